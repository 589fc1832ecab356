"""What the random calls choose from, by the names of parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDTHS = {"table": 2, "vlb_term": 12, "linear_combination": 2, "variance_coefficients": 2}
CHOICES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "reduction": ("none", "sample", "batchmean", "mean", "sum"),
    **{
        f"reduction of {op}": ("sum", "mean", "none")
        for op in ("reverse_step", "step_log_prob", "step_kl")
    },
    "mask_reduction": ("mask", "all", "mean"),
    "loss": ("mse", "mse", "pseudo_huber", "smooth_l1", "huber"),
    "return_target": (None, "epsilon", "v_prediction", "flow_prediction", "sample"),
    "variance_type": ("fixed_small", "fixed_large", "learned"),
    "clip_range": (None, 1.0, (-0.5, 2.0), -1.0),
    "eta": (0.0, 0.5, 1.0, 2.0),
    "ratio": (0.0, 0.5, 0.995, 1.0, 2.0),
    "sample_max_value": (1.0, 2.0, math.inf, 0.5),
    "rederive_epsilon": (False, True),
    "return_history": (False, True),
    "return_log_prob": (False, False, True),
    "group_dim": (None, 1, 1, 2, -1, 0, -3),
    "bits": (8, 8, 1, 2, 12, 32, 0, 33),
    "reduction of denoising_loss": ("sample", "sample", "group"),
    "generator": (None,),
    "device": (None, "cpu"),
    "dtype": (None, *FLOATS, torch.int64),
}
# What is odd for arguments of their kind only.
ODD_CHOICES: dict[str, tuple[Any, ...]] = {
    "shape": (2, -1, (2, -1), (2.0,), ((2,), 3), (True,), "23", (2**40, 2**40), torch.tensor(2)),
    "device": ("gpu", "cuda:x", -1, 1.5, 2**70),
    **dict.fromkeys(("rederive_epsilon", "return_history", "return_log_prob"), (2, "False", 1.0)),
}
SAMPLES = (
    *("x0", "x", "y", "x_t", "x_next", "model_output", "model_output_uncond", "variance_output"),
    *("gradient", "known", "reference_output", "reference_output_uncond"),
    *("mean", "logvar", "mean1", "logvar1", "mean2", "logvar2", "means", "log_scales"),
)
COEFFICIENTS = (
    *("alpha", "sigma", "alpha_prev", "sigma_prev", "weight", "scale"),
    *("guidance_scale", "threshold", "delta"),
)
