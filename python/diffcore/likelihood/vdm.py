"""The bound of a variational diffusion model, in continuous time or in T steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_int, as_real, check_choice, check_dense, check_memory
from diffcore._devices import beside, has_float64, in_float64, wide_dtype
from diffcore._engine.dispatch import run
from diffcore._engine.dtensor import all_of, of_first_rank, per_sample
from diffcore._kernels.bound import PRIOR_KL
from diffcore._types import Model
from diffcore.coefficients.bound import DECODERS, FIXED, VLB_COLUMNS, prior_coefficients
from diffcore.coefficients.step import PREDICTION_TYPES, target_coefficients, x0_coefficients
from diffcore.diffusion.checks import (
    can_read_values,
    check_bits,
    check_noise,
    check_pixels,
    exact_pixels,
    has_values,
)
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._noise import default_key
from diffcore.sampling.model import call_model, check_samples

Gamma = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class VDMBound:
    """The bound -log p(x) <= prior + diffusion + reconstruction of each sample.

    Attributes:
        prior_nats: KL(q(z_1 | x) || N(0, I)), ``[B]``, nats per sample.
        diffusion_nats: The integral of the loss over t, estimated at one t per sample, ``[B]``,
            nats per sample.
        reconstruction_nats: -log p(x | z_0), ``[B]``, nats per sample.
        t: The time of each sample, float64 ``[B]``.
        dimensions: Number of dimensions of a sample.
    """

    prior_nats: Tensor
    diffusion_nats: Tensor
    reconstruction_nats: Tensor
    t: Tensor
    dimensions: int

    @classmethod
    def combine(cls, bounds: Sequence[VDMBound]) -> VDMBound:
        """The bounds of all samples, from those of several batches or processes, in their order.

        A sample has the same bits in any batch if its noise is from a key, its t is given and the
        model works on single samples; so then has a mean over all of them.

        Args:
            bounds: At least one bound, of samples with the same number of dimensions.

        Returns:
            A ``VDMBound``, on the device of the first.

        Raises:
            ValueError: No bounds, or samples of different sizes.
        """
        if not bounds:
            raise ValueError("bounds must have at least one entry, got none")
        sizes = {bound.dimensions for bound in bounds}
        if len(sizes) > 1:
            raise ValueError(f"bounds must have one number of dimensions, got {sorted(sizes)}")
        device = bounds[0].t.device
        names = ("prior_nats", "diffusion_nats", "reconstruction_nats", "t")
        columns = ([getattr(bound, name).to(device) for bound in bounds] for name in names)
        prior, diffusion, reconstruction, t = (torch.cat(column) for column in columns)
        return cls(prior, diffusion, reconstruction, t, bounds[0].dimensions)

    @property
    def total_nats(self) -> Tensor:
        """The bound, ``[B]``, nats per sample."""
        return self.prior_nats + self.diffusion_nats + self.reconstruction_nats

    @property
    def total_bpd(self) -> Tensor:
        """The bound, ``[B]``, bits per dimension."""
        return self.total_nats / self._nats

    @property
    def prior_bpd(self) -> Tensor:
        """``prior_nats`` in bits per dimension, ``[B]``."""
        return self.prior_nats / self._nats

    @property
    def diffusion_bpd(self) -> Tensor:
        """``diffusion_nats`` in bits per dimension, ``[B]``."""
        return self.diffusion_nats / self._nats

    @property
    def reconstruction_bpd(self) -> Tensor:
        """``reconstruction_nats`` in bits per dimension, ``[B]``."""
        return self.reconstruction_nats / self._nats

    @property
    def _nats(self) -> float:
        return self.dimensions * math.log(2)


def vdm_bound(
    model: Model,
    x: Tensor,
    *,
    gamma_min: float | None = None,
    gamma_max: float | None = None,
    gamma: Gamma | None = None,
    gamma_prime: Gamma | None = None,
    num_timesteps: int | None = None,
    prediction_type: str = "epsilon",
    decoder: str = "discretized",
    bits: int = 8,
    t: Tensor | None = None,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> VDMBound:
    """The bound of a model of z_t = alpha_t x + sigma_t noise, with gamma = -log(alpha² / sigma²).

    alpha² = sigmoid(-gamma) and sigma² = sigmoid(gamma). In continuous time the diffusion loss is
    1/2 E_t[gamma'(t) |noise - predicted noise|²]; in T steps, with s = t - 1/T, it is
    T/2 E_t[expm1(gamma_t - gamma_s) |noise - predicted noise|²]. The bound is differentiable in the
    model output, so it is also a training loss; it is not differentiated in gamma.

    Args:
        model: ``model(z_t, gamma_t, **model_kwargs)``; its second argument is gamma(t), float
            ``[B]``, not t.
        x: The data, ``[B, ...]``.
        gamma_min: gamma at t = 0, -13.3 in the paper; gamma(t) is linear.
        gamma_max: gamma at t = 1, 5 in the paper.
        gamma: Instead of these two, an increasing function of float64 times in [0, 1], which are
            on the device of x, or on the CPU where that has no float64. Reading its value at 1
            synchronizes a CUDA device. Traced, it is not checked to increase.
        gamma_prime: Derivative of ``gamma``; ``None`` for autograd.
        num_timesteps: T, or ``None`` for continuous time.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        decoder: With p(x | z_0) = N(z_0 / alpha_0, sigma_0² / alpha_0²): the probability of the bin
            of a pixel k/127.5 - 1 ("discretized"), or the density ("gaussian").
        bits: Depth of the pixels, 1 to 32, with "discretized": they are 2 k / (2^bits - 1) - 1 for
            k = 0 .. 2^bits - 1, in float32 or float64 where there are more than 8.
        t: Times in [0, 1], ``[B]``; ``None`` for (u + i/B) mod 1 with one uniform u, which covers
            them evenly. With ``num_timesteps`` they are rounded up to a multiple of 1/T.
        noise: A tensor of the shape of ``x``, used for z_t and z_0; or a noise key, of which z_0
            uses the next stream; ``None`` for a key seeded by torch's generator.
        generator: Generator of u and of that seed; ``None`` for torch's default.
        model_kwargs: Keyword arguments of the model.

    Returns:
        A ``VDMBound``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Neither or both of gamma and its range, a gamma that does not increase, no
            samples, t of another shape or outside [0, 1], or, with "discretized", x that is not
            pixels of that depth (the last two on CUDA only with ``DIFFCORE_DEBUG=1``).

    Source:
        Kingma et al. 2021 (arXiv 2107.00630) eq. 11 to 17 and appendix I.1.
    """
    check_samples(x)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_choice("decoder", decoder, DECODERS)
    bits = check_bits(bits, decoder)
    if x.shape[0] == 0:
        raise ValueError("x must have at least one sample, got an empty batch")
    if num_timesteps is not None:
        num_timesteps = as_int("num_timesteps", num_timesteps, 1)
    schedule = _Schedule.of(gamma_min, gamma_max, gamma, gamma_prime, x.device)
    if decoder == "discretized" and can_read_values(x):
        check_pixels("x", x, bits)
    if generator is not None and noise is not None and t is not None:
        raise ValueError(
            "generator must be None where noise and t are both given, got a torch.Generator; "
            "nothing is left to seed"
        )
    if noise is None:
        noise = default_key(x, generator)
    noise = check_noise(noise, x)
    t = _times(t, x, generator)
    if num_timesteps is not None:
        t = torch.ceil(t * num_timesteps).clamp(1, num_timesteps) / num_timesteps
    return VDMBound(
        prior_nats=_prior(x, schedule.ends[1]),
        diffusion_nats=_diffusion(
            model, x, t, noise, schedule, num_timesteps, prediction_type, model_kwargs
        ),
        reconstruction_nats=_reconstruction(x, noise, schedule.ends[:1], decoder, bits),
        t=beside(t, x),
        dimensions=x.shape[1:].numel(),
    )


@dataclass(frozen=True)
class _Schedule:
    """A rising gamma(t) on [0, 1].

    Attributes:
        gamma: The function.
        gamma_prime: Its derivative.
        ends: gamma(0) and gamma(1), float64 ``[2]``.
    """

    gamma: Gamma
    gamma_prime: Gamma
    ends: Tensor

    @classmethod
    def of(
        cls,
        gamma_min: float | None,
        gamma_max: float | None,
        gamma: Gamma | None,
        gamma_prime: Gamma | None,
        device: torch.device,
    ) -> _Schedule:
        # The ends of a linear gamma are known on the CPU, so nothing waits for the device.
        at = _CPU if gamma is None else _levels_device(device)
        gamma, gamma_prime = _functions(gamma_min, gamma_max, gamma, gamma_prime)
        ends = gamma(torch.tensor([0.0, 1.0], dtype=torch.float64, device=at)).detach()
        if has_values(ends):
            first, last = ends.tolist()
            if not first < last:
                raise ValueError(f"gamma must rise from t = 0 to t = 1, got {first} and {last}")
        return cls(gamma, gamma_prime, ends)

    def weight(self, t: Tensor, num_timesteps: int | None) -> Tensor:
        """gamma'(t), or T expm1(gamma(t) - gamma(t - 1/T)) in T steps."""
        if num_timesteps is None:
            return self.gamma_prime(t)
        i = torch.round(t * num_timesteps)  # t is i / T, rounded
        return num_timesteps * torch.expm1(self.gamma(t) - self.gamma((i - 1) / num_timesteps))


def _prior(x: Tensor, gamma_1: Tensor) -> Tensor:
    """KL(q(z_1 | x) || N(0, I)), ``[B]``, nats."""
    if not has_values(gamma_1):
        levels = _coefficients(gamma_1.to(_levels_device(x.device)))
        coefs = [beside(c, x) for c in prior_coefficients(*levels)]
        return run(PRIOR_KL, (x,), tuple(coefs))
    alpha, sigma = (c.item() for c in _coefficients(gamma_1.cpu()))
    return ops.prior_kl(x, alpha, sigma)


def _diffusion(
    model: Model,
    x: Tensor,
    t: Tensor,
    noise: Noise,
    schedule: _Schedule,
    num_timesteps: int | None,
    prediction_type: str,
    model_kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """The diffusion loss, ``[B]``, nats."""
    gamma_t = schedule.gamma(t).detach()
    weight = schedule.weight(t, num_timesteps).detach()
    alpha, sigma = _coefficients(gamma_t)
    z_t = ops.add_noise(x, noise, beside(alpha, x), beside(sigma, x))
    model_input = gamma_t if x.dtype == torch.float64 else gamma_t.float()
    output = call_model(model, z_t, per_sample(beside(model_input, x), x), model_kwargs)
    # The error of x times alpha / sigma is the error of the noise.
    table = _errors(alpha, sigma, prediction_type)
    table[:, _FACTOR] = 0.5 * weight * torch.exp(-gamma_t)
    rows = torch.arange(x.shape[0], device=x.device)
    return ops.vlb_term(x, output, beside(table, x), t=rows, noise=noise)


def _reconstruction(x: Tensor, noise: Noise, gamma_0: Tensor, decoder: str, bits: int) -> Tensor:
    """-log p(x | z_0), ``[B]``, nats."""
    noise_0 = noise.at(noise.stream + 1) if isinstance(noise, PhiloxNoise) else noise
    if bits != 8:
        return _reconstruction_of_bits(x, noise_0, gamma_0, bits)
    table = beside(_decoder(gamma_0.to(_levels_device(x.device)), decoder), x)
    rows = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    # The mean of p(x | z_0) is z_0 / alpha_0, with no model: x stands in for the model output.
    return ops.vlb_term(x, x, table, t=rows, noise=noise_0)


def _reconstruction_of_bits(x: Tensor, noise: Noise, gamma_0: Tensor, bits: int) -> Tensor:
    """-log p(x | z_0), ``[B]``, nats, for pixels of any depth, in float64."""
    wide = exact_pixels(x, bits)
    noise = in_float64(noise) if isinstance(noise, Tensor) else noise.to(wide.device)
    log_scale = 0.5 * gamma_0.to(wide.device).reshape(())
    mass = ops.discretized_gaussian_log_likelihood(
        wide,
        means=ops.add_noise(wide, noise, 1.0, log_scale.exp()),
        log_scales=log_scale.expand_as(wide),
        reduction="sample",
        bits=bits,
    )
    return -mass.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)


_CPU = torch.device("cpu")


def _levels_device(device: torch.device) -> torch.device:
    """Where times, levels and tables are computed, in float64."""
    return device if has_float64(device) else _CPU


_FACTOR, _DECODER, _OFFSET, _D = (
    VLB_COLUMNS.index(name) for name in ("factor", "decoder", "offset", "d_0")
)


def _coefficients(gamma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def _errors(alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """A table of ``ops.vlb_term`` with the error of x from x, the noise and the prediction."""
    _, a_m = (
        torch.as_tensor(c, device=alpha.device)
        for c in x0_coefficients(alpha, sigma, prediction_type)
    )
    k_x, k_noise = target_coefficients(alpha, sigma, prediction_type)
    return _table(alpha, a_m * k_x, a_m * k_noise, -a_m)


def _decoder(gamma: Tensor, decoder: str) -> Tensor:
    """A row of ``ops.vlb_term`` for -log N(x; x + s noise, s²), s² = e^gamma."""
    log_variance = gamma
    table = _table(gamma, torch.zeros_like(gamma), -torch.exp(0.5 * gamma), torch.zeros_like(gamma))
    table[:, _D] = -log_variance
    if decoder == "discretized":
        table[:, _DECODER] = table[:, _FACTOR] = 1
    else:
        table[:, _FACTOR] = 0.5 * torch.exp(-log_variance)
        table[:, _OFFSET] = 0.5 * (math.log(2 * math.pi) + log_variance)
    return table


def _table(like: Tensor, *errors: Tensor) -> Tensor:
    table = torch.zeros(like.shape[0], FIXED, dtype=torch.float64, device=like.device)
    for k, b in enumerate(errors):
        table[:, k] = b.float()
        table[:, k + 3] = b - b.float().double()
    table[:, VLB_COLUMNS.index("clip_min")] = -math.inf
    table[:, VLB_COLUMNS.index("clip_max")] = math.inf
    return table


def _times(t: Tensor | None, x: Tensor, generator: torch.Generator | None) -> Tensor:
    there = _levels_device(x.device)
    if t is None:
        at = there if generator is None else generator.device
        wide = wide_dtype(at)
        u = torch.rand(1, dtype=wide, generator=generator, device=at).to(there).double()
        u = of_first_rank(u, x)
        i = torch.arange(x.shape[0], dtype=torch.float64, device=there)
        return torch.remainder(u + i / x.shape[0], 1.0)
    if not isinstance(t, Tensor) or not t.is_floating_point():
        what = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a tensor of floating point numbers, got {what}")
    check_dense("t", t)
    check_memory("t", t)
    t = all_of(t)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {list(x.shape[:1])}, got {list(t.shape)}")
    if can_read_values(t) and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must lie in [0, 1], got {t.tolist()}")
    return t.to(there).double()


def _functions(
    low: float | None, high: float | None, gamma: Gamma | None, gamma_prime: Gamma | None
) -> tuple[Gamma, Gamma]:
    """The function gamma and its derivative."""
    if gamma is not None:
        if low is not None or high is not None:
            raise ValueError(
                "gamma must be None if gamma_min or gamma_max is given, got both; pass one"
            )
        function = gamma

        def slope(t: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                derivative: Tensor = torch.func.grad(lambda t: function(t).sum())(t.detach())
                return derivative
            with torch.inference_mode(False), torch.enable_grad():
                t = t.detach().clone().requires_grad_()
                return torch.autograd.grad(function(t).sum(), t)[0]

        return function, slope if gamma_prime is None else gamma_prime
    if low is None or high is None:
        raise ValueError(
            f"gamma_min and gamma_max must both be given, or gamma, got {low} and {high}"
        )
    low, high = as_real("gamma_min", low), as_real("gamma_max", high)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"gamma_min must be less than gamma_max, got {low} and {high}")
    start, span = low, high - low
    return lambda t: start + span * t, lambda t: torch.full_like(t, span)
