"""An op gives the same bits for a noise key and for the tensor that it stands for.

Outputs, sums and gradients; in every shape, dtype, layout, and by every route through torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from diffcore import PhiloxNoise, ops
from diffcore._engine import dispatch, execute, kernel, native
from support.bounds import (
    assert_law,
    assert_same_bits,
    check,
    each_dtype,
    outputs_and_gradients,
    with_noise,
)
from support.cases import BY_NAME, NOISED, Arguments, OpCase, as_tuple, without_kernels
from support.layouts import DENSE, LAYOUTS, OTHER, Layout, inside

KEY = PhiloxNoise(2**63 + 5, sample_ids=2**32 - 2, stream=9, first_element=64)

each_noised_case = pytest.mark.parametrize("case", NOISED, ids=lambda case: case.name)
needs_module = pytest.mark.skipif(native._C is None, reason="needs the compiled module")

# As in test_noise_bits: about what a draw, a tile, a chunk holds; short rows, many and few.
SHAPES = (
    *((), (5,), (0, 5), (5, 0), (4, 1), (37, 3), (40, 9), (3, 63), (3, 64), (3, 65)),
    *((2, 2047), (2, 2049), (2, 8193), (2, 3, 4, 5)),
)


def assert_law_with_gradients(
    case: OpCase,
    args: Arguments,
    key: PhiloxNoise,
    run: Callable[..., Any] | None = None,
) -> None:
    like = args.tensors["noise"]
    noise = key.tensor(like.shape, dtype=like.dtype, device=like.device)
    drawn = outputs_and_gradients(case, run or case.native, args, key)
    read = outputs_and_gradients(case, case.native, args, noise)
    assert_same_bits(drawn, read, case.name)


# ---- values and gradients -----------------------------------------------------------------------


@each_noised_case
@each_dtype
def test_values_are_those_of_the_noise_as_a_tensor(
    case: OpCase, dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES:
        assert_law(case, case.make(shape, dtype, device), KEY)


@each_noised_case
@each_dtype
def test_gradients_are_those_of_the_noise_as_a_tensor(
    case: OpCase, dtype: torch.dtype, device: str
) -> None:
    for shape in ((), (5,), (37, 3), (5, 65), (2, 2049), (2, 3, 4, 5)):
        assert_law_with_gradients(case, case.make(shape, dtype, device), KEY)


@each_noised_case
def test_every_form_of_key(case: OpCase, device: str) -> None:
    ids = torch.tensor([3, -1, 2**40, 0, 3], device=device)
    parts = torch.tensor([7, 2], device=device)
    for key in (
        PhiloxNoise(-1),
        PhiloxNoise(parts[0], sample_ids=ids, stream=parts[:1]),
        PhiloxNoise(parts, sample_ids=ids[1]),
        PhiloxNoise(3, sample_ids=ids[:1].expand(5), stream=parts[1]),
    ):
        assert_law_with_gradients(case, case.make((5, 33), torch.float32, device), key)


@each_noised_case
@each_dtype
def test_without_kernels(case: OpCase, dtype: torch.dtype) -> None:
    args = case.make((41, 33), dtype)
    with without_kernels():
        assert_law_with_gradients(case, args, KEY)
    # The noise is the same to the bit; the ops themselves agree to the bound.
    read = with_noise(args, KEY.tensor((41, 33), dtype=dtype))
    check(case, read, case.reference(with_noise(args, KEY)))


def test_the_draw_is_rounded_to_the_dtype(device: str) -> None:
    """A noise of more digits than a tensor would hold, or of fewer, is another one."""
    wide = KEY.tensor((5, 33), device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        zero = torch.zeros(5, 33, dtype=dtype, device=device)
        assert_same_bits(ops.add_noise(zero, KEY, 1.0, 1.0), wide.to(dtype) + zero)
        # 3 times the rounded number, rounded; not 3 times the number
        rounded = (3 * wide.to(dtype).double()).to(dtype)
        assert_same_bits(ops.add_noise(zero, KEY, 1.0, 3.0), rounded + zero)


# ---- memory -------------------------------------------------------------------------------------


@each_noised_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(case: OpCase, layout: Layout, device: str) -> None:
    args = case.make((3, 4, 5, 7), torch.float32, device).map(layout)
    assert_law(case, args, KEY)
    if layout in DENSE.values():
        assert_law_with_gradients(case, args.map(torch.Tensor.bfloat16), KEY)


@each_noised_case
def test_every_order_of_dimensions(case: OpCase, device: str) -> None:
    for order in itertools.permutations(range(1, 4)):
        args = case.make((6, 3, 66, 9), torch.float32, device)
        laid = args.map(lambda x, o=order: inside(x, 0, (0, *o)))
        assert_law(case, laid, KEY)


@pytest.mark.parametrize("case", [c for c in NOISED if c.out], ids=lambda case: case.name)
@each_dtype
def test_out_of_any_layout(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = with_noise(case.make((3, 4, 5, 7), dtype, device), KEY)
    wanted = case.native(args)
    for name, layout in {**DENSE, **OTHER}.items():
        out = layout(torch.full((3, 4, 5, 7), 77.0, dtype=dtype, device=device))
        assert case.op(**args.tensors, **args.options, out=out) is out
        assert_same_bits(out, wanted, name)
    for name in args.tensors.keys() - {"noise"}:
        copy = args.tensors[name].clone()
        case.op(**{**args.tensors, name: copy}, **args.options, out=copy)
        assert_same_bits(copy, wanted, f"in place of {name}")


def test_out_partly_over_an_input(device: str) -> None:
    for shift in (-5, 1, 64):
        buffer = torch.randn(4 * 257 + 128, device=device)
        x = buffer[64:-64].view(4, 257)
        wanted = ops.add_noise(x, KEY, 0.8, 0.6)
        out = buffer[64 + shift : 64 + shift + 4 * 257].view(4, 257)
        assert_same_bits(ops.add_noise(x, KEY, 0.8, 0.6, out=out), wanted)


# ---- routes through torch -----------------------------------------------------------------------


def operator(case: OpCase, args: Arguments) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_compiling", lambda: True)
        return case.native(args)


def function_mode(case: OpCase, args: Arguments) -> Any:
    with torch.device("cpu"):
        return case.native(args)


class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def dispatch_mode(case: OpCase, args: Arguments) -> Any:
    with Seeing():
        return case.native(args)


def checkpointed(case: OpCase, args: Arguments, reentrant: bool = False) -> Any:
    """The op under checkpoint, its tensors being checkpoint's own arguments."""
    tensors = {n: x for n, x in args.tensors.items() if isinstance(x, Tensor)}

    def f(*found: Tensor) -> Any:
        return case.native(
            Arguments({**args.tensors, **dict(zip(tensors, found, strict=True))}, args.options)
        )

    return checkpoint(f, *tensors.values(), use_reentrant=reentrant)


