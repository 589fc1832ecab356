"""What a route is, what it measures of a call, and how a cell of the matrix is checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from support.bounds import assert_same_bits
from support.op_case import Shape
from support.routes.case import Call, Case, Function

Tensors = tuple[Tensor, ...]
Measure = Callable[[Function, Call], Tensors]
Compare = Callable[[Tensors, Tensors, str], None]
SEED = 11  # of torch's generator before each measurement: it seeds the default noise
SMALL: Shape = (2, 3)
WIDE: Shape = (3, 37)


@dataclass(frozen=True)
class Route:
    """One way through torch: a name, its column in docs/routes.md, and the check of a case.

    A route that takes long is checked on some cases in every run of the tests, on all with
    ``--all-routes``.
    """

    name: str
    column: str
    check: Callable[[Case], None]
    applies: Callable[[Case], bool] = lambda case: True
    usual: tuple[str, ...] | None = None  # names of those cases; None for all

    def in_usual_runs(self, case: Case) -> bool:
        return self.usual is None or case.name in self.usual


FEW = (
    "q_sample, key",
    "denoising_loss_v_prediction",
    "GaussianDiffusion.training_losses, learned_range",
)
KERNELS = (
    *FEW,
    "reverse_step_threshold",
    "normal_kl_sample",
    "reparameterize_kl, key",
    "vlb_term_learned_range, key",
    "dynamic_threshold",
    "tensor, key",
    "SolverTable.step, rows, key",
    "vae.DiagonalGaussianDistribution.kl, of two",
)
"""One case of each kind of kernel."""
MANY = (
    *KERNELS,
    "velocity_table",
    "linear_combination",
    "reverse_step_h2_guided",
    "step_log_prob",
    "gaussian_nll",
    "prior_kl",
    "ddim_step_noisy, key",
    "reparameterize, default noise",
    "denoising_loss_sample",
    "GaussianDiffusion.q_sample",
    "GaussianDiffusion.p_sample, key",
    "GaussianDiffusion.prior_bpd",
    "GaussianDiffusion.vb_terms_bpd",
    "GaussianDiffusion.p_sample_loop, key",
    "GaussianDiffusion.calc_bpd_loop, key",
    "sample, ddpm, key",
    "vdm_bound, key",
    "vae.elbo",
)
"""More of what Python does before and after the kernels."""


# ---- what is measured -----------------------------------------------------------------------


def seed() -> None:
    """Seeds torch's generator, from which the default noise takes its key."""
    if not torch.compiler.is_dynamo_compiling():  # which cannot: its caller does
        torch.manual_seed(SEED)


def values(f: Function, call: Call) -> Tensors:
    seed()
    return f(*call.values)


def upstream(outputs: Tensors) -> list[Tensor]:
    """Gradients of the outputs, all different, the same on every route."""
    return [_weights(y.numel()).reshape(y.shape).to(y) for y in outputs]


def _weights(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64, device="cpu").cos()


def leaves(call: Call) -> Tensors:
    return tuple(x.detach().requires_grad_(n) for x, n in zip(call.values, call.needs, strict=True))


def gradients(f: Function, call: Call) -> Tensors:
    """The outputs and the gradients of what is differentiable."""
    given = leaves(call)
    seed()
    outputs = f(*given)
    wanted = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(wanted, upstream(wanted))
    return (*(y.detach() for y in outputs), *(_zero_if_none(x) for x in given if x.requires_grad))


