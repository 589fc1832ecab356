"""Noise keys on CUDA: the CPU's bits, new noise at each replay, nothing waits or is kept.

The tests of noise and losses that take a device run there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops
from support.bounds import assert_law, assert_same_bits, each_dtype, with_noise
from support.cases import NOISE_TABLE, NOISED, OpCase, step_table, steps_of
from support.graphs import captured, run_with_gradients
from support.waiting import no_waiting

pytestmark = pytest.mark.cuda

KEY = PhiloxNoise(2**63 + 5, sample_ids=2**32 - 2, stream=9, first_element=64)
SHAPES = (
    (),
    (1,),
    (7,),
    (300_001, 5),
    (65_537, 16),
    (3, 1_000_003),
    (5, 3, 255, 257),
    (2, 70, 9, 9),
)

each_noised_case = pytest.mark.parametrize("case", NOISED, ids=lambda case: case.name)


# ---- the CPU's bits -----------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_and_cuda_draw_the_same(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    on_cpu = KEY.tensor(shape, dtype=dtype)
    assert_same_bits(KEY.tensor(shape, dtype=dtype, device="cuda"), on_cpu)
    if len(shape) == 4:
        out = torch.empty_like(on_cpu, device="cuda", memory_format=torch.channels_last)
        assert_same_bits(ops.randn(shape, KEY, out=out), on_cpu)
    if shape:
        ids = torch.randint(-(2**63), 2**63 - 1, shape[:1])
        there = KEY.for_samples(ids.cuda()).tensor(shape, dtype=dtype)
        assert_same_bits(there, KEY.for_samples(ids).tensor(shape, dtype=dtype))


@each_dtype
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_unaligned_outputs(offset: int, dtype: torch.dtype) -> None:
    for shape in ((1, 4099), (3, 4096), (37, 5)):
        wanted = KEY.tensor(shape, dtype=dtype)
        buffer = torch.full((wanted.numel() + 64,), 77.0, dtype=dtype, device="cuda")
        out = buffer[16 + offset : 16 + offset + wanted.numel()].view(shape)
        assert_same_bits(ops.randn(shape, KEY, out=out), wanted)
        assert (buffer[: 16 + offset] == 77).all()
        assert (buffer[16 + offset + wanted.numel() :] == 77).all()


@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 255, 257, 1023, 2049, 8191, 70_001])
@each_noised_case
def test_odd_columns(case: OpCase, columns: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = case.make((40 if columns < 5000 else 6, columns), dtype, "cuda")
        assert_law(case, args, KEY)


def test_more_than_2_to_the_31_elements() -> None:
    elements = 2**31 + 2**12 + 4
    if torch.cuda.mem_get_info()[0] < 4 * elements:
        pytest.skip("not enough free memory")
    z = PhiloxNoise(3).tensor((1, elements), dtype=torch.bfloat16, device="cuda")
    for first in (0, 2**31 - 64, elements - 2048):
        shard = PhiloxNoise(3, first_element=first).tensor((1, 64), dtype=torch.bfloat16)
        assert_same_bits(z[:, first : first + 64], shard)


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    assert_same_bits(KEY.tensor((7, 301), device="cuda:1"), KEY.tensor((7, 301)))
    with pytest.raises(ValueError, match=r"seed must be on .* got cuda:0"):
        PhiloxNoise(torch.tensor(3, device="cuda:0")).tensor((7, 301), device="cuda:1")


# ---- seeds of torch's generators ----------------------------------------------------------------


def test_cudas_generator_governs() -> None:
    torch.manual_seed(3)
    key = PhiloxNoise.from_generator(device="cuda")
    assert isinstance(key.seed, Tensor)
    assert key.seed.device.type == "cuda"
    torch.manual_seed(3)
    assert PhiloxNoise.from_generator(device="cuda") == key
    assert PhiloxNoise.from_generator(device="cuda") != key
    generator = torch.Generator("cuda").manual_seed(3)
    assert PhiloxNoise.from_generator(generator) == key


def test_a_generator_on_the_cpu_gives_the_same_noise_everywhere() -> None:
    def noise(device: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        key = PhiloxNoise.from_generator(generator, device=device)
        return key.tensor((3, 5), device=device)

    assert_same_bits(noise("cuda"), noise("cpu"))


# ---- no waiting, no memory ----------------------------------------------------------------------


@each_noised_case
def test_no_key_waits_for_the_device(case: OpCase) -> None:
    args = case.make((8, 129), torch.float32, "cuda")
    parts = torch.arange(8, device="cuda")
    diffcore.warm_up()
    torch.cuda.synchronize()
    with no_waiting():
        for key in (
            KEY,
            PhiloxNoise(parts[:2], sample_ids=parts, stream=parts[3]),
            PhiloxNoise.from_generator(device="cuda").at(parts[:1]).for_samples(parts[1]),
        ):
            tensors = {n: x for n, x in args.tensors.items() if n != "noise"}
            run_with_gradients(case, tensors, {**args.options, "noise": key})


def test_default_noise_does_not_wait() -> None:
    mean, logvar = torch.randn(2, 8, 129, device="cuda", requires_grad=True)
    diffcore.warm_up()
    torch.cuda.synchronize()
    with no_waiting():
        z, kl = ops.reparameterize_kl(mean, logvar)
        torch.autograd.grad(z.sum() + kl.sum(), (mean, logvar))


def test_the_noise_is_never_stored() -> None:
    x0, m = torch.randn(2, 4, 1_000_000, device="cuda")
    m.requires_grad_()
    loss = ops.denoising_loss(m, x0, KEY)  # once, for the kernels' own memory
    torch.autograd.grad(loss.mean(), m)

    def most(f: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept.append(f())
        return torch.cuda.max_memory_allocated() - before

    kept: list[Any] = []
    slack = x0.nbytes // 10
    assert most(lambda: ops.add_noise(x0, KEY, 0.8, 0.6)) < x0.nbytes + slack
    assert most(lambda: ops.denoising_loss(m.detach(), x0, KEY)) < slack
    assert most(lambda: ops.denoising_loss(m, x0, KEY)) < x0.nbytes + slack
    loss = kept[-1]
    made = loss.grad_fn.saved_tensors[-1].data_ptr()
    assert most(lambda: torch.autograd.grad(loss.sum(), m)[0]) < slack
    assert kept[-1].data_ptr() == made


# ---- graphs -------------------------------------------------------------------------------------


@each_noised_case
def test_a_replay_reads_the_key_again(case: OpCase) -> None:
    args = case.make((9, 2003), torch.float32, "cuda")
    seed = torch.tensor([5, 0], device="cuda")
    ids, stream = torch.arange(9, device="cuda"), torch.tensor(2, device="cuda")
    key = PhiloxNoise(seed, sample_ids=ids, stream=stream)
    tensors = {n: x for n, x in args.tensors.items() if n != "noise"}
    options = {**args.options, "noise": key}
    graph, found = captured(lambda: run_with_gradients(case, tensors, options))
    for value in (1, -(2**40)):
        seed[0].fill_(value)
        seed[1].fill_(value % 7)
        ids.add_(value)
        stream.fill_(value % 5)
        graph.replay()
        assert_same_bits(found, run_with_gradients(case, tensors, options))


def test_a_sampler_in_a_graph_advances_its_stream() -> None:
    rows = step_table().cuda()
    x0, m = torch.randn(2, 4, 1000, device="cuda")
    x, t, stream = x0.clone(), *(torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))

    def step() -> None:
        ops.reverse_step(x, m, rows, t=t, noise=PhiloxNoise(3).at(stream), out=x)
        t.add_(1)
        stream.add_(1)

    graph, _ = captured(step)
    x.copy_(x0)
    t.zero_()
    stream.fill_(2**32 - 3)  # and over the end of its 32 bits
    wanted = x0.clone()
    for i in range(10):
        graph.replay()
        noise = PhiloxNoise(3, stream=(2**32 - 3 + i) % 2**32)
        wanted = ops.reverse_step(wanted, m, rows, t=i, noise=noise)
    assert_same_bits(x, wanted)


def test_default_noise_in_a_graph_is_new_at_each_replay() -> None:
    mean, logvar = torch.randn(2, 4, 1000, device="cuda")
    graph, (z, _) = captured(lambda: ops.reparameterize_kl(mean, logvar))
    found = []
    for seed in (3, 3, 4):
        torch.cuda.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            found.append(z.clone())
    assert_same_bits(tuple(found[:2]), tuple(found[2:4]))
    for other in (found[1], found[4]):
        assert not torch.isclose(found[0], other, rtol=0, atol=1e-6).all(1).any()


def test_a_training_step_in_a_graph() -> None:
    x0, m = torch.randn(2, 6, 2003, device="cuda")
    table, t = NOISE_TABLE.cuda(), steps_of(6).cuda()
    seed = torch.tensor(5, device="cuda")
    m.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        noise = PhiloxNoise(seed)
        x_t = ops.q_sample(x0, t, noise, table)
        loss = ops.denoising_loss(m, x0, noise, weight=table[:, 1], t=t)
        return x_t, loss.detach(), *torch.autograd.grad(loss.mean(), m)

    graph, found = captured(step)
    for value in (1, 2**40):
        seed.fill_(value)
        graph.replay()
        assert_same_bits(found, step())


# ---- streams and compilers ----------------------------------------------------------------------


@each_noised_case
def test_on_a_side_stream(case: OpCase) -> None:
    args = case.make((33, 4097), torch.float32, "cuda")
    tensors = {n: x for n, x in args.tensors.items() if n != "noise"}
    seed = torch.tensor(5, device="cuda")
    wanted = run_with_gradients(case, tensors, {**args.options, "noise": PhiloxNoise(6)})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on any other stream the seed would still be the old one
        seed.add_(1)
        found = run_with_gradients(case, tensors, {**args.options, "noise": PhiloxNoise(seed)})
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("name", ["q_sample", "reparameterize_kl", "denoising_loss_v_prediction"])
def test_compile_on_cuda(name: str) -> None:
    case = next(c for c in NOISED if c.name == name)
    args = case.make((5, 4, 8, 8), torch.float32, "cuda")
    seed = torch.tensor(5, device="cuda")

    def f(seed: Tensor) -> Any:
        return case.op(**{**args.tensors, "noise": PhiloxNoise(seed)}, **args.options)

    compiled = torch.compile(f, fullgraph=True)
    for value in (5, -1):
        seed.fill_(value)
        assert_same_bits(compiled(seed), case.native(with_noise(args, PhiloxNoise(value))))