def reentrant(case: OpCase, args: Arguments) -> Any:
    return checkpointed(case, args, reentrant=True)


def compiled(case: OpCase, args: Arguments) -> Any:
    torch._dynamo.reset()
    run = torch.compile(lambda: case.native(args), fullgraph=True, backend="aot_eager")
    return run()


# One case of each kernel that draws.
KERNELS = (
    *("q_sample", "q_sample_target", "reverse_step", "ddpm_step_guided", "reparameterize"),
    *("reparameterize_kl", "denoising_loss_epsilon", "denoising_loss_v_prediction"),
)
each_kernel = pytest.mark.parametrize("name", KERNELS)
ROUTES = (operator, function_mode, dispatch_mode, checkpointed, reentrant, compiled)


@needs_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_kernel
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_every_route(name: str, route: Callable[..., Any]) -> None:
    case = BY_NAME[name]
    args = case.make((3, 37), torch.float32)
    key = PhiloxNoise(torch.tensor([5, 1]), sample_ids=torch.tensor([9, -1, 4]), stream=2)
    for noise in (key,) if route is compiled else (KEY, key):
        assert_law_with_gradients(case, args, noise, lambda a: route(case, a))


@needs_module
@each_kernel
def test_tracing(name: str) -> None:
    case = BY_NAME[name]
    args = with_noise(case.make((3, 37), torch.float32), KEY)
    names = [n for n in case.tensors if n != "noise"]

    def f(*tensors: Tensor) -> Any:
        found = {**args.tensors, **dict(zip(names, tensors, strict=True))}
        return case.native(Arguments(found, args.options))

    tensors = [args.tensors[n] for n in names]
    traced = make_fx(f)(*tensors)
    assert any("_generated" in str(n.target) for n in traced.graph.nodes)
    assert_same_bits(traced(*tensors), f(*tensors))


