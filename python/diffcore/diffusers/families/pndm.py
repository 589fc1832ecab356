"""PNDMScheduler without Runge-Kutta steps: Adams-Bashforth over the model's outputs (PLMS)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from diffcore.coefficients.step import tensors, x0_coefficients
from diffcore.diffusers.families.schedule import Noising, levels_of, schedule_times
from diffcore.diffusers.guidance import taken_apart
from diffcore.diffusers.rows import columns_table, float64, with_history
from diffcore.diffusers.scheduler import Call, Choice, check_samples
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.schedules.tensors import as_float64
from diffcore.solvers import SolverTable, pndm_table

# Of m, m_1, m_2 and m_3 in each kind of call: the first, the second, which takes the first step
# again, the third, the fourth and all others.
_WEIGHTS = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_KINDS = len(_WEIGHTS)
_OUTPUTS = ("c_m", "c_1", "c_2", "c_3")
# How small a divisor may be beside the step that it belongs to.
_SMALLEST_PIVOT = 1e-3


class FusedPNDM(Noising):
    """x' = (alpha' / alpha) x + k epsilon, epsilon of the mean of m, m_1, m_2, m_3.

    Liu et al. 2022 (arXiv 2202.09778), eq. 9 and 12. As in diffusers a step goes to t - T // n,
    whatever the next timestep is, and the mean of the v of several levels is taken for one of the
    current level. A walk begins with its first call, wherever that is.
    """

    stock = PNDMScheduler
    output_class = SchedulerOutput
    casts_to_model = False

    counter: int

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options.

        The table finds the first output from the samples since, for its rows have three h. A fused
        step keeps the outputs themselves, as diffusers does.
        """
        if choice.rules == "exact":
            return _exact(scheduler, choice.start)
        return _alone(scheduler, choice.start)

    def _step(self, call: Call) -> Any:
        return (
            super()._step(call) if self._fusion.manner.rules == "exact" else self._take_call(call)
        )

    def _row(self, walk: Walk, timestep: Any) -> int:
        return walk.places(timestep)[0] if walk.start is None else walk.start + self.counter

    def _done(self, row: int) -> None:
        self.counter += 1

    def _take_call(self, call: Call) -> Any:
        """As ``_take``, where h are the outputs of earlier calls and the first sample is kept."""
        model_output, sample = call.model_output, call.sample
        kind = min(self.counter, _KINDS - 1)
        try:
            walk = self._walk()
            place = walk.places(call.timestep)[0]
            check_samples(model_output, sample)
            table = self._found(walk, ("calls",), lambda: _calls(walk.on_host(self)))
            if kind and not walk.history:
                raise Unsupported("a call in the middle of a walk")
        except Unsupported as reason:
            self._count(reason)
            return None
        model_output, _ = taken_apart(model_output, apart=False)
        # After the first call its output and sample, later only outputs, the latest first.
        first, outputs = walk.history[-1:], walk.history if kind != 1 else walk.history[:1]
        x = first[0] if kind == 1 else sample
        found, _ = table.step(kind * len(walk) + place, x, model_output, outputs)
        if kind == 0:
            walk.history = (model_output, sample)
        else:
            walk.history = outputs if kind == 1 else (model_output, *outputs)[:3]
        self._done(place)
        return self._output(found.to(self._dtype(x, model_output)), return_dict=call.return_dict)


