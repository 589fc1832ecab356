"""`sample`: the sampling loop with any solver table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from diffcore._types import BeforeModel, Callback, CondFn, Model
from diffcore.guidance import Guidance, Weighted
from diffcore.noise import Noise, StepNoise
from diffcore.ops._arguments import as_coef
from diffcore.sampling.classifier import Classifier
from diffcore.sampling.known import BlendAt, known_part
from diffcore.sampling.loop import run_table
from diffcore.sampling.model import check_samples
from diffcore.sampling.noise import check_step_noise, noise_or_default
from diffcore.sampling.scheduled import run_schedule
from diffcore.sampling.threshold import threshold_rule
from diffcore.sampling.trajectory import Trajectory, recorder
from diffcore.solvers import SolverTable


@overload
def sample(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: StepNoise | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Noise | None = None,
    blend_at: BlendAt = "after_step",
    before_model: BeforeModel | None = None,
    cond_fn: CondFn | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
    checkpoint: bool = False,
    return_trajectory: Literal[False] = False,
    return_log_prob: Literal[False] = False,
    reduction: str = "sum",
    schedule: Tensor | Sequence[Any] | None = None,
    group_dim: int | None = None,
) -> Tensor: ...
@overload
def sample(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: StepNoise | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Noise | None = None,
    blend_at: BlendAt = "after_step",
    before_model: BeforeModel | None = None,
    cond_fn: CondFn | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
    checkpoint: bool = False,
    return_trajectory: Literal[True],
    return_log_prob: bool = False,
    reduction: str = "sum",
    schedule: Tensor | Sequence[Any] | None = None,
    group_dim: int | None = None,
) -> Trajectory: ...
@overload
def sample(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: StepNoise | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Noise | None = None,
    blend_at: BlendAt = "after_step",
    before_model: BeforeModel | None = None,
    cond_fn: CondFn | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
    checkpoint: bool = False,
    return_trajectory: Literal[False] = False,
    return_log_prob: Literal[True],
    reduction: str = "sum",
    schedule: Tensor | Sequence[Any] | None = None,
    group_dim: int | None = None,
) -> Trajectory: ...
def sample(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: StepNoise | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Noise | None = None,
    blend_at: BlendAt = "after_step",
    before_model: BeforeModel | None = None,
    cond_fn: CondFn | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
    checkpoint: bool = False,
    return_trajectory: bool = False,
    return_log_prob: bool = False,
    reduction: str = "sum",
    schedule: Tensor | Sequence[Any] | None = None,
    group_dim: int | None = None,
) -> Tensor | Trajectory:
    """Sample with any solver: one launch for each model call, and no wait for the device.

    The loop runs under ``torch.no_grad()``, unless it is ``differentiable``; a model or a
    ``cond_fn`` that needs gradients of its own enters ``torch.enable_grad()``. The loop keeps no
    state between calls and changes nothing in the table, so any number of threads may sample from
    one table at once. To write your own loop, call ``SolverTable.step``.

    Args:
        model: ``model(x, t, **model_kwargs)`` with ``t`` ``[B]``, the table's timesteps (int64 or
            floating point). It returns the shape of ``x``, a prediction of the prediction_type that
            the table was made for. Under guidance without ``uncond_kwargs`` it returns
            ``[2 B, ...]``, the unconditional half first. For a table with a learned variance it
            returns twice the channels: the prediction, then the predicted variance (under guidance
            the conditional one is used). For a table with ``target_timesteps`` (flow maps) it also
            gets the timestep of the level that the row reaches, ``[B]``, by the keyword
            ``table.target_name``.
        x: The samples to start from, ``[B, ...]``: standard normal noise times
            ``table.init_noise_sigma``, or for a table of levels that rise the samples to invert.
        table: The solver (``diffcore.solvers``).
        guidance_scale: w of classifier-free guidance, m_u + w (m_c - m_u): a number, ``[B]``, or
            ``[B, C]`` for the channels.
        guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for a second, unconditional call of the model.
        cond_fn: Classifier guidance: ``cond_fn(x, t, **model_kwargs)`` gets what the model gets and
            returns the gradient of log p(y | x) by that x, like it, in one call for each call of
            the model. It moves the prediction, under guidance the guided one, as
            ``ops.classifier_guidance`` does: x_0 by sigma² / alpha times the gradient, before it is
            clipped. In a row with alpha = 0, where x holds nothing of x_0, it moves nothing.
        noise: The noise of the steps: a noise key, of which row r takes the stream 1 + r after its
            own (so the key may also have generated ``x``); a tensor ``[S, B, ...]`` with an entry
            for each of the S = ``len(table)`` rows, and ``[S + 1, B, ...]`` for a table with churn,
            whose last entry is the noise that raises the start; or ``(r, x) -> noise``, called for
            the rows that add noise, and first with r = S where churn raises the start. ``None`` for
            a noise key seeded by torch's generator.
        dynamic_thresholding_ratio: Clip the predicted x_0 of each sample to [-s, s] and divide it
            by s, the quantile at this ratio of its absolute values, at least 1 (Imagen).
        sample_max_value: The largest s.
        mask: For inpainting: 1 or True where samples are made, 0 or False where ``known`` is kept;
            broadcast to the shape of ``x``. A soft mask has values between. See
            ``ops.blend_known``.
        known: The known clean samples, like ``x``; with ``mask``.
        known_noise: The noise that they get, the same at every level: like ``x``, or a noise key.
            ``None`` for the key ``noise`` itself, in its own stream, from which ``x`` may have been
            generated too; where that is no key, for one seeded by torch's generator.
        blend_at: Where they are put in, in one more launch a row: "after_step", at the level that
            a row reaches; or "before_model", at the level of each model call (after the function
            ``before_model``), and after the last row. With "after_step" the first model call sees
            ``x`` as it is given. The history of multistep solvers has no known part in it.
        before_model: Called once a step, before its first model call, with a read-only dict of
            ``x``, ``i`` (the step), ``t`` (the timestep input), ``alpha`` and ``sigma`` (the noise
            level of x). It returns another x, for example with the known part of an image put in,
            or ``None``. The tensors are not to be changed in place.
        callback: Called once a step, after it, with a read-only dict of ``x`` (after the step),
            ``i`` (the step), ``t`` (the timestep input), ``sigma`` and ``denoised`` (the predicted
            x_0; one more launch), the last three of the first model call of the step. It returns
            another x to continue with, or ``None``. The tensors are not to be changed in place.
        progress: Show a bar (tqdm); ``None`` for one on terminals only.
        differentiable: Record the loop for autograd: gradients by ``x``, by the parameters of the
            model and by tensors in its arguments.
        checkpoint: With ``differentiable``: keep only the samples between the rows, and call the
            model again in the backward pass. The noise of a key is generated again; a function
            for ``noise`` is called again, and must return the same.
        return_trajectory: Return the states between the rows as well: a ``Trajectory``. They stay
            in memory, S + 1 times the samples; nothing is copied. A state is what a row returned,
            before ``callback`` or ``before_model`` changed it for the next.
        return_log_prob: Return the log-probability of every row's x' as well: a ``Trajectory``. It
            takes a launch a row (``SolverTable.step``), and counts x' as a constant. In a
            ``differentiable`` loop it has gradients by x and the predictions; those of a policy
            come from ``SolverTable.log_prob`` of the states.
        reduction: Of the log-probabilities, "sum" or "mean" over the elements of a sample.
        schedule: The row that each group of a sample takes in each model call, ``[M, B, G]`` or
            ``[M, 1, G]`` ints (``sampling.pyramid_schedule``): -1 for a group that waits. A group
            takes its rows one after the other, from any first to any last one, so windows can roll;
            the first must read no history. The model then gets ``t`` ``[B, G]``: for a group that
            waits that of the level at which it is, and 0 after the last row of the table. The noise
            of model call m takes the stream 1 + m. Its values are read before the first call. Not
            with ``cond_fn``, ``mask``, thresholding, hooks, ``checkpoint`` or a ``Trajectory``.
        group_dim: The dimension of the groups, such as 2 for the frames of ``[B, C, F, H, W]``.

    Returns:
        The samples, like ``x``; with ``return_trajectory`` or ``return_log_prob`` a ``Trajectory``
        of ``samples``, ``states`` and ``log_probs``.

    Raises:
        TypeError: An argument, or the output of the model or of a hook, has the wrong type.
        ValueError: Shapes do not match, or guidance_scale, the second prediction, ``mask`` or
            ``known`` is missing.
    """
    if not isinstance(table, SolverTable):
        raise TypeError(
            f"table must be a SolverTable, got {type(table).__name__}; diffcore.solvers makes one, "
            "such as solvers.dpmpp_table(levels)"
        )
    check_samples(x)
    if noise is None:
        noise = noise_or_default(None, x)
    check_step_noise("noise", noise)
    rule = guidance_rule(guidance_scale, guidance, uncond_kwargs)
    record = recorder(return_trajectory, return_log_prob, reduction)
    if schedule is not None or group_dim is not None:
        _check_scheduled(
            schedule=schedule,
            group_dim=group_dim,
            cond_fn=cond_fn,
            mask=mask,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            before_model=before_model,
            callback=callback,
            checkpoint=checkpoint or None,
            return_trajectory=return_trajectory or None,
            return_log_prob=return_log_prob or None,
        )
        assert schedule is not None
        assert group_dim is not None
        return run_schedule(
            model,
            x,
            table,
            schedule,
            group_dim,
            noise,
            guidance=rule,
            model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs,
            progress=progress,
            differentiable=differentiable,
        )
    samples = run_table(
        model,
        x,
        table,
        noise,
        guidance=rule,
        model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs,
        threshold=threshold_rule(dynamic_thresholding_ratio, sample_max_value),
        known=known_part(mask, known, known_noise, blend_at),
        before_model=before_model,
        callback=callback,
        progress=progress,
        differentiable=differentiable,
        checkpoint=checkpoint,
        classifier=None if cond_fn is None else Classifier(cond_fn),
        noise_name="noise",
        recorder=record,
    )
    return samples if record is None else record.trajectory(samples)


def _check_scheduled(**arguments: Any) -> None:
    """Refuses a schedule without groups, groups without one, and what takes one level a sample."""
    for name in ("schedule", "group_dim"):
        if arguments.pop(name) is None:
            other = "group_dim" if name == "schedule" else "schedule"
            raise ValueError(f"{name} must be given with {other}, got None")
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must not be given with schedule, got {value!r}")


def guidance_rule(
    guidance_scale: float | Tensor | None,
    guidance: Guidance | None,
    uncond_kwargs: Mapping[str, Any] | None,
) -> Guidance | None:
    """The rule of a sampling loop, from its arguments.

    Args:
        guidance_scale: w, or ``None``.
        guidance: A rule, or ``None``.
        uncond_kwargs: Arguments of the second call, or ``None``.

    Returns:
        The rule; ``None`` without guidance.

    Raises:
        TypeError: ``guidance_scale`` is neither a number nor a tensor of them, or ``guidance`` is
            no rule.
        ValueError: Only ``uncond_kwargs`` is given, both kinds of guidance, or a scale that is not
            one for each sample.
    """
    if guidance is not None and not isinstance(guidance, Guidance):
        kind = type(guidance).__name__
        raise TypeError(
            f"guidance must be a rule of diffcore.guidance, got {kind}; a number is guidance_scale"
        )
    if guidance_scale is not None:
        if guidance is not None:
            raise ValueError("guidance_scale must be None with guidance, got both")
        of_channels = isinstance(guidance_scale, Tensor) and guidance_scale.ndim == 2
        if not of_channels:  # those are checked beside the predictions
            as_coef("guidance_scale", guidance_scale, None)
        return Weighted(guidance_scale, 0.0)
    if uncond_kwargs is not None and guidance is None:
        raise ValueError(
            "guidance_scale must be given with uncond_kwargs, got None; pass a number or [B]"
        )
    return guidance
