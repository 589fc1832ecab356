"""Dynamic thresholding in a sampling loop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffcore import ops
from diffcore._checks import as_real
from diffcore.guidance import Guidance
from diffcore.sampling.model import Prediction
from diffcore.solvers.table import Row

Threshold = Callable[[Row, Tensor, Prediction, Guidance | None], Tensor]
"""From a row, the samples before it, the prediction and its rule to the bound of x_0, ``[B]``."""


def threshold_rule(ratio: float | None, max_value: float) -> Threshold | None:
    """Imagen's bound of x_0 as a function for ``run_table``.

    Args:
        ratio: Quantile of abs(x_0) in each sample; ``None`` for no thresholding.
        max_value: The largest bound.

    Returns:
        The function, ``None`` for no thresholding.

    Raises:
        TypeError: Not numbers.
        ValueError: A ratio outside [0, 1], or a largest bound below 1.
    """
    if ratio is None:
        return None
    quantile = as_real("dynamic_thresholding_ratio", ratio)
    if not 0 <= quantile <= 1:
        raise ValueError(f"dynamic_thresholding_ratio must be in [0, 1], got {quantile}")
    largest = as_real("sample_max_value", max_value)
    if not largest >= 1:
        raise ValueError(f"sample_max_value must be at least 1, got {largest}")

    def bound(row: Row, x: Tensor, prediction: Prediction, guidance: Guidance | None) -> Tensor:
        output, uncond, _ = prediction
        return ops.dynamic_threshold(
            x,
            output,
            row.coefficients,
            ratio=quantile,
            sample_max_value=largest,
            model_output_uncond=uncond,
            guidance=guidance,
        )

    return bound
