"""The kernels of dynamic thresholding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore import reference
from diffcore._registry import Kernel

COEFS = ("a_x", "a_m", "guidance_scale", "ratio", "sample_max_value")


def _quantile_kernel(guided: bool) -> Kernel:
    def plain(*args: Any, whole: bool) -> Tensor:
        x, m, *rest = args
        uncond, coefs = (rest[0], rest[1:]) if guided else (None, rest)
        return reference.x0_quantile(x, m, uncond, *coefs, whole=whole)

    names = ("x", "model_output") + ("model_output_uncond",) * guided
    name = "x0_quantile" + "_guided" * guided
    return Kernel(name, names, COEFS, outputs=0, sums=1, reference=plain)


X0_QUANTILE = {guided: _quantile_kernel(guided) for guided in (False, True)}
