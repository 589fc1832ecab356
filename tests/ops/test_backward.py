"""Gradients: numerically in float64 on the native kernels; in lower dtypes against the bound."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine import autograd, dispatch, execute
from diffcore.testing import assert_within_bound
from support.bounds import assert_same_bits, each_16_bit, each_case, each_dtype, each_low_dtype
from support.cases import (
    BY_NAME,
    CASES,
    LOSSES,
    NOISE_TABLE,
    Arguments,
    OpCase,
    as_tuple,
    step_table,
    steps_of,
    without_kernels,
)

GAUSSIANS = [
    "normal_kl",
    "standard_normal_kl",
    "gaussian_nll",
    "discretized_gaussian_log_likelihood",
]


def gradients(
    case: OpCase, run: Any, args: Arguments, upstream: list[Tensor], needs: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The gradients of `run` in the tensors `needs` names (every differentiable one by default)."""
    needs = needs or case.differentiable
    leaves = {n: x.detach().requires_grad_(n in needs) for n, x in args.tensors.items()}
    outputs = as_tuple(run(Arguments(leaves, args.options)))
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    # An output that is the model output itself has no use for x_t, say: no gradient is a zero one.
    return {
        n: torch.zeros_like(x) if x.grad is None else x.grad
        for n, x in leaves.items()
        if n in needs
    }


def upstream_of(case: OpCase, args: Arguments) -> list[Tensor]:
    """A random gradient for each output, in the dtype of the output."""
    generator = torch.Generator().manual_seed(5)
    outputs = as_tuple(case.native(args))
    return [torch.randn(y.shape, generator=generator).to(y) for y in outputs]


def functional(case: OpCase, args: Arguments) -> tuple[Any, tuple[Tensor, ...]]:
    """The op as a function of its tensors alone, and those tensors, as gradcheck takes them."""
    names = list(args.tensors)

    def f(*tensors: Tensor) -> Any:
        return case.op(**dict(zip(names, tensors, strict=True)), **args.options)

    return f, tuple(x.requires_grad_(n in case.differentiable) for n, x in args.tensors.items())


@each_case
def test_gradcheck(case: OpCase, device: str) -> None:
    f, tensors = functional(case, case.make((2, 3), torch.float64, device))
    assert torch.autograd.gradcheck(f, tensors)


@each_case
def test_gradgradcheck(case: OpCase, device: str) -> None:
    f, tensors = functional(case, case.make((2, 2), torch.float64, device))
    assert torch.autograd.gradgradcheck(f, tensors)


