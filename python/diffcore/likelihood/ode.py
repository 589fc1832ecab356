"""The log-likelihood of samples by the probability flow, over any table whose levels rise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_int, check_choice, check_not_compiling
from diffcore._devices import beside, in_float64
from diffcore._engine.dtensor import is_dtensor
from diffcore._types import Model
from diffcore.likelihood.flow_weights import FlowWeights
from diffcore.noise import PhiloxNoise
from diffcore.ops._arguments import as_dof
from diffcore.ops._noise import default_key
from diffcore.sampling.model import call_model, check_samples
from diffcore.sampling.sample import sample
from diffcore.solvers import SolverTable

DIVERGENCES = ("exact", "hutchinson")


@dataclass(frozen=True, eq=False)
class ODELogLikelihood:
    """log p(x) of each sample by the probability flow. ``str`` gives one line.

    Attributes:
        log_likelihood: ``log_prior + log_det``, float64 ``[B]``, nats per sample.
        log_prior: log p(x_T), float64 ``[B]``, nats per sample.
        log_det: Log of the volume that the flow from x to x_T makes of a unit of volume, the
            integral of the divergence, float64 ``[B]``, nats per sample.
        estimator_variance: Variance of ``log_likelihood`` that is due to the random vectors, from
            that between them, float64 ``[B]``: 0 if exact, nan for one vector.
        dimensions: Number of dimensions of each sample, float64 ``[B]``.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_det: Tensor
    estimator_variance: Tensor
    dimensions: Tensor

    @classmethod
    def combine(cls, results: Sequence[ODELogLikelihood]) -> ODELogLikelihood:
        """The result of all samples, from those of several batches, in their order.

        Args:
            results: At least one result.

        Returns:
            An ``ODELogLikelihood``, on the device of the first.

        Raises:
            TypeError: An entry is no ``ODELogLikelihood``.
            ValueError: No results.
        """
        if not results:
            raise ValueError("results must have at least one entry, got none")
        for result in results:
            if not isinstance(result, ODELogLikelihood):
                raise TypeError(f"results must be ODELogLikelihood, got {type(result).__name__}")
        device = results[0].log_likelihood.device
        return cls(
            *(torch.cat([getattr(r, f.name).to(device) for r in results]) for f in fields(cls))
        )

    @property
    def bpd(self) -> Tensor:
        """-log2 p(x) per dimension, float64 ``[B]``: bits per dimension of a density."""
        return -self.log_likelihood / (self.dimensions * math.log(2))

    @property
    def mean_bpd(self) -> float:
        """Mean of ``bpd`` over the samples."""
        return self.bpd.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of ``mean_bpd``, from the variance between samples; nan for one sample."""
        bpd = self.bpd
        return math.nan if len(bpd) < 2 else bpd.std().item() / math.sqrt(len(bpd))

    def __str__(self) -> str:
        return (
            f"{self.mean_bpd:.4f} ± {self.standard_error:.4f} bits/dim "
            f"({len(self.log_likelihood)} samples)"
        )


def ode_log_likelihood(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    divergence: str = "exact",
    num_samples: int = 1,
    noise: PhiloxNoise | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    dof: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool | None = False,
) -> ODELogLikelihood:
    """Log p(x) by the probability flow: log p(x_T) plus the integral of the divergence on the way.

    The table runs from the data up to noise (``docs/how-to/inversion.md``). The integral has the
    nodes and the order of convergence of the table itself: with m_r the output of the model in row
    r, for its scaled input,

        log p(x) = log p(x_T) + n c + sum_r w_r div m_r

    where c and w_r come from the coefficients in float64: the log of the factor by which the table
    multiplies x, as a linear function of the slopes of the outputs, which is what it is for the
    exact flow (``FlowWeights``). The log-determinant of the table's own map from x to x_T converges
    to the same value at the same order. It is not used because it would need the complete Jacobian,
    and has no unbiased estimate from a few random vectors; the sum is linear in the divergence, so
    that Hutchinson's estimate of it is unbiased.

    The result has the error of the table, in x_T and in the integral: compare two numbers of steps,
    and prefer a solver of order 2 or more. Each row calls the model once, and takes one backward
    pass for each dimension ("exact") or random vector ("hutchinson"). The model must treat samples
    independently: call ``model.eval()`` first.

    Args:
        model: ``model(x, t, **model_kwargs)``, as for ``sample``. It must be differentiable in x.
        x: The data, ``[B, ...]``. Add uniform noise of the width of a bin to pixels, whose density
            is not finite otherwise.
        table: A solver without noise and clip, of levels that rise, such as
            ``solvers.heun_table(levels.reversed())``.
        divergence: "exact": the trace of the Jacobian, element by element. "hutchinson": its
            unbiased estimate z^T J z from random signs z.
        num_samples: Random vectors z in each row, with "hutchinson".
        noise: The key of z, with "hutchinson": vector k of K in row r is of the stream
            ``noise.stream + r K + k``. ``None`` for a key seeded by torch's generator.
        prior: ``prior(x_T)``, the log-density at the last level, ``[B]`` in nats; ``None`` for
            N(0, s² I) with s = ``table.init_noise_sigma``, from which samplers start.
        dof: Number of dimensions of the subspace in which x and the model's output lie, a number or
            ``[B]``, such as 3 (N - 1) for N points without their center of mass; ``None`` for all.
        model_kwargs: More arguments for the model.
        progress: Show a bar (tqdm); ``None`` for one on terminals only.

    Returns:
        An ``ODELogLikelihood``.

    Raises:
        TypeError: An argument, or the output of the model, has the wrong type.
        ValueError: A table that adds noise, clips, needs guidance, or whose levels fall; or a model
            that is not differentiable in x.

    Source:
        Song et al. 2021 (arXiv 2011.13456) section 4.3; Grathwohl et al. 2019 (arXiv 1810.01367);
        Hutchinson 1990.
    """
    check_not_compiling("ode_log_likelihood", "compile the model that it gets")
    check_samples(x)
    if is_dtensor(x):
        raise TypeError("x must be a plain tensor, got a DTensor; pass the samples of each process")
    check_choice("divergence", divergence, DIVERGENCES)
    count = as_int("num_samples", num_samples, 1)
    weights = FlowWeights.of(table)
    if prior is not None and not callable(prior):
        raise TypeError(f"prior must be a function or None, got {type(prior).__name__}")
    dimensions = _dimensions(dof, x)
    key: PhiloxNoise | None = None
    if divergence == "hutchinson":
        key = default_key(x) if noise is None else noise
        if not isinstance(key, PhiloxNoise):
            raise TypeError(f"noise must be a PhiloxNoise or None, got {type(key).__name__}")
    elif noise is not None or count != 1:
        name, came = ("noise", noise) if noise is not None else ("num_samples", count)
        raise ValueError(
            f"{name} must not be given with divergence='exact', got {came!r}; "
            "pass divergence='hutchinson'"
        )
    traced = _TracedModel(model, weights.of_rows, key, count, x)
    # The key is not read: the table adds no noise.
    x_T = sample(
        traced, x, table, noise=PhiloxNoise(0), model_kwargs=model_kwargs, progress=progress
    )
    log_prior = in_float64(
        _gaussian(x_T, table, dimensions) if prior is None else _given(prior, x_T)
    )
    sums = traced.sums
    log_det = sums.mean(0) + dimensions * weights.log_factor
    if key is None:
        variance = torch.zeros_like(log_det)
    elif count == 1:
        variance = torch.full_like(log_det, math.nan)
    else:
        variance = sums.var(0) / count
    found = (log_prior + log_det, log_prior, log_det, variance, dimensions)
    return ODELogLikelihood(*(beside(y, x) for y in found))


class _TracedModel:
    """A model that adds up the weighted traces of its Jacobians as it is called, row by row."""

    def __init__(
        self,
        model: Model,
        weights: Sequence[float],
        key: PhiloxNoise | None,
        count: int,
        x: Tensor,
    ) -> None:
        self._model = model
        self._weights = weights
        self._key = key
        self._count = count
        self._row = 0
        self.sums = in_float64(torch.zeros(count, len(x), device=x.device))

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # A clone, because autograd takes no tensor of an inference mode.
            leaf = x.detach().clone().requires_grad_()
            output = call_model(self._model, leaf, t.clone(), kwargs)
            if not output.requires_grad:
                raise ValueError(
                    "model must be differentiable in x, got an output without gradient; it must "
                    "not run under torch.no_grad() or detach x"
                )
            if self._key is None:
                traces = _exact_trace(output, leaf).unsqueeze(0)
            else:
                traces = self._estimates(output, leaf)
        self.sums += self._weights[self._row] * traces
        self._row += 1
        return output.detach()

    def _estimates(self, output: Tensor, leaf: Tensor) -> Tensor:
        assert self._key is not None
        found = []
        for k in range(self._count):
            key = self._key.at(self._key.stream + self._row * self._count + k)
            signs = _signs(key, leaf)
            again = k + 1 < self._count
            (product,) = torch.autograd.grad(output, leaf, signs, retain_graph=again)
            found.append(in_float64(product * signs).flatten(1).sum(1))
        return torch.stack(found)


def _signs(key: PhiloxNoise, like: Tensor) -> Tensor:
    """Independent random signs, -1 or 1 with the same probability."""
    u = key.uniform(like.shape, dtype=torch.float32, device=like.device)
    return torch.where(u < 0.5, -1.0, 1.0).to(like.dtype)


def _exact_trace(output: Tensor, leaf: Tensor) -> Tensor:
    """The trace of the Jacobian of each sample, float64 ``[B]``, a backward pass an element."""
    rows = output.flatten(1)
    trace = in_float64(torch.zeros(len(leaf), device=leaf.device))
    last = rows.shape[1] - 1
    for i in range(rows.shape[1]):
        (slope,) = torch.autograd.grad(rows[:, i].sum(), leaf, retain_graph=i < last)
        trace += in_float64(slope.flatten(1)[:, i])
    return trace


def _dimensions(dof: float | Tensor | None, x: Tensor) -> Tensor:
    n = x.shape[1:].numel()
    if x.ndim < 2:
        raise ValueError(f"x must have shape [B, ...] with a dimension more, got {tuple(x.shape)}")
    number = float(n) if dof is None else as_dof(dof, x)
    if isinstance(number, Tensor):
        return in_float64(number)
    return in_float64(torch.ones(len(x), device=x.device)) * number


def _gaussian(x_T: Tensor, table: SolverTable, dimensions: Tensor) -> Tensor:
    """Log N(x_T; 0, s² I) on a subspace of that many dimensions."""
    std = table.init_noise_sigma
    square = (in_float64(x_T) / std).flatten(1).square().sum(1)
    return -0.5 * square - dimensions * (math.log(std) + 0.5 * math.log(2 * math.pi))


def _given(prior: Callable[[Tensor], Tensor], x_T: Tensor) -> Tensor:
    found = prior(x_T)
    if not isinstance(found, Tensor) or found.shape != x_T.shape[:1]:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"prior must return a tensor of shape [{len(x_T)}], got {came}")
    return found.detach()