def _zero_if_none(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def scalar(f: Function, call: Call) -> Callable[..., Tensor]:
    """A function of the differentiable tensors: a weighted sum of the outputs."""

    def g(*differentiable: Tensor) -> Tensor:
        rest = iter(differentiable)
        given = [
            next(rest) if n else x.detach() for x, n in zip(call.values, call.needs, strict=True)
        ]
        seed()
        outputs = f(*given)
        return sum(
            (y.double() * _weights(y.numel()).reshape(y.shape)).sum()
            for y in outputs
            if y.is_floating_point()
        )

    return g


def differentiable(call: Call) -> Tensors:
    return tuple(x for x, n in zip(call.values, call.needs, strict=True) if n)


def directions(call: Call) -> Tensors:
    return tuple(_weights(x.numel()).reshape(x.shape).to(x) - 0.3 for x in differentiable(call))


def by_backward(f: Function, call: Call) -> Tensors:
    """The gradients of the weighted sum, by plain reverse mode: the truth of the next ones."""
    given = tuple(x.clone().requires_grad_() for x in differentiable(call))
    return torch.autograd.grad(scalar(f, call)(*given), given, materialize_grads=True)


def by_func_grad(f: Function, call: Call) -> Tensors:
    given = differentiable(call)
    found = torch.func.grad(scalar(f, call), argnums=tuple(range(len(given))))(*given)
    return tuple(found)


def slope(f: Function, call: Call) -> Tensors:
    """The derivative along ``directions``, by plain reverse mode."""
    pairs = zip(by_backward(f, call), directions(call), strict=True)
    return (sum((g * d).sum(dtype=torch.float64) for g, d in pairs),)


def slope_by_jvp(f: Function, call: Call) -> Tensors:
    return (torch.func.jvp(scalar(f, call), differentiable(call), directions(call))[1],)


def slope_by_duals(f: Function, call: Call) -> Tensors:
    with forward_ad.dual_level():
        pairs = zip(differentiable(call), directions(call), strict=True)
        given = [forward_ad.make_dual(x, d) for x, d in pairs]
        tangent = forward_ad.unpack_dual(scalar(f, call)(*given)).tangent
    assert tangent is not None, "the tangent is lost"
    return (tangent,)


# ---- how it is compared -----------------------------------------------------------------------


def same_bits(found: Tensors, wanted: Tensors, what: str) -> None:
    assert len(found) == len(wanted), what
    assert_same_bits(found, wanted, what)


def close(found: Tensors, wanted: Tensors, what: str) -> None:
    """Equal up to rounding: torch's own tolerance, 1e-7 of the value in float64."""
    assert len(found) == len(wanted), what
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, msg=lambda m: f"{what}: {m}")


# ---- how a cell is checked ----------------------------------------------------------------------


@functools.cache
def truth_of(case: Case, measure: Measure, shape: Shape, dtype: torch.dtype) -> Tensors:
    """What plain eager gives for a new object; asked by many routes, so kept."""
    call = case.make(shape, dtype)
    return tuple(x.clone() for x in measure(call.of_tensors(case.subject()), call))


@dataclass(frozen=True)
class Through:
    """Checks that a call gives on a route what it gives in plain eager.

    The object of a case is new on the route (cold), is used there again (warm), and afterwards in
    plain eager: what a route left in its caches may serve no one else.
    """

    measures: tuple[tuple[Measure, Measure], ...] = ((values, values), (gradients, gradients))
    context: Callable[[], Any] = contextlib.nullcontext
    wrap: Callable[[Function], Function] = lambda f: f
    before: Callable[[Tensor], Tensor] = lambda x: x
    after: Callable[[Tensor], Tensor] = lambda y: y
    compare: Compare = same_bits
    dtype: torch.dtype = torch.float32
    shape: Shape = WIDE

    def __call__(self, case: Case) -> None:
        call = case.make(self.shape, self.dtype)
        tensors = {name: self.before(x) for name, x in call.tensors.items()}
        on_route = Call(case, tensors, call.others)
        for measure, truth in self.measures:
            if measure is not values and not case.differentiable:
                continue
            wanted = truth_of(case, truth, self.shape, self.dtype)
            what = f"{case.name}, {measure.__name__}"
            subject = case.subject()
            f = self.wrap(on_route.of_tensors(subject))
            for when in ("cold", "warm") if case.stateful else ("cold",):
                with self.context():
                    found = measure(f, on_route)
                self.compare(tuple(map(self.after, found)), wanted, f"{what}, {when}")
            if case.stateful:
                after_route(case, call, subject)


def after_route(case: Case, call: Call, subject: Any) -> None:
    """Plain eager on an object that a route has used first."""
    shape, dtype = next(iter(call.tensors.values())).shape, call.dtype
    found = values(call.of_tensors(subject), call)
    wanted = truth_of(case, values, tuple(shape), dtype)
    same_bits(found, wanted, f"{case.name}, in plain eager after the route")


TRANSFORMS = ((by_func_grad, by_backward), (slope_by_jvp, slope), (slope_by_duals, slope))
"""Transforms that a mode or a subclass may not hide, each with its truth in plain eager."""
