"""Values of one step in a sampling loop: timestep inputs of the model, state for a callback."""

from __future__ import annotations

from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from diffcore._engine.dtensor import is_dtensor, per_sample
from diffcore.sampling.model import Prediction
from diffcore.solvers import SolverTable


def timestep_inputs(table: SolverTable, x: Tensor) -> Tensor:
    """The timestep input of every row, on the device of the samples.

    Args:
        table: The solver.
        x: Samples ``[B, ...]``.

    Returns:
        ``[S, B]``: int64 where the timesteps are integers, else float32, or float64 beside float64
        samples.
    """
    timesteps = table.to(x.device).timesteps
    if timesteps.is_floating_point() and x.dtype != torch.float64:
        timesteps = timesteps.float()
    timesteps = timesteps.unsqueeze(1).repeat(1, x.shape[0])
    return per_sample(timesteps.T, x).T if is_dtensor(x) else timesteps


def callback_state(
    table: SolverTable,
    i: int,
    x: Tensor,
    t: Tensor,
    prediction: Prediction,
    guidance_scale: float | Tensor | None,
    threshold: Tensor | None,
) -> dict[str, Any]:
    """What a callback gets before a step; the predicted x_0 takes one launch.

    Args:
        table: The solver.
        i: The first row of the step.
        x: The samples before it, ``[B, ...]``.
        t: Its timestep input ``[B]``.
        prediction: What the model returned.
        guidance_scale: w of classifier-free guidance, or ``None``.
        threshold: Bound of x_0 ``[B]``, or ``None``.

    Returns:
        ``x``, ``i`` (the step), ``t``, ``sigma`` and ``denoised``; not to be written.
    """
    output, uncond, _ = prediction
    denoised = table.denoised(
        i,
        x,
        output,
        model_output_uncond=uncond,
        guidance_scale=guidance_scale,
        threshold=threshold,
    )
    row = table.rows[i]
    return CallbackState(x=x, i=row.step, t=t, sigma=row.sigma, denoised=denoised)


class CallbackState(dict[str, Any]):
    """The state that a callback gets: a dict that refuses to be written.

    The model has been called already, so another x would be combined with the output for this one.
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "state must not be changed, because the model has been called already; to change x "
            "before the model call, for example to inpaint, write a loop on table.step"
        )

    def __reduce_ex__(self, _: SupportsIndex) -> tuple[Any, ...]:
        """Copies and pickles as a plain dict, which may be written."""
        return dict, (dict(self),)

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse
