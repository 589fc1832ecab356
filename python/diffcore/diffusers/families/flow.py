"""FlowMatchEulerDiscreteScheduler: Euler's method in a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from diffcore import ops
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.diffusers.families.schedule import Stateless
from diffcore.diffusers.families.sigmas import BySigma
from diffcore.diffusers.guidance import taken_apart
from diffcore.diffusers.rows import columns_table, float64
from diffcore.diffusers.scheduler import NO_OPTIONS, Call, Choice, Place, check_samples
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable

# How far below a token's sigma the next one has to be, as in diffusers.
_BELOW = 1e-6


class NoisingFlow(BySigma):
    """A scheduler of a rectified flow with a list of sigmas."""

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """X = (1 - sigma) x_0 + sigma noise, in one launch; sigma is not rounded to 16 bits."""
        if noise is None:
            raise TypeError("noise must be a torch.Tensor, got None")
        return self._noised(sample, noise, timestep, lambda sigma: 1 - sigma)


class FusedFlowMatchEuler(Stateless, NoisingFlow):
    """x' = x + (sigma' - sigma) m. Liu et al. 2023 (arXiv 2209.03003).

    With ``stochastic_sampling``, x' = (1 - sigma') x0 + sigma' z, x0 = x - sigma m. With
    ``invert_sigmas`` sigma is the signal, which rises to 1, and m is data minus noise.
    """

    stock = FlowMatchEulerDiscreteScheduler
    refuses_integers = True
    output_class = FlowMatchEulerDiscreteSchedulerOutput
    noise_dtype = torch.float32

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:  # noqa: ARG003
        """See ``FusedScheduler.make_table``; there are no options, and the two rules agree."""
        if scheduler.config.stochastic_sampling:
            return renoised_flow("flow_euler", scheduler)
        return moved_flow(scheduler, inverted=scheduler.config.invert_sigmas)

    def _draws(self, place: Place) -> bool:
        return bool(self.config.stochastic_sampling)

    def _step(self, call: Call) -> Any:
        if call.per_token_timesteps is None:
            return self._take(call, NO_OPTIONS)
        return self._tokens(call)

    def _tokens(self, call: Call) -> Any:
        """A step of its own length for each token ``[B, L]``, in one launch.

        A token goes to the next sigma below its own, whatever the step is, or to 0.
        """
        model_output, sample = call.model_output, call.sample
        per_token_timesteps = call.per_token_timesteps
        try:
            walk = self._walk()
            row = self._row(walk, call.timestep)
            check_samples(model_output, sample)
            if sample.ndim != 3 or per_token_timesteps.shape != sample.shape[:2]:
                raise Unsupported(
                    f"per_token_timesteps of shape {tuple(per_token_timesteps.shape)} for samples "
                    f"of shape {tuple(sample.shape)}"
                )
        except Unsupported as reason:
            self._count(reason)
            return None
        model_output, _ = taken_apart(model_output, apart=False)
        sigma = per_token_timesteps.to(sample.device, torch.float64)
        sigma = (sigma / self.config.num_train_timesteps).contiguous()
        held: Tensor = self.sigmas.to(sigma)  # type: ignore[attr-defined]
        rising = torch.cat([held.new_zeros(1), held.sort().values])
        after = rising[torch.searchsorted(rising[1:].contiguous(), sigma - _BELOW)]
        # diffusers has sigma - sigma' here, and sigma' - sigma without tokens: a pipeline that
        # passes tokens turns the sign of the prediction.
        columns: dict[str, Any] = {"c_x": 1.0, "c_m": sigma - after}
        if self.config.stochastic_sampling:
            columns = {"c_0": 1 - after, "c_z": after, "a_x": 1.0, "a_m": -sigma}
        columns |= {"clip_min": -torch.inf, "clip_max": torch.inf}
        # It stays in float32, as in diffusers.
        sample = sample.to(torch.promote_types(torch.float32, model_output.dtype))
        noise = None
        if self.config.stochastic_sampling:
            noise = self._noise(walk, row, model_output, sample, call)
        x = ops.reverse_step(
            sample, model_output, _rows_for(sigma, columns), noise=noise, group_dim=1
        )
        self._done(row)
        return self._output(x, return_dict=call.return_dict)


def moved_flow(scheduler: Any, *, inverted: bool = False) -> SolverTable:
    """Euler's steps x' = x + (sigma' - sigma) m at the sigmas that a scheduler holds.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set.
        inverted: Whether its sigmas are the signal.

    Returns:
        The table.
    """
    sigmas = float64(scheduler.sigmas)
    length = sigmas[1:] - sigmas[:-1]
    one = torch.ones_like(length)
    noise, sign = (1 - sigmas, 1) if inverted else (sigmas, -1)
    return columns_table(
        "flow_euler",
        timesteps=scheduler.timesteps,
        alpha=1 - noise[:-1],
        sigma=noise[:-1],
        end=(1 - float(noise[-1]), float(noise[-1])),
        columns={"c_x": one, "c_m": length, "a_x": one, "a_m": sign * noise[:-1]},
    )


def renoised_flow(name: str, scheduler: Any) -> SolverTable:
    """Steps x' = (1 - sigma') x0 + sigma' z, x0 = x - sigma m, at a scheduler's sigmas.

    Args:
        name: Name of the solver.
        scheduler: With ``sigmas`` and ``timesteps`` set.

    Returns:
        The table.
    """
    sigmas = float64(scheduler.sigmas)
    sigma, after = sigmas[:-1], sigmas[1:]
    return columns_table(
        name,
        timesteps=scheduler.timesteps,
        alpha=1 - sigma,
        sigma=sigma,
        end=(1 - float(after[-1]), float(after[-1])),
        columns={"a_x": torch.ones_like(sigma), "a_m": -sigma, "c_0": 1 - after, "c_z": after},
    )


def _rows_for(like: Tensor, columns: dict[str, Any]) -> Tensor:
    """Coefficients ``[B, L, 8]`` from numbers and tensors ``[B, L]``."""
    parts = [columns.get(name, 0.0) for name in STEP_COLUMNS[:8]]
    return torch.stack(
        [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in parts], dim=-1
    )
