"""The specification: every op of diffcore in plain PyTorch, under the same name, one file a family.

Tests run these in float64 as the truth; devices without kernels and installs without the compiled
module run on them. Inputs keep their dtype at the boundary and 16-bit inputs are computed in
float32, rounded once at the end. Coefficients are numbers or tensors that broadcast against the
inputs (see :func:`per_sample`).
"""

from diffcore._types import Coef
from diffcore.reference.bound import prior_kl, vlb_term
from diffcore.reference.common import compute_dtype, per_sample
from diffcore.reference.gaussian import (
    expm1_minus,
    gaussian_nll,
    normal_kl,
    reparameterize,
    reparameterize_kl,
    standard_normal_kl,
)
from diffcore.reference.likelihood import discretized_gaussian_log_likelihood
from diffcore.reference.linear import (
    add_noise,
    linear_combination,
    linear_pair,
    predict_epsilon,
    predict_x0,
    scale,
    scale_twice,
    velocity,
)
from diffcore.reference.loss import mixed_target_loss, target_loss
from diffcore.reference.step import reverse_step, step_log_prob
from diffcore.reference.threshold import x0_quantile

__all__ = [
    "Coef",
    "add_noise",
    "compute_dtype",
    "discretized_gaussian_log_likelihood",
    "expm1_minus",
    "gaussian_nll",
    "linear_combination",
    "linear_pair",
    "mixed_target_loss",
    "normal_kl",
    "per_sample",
    "predict_epsilon",
    "predict_x0",
    "prior_kl",
    "reparameterize",
    "reparameterize_kl",
    "reverse_step",
    "scale",
    "scale_twice",
    "standard_normal_kl",
    "step_log_prob",
    "target_loss",
    "velocity",
    "vlb_term",
    "x0_quantile",
]
