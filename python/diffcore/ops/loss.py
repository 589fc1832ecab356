"""Denoising losses."""

from __future__ import annotations

from torch import Tensor

from .. import _kernels as k
from .. import _validate
from .._registry import Coef, Step, run
from ..coefficients import PREDICTION_TYPES
from ._arguments import as_coef, as_number

_NOISE_LOSS = k.TARGET_LOSS.named(("model_output", "noise"))
_X0_LOSS = k.TARGET_LOSS.named(("model_output", "x0"))
_V_LOSS = k.MIXED_TARGET_LOSS.named(
    k.MIXED_TARGET_LOSS.inputs, ("weight", "inverse_n", "sigma", "alpha")
)


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "epsilon",
    alpha: Coef | None = None,
    sigma: Coef | None = None,
    weight: Coef | None = None,
    t: Step = None,
) -> Tensor:
    """The weighted squared error, per sample: ``weight · mean_i (m_i - target_i)²``.

    The target is noise ("epsilon"), x_0 ("sample"), alpha noise - sigma x_0 ("v_prediction") or
    noise - x_0 ("flow_prediction"); it is never written to memory.

    Args:
        model_output: m, `[B, ...]`.
        x0: clean samples `[B, ...]`.
        noise: the noise that was added `[B, ...]`.
        prediction_type: what the model predicts.
        alpha: signal coefficient, for "v_prediction" only: a number, `[B]`, or a table `[T]` with
            `t`.
        sigma: noise coefficient, likewise.
        weight: the weight of each sample (1 when None), likewise.
        t: the step that gathers the tables.

    Returns:
        The loss of each sample, `[B]` (float32 for 16-bit inputs).

    Source: Ho et al. 2020, eq. 14 and Algorithm 1; weights: Hang et al. 2023.
    """
    _validate.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if not isinstance(model_output, Tensor):
        raise TypeError(f"model_output is a {type(model_output).__name__}; wanted a torch.Tensor")
    n = model_output.shape[1:].numel() if model_output.ndim else 1
    w = 1.0 if weight is None else as_coef("weight", weight, t)
    common = (w, 1.0 / max(n, 1))
    if prediction_type in ("epsilon", "sample"):
        step = t if isinstance(w, Tensor) and w.ndim == 2 else None
        of_noise = prediction_type == "epsilon"
        target, other, name = (noise, x0, "x0") if of_noise else (x0, noise, "noise")
        if not isinstance(other, Tensor) or other.shape != model_output.shape:
            _validate.refuse_other(name, other, model_output)
        return run(_NOISE_LOSS if of_noise else _X0_LOSS, (model_output, target), common, step)
    if prediction_type == "flow_prediction":
        step = t if isinstance(w, Tensor) and w.ndim == 2 else None
        return run(k.MIXED_TARGET_LOSS, (model_output, x0, noise), (*common, -1.0, 1.0), step)
    if alpha is None or sigma is None:
        raise ValueError("alpha and sigma are needed for prediction_type='v_prediction'")
    a = as_coef("sigma", -as_number("sigma", sigma), t)
    coefs = (*common, a, as_coef("alpha", alpha, t))
    return run(_V_LOSS, (model_output, x0, noise), coefs, t)