def _calls(scheduler: Any) -> SolverTable:
    """The rows of all kinds of calls, one kind after the other, at each of the timesteps.

    Their h are the outputs of earlier calls. The second call starts at the first one's sample.
    """
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        raise Unsupported("a step before set_timesteps")
    if not config.skip_prk_steps:
        raise Unsupported("skip_prk_steps=False, whose Runge-Kutta steps need outputs 12 calls old")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise Unsupported(f"prediction_type={config.prediction_type!r}")
    times = schedule_times(scheduler)
    signal = float64(scheduler.alphas_cumprod)
    length = config.num_train_timesteps // scheduler.num_inference_steps
    again = (times + length).clamp(max=len(signal) - 1)  # beyond it diffusers raises an error
    begin = torch.cat([again if kind == 1 else times for kind in range(_KINDS)])
    end = torch.cat([times if kind == 1 else times - length for kind in range(_KINDS)])
    now = signal[begin]
    then = torch.where(end >= 0, signal[end.clamp(min=0)], float(scheduler.final_alpha_cumprod))
    # Eq. 9 of the paper.
    scale = (then / now).sqrt()
    k = (now - then) / (now * (1 - then).sqrt() + (now * (1 - now) * then).sqrt())
    columns = {"c_x": scale}
    if config.prediction_type == "v_prediction":
        columns["c_x"], k = scale + k * (1 - now).sqrt(), k * now.sqrt()
    weights = as_float64(_WEIGHTS).repeat_interleave(len(times), dim=0)
    columns |= {name: k * w for name, w in zip(_OUTPUTS, weights.unbind(1), strict=True)}
    at = times.repeat(_KINDS)
    alpha, sigma = signal[at].sqrt(), (1 - signal[at]).sqrt()
    a_x, a_m = tensors(x0_coefficients(alpha, sigma, config.prediction_type))
    table = columns_table(
        "pndm",
        timesteps=at,
        alpha=alpha,
        sigma=sigma,
        end=(float(then[-1].sqrt()), float((1 - then[-1]).sqrt())),
        columns={**columns, "a_x": a_x, "a_m": a_m},
    )
    return with_history(table, 3)


def _alone(scheduler: Any, start: int) -> SolverTable:
    """The calls of a walk, with rows that write what later ones read.

    With X and m_0 of the first call, the second row reads X + (c_1 / c_x) m_0 and writes h = x_2 -
    d m_0, from which the next three find m_0: each x is a h + d m_0 + (sum of b_j m_j) there.
    """
    calls = _calls(scheduler)
    count = len(scheduler.timesteps)
    rows = torch.arange(start, count, device="cpu")
    rows += (rows - start).clamp(max=_KINDS - 1) * count
    found = {name: calls.column(name)[rows].clone() for name in ("c_x", *_OUTPUTS)}
    by_x, by_m, *by_h = (column.tolist() for column in found.values())
    e_x, e_m = torch.zeros(len(rows), device="cpu").double(), (rows >= 0).double()
    if len(rows) > 1:
        e_x[0], e_m[0] = 1.0, by_h[0][1] / by_x[1]
        e_x[1], e_m[1] = by_x[1] / by_x[0], by_m[1]
        found["c_x"][1], found["c_1"][1] = 0.0, by_x[1]
        a, d, b = 1.0, by_h[0][1] - by_x[1] / by_x[0] * by_m[0], [0.0, 0.0]
        for i in range(2, min(len(rows), _KINDS)):
            if abs(d) < _SMALLEST_PIVOT * abs(by_m[0]):
                raise Unsupported("timesteps from which the first output does not follow later")
            # Of m_(i - 1), ..., m_2 and m_0; the last is h in the table.
            *recent, oldest = [column[i] for column in by_h[: i - 1]]
            found["c_x"][i] += oldest / d
            for j in range(i - 2):
                found[f"c_{j + 1}"][i] -= oldest / d * b[i - 3 - j]
            found[f"c_{i - 1}"][i] = -oldest / d * a
            a, d = by_x[i] * a, by_x[i] * d + oldest
            b[: i - 2] = [by_x[i] * b[j] + recent[i - 3 - j] for j in range(i - 2)]
            b[i - 2 :] = [by_m[i]] if i < _KINDS - 1 else []
    picked = columns_table(
        "pndm",
        timesteps=calls.timesteps[rows],
        alpha=calls.alpha[rows],
        sigma=calls.sigma[rows],
        end=(calls.final_alpha, calls.final_sigma),
        columns={**found, "a_x": calls.column("a_x")[rows], "a_m": calls.column("a_m")[rows]},
    )
    return with_history(picked, 3, e_x=e_x, e_m=e_m)


def _exact(scheduler: Any, start: int) -> SolverTable:
    """PNDM along the timesteps, with the noise that each output predicts."""
    _calls(scheduler)  # refuses what has no table
    if start:
        raise Unsupported("rules='exact' from the middle of the timesteps")
    times = schedule_times(scheduler)
    times = torch.cat([times[:1], times[2:]])
    end = float(scheduler.final_alpha_cumprod)
    if end <= float(scheduler.alphas_cumprod[times[-1]]):  # the last step would go nowhere
        end = 1.0
    levels = levels_of(scheduler, end=end, timesteps=times)
    return pndm_table(levels, prediction_type=scheduler.config.prediction_type)
