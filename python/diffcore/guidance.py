"""Guidance: how two predictions of a model, conditional and unconditional, become one.

Every rule here is two numbers of a sample, w and g, with which the step kernel computes
``m = m_u + g m_u + w (m_c - m_u)`` while it takes the step: no guided prediction is written to
memory. Rules that depend on the predictions get both numbers from sums over a sample, in one more
launch that reads m_c and m_u once, without waiting for the device. Numbers of each channel or token
combine m_c and m_u in one more launch before the step.

Pass a rule as ``guidance=`` to ``diffcore.sample``, ``SolverTable.step``, ``ops.reverse_step``,
``sampling.capture`` and the loops of ``GaussianDiffusion``; ``guidance_scale=w`` is short for
``CFG(w)``.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffcore._checks import as_int, as_real
from diffcore._engine.dispatch import run, run_tuple
from diffcore._kernels.guidance import GUIDANCE_WEIGHTS, KINDS
from diffcore._kernels.linear import LINEAR_COMBINATION
from diffcore._kernels.step import REVERSE_STEP, STILL
from diffcore._types import Coef, Coefs

__all__ = [
    "APG",
    "CFG",
    "TCFG",
    "CFGPlusPlus",
    "CFGZeroStar",
    "Guidance",
    "NormPreservingCFG",
    "RescaledCFG",
    "Weighted",
]

_SUM = LINEAR_COMBINATION.reading.renamed(
    ("model_output", "model_output_uncond"), ("1", "momentum")
)
_STEP = REVERSE_STEP[True, 0, False, STILL]
# Of a step that stops at m: c_m = 1.
_TO_M: Coefs = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -math.inf, math.inf)
_Weights = tuple[Coef, Coef]
_ALWAYS = (0.0, 1.0)
_Rule = TypeVar("_Rule", bound="Guidance")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A rule of guidance; the base of all.

    Args:
        interval: (start, stop), as fractions of the rows of a table: guidance acts in the rows i of
            n with ``int(start n) <= i < int(stop n)``; in the others m is m_c, and
            ``diffcore.sample`` leaves out the call of the model for m_u, if there is one. Source:
            Kynkäänniemi et al. 2024 (arXiv 2404.07724), with the fractions of diffusers' guiders.
    """

    interval: tuple[float, float] = _ALWAYS

    reads_predictions: ClassVar[bool] = True
    """Whether ``weights`` reads the predictions, which are checked before it is called then."""

    def __post_init__(self) -> None:
        """Checks the arguments."""
        try:
            start, stop = self.interval
        except (TypeError, ValueError):
            came = type(self.interval).__name__
            raise TypeError(f"interval must be a pair of numbers, got {came}") from None
        low, high = as_real("interval", start), as_real("interval", stop)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"interval must be (start, stop) with 0 <= start <= stop <= 1, got {(low, high)}"
            )
        object.__setattr__(self, "interval", (low, high))

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """The numbers w and g of ``m = m_u + g m_u + w (m_c - m_u)``.

        Args:
            model_output: m_c, the conditional prediction ``[B, ...]``.
            model_output_uncond: m_u, the unconditional one ``[B, ...]``.

        Returns:
            Two numbers, or tensors ``[B]``: float32 (float64 for float64 predictions).
        """
        raise NotImplementedError(f"{type(self).__name__} must define weights(m_c, m_u)")

    def numbers(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """``weights``, checked.

        Args:
            model_output: m_c ``[B, ...]``.
            model_output_uncond: m_u ``[B, ...]``, as ``moved`` returned it.

        Returns:
            w and g.

        Raises:
            TypeError: ``weights`` returned something else than two values.
        """
        found = self.weights(model_output, model_output_uncond)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            came = (
                f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
            )
            raise TypeError(f"weights of {type(self).__name__} must return (w, g), got {came}")
        return found[0], found[1]

    def combine(self, model_output: Tensor, model_output_uncond: Tensor) -> Tensor:
        """The guided prediction itself, for a loop that needs it as a tensor.

        Args:
            model_output: m_c ``[B, ...]``.
            model_output_uncond: m_u ``[B, ...]``.

        Returns:
            ``m_u + g m_u + w (m_c - m_u)``, ``[B, ...]``. Remembers nothing.

        Raises:
            ValueError: The rule differs between rows: take that of a row by ``at``.
        """
        if self.by_row:
            raise ValueError(
                f"guidance must be the same in every row here, got {type(self).__name__} with an "
                "interval or zero_init_steps; call combine of guidance.at(i, rows)"
            )
        uncond = self.moved(model_output, model_output_uncond)
        w, g = (
            x if isinstance(x, Tensor) else as_real("weights", x)
            for x in self.numbers(model_output, uncond)
        )
        return combined(model_output, uncond, w, g)

    def at(self, i: int, rows: int) -> Guidance | None:
        """The rule at a row of a table.

        Args:
            i: The row.
            rows: How many rows the table has.

        Returns:
            The rule that holds there; ``None`` where m is m_c.
        """
        if self.interval == _ALWAYS:
            return self
        start, stop = self.interval
        inside = int(start * rows) <= i < int(stop * rows)
        return _changed(self, interval=_ALWAYS) if inside else None

    def moved(self, model_output: Tensor, model_output_uncond: Tensor) -> Tensor:
        """m_u as the step reads it; called before ``weights``, and more than once in a row.

        Args:
            model_output: m_c ``[B, ...]``.
            model_output_uncond: m_u ``[B, ...]``.

        Returns:
            m_u, unless the rule remembers predictions of earlier rows.
        """
        del model_output
        return model_output_uncond

    def remember(self, model_output: Tensor, model_output_uncond: Tensor) -> None:
        """Called by each step with its predictions, for rules that read them in the next one.

        Args:
            model_output: m_c ``[B, ...]``.
            model_output_uncond: What ``moved`` returned, ``[B, ...]``.
        """

    @property
    def remembers(self) -> bool:
        """Whether it remembers predictions of earlier rows."""
        return type(self).remember is not Guidance.remember

    @property
    def by_row(self) -> bool:
        """Whether it differs between the rows of a table."""
        return self.interval != _ALWAYS

    def begin(self) -> Guidance:
        """The rule for one sampling loop: a fresh one if it remembers predictions of earlier rows.

        Returns:
            Itself, if it remembers nothing.
        """
        return self


@dataclass(frozen=True)
class Weighted(Guidance):
    """Guidance whose two numbers are known.

    Args:
        w: A number or ``[B]``.
        g: A number or ``[B]``.
    """

    w: Coef
    g: Coef

    reads_predictions = False

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """See ``Guidance``."""
        del model_output, model_output_uncond
        return self.w, self.g


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance: ``m = m_u + w (m_c - m_u)``.

    Args:
        scale: w, a number, ``[B]``, or ``[B, C]`` for the channels, which takes one more launch.
        interval: See ``Guidance``.

    Source:
        Ho and Salimans 2022 (arXiv 2207.12598).
    """

    scale: Coef

    reads_predictions = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale", dims=2)

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """See ``Guidance``."""
        del model_output, model_output_uncond
        return self.scale, 0.0


@dataclass(frozen=True)
class CFGPlusPlus(CFG):
    """CFG++: x_0 from the guided prediction, the noise that is added back from m_u.

    It needs a table that has factors for m_u itself: ``solvers.cfg_pp_table`` or
    ``solvers.dpmpp_2m_cfg_pp_table``. There ``CFG`` is the same; this class is refused elsewhere.

    Args:
        scale: λ, most often in [0, 1]. A number or ``[B]``.
        interval: See ``Guidance``.

    Source:
        Chung et al. 2024 (arXiv 2406.08070).
    """


class _BySums(Guidance):
    """A rule whose numbers are made of sums over a sample."""

    scale: Coef
    _kind: str

    def _parameters(self) -> tuple[float, float]:
        """Two numbers of the kind."""
        return 0.0, 0.0

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """See ``Guidance``."""
        coefs = (float(KINDS.index(self._kind)), self.scale, *self._parameters())
        w, g = run_tuple(GUIDANCE_WEIGHTS, (model_output, model_output_uncond), coefs)
        return w, g


@dataclass(frozen=True)
class RescaledCFG(_BySums):
    """CFG with the standard deviation of m_c: ``m = φ m' std(m_c) / std(m') + (1 - φ) m'``.

    m' is the prediction under CFG, std the deviation of the elements of a sample.

    Args:
        scale: w, a number or ``[B]``.
        rescale: φ; 0 is CFG.
        interval: See ``Guidance``.

    Source:
        Lin et al. 2023 (arXiv 2305.08891), section 3.4.
    """

    scale: Coef
    rescale: float = 0.7
    _kind = "rescaled"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale")
        _number(self, "rescale", 0, 1)

    def _parameters(self) -> tuple[float, float]:
        return self.rescale, 0.0


@dataclass(frozen=True)
class CFGZeroStar(_BySums):
    """CFG-Zero*: CFG with the multiple of m_u nearest to m_c, and m = 0 in the first rows.

    ``m = s m_u + w (m_c - s m_u)`` with ``s = m_c · m_u / |m_u|²``.

    Args:
        scale: w, a number or ``[B]``.
        zero_init_steps: In how many rows of the table, from the first, m is 0.
        interval: See ``Guidance``.

    Source:
        Fan et al. 2025 (arXiv 2503.18886).
    """

    scale: Coef
    zero_init_steps: int = 1
    _kind = "zero_star"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale")
        object.__setattr__(
            self, "zero_init_steps", as_int("zero_init_steps", self.zero_init_steps, 0)
        )

    def at(self, i: int, rows: int) -> Guidance | None:
        """See ``Guidance``."""
        if i < self.zero_init_steps:
            return Weighted(0.0, -1.0)
        return super(CFGZeroStar, _changed(self, zero_init_steps=0)).at(i, rows)

    @property
    def by_row(self) -> bool:
        """See ``Guidance``."""
        return self.interval != _ALWAYS or self.zero_init_steps > 0


@dataclass(frozen=True)
class APG(_BySums):
    """Adaptive projected guidance: ``m = m_c + (w - 1) (Δ_⊥ + η Δ_∥)``.

    Δ = m_c - m_u, plus ``momentum`` times that of the row before, shortened to the norm
    ``norm_threshold``; Δ_∥ is its part along m_c, Δ_⊥ the rest. diffusers' guider has the same with
    ``use_original_formulation=True`` and a scale of w - 1; its default adds w times to m_u.

    Args:
        scale: w, a number or ``[B]``.
        eta: η, the share of the part along m_c, which saturates images; 1 keeps it all.
        norm_threshold: The largest norm of Δ over a sample; ``None`` or 0 for no limit.
        momentum: Of Δ, negative in the paper; 0 for none. A rule with momentum remembers Δ: loops
            of your own pass ``rule.begin()`` for every loop.
        interval: See ``Guidance``.

    Source:
        Sadat et al. 2024 (arXiv 2410.02416).
    """

    scale: Coef
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0
    _kind = "projected"
    _before: list[Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale")
        _number(self, "eta")
        _number(self, "momentum")
        if self.norm_threshold is not None:
            _number(self, "norm_threshold", 0)

    def _parameters(self) -> tuple[float, float]:
        limit = self.norm_threshold
        return self.eta, math.inf if limit is None or limit == 0 else limit

    def begin(self) -> Guidance:
        """See ``Guidance``."""
        return replace(self, _before=[]) if self.momentum else self

    def moved(self, model_output: Tensor, model_output_uncond: Tensor) -> Tensor:
        """m_u moved so that m_c - m_u has its momentum; see ``Guidance``.

        Raises:
            ValueError: The rule has momentum and was not begun.
        """
        del model_output
        if not self.momentum:
            return model_output_uncond
        if self._before is None:
            raise ValueError(
                "guidance must be begun where it has momentum, got APG; pass guidance.begin() of "
                "each loop"
            )
        if not self._before:
            return model_output_uncond
        return run(_SUM, (model_output_uncond, self._before[0]), (1.0, -self.momentum))

    def remember(self, model_output: Tensor, model_output_uncond: Tensor) -> None:
        """Keeps m_c - m_u; see ``Guidance``."""
        if self._before is not None:
            self._before[:] = [run(_SUM, (model_output, model_output_uncond), (1.0, -1.0))]

    @property
    def remembers(self) -> bool:
        """See ``Guidance``."""
        return self.momentum != 0


@dataclass(frozen=True)
class TCFG(_BySums):
    """Tangential damping: CFG with m_u projected on the first singular vector of (m_c, m_u).

    Args:
        scale: w, a number or ``[B]``.
        interval: See ``Guidance``.

    Source:
        Kwon et al. 2025 (arXiv 2503.18137).
    """

    scale: Coef
    _kind = "tangential"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale")


@dataclass(frozen=True)
class NormPreservingCFG(_BySums):
    """CFG with the norm of m_c: ``m = m' |m_c| / |m'|``, m' the prediction under CFG.

    Args:
        scale: w, a number or ``[B]``.
        dim: -1 for the norm of each vector along the last dimension, such as the tokens of
            ``[B, N, D]``, in one more launch; ``None`` for that of a sample.
        interval: See ``Guidance``.

    Source:
        The guidance of Qwen-Image's pipeline, with dim = -1.
    """

    scale: Coef
    dim: int | None = None
    _kind = "norm_preserving"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        _number(self, "scale")
        if self.dim is not None and as_int("dim", self.dim) != -1:
            raise ValueError(f"dim must be -1 or None, got {self.dim}")

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> _Weights:
        """See ``Guidance``; with ``dim`` tensors of the shape of the predictions but for it."""
        if self.dim is None or model_output.ndim < 3:
            return super().weights(model_output, model_output_uncond)
        entries = tuple(model_output.shape[:-1])
        rule = replace(self, dim=None, scale=_of_entries(self.scale, entries))
        rows = [m.reshape(-1, m.shape[-1]) for m in (model_output, model_output_uncond)]
        w, g = (x.view(entries) for x in rule.weights(*rows))  # type: ignore[union-attr]
        return w, g


def by_entry(w: Any, model_output: Tensor) -> bool:
    """Whether w is a number of each entry of several leading dimensions of the prediction."""
    if not isinstance(w, Tensor) or w.ndim < 2 or not isinstance(model_output, Tensor):
        return False
    if w.is_nested or model_output.is_nested:
        return False
    return w.shape == model_output.shape[: w.ndim]


def combined(model_output: Tensor, model_output_uncond: Tensor, w: Coef, g: Coef) -> Tensor:
    """The guided prediction, in one launch.

    Args:
        model_output: m_c ``[B, ...]``.
        model_output_uncond: m_u ``[B, ...]``.
        w: A number, ``[B]``, or one of each entry of several leading dimensions, ``[B, C]``.
        g: The same.

    Returns:
        ``m_u + g m_u + w (m_c - m_u)``.
    """
    dims = w.ndim if by_entry(w, model_output) else 1  # type: ignore[union-attr]
    if dims == 1:
        predictions = (model_output, model_output, model_output_uncond)  # the first as x, unread
        return run(_STEP, predictions, (w, g, *_TO_M))
    entries = tuple(model_output.shape[:dims])
    rows = [m.flatten(0, dims - 1) for m in (model_output, model_output_uncond)]
    w, g = [_of_entries(c, entries) for c in (w, g)]
    m: Tensor = run(_STEP, (rows[0], *rows), (w, g, *_TO_M)).unflatten(0, entries)
    return m


def _of_entries(c: Coef, entries: tuple[int, ...]) -> Coef:
    """A number of each entry, flat; one of each sample is that of all its entries."""
    if not isinstance(c, Tensor) or c.ndim == 0:
        return c
    return c.reshape(*c.shape, *(1,) * (len(entries) - c.ndim)).expand(entries).reshape(-1)


def _changed(rule: _Rule, **fields: Any) -> _Rule:
    """A copy with other fields, of a class that may have an ``__init__`` of its own."""
    found = copy.copy(rule)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def _number(
    rule: Any, name: str, least: float = -math.inf, most: float = math.inf, dims: int = 1
) -> None:
    """Checks a field that is a number, or, as the scale, ``[B]``; stores it as a float."""
    value = getattr(rule, name)
    if name == "scale" and isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64) or value.ndim > dims:
            shapes = "[B]" if dims == 1 else "[B] or [B, C]"
            raise TypeError(
                f"scale must be a number or a float32 or float64 tensor {shapes}, got "
                f"{value.dtype} {'nested' if value.is_nested else tuple(value.shape)}"
            )
        return
    number = as_real(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} must not be nan, got nan")
    if not least <= number <= most:
        wanted = f"in [{least:g}, {most:g}]" if most < math.inf else f"at least {least:g}"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    object.__setattr__(rule, name, number)
