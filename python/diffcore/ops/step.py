"""One reverse step of any solver, its log-probability, and the two of the lecture by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffcore._engine.dispatch import plain_eager, run
from diffcore._kernels import step as k
from diffcore._types import ClipRange, Coef, Noise, Row, Step
from diffcore.coefficients import step as formulas
from diffcore.ops._arguments import as_coef, as_table, in_float64
from diffcore.ops._noise import run_noisy

__all__ = [
    "ddim_step",
    "ddpm_step",
    "reverse_step",
    "step_log_prob",
]


_ALL = len(formulas.STEP_COLUMNS)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    threshold: Coef | None = None,
    history: Sequence[Tensor] = (),
    return_history: bool = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: bool = False,
    out: Tensor | None = None,
) -> Any:
    """One step of any solver, with guidance, conversion, clip, update and noise in one launch.

    With ``m = m_u + w (m_c - m_u)`` under guidance and ``x0 = clip(a_x x + a_m m, clip_min,
    clip_max)``::

        x' = c_x x + c_m m + c_0 x0 + c_1 h_1 + c_2 h_2 + c_3 h_3 + c_z noise
        h' = e_x x + e_m m + e_0 x0

    Differentiable in `x`, the model outputs, `history` and `noise`; outside the clip no gradient
    flows through `x0`. ``SolverTable.step`` calls this for a step of a solver.

    Args:
        x: the current samples `[B, ...]`.
        model_output: m, `[B, ...]`. Under guidance m_c, or, without `model_output_uncond`, both in
            one tensor `[2 B, ...]`, m_u first.
        coefficients: a table `[T, 8]` or `[T, 14]` read at `t`, or `[B, 8 or 14]` or a row of
            numbers without `t`; float64 or float32. The columns are c_x, c_m, c_0, c_z, a_x, a_m,
            clip_min, clip_max, and, where history is read or returned, e_x, e_m, e_0, c_1, c_2,
            c_3 (``solvers.COLUMNS``).
        t: the row: an int, `[B]` or a one-element counter.
        noise: z `[B, ...]`, or a recipe for it; None leaves the last term out.
        model_output_uncond: m_u `[B, ...]`, for classifier-free guidance.
        guidance_scale: w, a number or `[B]`; needed under guidance, and only then.
        threshold: s, a number or `[B]`: x0 is clipped to [-s, s] instead, and divided by s
            (:func:`dynamic_threshold`); 0 for the row's own clip_min and clip_max.
        history: h_1, h_2, h_3 or the first of them, `[B, ...]`: what earlier steps returned.
        return_history: return h' too.
        variance_output: v `[B, ...]`, where a model says the variance of its own step: the noise
            is then ``c_z exp(s_0 + s_v v) noise``. Needs `noise`; not with history.
        variance_coefficients: (s_0, s_v), like `coefficients`.
        return_log_prob: return log p(x' | x) too (:func:`step_log_prob`), of x' as it is stored,
            which takes a second launch; x' counts as a constant. Not with history.
        out: where to write x', `x` itself if you like; no gradient may be needed.

    Returns:
        The samples of the next step `[B, ...]`; or a tuple of them and what was asked for: h'
        `[B, ...]`, the log-probability `[B]`.

    Source: docs/architecture.md, "A solver is a table"; guidance: Ho & Salimans 2022 (arXiv
    2207.12598); threshold: Saharia et al. 2022 (arXiv 2205.11487).
    """
    earlier = tuple(history)
    if len(earlier) > k.MOST_HISTORY:
        raise ValueError(f"history has {len(earlier)} tensors; wanted at most {k.MOST_HISTORY}")
    if (variance_output is None) != (variance_coefficients is None):
        raise ValueError("variance_output and variance_coefficients come together; got one")
    more = bool(earlier) or return_history
    if return_log_prob and (out is not None or more or variance_output is not None):
        raise ValueError("return_log_prob goes with neither out, history nor variance_output")
    if out is not None and (return_history or len(earlier) > 1):
        raise ValueError("out goes with neither return_history nor more than one h")
    reads, keeps = len(earlier), return_history or len(earlier) > 1
    if variance_output is None:
        row = first_columns(coefficients, k.columns_read(reads, keeps))
        plan = k.plan(row, reads, keeps, noise is not None)
        if plan.padding:
            earlier += (x,) * plan.padding
    else:
        if noise is None or reads or keeps:
            raise ValueError("variance_output goes with noise and without history")
        assert variance_coefficients is not None
        row = first_columns(coefficients, k.PLAIN)
        row += first_columns(variance_coefficients, 2, "variance_coefficients")
        plan, earlier = k.learned_plan(row), (variance_output,)
    found = take(
        plan,
        x,
        model_output,
        earlier,
        t,
        noise,
        model_output_uncond,
        guidance_scale,
        threshold,
        out,
    )
    if keeps and not return_history:
        found = found[0]
    if return_log_prob:
        made = found.detach()
        return found, step_log_prob(
            x,
            model_output,
            made,
            coefficients,
            t=t,
            model_output_uncond=model_output_uncond,
            guidance_scale=guidance_scale,
            threshold=threshold,
        )
    return found


def step_log_prob(
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    threshold: Coef | None = None,
) -> Tensor:
    """The log p(x' | x) of a step: a Gaussian around what :func:`reverse_step` gives unnoised.

    With n elements in a sample and mean = c_x x + c_m m + c_0 x0::

        -1/2 sum((x' - mean)²) / c_z² - n log c_z - n/2 log(2 pi)

    A step without noise (c_z = 0: the last of most walks) has no density; it gives 0 and gradient
    0. Differentiable; by m alone in one launch, as policy gradients need it.

    Args:
        x: the samples before the step `[B, ...]`.
        model_output: as for :func:`reverse_step`.
        x_next: x', the samples after it `[B, ...]`.
        coefficients: as for :func:`reverse_step`; a step that reads history has no such form.
        t: as for :func:`reverse_step`.
        model_output_uncond: as for :func:`reverse_step`.
        guidance_scale: as for :func:`reverse_step`.
        threshold: as for :func:`reverse_step`.

    Returns:
        `[B]`, float32 (float64 for float64 samples): the sum over each sample, in nats.

    Source: Black et al. 2023 (arXiv 2305.13301), section 4.
    """
    row = first_columns(coefficients, k.PLAIN)
    tensors, leading = leading_of(x, model_output, model_output_uncond, guidance_scale, threshold)
    kernel = k.STEP_LOG_PROB[len(tensors) == 3]
    return run(kernel, (*tensors, x_next), (*leading, *row), t)


def leading_of(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    threshold: Coef | None,
) -> tuple[tuple[Tensor, ...], tuple[Coef, Coef]]:
    """The tensors that every step reads, and the coefficients that no table holds."""
    bound = 0.0 if threshold is None else as_coef("threshold", threshold, None)
    if isinstance(bound, float) and bound < 0:
        raise ValueError(f"threshold is {bound}; wanted at least 0")
    if guidance_scale is None:
        if model_output_uncond is not None:
            raise ValueError(
                "model_output_uncond and guidance_scale come together; got only model_output_uncond"
            )
        return (x, model_output), (1.0, bound)
    scale = as_coef("guidance_scale", guidance_scale, None)
    if model_output_uncond is None:
        pair = isinstance(x, Tensor) and isinstance(model_output, Tensor) and x.ndim > 0
        if not pair or model_output.ndim == 0 or len(model_output) != 2 * len(x):
            raise ValueError(
                "model_output_uncond and guidance_scale come together; got only guidance_scale, "
                "and a model_output that is not two batches, the unconditional one first"
            )
        model_output_uncond, model_output = model_output.chunk(2)
    return (x, model_output, model_output_uncond), (scale, bound)


def take(
    plan: k.Plan,
    x: Tensor,
    model_output: Tensor,
    others: tuple[Tensor, ...],
    t: Step,
    noise: Noise | None,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    threshold: Coef | None,
    out: Tensor | None = None,
) -> Any:
    """`reverse_step` as planned; `others` is what its kernel reads beside x and the predictions."""
    tensors, leading = leading_of(x, model_output, model_output_uncond, guidance_scale, threshold)
    kernel = plan.kernel if len(tensors) == 2 else plan.guided
    coefs, inputs = leading + plan.coefs[2:], (*tensors, *others)
    if noise is None:
        return run(kernel, inputs, coefs, t, False, out)
    return run_noisy(kernel, inputs, noise, coefs, t, out)


def first_columns(row: Row, columns: int, name: str = "coefficients") -> tuple[Coef, ...]:
    """The first columns of a table, or the first numbers of a row."""
    widths = (columns,) if columns == 2 else (columns, _ALL) if columns == k.PLAIN else (_ALL,)
    if isinstance(row, tuple):
        if len(row) not in widths:
            wanted = " or ".join(map(str, widths))
            raise ValueError(f"{name} has {len(row)} numbers; wanted {wanted}")
        return row[:columns]
    table = as_table(name, row, *widths)
    return (table if table.shape[1] == columns else table[:, :columns],)


def _row(table: Tensor, like: Tensor) -> tuple[Coef, ...]:
    """Coefficients just computed: as numbers where they are, so that none is sent to a device."""
    if table.ndim == 1 and table.device.type == "cpu" and not table.requires_grad and plain_eager():
        return tuple(table.tolist())
    if isinstance(like, Tensor) and table.device != like.device:
        table = table.to(like.device, non_blocking=True)
    return (as_table("coefficients", table, 8),)


def ddpm_step(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    noise: Noise | None = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One ancestral step: ``x_{t-1} = A_t x0 + B_t x_t + s_t noise``, x0 the (clipped) prediction.

    With beta = sigma² - (alpha/alpha_prev)² sigma_prev²: A = alpha_prev beta / sigma², B =
    (alpha/alpha_prev) sigma_prev² / sigma², s² = beta sigma_prev² / sigma² ("fixed_small") or
    beta ("fixed_large"). The coefficients are computed in float64. In a loop, compute a table
    once and use :func:`reverse_step`.

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        noise: z `[B, ...]`, or a recipe for it; None for the last step.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        variance_type: "fixed_small" or "fixed_large".
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: the unconditional prediction `[B, ...]`, for classifier-free guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        out: where to write, `x_t` itself if you like; no gradient may be needed.

    Returns:
        `x_{t-1}` `[B, ...]`.

    Source: Ho et al. 2020, eqs. 6-7 and Algorithm 2.
    """
    table = formulas.ddpm_coefficients(
        in_float64("alpha", alpha),
        in_float64("sigma", sigma),
        in_float64("alpha_prev", alpha_prev),
        in_float64("sigma_prev", sigma_prev),
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=clip_range,
    )
    row = _row(table, x_t)
    plan = k.plan(row, 0, False, noise is not None, k.SOLVER_STEP)
    x_prev: Tensor = take(
        plan, x_t, model_output, (), None, noise, model_output_uncond, guidance_scale, None, out
    )
    return x_prev


def ddim_step(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM step: ``x' = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise``.

    s is eta times the deviation of :func:`ddpm_step` ("fixed_small").

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        eta: 0 is deterministic, 1 has DDPM's ("fixed_small") variance.
        noise: z `[B, ...]`, or a recipe for it; needed only where eta > 0.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        rederive_epsilon: after the clip, take epsilon from the clipped x0 (guided-diffusion's
            rule) or keep the model's (diffusers' default).
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: the unconditional prediction `[B, ...]`, for classifier-free guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        out: where to write, `x_t` itself if you like; no gradient may be needed.

    Returns:
        The samples of the next step `[B, ...]`.

    Raises:
        ValueError: eta above 0 without noise.

    Source: Song et al. 2021, eqs. 12 and 16.
    """
    if noise is None and eta != 0:
        raise ValueError(f"eta is {eta} and noise is None; wanted noise where eta is not 0")
    table = formulas.ddim_coefficients(
        in_float64("alpha", alpha),
        in_float64("sigma", sigma),
        in_float64("alpha_prev", alpha_prev),
        in_float64("sigma_prev", sigma_prev),
        eta=eta,
        prediction_type=prediction_type,
        rederive_epsilon=rederive_epsilon,
        clip_range=clip_range,
    )
    row = _row(table, x_t)
    plan = k.plan(row, 0, False, noise is not None, k.SOLVER_STEP)
    x_prev: Tensor = take(
        plan, x_t, model_output, (), None, noise, model_output_uncond, guidance_scale, None, out
    )
    return x_prev