@each_kernel
def test_vmap(name: str) -> None:
    """A noise key whose ids are mapped over: each call has the noise of its id."""
    case = BY_NAME[name]
    samples = [case.make((1, 7), torch.float64, seed=i) for i in range(4)]
    options = samples[0].options
    names = [n for n in case.tensors if n != "noise"]
    ids = torch.tensor([7, 2**33, -1, 0])

    def f(sample_id: Tensor, *tensors: Tensor) -> Any:
        noise = KEY.for_samples(sample_id)
        return case.op(**dict(zip(names, tensors, strict=True)), noise=noise, **options)

    tensors = [torch.stack([s.tensors[n] for s in samples]) for n in names]
    found = as_tuple(torch.vmap(f)(ids, *tensors))
    for i in range(4):
        args = with_noise(
            Arguments({n: x[i] for n, x in zip(names, tensors, strict=True)}, options),
            KEY.for_samples(int(ids[i])).tensor((1, 7), dtype=torch.float64),
        )
        for y, w in zip(found, as_tuple(case.native(args)), strict=True):
            torch.testing.assert_close(y[i], w)


@each_kernel
def test_forward_mode_and_second_derivatives(name: str) -> None:
    case = BY_NAME[name]
    args = case.make((2, 3), torch.float64)
    names = [n for n in case.differentiable if n != "noise"]

    def f(*tensors: Tensor) -> Any:
        found = {**args.tensors, **dict(zip(names, tensors, strict=True)), "noise": KEY}
        return case.op(**found, **args.options)

    tensors = tuple(args.tensors[n].requires_grad_() for n in names)
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, tensors)


# ---- noise of torch's generator -----------------------------------------------------------------


def gradients_of_default_noise(run: Callable[..., Any]) -> tuple[Tensor, ...]:
    """z, and the gradients of z.sum() + kl.sum(), where no noise is given."""
    mean = torch.linspace(-1, 1, 111, dtype=torch.float64).view(3, 37).requires_grad_()
    logvar = torch.linspace(1, -2, 111, dtype=torch.float64).view(3, 37).requires_grad_()
    torch.manual_seed(3)
    z, kl = run(mean, logvar)
    (z.sum() + kl.sum()).backward()
    assert mean.grad is not None
    assert logvar.grad is not None
    # dz / dlogvar is half of what was added to the mean: the same noise, or there is no such luck
    of_z = 0.5 * (z - mean).detach()
    of_kl = 0.5 * logvar.detach().expm1()
    torch.testing.assert_close(logvar.grad, of_z + of_kl)
    return z.detach(), mean.grad, logvar.grad


@needs_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_default_noise_under_compile(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(ops.reparameterize_kl, fullgraph=True, backend=backend)
    found = gradients_of_default_noise(run)
    if backend == "aot_eager":  # inductor has a generator of its own
        assert_same_bits(found, gradients_of_default_noise(ops.reparameterize_kl))
    again, once_more = (gradients_of_default_noise(run)[0] for _ in range(2))
    assert_same_bits(again, once_more)
    first, second = (run(*torch.zeros(2, 3, 37, dtype=torch.float64))[0] for _ in range(2))
    assert not torch.isclose(first, second, rtol=0, atol=1e-6).any()


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_default_noise_under_checkpoint(reentrant: bool) -> None:
    plain = gradients_of_default_noise(ops.reparameterize_kl)

    def run(mean: Tensor, logvar: Tensor) -> Any:
        return checkpoint(ops.reparameterize_kl, mean, logvar, use_reentrant=reentrant)

    assert_same_bits(gradients_of_default_noise(run), plain)


@pytest.mark.parametrize("op", [ops.reparameterize, ops.reparameterize_kl])
@pytest.mark.parametrize("part", ["seed", "sample_ids", "stream"])
def test_changing_a_part_before_the_backward_draws_again_is_noticed(
    op: Callable[..., Any], part: str, device: str
) -> None:
    value = torch.tensor([3, 4] if part == "sample_ids" else 3, device=device)
    key = PhiloxNoise(**{"seed": 1, part: value})
    mean, logvar = torch.randn(2, 2, 5, device=device)
    z = as_tuple(op(mean, logvar.requires_grad_(), key))[0]
    value.add_(1)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        z.sum().backward()


@pytest.mark.skipif(native._C is None, reason="needs the compiled module")
def test_a_refusal_to_generate_noise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Samples interleaved in memory: the noise is generated first, by a launch of its own.
    x = torch.randn(6, 4).t()
    real, refused = execute._C, []

    class Refusing:
        def call(self, index: int, *arguments: Any) -> Any:
            if index == kernel.RANDN_INDEX:
                refused.append(index)
                return real.call(index, *arguments[:-1], None)  # without a noise key
            return real.call(index, *arguments)

    monkeypatch.setattr(execute, "_C", Refusing())
    with pytest.raises(RuntimeError, match="randn"):
        ops.add_noise(x, PhiloxNoise(1), 0.8, 0.6)
    assert refused
