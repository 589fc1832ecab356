"""The guiders of diffusers' modular pipelines whose rule is one of ``diffcore.guidance``.

Guiders that write ``m_u + w (m_c - m_u)`` need nothing: the predictions know of it. Others compute
with the predictions, so the ``forward`` of the guider itself notes its rule.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from diffcore.diffusers.guidance import Combination, paired
from diffcore.guidance import APG, TCFG, CFGZeroStar, Guidance, RescaledCFG


def watch(pipe: Any) -> None:
    """Let the guiders of a pipeline note their rules.

    Args:
        pipe: A pipeline of diffusers.
    """
    for guider in _guiders(pipe):
        # Of the object, and with the object for an argument: a copy has its own.
        guider.forward = functools.partial(_noting, guider)


def unwatch(pipe: Any) -> None:
    """Let the guiders of a pipeline compute again.

    Args:
        pipe: A pipeline of diffusers, or anything else, which has none.
    """
    for guider in _guiders(pipe):
        if getattr(vars(guider).get("forward"), "func", None) is _noting:
            del guider.forward


def rule_of(guider: Any) -> Guidance | None:
    """The rule of a guider in the step that it is at.

    Args:
        guider: One of diffusers.

    Returns:
        The rule; ``None`` where there is none, or it is only the formula of the predictions.
    """
    if type(guider.guidance_scale) not in (float, int):
        return None
    # m_c + w (m_c - m_u) is m_u + (1 + w) (m_c - m_u).
    w = guider.guidance_scale + (1.0 if guider.use_original_formulation else 0.0)
    return _RULES[type(guider)](guider, w)


def _guiders(pipe: Any) -> list[Any]:
    components = getattr(pipe, "components", None)
    found = components.values() if isinstance(components, dict) else ()
    return [guider for guider in found if type(guider) in _RULES]


def _noting(guider: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
    """``forward`` of a guider."""
    forward = type(guider).forward
    rule = rule_of(guider)
    parts = None if rule is None else paired(pred_cond, pred_uncond)
    if parts is None:
        return forward(guider, pred_cond, pred_uncond)
    now = copy.copy(guider)  # the guider goes on, and a tensor may be looked at later

    def looked_at(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda cond, uncond: getattr(forward(now, cond, uncond), name)

    uncond = pred_uncond
    if isinstance(rule, CFGZeroStar):  # returns the multiple of m_u that it has made
        uncond = Combination.of(parts, rule=(None, looked_at("pred_uncond")))
    return GuiderOutput(
        pred=Combination.of(parts, rule=(rule, looked_at("pred"))),
        pred_cond=pred_cond,
        pred_uncond=uncond,
    )


def _rescaled(guider: Any, w: float) -> Guidance | None:
    if not guider._is_cfg_enabled() or not 0 < guider.guidance_rescale <= 1:
        return None
    return RescaledCFG(w, guider.guidance_rescale)


def _zero_star(guider: Any, w: float) -> Guidance | None:
    zero = guider._step < guider.zero_init_steps
    if zero or not guider._is_cfg_enabled() or guider.guidance_rescale > 0:
        return None
    return CFGZeroStar(w, zero_init_steps=0)


def _tangential(guider: Any, w: float) -> Guidance | None:
    if not guider._is_tcfg_enabled() or guider.guidance_rescale > 0:
        return None
    return TCFG(w)


def _projected(guider: Any, w: float) -> Guidance | None:
    plain = guider.momentum_buffer is None and guider.adaptive_projected_guidance_norm_dim is None
    # The default adds w times the update to m_u, where the paper adds it to m_c.
    if not plain or not guider.use_original_formulation or guider.guidance_rescale > 0:
        return None
    if not guider._is_apg_enabled():
        return None
    return APG(w, eta=guider.eta, norm_threshold=guider.adaptive_projected_guidance_rescale)


_RULES: dict[type, Callable[[Any, float], Guidance | None]] = {
    ClassifierFreeGuidance: _rescaled,
    ClassifierFreeZeroStarGuidance: _zero_star,
    TangentialClassifierFreeGuidance: _tangential,
    AdaptiveProjectedGuidance: _projected,
}
