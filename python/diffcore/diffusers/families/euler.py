"""EulerDiscreteScheduler: Euler's method over sigma."""

from __future__ import annotations

import math
from ctypes import c_float
from typing import Any, NamedTuple

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.families.sigmas import (
    ScaledInput,
    ends_of,
    prediction_among,
    ve_levels,
    x0_columns,
)
from diffcore.diffusers.rows import columns_table, float64
from diffcore.diffusers.scheduler import Call, Choice, Place, is_integer
from diffcore.diffusers.walk import Unsupported
from diffcore.noise import Noise
from diffcore.solvers import SolverTable, euler_table
from diffcore.solvers.table import COLUMNS, Row

PREDICTIONS = ("epsilon", "sample", "v_prediction")
_MAX_CHURN = math.sqrt(2) - 1
_C_X, _C_0, _C_Z, _A_X = (COLUMNS.index(name) for name in ("c_x", "c_0", "c_z", "a_x"))


class Churn(NamedTuple):
    """The options of a ``step`` with churn."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def gamma(self, sigma: float, count: int) -> float:
        """By how much of itself a sigma is raised.

        Args:
            sigma: The sigma, a float32 value: bounds are compared as diffusers does, in float32.
            count: How many sigmas the scheduler has, less one.

        Returns:
            gamma; 0 for no noise.
        """
        if not self.s_churn:
            return 0.0
        low, high = c_float(self.s_tmin).value, c_float(self.s_tmax).value
        return min(self.s_churn / count, _MAX_CHURN) if low <= sigma <= high else 0.0


class Churned(ScaledInput):
    """Euler's method with churn by diffusers' rule: its noise comes after the model call."""

    options = Churn._fields
    refuses_integers = True
    returns_x0 = True
    # Of the stock class.
    sigmas: Tensor

    def _draws(self, place: Place) -> bool:
        churn = Churn(*(place.options[name] for name in Churn._fields))
        # Also where the step multiplies the noise by 0: with s_noise=0, or to sigma = 0.
        return churn.gamma(self._walk().sigmas[place.row], len(self.sigmas) - 1) > 0

    def _original(self, x0: Tensor, row: Row, noise: Noise | None) -> Tensor:
        """x0 of the noisy sample x + n z: the row has that of x, and a_x n z is to be added."""
        c = row.coefficients
        if noise is None or c[_C_Z] == 0 or c[_A_X] == 0:
            return x0
        # c_z is n times the factor of x + n z, as in ``churned_table``.
        n = c[_C_Z] / (c[_C_X] + c[_C_0] * c[_A_X])
        return ops.add_noise(x0, noise, 1.0, c[_A_X] * n)

    def _refuse(self, call: Call) -> None:
        super()._refuse(call)
        if call.s_churn and self._fusion.manner.rules == "exact":
            # It calls the model at levels that the scheduler does not have.
            raise Unsupported("s_churn with rules='exact', which only table_of can have")


def raised_sigmas(scheduler: Any, sigma: Tensor, churn: Churn) -> Tensor:
    """Sigma (1 + gamma) of each step.

    Args:
        scheduler: With ``sigmas`` set.
        sigma: float64 ``[N]``.
        churn: The options.

    Returns:
        float64 ``[N]``.
    """
    count = len(scheduler.sigmas) - 1
    return sigma * (1 + float64([churn.gamma(value, count) for value in sigma.tolist()]))


def churned_table(
    name: str,
    scheduler: Any,
    sigma: Tensor,
    raised: Tensor,
    after: Tensor,
    *,
    x0: tuple[Tensor, Tensor],
    s_noise: float,
    input_std: float = 1.0,
) -> SolverTable:
    """Euler's step from x^ = x + n z: x' = k x^ + (1 - k) x0, x0 = a_x x^ + a_m m, k = sigma' / s.

    n^2 = s^2 - sigma^2 with s the raised sigma. diffusers adds this noise after the model call.

    Args:
        name: Name of the solver.
        scheduler: With ``timesteps`` set.
        sigma: Before each step, float64 ``[N]``.
        raised: s, float64 ``[N]``.
        after: sigma', float64 ``[N]``.
        x0: a_x and a_m, float64 ``[N]`` each.
        s_noise: Factor of the noise.
        input_std: See ``NoiseLevels``.

    Returns:
        The table.
    """
    a_x, a_m = x0
    n = s_noise * ((raised - sigma) * (raised + sigma)).sqrt()
    keep = after / raised
    moved = keep + (1 - keep) * a_x
    return columns_table(
        name,
        timesteps=scheduler.timesteps[-len(sigma) :],
        alpha=torch.ones_like(sigma),
        sigma=sigma,
        end=(1.0, float(after[-1])),
        columns={"c_x": keep, "c_0": 1 - keep, "c_z": n * moved, "a_x": a_x, "a_m": a_m},
        input_scale=(sigma**2 + input_std**2).rsqrt(),
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


class FusedEuler(Churned):
    """x' = x + (sigma' - sigma) (x - x0) / sigma. Karras et al. 2022 (arXiv 2206.00364)."""

    stock = EulerDiscreteScheduler
    output_class = EulerDiscreteSchedulerOutput
    # Of the stock class.
    alphas_cumprod: Tensor

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; options: those of the churn."""
        churn = Churn(**choice.options)
        prediction = prediction_among(scheduler, (*PREDICTIONS, "original_sample"))
        if choice.rules == "exact":
            levels = ve_levels(scheduler, 1.0, choice.start)
            return euler_table(levels, **churn._asdict(), prediction_type=prediction)
        sigma, after = ends_of(scheduler, choice.start)
        raised = raised_sigmas(scheduler, sigma, churn)
        a_x, a_m = x0_columns(sigma, prediction)
        return churned_table(
            "euler",
            scheduler,
            sigma,
            raised,
            after,
            # Of v diffusers takes x0 at the sigma before the churn.
            x0=(a_x, -raised if prediction == "epsilon" else a_m),
            s_noise=churn.s_noise,
        )

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(a) noise - sqrt(1 - a) x_0, in one launch.

        By diffusers' rule a is ``alphas_cumprod`` at the index of the timestep in ``timesteps``,
        which is the level of another timestep; by the exact rule 1 / (sigma^2 + 1).
        """
        try:
            if is_integer(timesteps):
                raise Unsupported("get_velocity of integer timesteps")
            rows = self._rows_with(timesteps)
        except Unsupported as reason:
            self.fallbacks[str(reason)] += 1
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc, no-any-return]
        if self._fusion.manner.rules == "exact":
            sigmas = self._walk().sigmas
            signal = float64([1 / (sigmas[row] ** 2 + 1) for row in rows])
        else:
            signal = float64(self.alphas_cumprod[rows])
        alpha, sigma = (a.sqrt().to(sample.device) for a in (signal, 1 - signal))
        return ops.velocity(sample, noise, alpha, sigma)
