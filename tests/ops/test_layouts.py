"""Memory: dense layouts as they are, all others too, out= of any kind, nothing outside."""

from __future__ import annotations

import pytest
import torch

from diffcore import PhiloxNoise, ops
from diffcore._engine import execute
from support.bounds import assert_same_bits, check, each_case, each_dtype
from support.cases import BY_NAME, CASES, OpCase, as_tuple
from support.layouts import DENSE, EXPANDED, LAYOUTS, OTHER, SENTINEL, Layout

SHAPE = (3, 4, 5, 7)


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def assert_same(case: OpCase, found: object, wanted: object) -> None:
    """Same bits; sums only nearly so, because a layout is also an order."""
    for y, w in zip(as_tuple(found), as_tuple(wanted), strict=True):
        if y.ndim == len(SHAPE):
            assert_same_bits(y, w, case.name)


@each_case
@each_layout
def test_every_layout_gives_the_same_values(case: OpCase, layout: Layout, device: str) -> None:
    args = case.make((24, 4, 5, 7), torch.float32, device).map(layout)
    found = case.native(args)
    assert_same(case, found, case.native(args.map(lambda x: x.contiguous())))
    if layout not in EXPANDED.values():  # a bound needs many different numbers
        check(case, args, found)


@pytest.mark.parametrize("columns", [131, 784, 1000, 9001])
@each_dtype
def test_a_sum_has_the_same_bits_in_any_batch_and_at_any_address(
    columns: int, dtype: torch.dtype, device: str
) -> None:
    x, y = torch.randn(2, 3, columns).to(device, dtype)
    noise = PhiloxNoise(5)
    for sums in (
        lambda x, y, first: ops.normal_kl(x, y, y, x, reduction="sample"),
        lambda x, y, first: ops.denoising_loss(x, y, noise.for_samples(first)),
    ):
        together = sums(x, y, 0)
        for b in range(3):
            assert_same_bits(sums(x[b : b + 1], y[b : b + 1], b), together[b : b + 1])
        moved = [torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:] for _ in range(2)]
        moved = [m.view_as(x).copy_(t) for m, t in zip(moved, (x, y), strict=True)]
        assert_same_bits(sums(*moved, 0), together)


@each_case
def test_operands_of_different_layouts(case: OpCase, device: str) -> None:
    args = case.make(SHAPE, torch.float32, device)
    wanted = case.native(args)
    for shift in range(len(LAYOUTS) - len(EXPANDED)):
        layouts = list({**DENSE, **OTHER}.values())
        mixed = {
            name: layouts[(i * 3 + shift) % len(layouts)](x)
            for i, (name, x) in enumerate(args.tensors.items())
        }
        assert_same(case, case.op(**mixed, **args.options), wanted)


