"""The public functional ops: each call is one kernel launch, forward and backward.

Tensors called elementwise (samples, noise, predictions, means, ...) share one shape `[B, ...]`,
one dtype (float32, float64, bfloat16, float16) and one device; any dense memory layout they share
is used without a copy. Values are computed in float32 (float64 for float64) and rounded once at
the store.

A coefficient (`alpha`, `sigma`, ...) is a number, or a float32 or float64 tensor: 0-dim, or
`[B]`, one per sample. With `t` it is a table `[T]`, gathered at `t` inside the kernel; `t` is an
int, an integer tensor `[B]`, or a one-element integer tensor on the device (a counter). On the
CPU a `t` out of range raises; on CUDA it is clamped, because a check would wait for the device
(`DIFFCORE_DEBUG=1` checks it).

Wherever an op takes noise, it takes a tensor or a `PhiloxNoise`, a recipe for it.

Every op raises TypeError or ValueError, before any memory is touched, for an argument of the
wrong type, dtype, shape or device, and names it. KL and likelihoods are in nats.
"""

from __future__ import annotations

from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.noise import PhiloxNoise
from diffcore.ops._noise import randn
from diffcore.ops.bound import prior_kl, vlb_term
from diffcore.ops.gaussian import (
    gaussian_nll,
    normal_kl,
    reparameterize,
    reparameterize_kl,
    standard_normal_kl,
)
from diffcore.ops.likelihood import discretized_gaussian_log_likelihood
from diffcore.ops.linear import (
    add_noise,
    linear_combination,
    predict_epsilon,
    predict_x0,
    q_sample,
    velocity,
)
from diffcore.ops.loss import denoising_loss
from diffcore.ops.step import ddim_step, ddpm_step, reverse_step, step_log_prob
from diffcore.ops.threshold import dynamic_threshold

__all__ = [
    "PREDICTION_TYPES",
    "PhiloxNoise",
    "add_noise",
    "ddim_step",
    "ddpm_step",
    "denoising_loss",
    "discretized_gaussian_log_likelihood",
    "dynamic_threshold",
    "gaussian_nll",
    "linear_combination",
    "normal_kl",
    "predict_epsilon",
    "predict_x0",
    "prior_kl",
    "q_sample",
    "randn",
    "reparameterize",
    "reparameterize_kl",
    "reverse_step",
    "standard_normal_kl",
    "step_log_prob",
    "velocity",
    "vlb_term",
]
