"""The guidance of a call: from its arguments to the tensors and numbers that a step reads."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore._checks import check_dense
from diffcore._engine import messages
from diffcore._kernels.step import UNGUIDED
from diffcore._types import Coef, Coefs, Tensors
from diffcore.guidance import CFGPlusPlus, Guidance, Weighted, by_entry, combined
from diffcore.ops._arguments import as_coef


class Guided(NamedTuple):
    """The unconditional prediction, and the numbers of ``m = m_u + g m_u + w (m_c - m_u)``."""

    uncond: Tensor
    w: Coef
    g: Coef


def predictions(
    x: Tensor,
    model_output: Tensor,
    guided: Guided | None,
    threshold: Coef | None,
) -> tuple[Tensors, Coefs]:
    """The tensors that every step reads, and its coefficients before the columns.

    Args:
        x: The current samples.
        model_output: m, or m_c under guidance.
        guided: ``None`` without guidance.
        threshold: Bound of x_0, or ``None``.
    """
    bound = 0.0 if threshold is None else bound_of(threshold)
    if guided is None:
        return (x, model_output), (*UNGUIDED[:4], bound)
    uncond, w, g = guided
    return (x, model_output, uncond), (w, g, *UNGUIDED[2:4], bound)


def bound_of(threshold: Coef) -> Coef:
    """The bound of x_0, checked."""
    bound = as_coef("threshold", threshold, None)
    if isinstance(bound, float) and bound < 0:
        raise ValueError(f"threshold must be at least 0, got {bound}")
    return bound


def guided_by(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    guidance: Guidance | None = None,
    plus_plus: bool = False,
    remember: bool = True,
) -> tuple[Tensor, Guided | None]:
    """The conditional prediction, and the guidance of a call, ``None`` if there is none.

    Args:
        x: The current samples.
        model_output: m_c, or both predictions in one tensor.
        model_output_uncond: m_u, or ``None``.
        guidance_scale: w, or ``None``.
        guidance: A rule, or ``None``.
        plus_plus: Whether the rule may be that of CFG++.
        remember: Whether this is a step, whose predictions a rule may remember.
    """
    if guidance is None and guidance_scale is not None:
        uncond = model_output_uncond
        if uncond is None:
            model_output, uncond = halves(x, model_output)
        if by_entry(guidance_scale, model_output):
            return _combined(x, model_output, uncond, guidance_scale, 0.0), None
        return model_output, Guided(uncond, as_coef("guidance_scale", guidance_scale, None), 0.0)
    if guidance_scale is None:
        if guidance is None:
            if model_output_uncond is None:
                return model_output, None
            raise ValueError(
                "guidance_scale must be given with model_output_uncond, got None; or pass guidance"
            )
        _check_rule(guidance, plus_plus)
    elif guidance is not None:
        raise ValueError("guidance_scale must be None with guidance, got both")
    uncond = model_output_uncond
    if uncond is None:
        model_output, uncond = halves(x, model_output)
    assert guidance is not None
    if guidance.reads_predictions:
        given = {"x": x, "model_output": model_output, "model_output_uncond": uncond}
        _, model_output, uncond = alike(given)
        uncond = guidance.moved(model_output, uncond)
    w, g = guidance.numbers(model_output, uncond)
    if remember:
        guidance.remember(model_output, uncond)
    if by_entry(w, model_output):
        return _combined(x, model_output, uncond, w, g), None
    return model_output, Guided(uncond, as_coef("scale", w, None), as_coef("g", g, None))


def _combined(x: Tensor, model_output: Tensor, uncond: Tensor, w: Coef, g: Coef) -> Tensor:
    """The guided prediction, where w has a number of each channel or token."""
    given = {"x": x, "model_output": model_output, "model_output_uncond": uncond}
    _, model_output, uncond = alike(given)
    return combined(model_output, uncond, w, g)


def known_guidance(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    guidance: Guidance | None,
) -> tuple[Tensor, Tensor | None, Guidance | None]:
    """m_c, m_u and the guidance as numbers, before samples are viewed in another shape."""
    if guidance is None and guidance_scale is not None:
        if model_output_uncond is None:
            model_output, model_output_uncond = halves(x, model_output)
        return model_output, model_output_uncond, Weighted(guidance_scale, 0.0)
    given = (model_output, model_output_uncond, guidance_scale, guidance)
    model_output, guided = guided_by(x, *given)
    if guided is None:
        return model_output, None, None
    return model_output, guided.uncond, Weighted(guided.w, guided.g)


def _check_rule(guidance: object, plus_plus: bool) -> None:
    """Refuses what is no rule, or none for a call that knows no row."""
    if not isinstance(guidance, Guidance):
        kind = type(guidance).__name__
        raise TypeError(
            f"guidance must be a rule of diffcore.guidance, got {kind}; a number is guidance_scale"
        )
    if isinstance(guidance, CFGPlusPlus) and not plus_plus:
        raise ValueError("guidance must not be CFGPlusPlus here; use solvers.cfg_pp_table")
    if guidance.by_row:
        raise ValueError(
            f"guidance must be the same in every row here, got {type(guidance).__name__} with an "
            "interval or zero_init_steps; use a table, or pass guidance.at(i, rows) or "
            "Weighted(1.0, 0.0)"
        )


def alike(named: dict[str, Tensor]) -> Tensors:
    """Tensors that are read before a kernel checks them: checked, in the widest of their dtypes.

    Args:
        named: The tensors by the names of the caller's arguments; x states shape and device.

    Raises:
        TypeError: Something else, or a dtype that kernels do not take.
        ValueError: A tensor without memory, or of another shape or device.
    """
    if not all(isinstance(value, Tensor) for value in named.values()):
        messages.refuse_non_tensor(tuple(named), tuple(named.values()))
    for name, value in named.items():
        messages.check_tensor(name, value)
    x = named["x"]
    for name, value in named.items():
        if value.shape != x.shape:
            raise ValueError(
                f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} must have the device of x, {x.device}, got {value.device}")
    widest = functools.reduce(torch.promote_types, [value.dtype for value in named.values()])
    return tuple([y if y.dtype == widest else y.to(widest) for y in named.values()])


def halves(x: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """m_c and m_u of one tensor ``[2 B, ...]``, m_u first."""
    pair = isinstance(x, Tensor) and isinstance(model_output, Tensor) and x.ndim > 0
    if pair:
        check_dense("x", x)
        check_dense("model_output", model_output)
    if not pair or model_output.ndim == 0 or model_output.shape[0] != 2 * x.shape[0]:
        raise ValueError(
            "model_output_uncond must be given with guidance, got None; or pass a model_output "
            "[2 B, ...] with the unconditional batch first"
        )
    uncond, model_output = model_output.chunk(2)
    return model_output, uncond