@each_case
@pytest.mark.parametrize("name", ["every other sample", "half of the channels"])
def test_samples_farther_apart_are_read_in_place(
    case: OpCase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if execute._C is None:
        pytest.skip("plain torch reads anything")
    args = case.make(SHAPE, torch.float32).map(OTHER[name])

    def careful(*_: object) -> None:
        raise AssertionError("a tensor is copied")

    wanted = case.native(args.map(lambda x: x.contiguous()))
    monkeypatch.setattr(execute, "_careful", careful)
    assert_same_bits(case.native(args), wanted, case.name)


@pytest.mark.parametrize("layout", DENSE.values(), ids=DENSE)
def test_dense_layouts_are_kept(layout: Layout, device: str) -> None:
    x0, noise = (layout(x) for x in torch.randn(2, *SHAPE, device=device))
    assert ops.add_noise(x0, noise, 0.8, 0.6).stride() == x0.stride()
    x0.requires_grad_()
    ops.add_noise(x0, noise, 0.8, 0.6).sum().backward()
    assert x0.grad is not None
    assert x0.grad.stride() == x0.stride()


@each_case
def test_gradients_of_channels_last_tensors(case: OpCase, device: str) -> None:
    args = case.make(SHAPE, torch.float32, device)
    grads = []
    for layout in (lambda x: x, DENSE["channels_last"]):
        leaves = args.map(lambda x, layout=layout: layout(x).detach().requires_grad_())
        outputs = as_tuple(case.native(leaves))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        grads.append([x.grad for x in leaves.tensors.values()])
    for plain, last in zip(*grads, strict=True):
        if plain is None:
            assert last is None
        else:
            assert_same_bits(last, plain)


WRITING = [case for case in CASES if case.out]
each_writing_case = pytest.mark.parametrize("case", WRITING, ids=lambda case: case.name)


@each_writing_case
@each_dtype
def test_out_is_written_and_returned(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = case.make(SHAPE, dtype, device)
    wanted = case.native(args)
    out = torch.full_like(wanted, SENTINEL)
    assert case.op(**args.tensors, **args.options, out=out) is out
    assert_same_bits(out, wanted)


@each_writing_case
@pytest.mark.parametrize("layout", [*DENSE.values(), *OTHER.values()], ids=[*DENSE, *OTHER])
def test_out_of_any_layout(case: OpCase, layout: Layout, device: str) -> None:
    args = case.make(SHAPE, torch.float32, device)
    out = layout(torch.full(SHAPE, SENTINEL, device=device))
    strides = out.stride()
    assert case.op(**args.tensors, **args.options, out=out) is out
    assert out.stride() == strides
    assert_same_bits(out, case.native(args))


@each_writing_case
@pytest.mark.parametrize("columns", [1, 3, 8, 15, 64, 65, 1023])
@each_dtype
def test_nothing_outside_out_is_written(
    case: OpCase, columns: int, dtype: torch.dtype, device: str
) -> None:
    args = case.make((3, columns), dtype, device)
    margin = 65
    buffer = torch.full((3 * columns + 2 * margin,), SENTINEL, dtype=dtype, device=device)
    out = buffer[margin:-margin].view(3, columns)
    case.op(**args.tensors, **args.options, out=out)
    assert_same_bits(out, case.native(args))
    assert (buffer[:margin] == SENTINEL).all()
    assert (buffer[-margin:] == SENTINEL).all()


@each_writing_case
def test_in_place(case: OpCase, device: str) -> None:
    for name in case.tensors:
        args = case.make((5, 1031), torch.float32, device)
        wanted = case.native(args)
        case.op(**args.tensors, **args.options, out=args.tensors[name])
        assert_same_bits(args.tensors[name], wanted, f"out={name}")


@each_writing_case
@pytest.mark.parametrize("shift", [-5, -1, 1, 2, 64])
def test_out_partly_over_an_input(case: OpCase, shift: int, device: str) -> None:
    for name in case.tensors:
        args = case.make((4, 257), torch.float32, device)
        wanted = case.native(args)
        n = 4 * 257
        buffer = torch.full((n + 128,), SENTINEL, device=device)
        laid = buffer[64 : 64 + n].view(4, 257)
        laid.copy_(args.tensors[name])
        args.tensors[name] = laid
        out = buffer[64 + shift : 64 + shift + n].view(4, 257)
        case.op(**args.tensors, **args.options, out=out)
        assert_same_bits(out, wanted, f"out over {name}")


def test_the_same_tensor_as_every_input(device: str) -> None:
    x = torch.randn(3, 37, device=device)
    assert_same_bits(ops.normal_kl(x, x, x, x), torch.zeros_like(x))
    assert_same_bits(ops.add_noise(x, x, 0.5, 0.25), ops.add_noise(x, x.clone(), 0.5, 0.25))


def test_a_negated_view_is_resolved(device: str) -> None:
    # complex.conj().imag is a float tensor whose memory holds the opposite sign.
    values = torch.randn(3, 5, dtype=torch.complex64, device=device)
    x, noise = values.conj().imag, torch.randn(3, 5, device=device)
    assert x.is_neg()
    wanted = ops.add_noise(-values.imag, noise, 0.8, 0.6)
    assert_same_bits(ops.add_noise(x, noise, 0.8, 0.6), wanted)
    assert_same_bits(
        ops.add_noise(noise, x, 0.6, 0.8), ops.add_noise(noise, -values.imag, 0.6, 0.8)
    )


def test_a_negated_coefficient_is_resolved(device: str) -> None:
    values = torch.randn(3, dtype=torch.complex64, device=device)
    x, noise = torch.randn(2, 3, 5, device=device)
    alpha = values.conj().imag
    assert alpha.is_neg()
    wanted = ops.add_noise(x, noise, -values.imag, 0.6)
    assert_same_bits(ops.add_noise(x, noise, alpha, 0.6), wanted)


def test_a_negated_upstream_gradient_is_resolved(device: str) -> None:
    values = torch.randn(3, dtype=torch.complex64, device=device)
    upstream = values.conj().imag
    grads = []
    for g in (upstream, -values.imag):
        mean = torch.ones(3, 5, device=device, requires_grad=True)
        kl = ops.standard_normal_kl(mean, torch.zeros(3, 5, device=device), reduction="sample")
        kl.backward(g)
        grads.append(mean.grad)
    assert_same_bits(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add_noise", "standard_normal_kl_sample"])
def test_more_than_2_to_the_31_elements(name: str, device: str) -> None:
    elements = 2**31 + 2**12 + 3
    if available_bytes(device) < 8 * elements:
        pytest.skip("not enough free memory")
    x = torch.zeros(1, elements, dtype=torch.bfloat16, device=device)
    places = [0, 1, 2**31 - 1, 2**31, 2**31 + 5, elements - 1]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.bfloat16, device=device)
    x[0, places] = values
    if name == "add_noise":
        y = ops.add_noise(x, x, 0.5, 0.25, out=x)
        assert y[0, places].tolist() == (0.75 * values).tolist()
        assert torch.count_nonzero(y[0, 2**31 :]) == 3
    else:
        kl = BY_NAME[name].op(x, x, reduction="sample")
        values = values.double()
        wanted = 0.5 * (values**2 + torch.expm1(values) - values).sum()
        torch.testing.assert_close(kl.double(), wanted[None], rtol=1e-6, atol=0)


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
