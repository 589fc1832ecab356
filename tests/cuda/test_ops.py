"""What only CUDA has: streams, graphs, no hidden waiting, many rows, agreement with the CPU.

Values, gradients, layouts and errors on CUDA are in the other files, whose tests take a device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import ops
from diffcore.testing import assert_within_bound
from support.bounds import LOW, assert_same_bits, check, each_case, each_dtype
from support.cases import BY_NAME, NOISE_TABLE, STEPS, OpCase, as_tuple, step_table, steps_of
from support.graphs import captured, run_with_gradients
from support.waiting import no_waiting

pytestmark = pytest.mark.cuda

SUMS = (
    "normal_kl_sample",
    "gaussian_nll_sample",
    "reparameterize_kl",
    "denoising_loss_v_prediction",
)


@each_case
@each_dtype
def test_the_cpu_and_cuda_agree(case: OpCase, dtype: torch.dtype) -> None:
    # Judged against each other with the CPU as eager: both are within the bound of the truth.
    args = case.make((19, 1031), dtype)
    on_cuda = args.to("cuda")
    check(case, args, run=lambda a: tuple(y.cpu() for y in as_tuple(case.native(on_cuda))))
    if dtype in LOW and case.elementwise and not case.has_exp:
        # Without exp the arithmetic is the same to the last rounding, if both contract alike.
        truth = case.truth(args.map(lambda x: x.double()))
        sides = (as_tuple(case.native(on_cuda)), as_tuple(case.native(args)), as_tuple(truth))
        for cuda, cpu, exact in zip(*sides, strict=True):
            assert_within_bound(cuda.cpu(), cpu, exact)


@each_case
@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 255, 257, 1023, 2049, 8191, 70_001])
def test_odd_columns(case: OpCase, columns: int) -> None:
    check(case, case.make((40 if columns < 5000 else 6, columns), torch.bfloat16, "cuda"))


@pytest.mark.parametrize("rows", [65_535, 65_536, 65_537, 300_001])
@pytest.mark.parametrize("name", ["q_sample", *SUMS])
def test_many_rows(name: str, rows: int) -> None:
    check(BY_NAME[name], BY_NAME[name].make((rows, 5), torch.float32, "cuda"))


@pytest.mark.parametrize("name", SUMS)
@each_dtype
def test_sums_are_the_same_every_time(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    for shape in ((3, 1_000_003), (700, 401), (70_000, 3)):
        args = case.make(shape, dtype, "cuda")
        first = as_tuple(case.native(args))
        for _ in range(5):
            assert_same_bits(as_tuple(case.native(args)), first, f"{shape}")


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_one_long_sum(reduction: str) -> None:
    mean, logvar = torch.randn(2, 3, 4_000_037, device="cuda")
    found = [ops.standard_normal_kl(mean, logvar, reduction=reduction) for _ in range(3)]
    wide = ops.standard_normal_kl(mean.double(), logvar.double(), reduction=reduction)
    naive = 0.5 * (mean**2 + torch.exp(logvar) - 1 - logvar)
    eager = naive.sum() / {"sum": 1, "mean": naive.numel(), "batchmean": 3}[reduction]
    assert_within_bound(found[0], eager, wide)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


# ---- streams ------------------------------------------------------------------------------------


@each_case
def test_on_a_side_stream(case: OpCase) -> None:
    args = case.make((33, 4097), torch.float32, "cuda")
    wanted = run_with_gradients(case, args.tensors, args.options)
    late = {name: torch.empty_like(x) for name, x in args.tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # an op on any other stream would run before the inputs exist
        for name, x in args.tensors.items():
            late[name].copy_(x)
        found = run_with_gradients(case, late, args.options)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert_same_bits(found, wanted)


@each_case
def test_no_op_waits_for_the_device(case: OpCase) -> None:
    args = case.make((8, 129), torch.float32, "cuda")
    diffcore.warm_up()
    torch.cuda.synchronize()
    with no_waiting():
        run_with_gradients(case, args.tensors, args.options)


def test_memory_of_a_temporary_is_not_reused_too_early() -> None:
    # Sums over long rows have a workspace, freed when the call returns, before the kernel has run.
    mean, logvar = torch.randn(2, 2, 3_000_017, device="cuda")
    wanted = ops.standard_normal_kl(mean, logvar, reduction="sample")
    found = []
    for _ in range(50):
        found.append(ops.standard_normal_kl(mean, logvar, reduction="sample"))
        torch.full((4096,), 1e30, dtype=torch.float64, device="cuda")
    for y in found:
        assert_same_bits(y, wanted)


# ---- graphs -------------------------------------------------------------------------------------


@each_case
def test_capture_and_replay(case: OpCase) -> None:
    args = case.make((9, 20_003), torch.float32, "cuda")
    graph, found = captured(lambda: run_with_gradients(case, args.tensors, args.options))
    for seed in (1, 2):
        fresh = case.make((9, 20_003), torch.float32, "cuda", seed=seed)
        for name, x in fresh.tensors.items():
            args.tensors[name].copy_(x)
        graph.replay()
        assert_same_bits(found, run_with_gradients(case, fresh.tensors, fresh.options))


def test_a_loop_in_a_graph_steps_by_a_device_counter() -> None:
    rows = step_table().cuda()
    x0, m = torch.randn(2, 4, 1000, device="cuda")
    x, counter = x0.clone(), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        ops.reverse_step(x, m, rows, t=counter, out=x)
        counter.add_(1)

    graph, _ = captured(step)
    x.copy_(x0)
    counter.zero_()
    wanted = x0.clone()
    for t in range(STEPS):
        graph.replay()
        wanted = ops.reverse_step(wanted, m, rows, t=t)
    assert_same_bits(x, wanted)
    assert int(counter) == STEPS


def test_cold_kernels_can_be_captured() -> None:
    diffcore.warm_up()
    x = torch.randn(4, 1000, dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.gaussian_nll(x, x, x, reduction="sample")
    graph.replay()
    assert_same_bits(y, ops.gaussian_nll(x, x, x, reduction="sample"))


# ---- coefficients, steps, memory ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_steps_out_of_range_are_clamped(dtype: torch.dtype) -> None:
    if diffcore._engine.native.DEBUG:
        pytest.skip("DIFFCORE_DEBUG=1 checks them")
    x, noise = torch.randn(2, 6, 50, device="cuda")
    table = NOISE_TABLE.cuda()
    huge = 2**40 if dtype == torch.int64 else 2**31 - 1
    wild = torch.tensor([-1, -huge, 0, STEPS - 1, STEPS, huge], dtype=dtype, device="cuda")
    tame = wild.clamp(0, STEPS - 1)
    assert_same_bits(ops.q_sample(x, wild, noise, table), ops.q_sample(x, tame, noise, table))
    with pytest.raises(ValueError, match=r"^t must"):
        ops.q_sample(x, STEPS, noise, table)


def test_a_number_on_the_cpu_is_no_matter() -> None:
    x, noise = torch.randn(2, 6, 50, device="cuda")
    alpha = torch.tensor(0.8, dtype=torch.float64)
    assert_same_bits(ops.add_noise(x, noise, alpha, 0.6), ops.add_noise(x, noise, 0.8, 0.6))
    with pytest.raises(ValueError, match=r"alpha must be on .* got cpu"):
        ops.add_noise(x, noise, torch.rand(6), 0.6)
    with pytest.raises(ValueError, match=r"t must be on .* got cpu"):
        ops.q_sample(x, steps_of(6), noise, NOISE_TABLE.cuda())
    with pytest.raises(ValueError, match="noise must have the device of x0"):
        ops.add_noise(x, noise.cpu(), 0.8, 0.6)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 8])
@each_dtype
def test_unaligned_views(offset: int, dtype: torch.dtype) -> None:
    case = BY_NAME["ddpm_step_guided"]
    args = case.make((1, 4099), dtype, "cuda")
    wanted = case.native(args)

    def shifted(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 16,), 77.0, dtype=dtype, device="cuda")
        view = buffer[offset : offset + x.numel()].view(x.shape)
        return view.copy_(x)

    assert_same_bits(case.native(args.map(shifted)), wanted)
    buffer = torch.full((4099 + 64,), 77.0, dtype=dtype, device="cuda")
    out = buffer[16 + offset : 16 + offset + 4099].view(1, 4099)
    case.op(**args.tensors, **args.options, out=out)
    assert_same_bits(out, wanted)
    assert (buffer[: 16 + offset] == 77).all()
    assert (buffer[16 + offset + 4099 :] == 77).all()


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    case = BY_NAME["ddpm_step"]
    args = case.make((7, 301), torch.float32)
    wanted = case.native(args.to("cuda:0")).cpu()
    assert_same_bits(case.native(args.to("cuda:1")).cpu(), wanted)
    assert torch.cuda.current_device() == 0


def test_pinned_memory_is_cpu_memory() -> None:
    x, noise = torch.randn(2, 6, 50)
    pinned = [y.pin_memory() for y in (x, noise)]
    assert_same_bits(ops.add_noise(*pinned, 0.8, 0.6), ops.add_noise(x, noise, 0.8, 0.6))


@pytest.mark.parametrize("name", ["q_sample", "normal_kl_sample"])
def test_compile_on_cuda(name: str) -> None:
    case = BY_NAME[name]
    args = case.make((5, 4, 8, 8), torch.float32, "cuda")
    compiled = torch.compile(lambda tensors: case.op(**tensors, **args.options), fullgraph=True)
    assert_same_bits(compiled(args.tensors), case.native(args))
