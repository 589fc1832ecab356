"""The float64 scalars of every formula: of steps and conversions, and of the bound's terms."""

from diffcore.coefficients.bound import (
    DECODERS,
    VLB_COLUMNS,
    log_variances,
    prior_coefficients,
    vlb_coefficients,
)
from diffcore.coefficients.consistency import consistency_coefficients, lcm_coefficients
from diffcore.coefficients.step import (
    PREDICTION_TYPES,
    STEP_COLUMNS,
    VARIANCE_TYPES,
    ddim_coefficients,
    ddpm_coefficients,
    epsilon_coefficients,
    parse_clip_range,
    posterior_coefficients,
    target_coefficients,
    x0_coefficients,
)

__all__ = [
    "DECODERS",
    "PREDICTION_TYPES",
    "STEP_COLUMNS",
    "VARIANCE_TYPES",
    "VLB_COLUMNS",
    "consistency_coefficients",
    "ddim_coefficients",
    "ddpm_coefficients",
    "epsilon_coefficients",
    "lcm_coefficients",
    "log_variances",
    "parse_clip_range",
    "posterior_coefficients",
    "prior_coefficients",
    "target_coefficients",
    "vlb_coefficients",
    "x0_coefficients",
]
