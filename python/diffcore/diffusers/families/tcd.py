"""TCDScheduler: steps of trajectory consistency distillation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import TCDScheduler
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.schedule import Counted, levels_of, prediction_of
from diffcore.diffusers.rows import columns_table, float64, with_history
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, tcd_table


class FusedTCD(Counted):
    """x_s = alpha_s x0 + sigma_s epsilon, then x' = (alpha' / alpha_s) x_s + c_z z.

    Zheng et al. 2024 (arXiv 2402.19159), algorithm 4, with s = (1 - eta) t' and a last t' of 0. The
    step returns x_s, too. diffusers ignores ``clip_sample`` and ``thresholding``.
    """

    stock = TCDScheduler
    options = ("eta",)
    output_class = TCDSchedulerOutput
    returns_x0 = True  # x_s in its place
    casts_to_model = False

    num_inference_steps: int | None

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; options: ``eta``."""
        eta = float(choice.options.get("eta", 0.3))
        if scheduler.num_inference_steps is None:
            raise Unsupported("a step before set_timesteps")
        if not 0 <= eta <= 1:
            raise Unsupported(f"eta={eta:g}, outside [0, 1]")
        prediction = prediction_of(scheduler.config)
        signal = float64(scheduler.alphas_cumprod)
        if choice.rules == "exact":
            levels = levels_of(scheduler, end=float(signal[0]))
            return tcd_table(levels, gamma=eta, prediction_type=prediction)
        levels = levels_of(scheduler)
        times = levels.timesteps
        after = torch.cat([times[1:], times.new_zeros(1)])
        below = torch.floor((1 - eta) * after).long()  # rounded in float32, as in diffusers
        at = signal[below].sqrt(), (1 - signal[below]).sqrt()
        a_x, a_m = levels.x0_columns(prediction)
        e_x, e_m = levels.epsilon_columns(prediction)
        row = torch.arange(len(times), device="cpu")
        up = (row != scheduler.num_inference_steps - 1) & (eta > 0)
        kept = torch.where(up, signal[after] / signal[below], 1.0)
        r = kept.sqrt()
        end = signal[after if bool(up[-1]) else below][-1]
        return columns_table(
            "tcd",
            timesteps=times,
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
            end=(float(end.sqrt()), float((1 - end).sqrt())),
            columns={
                "a_x": a_x,
                "a_m": a_m,
                "c_x": r * (at[0] * a_x + at[1] * e_x),
                "c_m": r * (at[0] * a_m + at[1] * e_m),
                "c_z": (1 - kept).clamp_min(0.0).sqrt(),
            },
        )

    def _draws(self, place: Place) -> bool:
        if self._fusion.manner.rules == "exact":
            return place.noisy
        assert self.num_inference_steps is not None
        return bool(place.options["eta"] > 0) and place.row != self.num_inference_steps - 1

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.promote_types(sample.dtype, output.dtype)

    def _returning(self, table: SolverTable) -> SolverTable:
        # The levels are variance preserving, so (alpha' / alpha_s)^2 = 1 - c_z^2.
        r = (1 - table.column("c_z") ** 2).sqrt()
        parts = {f"e_{part}": table.column(f"c_{part}") / r for part in ("x", "m", "0")}
        return with_history(table, 1, **parts)

    def _threshold(self, *_: Any) -> None:
        """There is none."""
