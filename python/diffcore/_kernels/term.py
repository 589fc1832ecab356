"""An elementwise term, its sum over samples, and the kernels of both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore._engine.dispatch import run_tuple
from diffcore._engine.kernel import Call, Grads, Kernel
from diffcore._engine.library import define
from diffcore._kernels.noise import Needs
from diffcore._types import Coef, Tensors
from diffcore.reference import common


class Term:
    """An elementwise term, its sum over samples, and the kernels of their gradients."""

    def __init__(
        self,
        name: str,
        inputs: tuple[str, ...],
        formula: Callable[..., Tensor],
        gradients: dict[str, tuple[int, ...]],
    ) -> None:
        self.gradients = gradients
        self.elementwise = define(
            Kernel(
                name,
                inputs,
                reference=lambda *x: common.elementwise(formula, x),
                backward=self._elementwise_backward,
            )
        )
        self.sum = define(
            Kernel(
                f"{name}_sum",
                inputs,
                ("scale",),
                outputs=0,
                sums=1,
                reference=lambda *args, reduce_all: _sum_of(
                    formula, args[:-1], args[-1], reduce_all
                ),
                backward=self._sum_backward,
            )
        )
        self.of_elementwise, self.of_sum = {}, {}
        for suffix, covered in gradients.items():
            names, n = f"backward{suffix}", len(covered)
            self.of_elementwise[suffix] = define(
                Kernel(f"{name}_{names}", (*inputs, "grad"), outputs=n)
            )
            self.of_sum[suffix] = define(
                Kernel(f"{name}_sum_{names}", inputs, ("grad", "scale"), outputs=n)
            )

    def _smallest(self, needs: Needs) -> str:
        fits = [
            s for s, c in self.gradients.items() if all(i in c for i, n in enumerate(needs) if n)
        ]
        return min(fits, key=lambda s: len(self.gradients[s]))

    def _by_input(self, suffix: str, found: Tensors, needs: Needs) -> Grads:
        by_input = dict(zip(self.gradients[suffix], found, strict=True))
        return [by_input[i] if n else None for i, n in enumerate(needs)]

    def _elementwise_backward(
        self, inputs: Tensors, call: Call, grads: Grads, needs: Needs
    ) -> Grads:
        (g,) = grads
        assert g is not None
        suffix = self._smallest(needs)
        if not torch.compiler.is_compiling() and g.ndim and g.numel() and not any(g.stride()):
            # The gradient of .sum() or .mean(): one number, expanded. Read it as one number.
            number = g.as_strided((), ()).to(common.compute_dtype(g.dtype))
            found = run_tuple(self.of_sum[suffix], inputs, (number, 1.0), None)
        else:
            found = run_tuple(self.of_elementwise[suffix], (*inputs, g), (), None)
        return self._by_input(suffix, found, needs)

    def _sum_backward(self, inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
        _, coefs, step, _, _ = call
        (g,) = grads
        assert g is not None
        suffix = self._smallest(needs)
        return self._by_input(
            suffix, run_tuple(self.of_sum[suffix], inputs, (g, *coefs), step), needs
        )


def _sum_of(formula: Any, inputs: Tensors, scale: Coef, reduce_all: bool) -> Tensor:
    compute = common.compute_dtype(inputs[0].dtype)
    return common.row_sum(formula(*(x.to(compute) for x in inputs)), scale, reduce_all)
