"""What a kernel is: a functor of csrc/ops, the names of its arguments, its meaning and gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from diffcore._engine import native
from diffcore._types import Coefs, NoiseParts, Step, Tensors

OPS = () if native._C is None else native._C.op_table()
_INDEX: dict[tuple[str, bool], int] = {(op[0], op[5]): i for i, op in enumerate(OPS)}
RANDN_INDEX = _INDEX.get(("randn", True), -1)

Grads = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One functor of csrc/ops/all.h: what it reads and writes, its formula and its gradient.

    Args:
        name: Its name in csrc/ops/all.h.
        inputs: Names of the elementwise inputs, for error messages.
        coefs: Names of the coefficients, for error messages.
        outputs: Number of elementwise outputs.
        sums: Number of sums: one value per sample, or one for all with ``reduce_all``.
        reference: ``(*inputs, *coefs)``, and ``reduce_all=`` for sums, in plain torch. ``None`` for
            a backward kernel.
        backward: The gradient, made of other kernels. ``None`` for a backward kernel.
        saves_inputs: Whether the backward pass needs the inputs.
        makes_gradient: Whether the first output is a gradient that is kept for the backward pass.
        reads_inputs: ``False`` where the only input states shape, dtype and device of the output.
        reads_samples: Whether it is neither elementwise nor a sum: it needs all elements of a
            sample at once.
        table: What error messages call a table of several coefficients.
        step: What they call the row of such a table.
        samples: Which input is the samples: the noise of a key is rounded to its dtype.
        generates_noise: Whether the functor's last input is noise that the kernel generates; it is
            not among ``inputs`` then.
        index: The position in the table of the compiled module; -1 without the module.
    """

    name: str
    inputs: tuple[str, ...]
    coefs: tuple[str, ...] = ()
    outputs: int = 1
    sums: int = 0
    reference: Callable[..., Any] | None = None
    backward: Backward | None = None
    saves_inputs: bool = True
    makes_gradient: bool = False
    reads_inputs: bool = True
    reads_samples: bool = False
    table: str = "coefficients"
    step: str = "t"
    samples: int = 0
    generates_noise: bool = False
    index: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _INDEX.get((self.name, self.generates_noise), -1))

    @property
    def operator(self) -> str:
        """The name of this kernel in torch.library."""
        return self.name + "_generated" * self.generates_noise

    def renamed(
        self, inputs: tuple[str, ...], coefs: tuple[str, ...] = (), table: str = "coefficients"
    ) -> Kernel:
        """The same kernel under the argument names of a public function, for its errors."""
        return replace(self, inputs=inputs, coefs=coefs or self.coefs, table=table)

    def selected_by(self, step: str) -> Kernel:
        """The same kernel with another name of the row of a table, for its errors."""
        return replace(self, step=step)

    def generating(self) -> Kernel:
        """The kernel that generates the last input instead of reading it."""
        return replace(self, inputs=self.inputs[:-1], generates_noise=True)

    def reading(self) -> Kernel:
        """The kernel that reads the noise which this one generates."""
        return replace(self, inputs=(*self.inputs, "noise"), generates_noise=False)


class NoisyKernel(NamedTuple):
    """A kernel whose last input is noise, and the one that generates this noise."""

    reading: Kernel
    generating: Kernel

    def renamed(
        self, inputs: tuple[str, ...], coefs: tuple[str, ...] = (), table: str = "coefficients"
    ) -> NoisyKernel:
        """The same pair under the argument names of a public function, for its errors."""
        reading = self.reading.renamed(inputs, coefs, table)
        return NoisyKernel(reading, reading.generating())

    def selected_by(self, step: str) -> NoisyKernel:
        """The same pair with another name of the row of a table, for its errors."""
        return NoisyKernel(self.reading.selected_by(step), self.generating.selected_by(step))


Call = tuple[Kernel, Coefs, Step, bool, NoiseParts | None]
"""Kernel, coefficients, step, ``reduce_all``, and what the kernel generates its noise from."""

Backward = Callable[[Tensors, Call, Grads, Sequence[bool]], Grads | None]
"""``(inputs, call, upstream gradients, which inputs need one)`` to a gradient for each input.

``None`` in place of them: differentiate the reference.
"""