@each_case
@each_low_dtype
def test_gradients_are_within_the_bound(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = case.make((41, 131), dtype, device)
    upstream = upstream_of(case, args)
    wide = args.map(lambda x: x.double())
    found, eager, truth = (
        gradients(case, run, a, upstream)
        for run, a in ((case.native, args), (case.eager, args), (case.eager, wide))
    )
    for name, g in found.items():
        assert g.dtype == dtype
        assert_within_bound(g, eager[name], truth[name], name=f"gradient in {name}")


@each_case
@each_low_dtype
def test_gradients_without_kernels_are_within_the_bound(case: OpCase, dtype: torch.dtype) -> None:
    args = case.make((41, 31), dtype)
    upstream = upstream_of(case, args)
    wide = args.map(lambda x: x.double())
    eager, truth = (gradients(case, case.eager, a, upstream) for a in (args, wide))
    with without_kernels():
        found = gradients(case, case.native, args, upstream)
        f, tensors = functional(case, case.make((2, 2), torch.float64))
        assert torch.autograd.gradgradcheck(f, tensors)
    for name, g in found.items():
        assert_within_bound(g, eager[name], truth[name], name=f"gradient in {name}")


@pytest.mark.parametrize("case", [c for c in CASES if c not in LOSSES], ids=lambda c: c.name)
@each_16_bit
def test_16_bit_gradients_are_float32_gradients_rounded_once(
    case: OpCase, dtype: torch.dtype
) -> None:
    args = case.make((5, 1031), dtype)
    upstream = upstream_of(case, args)
    found = gradients(case, case.native, args, upstream)
    wide = gradients(case, case.native, args.map(lambda x: x.float()), upstream)
    for name, g in found.items():
        assert_same_bits(g, wide[name].to(dtype), name)


# A loss keeps its gradient in the dtype of the tensors until the upstream one comes. It is rounded
# again only where that changes it by more than a power of two; then the bound holds, as everywhere.
@pytest.mark.parametrize("case", LOSSES, ids=lambda c: c.name)
@pytest.mark.parametrize("scale", [1, 2**11], ids=["mean", "scaled mean"])
def test_bfloat16_gradients_of_a_mean_loss_are_rounded_once(case: OpCase, scale: int) -> None:
    args = case.make((5, 1031), torch.bfloat16)
    found = gradient_of_mean(case, args, scale)
    wide = gradient_of_mean(case, args.map(lambda x: x.float()), scale)
    assert_same_bits(found, wide.bfloat16())


@pytest.mark.parametrize("case", LOSSES, ids=lambda c: c.name)
def test_float16_gradients_of_an_unweighted_loss_are_rounded_once(case: OpCase) -> None:
    args = case.make((4, 1024), torch.float16)
    args.options.pop("t", None)
    args.options["weight"] = 2.0  # and 4 · 1024 elements: all factors are powers of two
    if "delta" in args.options:
        args.options["delta"] = 0.7
    found = gradient_of_mean(case, args, 2**11)
    wide = gradient_of_mean(case, args.map(lambda x: x.float()), 2**11)
    assert_same_bits(found, wide.half())


def gradient_of_mean(case: OpCase, args: Arguments, scale: float) -> Tensor:
    m = args.tensors["model_output"].detach().requires_grad_()
    (case.op(**{**args.tensors, "model_output": m}, **args.options).mean() * scale).backward()
    assert m.grad is not None
    return m.grad


@each_case
def test_any_subset_of_gradients_is_the_same(case: OpCase, device: str) -> None:
    args = case.make((3, 67), torch.float32, device)
    upstream = upstream_of(case, args)
    every = gradients(case, case.native, args, upstream)
    for size in range(1, len(every)):
        for needs in itertools.combinations(every, size):
            for name, g in gradients(case, case.native, args, upstream, needs).items():
                assert_same_bits(g, every[name], f"{name} of {needs}")


def test_gradients_come_from_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("went through the reference")

    for module in (dispatch, execute, autograd):
        monkeypatch.setattr(module, "run_reference", refuse)
    for case in BY_NAME.values():
        args = case.make((3, 5), torch.float32)
        gradients(case, case.native, args, upstream_of(case, args))


@pytest.mark.parametrize("reduction", ["sample", "batchmean", "mean", "sum"])
@pytest.mark.parametrize("name", GAUSSIANS)
@each_low_dtype
def test_gradients_of_reductions(
    name: str, reduction: str, dtype: torch.dtype, device: str
) -> None:
    case = BY_NAME[name]
    args = case.make((9, 4, 41), dtype, device)
    args.options["reduction"] = reduction
    upstream = upstream_of(case, args)
    wide = args.map(lambda x: x.double())
    found, eager, truth = (
        gradients(case, run, a, upstream)
        for run, a in ((case.native, args), (case.eager, args), (case.eager, wide))
    )
    for key, g in found.items():
        assert_within_bound(g, eager[key], truth[key], name=f"gradient in {key}")


@pytest.mark.parametrize("reduction", ["sample", "batchmean", "mean", "sum"])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_gradcheck_of_reductions(name: str, reduction: str, device: str) -> None:
    args = BY_NAME[name].make((2, 3), torch.float64, device)
    args.options["reduction"] = reduction
    f, tensors = functional(BY_NAME[name], args)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("name", GAUSSIANS)
@each_dtype
def test_gradient_of_a_torch_sum_over_an_elementwise_op(
    name: str, dtype: torch.dtype, device: str
) -> None:
    # Here the upstream gradient is one expanded number, which has a kernel of its own.
    case = BY_NAME[name]
    args = case.make((3, 37), dtype, device)
    for total in (torch.sum, torch.mean, lambda y: (2.5 * y).sum()):
        leaves = args.map(lambda x: x.detach().requires_grad_())
        total(case.native(leaves)).backward()
        y = case.native(args).requires_grad_()
        (upstream,) = torch.autograd.grad(total(y), y)
        full = gradients(case, case.native, args, [upstream.contiguous()])
        for key, x in leaves.tensors.items():
            assert_same_bits(x.grad, full[key], key)


@each_case
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_upstream_gradients_of_any_layout(case: OpCase, layout: str, device: str) -> None:
    args = case.make((4, 6, 5), torch.float32, device)
    upstream = upstream_of(case, args)
    if layout == "transposed":
        laid = [g.transpose(0, -1).contiguous().transpose(0, -1) for g in upstream]
    elif layout == "strided":
        laid = [torch.stack([g, g + 1], -1)[..., 0] for g in upstream]
    else:
        upstream = [g[:1].expand_as(g).contiguous() for g in upstream]
        laid = [g[:1].expand_as(g) for g in upstream]
    plain = gradients(case, case.native, args, upstream)
    for name, g in gradients(case, case.native, args, laid).items():
        assert_same_bits(g, plain[name], name)


@pytest.mark.parametrize("needed", [0, 1])
def test_one_output_of_reparameterize_kl_alone(needed: int, device: str) -> None:
    case = BY_NAME["reparameterize_kl"]
    args = case.make((3, 5), torch.float64, device)
    f, tensors = functional(case, args)
    assert torch.autograd.gradcheck(lambda *x: f(*x)[needed], tensors)
    assert torch.autograd.gradgradcheck(lambda *x: f(*x)[needed], tensors)


@pytest.mark.parametrize("name", ["reparameterize", "reparameterize_kl"])
def test_gradient_in_the_noise(name: str, device: str) -> None:
    case = BY_NAME[name]
    f, tensors = functional(case, case.make((2, 3), torch.float64, device))
    tensors[2].requires_grad_()
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)
    single = [x.detach().float().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(as_tuple(f(*single))[0].square().sum(), single)
    truth = torch.autograd.grad(as_tuple(f(*tensors))[0].square().sum(), tensors)
    for g, exact in zip(grads, truth, strict=True):
        torch.testing.assert_close(g.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", LOSSES, ids=lambda c: c.name)
def test_gradient_in_the_target(case: OpCase, device: str) -> None:
    args = case.make((2, 3), torch.float64, device)
    f, tensors = functional(case, args)
    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in tensors))


