"""Values of one step in a sampling loop: timestep inputs of the model, state for a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from diffcore._engine.dtensor import is_dtensor, per_sample
from diffcore.guidance import Guidance
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
    return _for_samples(table.to(x.device).timesteps, x)


def target_inputs(table: SolverTable, x: Tensor) -> Tensor | None:
    """The second timestep input of every row, for models that also get the level to reach.

    Args:
        table: The solver.
        x: Samples ``[B, ...]``.

    Returns:
        As ``timestep_inputs``; ``None`` for a table without.
    """
    targets = table.to(x.device).target_timesteps
    return None if targets is None else _for_samples(targets, x)


def _for_samples(timesteps: Tensor, x: Tensor) -> Tensor:
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
    guidance: Guidance | None,
    threshold: Tensor | None,
) -> CallbackState:
    """What is known of a step before it; the predicted x_0 takes one launch.

    Args:
        table: The solver.
        i: The first row of the step.
        x: The samples before it, ``[B, ...]``.
        t: Its timestep input ``[B]``.
        prediction: What the model returned.
        guidance: The rule at this row, or ``None``.
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
        guidance=guidance,
        threshold=threshold,
    )
    row = table.rows[i]
    return CallbackState(x=x, i=row.step, t=t, sigma=row.sigma, denoised=denoised)


class CallbackState(dict[str, Any]):
    """The state that a hook of a loop gets, which answers with another x; a read-only dict."""

    _instead = "because it is only read; return another x instead"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"state must not be changed, {self._instead}")

    def __reduce_ex__(self, _: SupportsIndex) -> tuple[Any, ...]:
        """Copies and pickles as a plain dict, which may be written."""
        return dict, (dict(self),)

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse


class StateBeforeStep(CallbackState):
    """The state that the callback of a sampler of k-diffusion gets.

    The model has been called already, so another x would be combined with the output for this one.
    """

    _instead = (
        "because the model has been called already; to change x between the steps return another "
        "one from the callback of diffcore.sample"
    )


def answer(
    name: str, hook: Callable[[dict[str, Any]], Tensor | None], state: CallbackState
) -> Tensor:
    """The x that a loop continues with.

    Args:
        name: What the caller calls ``hook``, for errors.
        hook: ``before_model`` or ``callback``, see ``diffcore.sample``.
        state: What it gets.

    Returns:
        What it returned, or x where that is ``None``.

    Raises:
        TypeError: It returned no tensor, or one of another dtype.
        ValueError: It returned another shape, or a tensor on another device.
    """
    x: Tensor = state["x"]
    found = hook(state)
    if found is None:
        return x
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor or None, got {type(found).__name__}")
    if found.dtype != x.dtype:
        raise TypeError(f"{name} must return the dtype of x, {x.dtype}, got {found.dtype}")
    for what in ("shape", "device"):
        if getattr(found, what) != getattr(x, what):
            wanted, came = (getattr(y, what) for y in (x, found))
            if what == "shape":
                wanted, came = tuple(wanted), tuple(came)
            raise ValueError(f"{name} must return the {what} of x, {wanted}, got {came}")
    return found
