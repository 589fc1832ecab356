"""The kernels of dynamic thresholding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore._engine.kernel import Kernel
from diffcore._engine.library import define
from diffcore._kernels.step import LEADING, PLAIN, inputs_of
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.reference import threshold as formulas


def _quantile_kernel(guided: bool) -> Kernel:
    def plain(*args: Any, reduce_all: bool) -> Tensor:
        x, m, *rest = args
        uncond, coefs = (rest[0], rest[1:]) if guided else (None, rest)
        *columns, ratio, most = coefs[len(LEADING) :]
        return formulas.x0_quantile(
            x,
            m,
            columns,
            ratio,
            most,
            leading=coefs[: len(LEADING)],
            model_output_uncond=uncond,
            reduce_all=reduce_all,
        )

    return define(
        Kernel(
            "x0_quantile" + "_guided" * guided,
            inputs_of(guided),
            (*LEADING, *STEP_COLUMNS[:PLAIN], "ratio", "sample_max_value"),
            outputs=0,
            sums=1,
            reference=plain,
            reads_samples=True,
        )
    )


X0_QUANTILE = {guided: _quantile_kernel(guided) for guided in (False, True)}