def test_gradients_in_coefficients(device: str) -> None:
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    alpha = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)
    sigma = torch.rand((), dtype=torch.float64, device=device, requires_grad=True)
    table = NOISE_TABLE.to(device).clone().requires_grad_()
    rows = step_table().to(device).clone().requires_grad_()
    t = steps_of(3).to(device)
    weight = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)
    for f, inputs in (
        (lambda a, s: ops.add_noise(x, y, a, s), (alpha, sigma)),
        (lambda a, s: ops.predict_x0(x, y, a, s), (alpha, sigma)),
        (lambda a, s: ops.velocity(x, y, a, s), (alpha, sigma)),
        (lambda w: ops.denoising_loss(x, y, y, weight=w), (weight,)),
        (lambda k: ops.q_sample(x, t, y, k), (table,)),
        (lambda k: ops.reverse_step(x, y, k, t=t, noise=x), (rows,)),
    ):
        assert torch.autograd.gradcheck(f, inputs)


def test_gradient_in_the_guidance_scale(device: str) -> None:
    x, m, u = torch.randn(3, 2, 4, dtype=torch.float64, device=device)
    w = torch.rand(2, dtype=torch.float64, device=device, requires_grad=True)
    rows = step_table().to(device)
    assert torch.autograd.gradcheck(
        lambda w: ops.reverse_step(x, m, rows, t=3, model_output_uncond=u, guidance_scale=w), (w,)
    )


def test_changing_a_saved_input_in_place_is_noticed(device: str) -> None:
    mean, logvar = torch.randn(2, 3, 5, device=device)
    mean.requires_grad_()
    kl = ops.standard_normal_kl(mean, logvar)
    logvar.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


def test_changing_a_coefficient_or_the_timesteps_in_place_is_noticed(device: str) -> None:
    x, noise = torch.randn(2, 3, 5, device=device)
    x.requires_grad_()
    alpha, t = torch.ones(3, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    table = torch.rand(4, 2, dtype=torch.float64, device=device)
    logvar = torch.randn(3, 5, device=device)
    for changed, y in (
        (alpha, ops.add_noise(x, noise, alpha, 0.5)),
        (t, ops.q_sample(x, t, noise, table)),
        (table, ops.q_sample(x, t, noise, table)),
    ):
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    # What a loss has read it does not read again.
    weight = torch.ones(3, device=device)
    loss = ops.denoising_loss(x, noise, logvar, prediction_type="sample", weight=weight)
    weight.mul_(7)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, 2 / 5 * (x - noise).detach())


def test_writing_with_out_is_noticed_by_autograd(device: str) -> None:
    mean, logvar = torch.randn(2, 3, 5, device=device)
    mean.requires_grad_()
    kl = ops.standard_normal_kl(mean, logvar)
    ops.add_noise(torch.randn_like(logvar), torch.randn_like(logvar), 0.8, 0.6, out=logvar)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


def test_linear_ops_keep_no_inputs_for_backward() -> None:
    x, noise = torch.randn(2, 3, 5)
    y = ops.add_noise(x.requires_grad_(), noise, 0.8, 0.6)
    x.detach().zero_()
    noise.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.8))


def test_backward_twice_with_retain_graph(device: str) -> None:
    mean, logvar = torch.randn(2, 3, 5, device=device)
    mean.requires_grad_()
    kl = ops.standard_normal_kl(mean, logvar, reduction="sum")
    kl.backward(retain_graph=True)
    once = mean.grad.clone()
    kl.backward()
    assert_same_bits(mean.grad, 2 * once)


def test_no_gradient_is_tracked_without_need() -> None:
    for case in BY_NAME.values():
        args = case.make((2, 3), torch.float32)
        assert not any(y.requires_grad for y in as_tuple(case.native(args)))
        leaves = args.map(lambda x: x.detach().requires_grad_())
        with torch.no_grad():
            assert not any(y.requires_grad for y in as_tuple(case.native(leaves)))


def test_parameters_are_tensors_too() -> None:
    mean = torch.nn.Parameter(torch.randn(3, 5))
    z = ops.reparameterize(mean, torch.zeros(3, 5), torch.randn(3, 5))
    z.sum().backward()
    assert_same_bits(mean.grad, torch.ones(3, 5))


@each_case
@pytest.mark.parametrize("create_graph", [False, True])
def test_arguments_that_depend_on_each_other(case: OpCase, create_graph: bool) -> None:
    # x_t and the model's prediction of it, say: what reaches one argument must not count for both.
    if not case.differentiable:
        return
    args = case.make((3, 4), torch.float64)
    truth: list[Tensor] = []
    for run in (case.native, case.eager):
        x = args.tensors[case.differentiable[0]].clone().requires_grad_()
        made = {n: 0.9 * x if k % 2 else x for k, n in enumerate(case.differentiable)}
        outputs = as_tuple(run(Arguments({**args.tensors, **made}, args.options)))
        total = sum(y.sum() for y in outputs if y.requires_grad)
        (g,) = torch.autograd.grad(total, x, create_graph=create_graph)
        again = torch.zeros_like(x)
        if create_graph and g.requires_grad:
            (again,) = torch.autograd.grad(g.square().sum(), x)
        truth += [g.detach(), again]
    torch.testing.assert_close(truth[0], truth[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(truth[1], truth[3], rtol=1e-8, atol=1e-8)
