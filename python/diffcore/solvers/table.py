"""A solver as a table: one row of coefficients for each call of the model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._engine.dispatch import run
from diffcore._kernels.step import PLAIN, Plan, columns_read, learned_plan, plan
from diffcore._types import Coef, Noise
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.ops import reverse_step
from diffcore.ops._noise import noised
from diffcore.ops.step import take

COLUMNS = STEP_COLUMNS
KEPT, READ = slice(8, 11), slice(11, 14)  # e_x, e_m, e_0; c_1, c_2, c_3
TO_X0 = (0.0, 0.0, 1.0, 0.0)  # c_x, c_m, c_0, c_z of a step that stops at the predicted x_0


class Row(NamedTuple):
    """A row as numbers, and how to take it."""

    coefficients: tuple[float, ...]
    plan: Plan
    sigma: float
    input_scale: float
    step: int
    begins: bool  # that step

    @property
    def noisy(self) -> bool:
        """Whether it adds noise."""
        return self.plan.noisy


@dataclass(frozen=True, eq=False)
class SolverTable:
    """Every number of a walk from noise to a sample; row r belongs to the r-th call of the model.

    With m the model's answer to ``input_scale[r] * x`` and ``timesteps[r]``, z a standard normal,
    and h_1, h_2, h_3 what the last three rows left behind, row r is

        x0 = clip(a_x x + a_m m, clip_min, clip_max)
        x' = c_x x + c_m m + c_0 x0 + c_1 h_1 + c_2 h_2 + c_3 h_3 + c_z z
        h' = e_x x + e_m m + e_0 x0

    Where the model says its own variance, the noise is c_z exp(s_0 + s_v v) z, v what it says.
    Then x' is the next row's x, and h' its h_1 (h_1 becomes h_2, h_2 becomes h_3). A row whose e
    are all 0 leaves nothing that is ever read, so nothing need be written; a row with c_k = 0
    does not read h_k, whatever that holds. Before the first row x = start_scale x + start_noise z.

    Args:
        name: Of the solver.
        coefficients: float64 ``[S, 14]``, columns as in ``COLUMNS``.
        timesteps: ``[S]``, int64 or float64: what the model is told.
        alpha: float64 ``[S]``: signal in the x that the model sees (before ``input_scale``).
        sigma: float64 ``[S]``: noise in it.
        input_scale: float64 ``[S]``: the model sees x times this.
        step_index: int64 ``[S]``: which of the solver's steps the row belongs to.
        noise_levels: float64 ``[S, 2]``: sigma / alpha before and after the row's noise, for noise
            that is a function of an interval (k-diffusion's ``noise_sampler``).
        history: How many h its rows read, 0 to 3.
        order: Order of convergence to the probability flow (1 for a solver that draws noise).
        init_noise_sigma: Standard deviation of the x to start from.
        start_scale: See above; 1 but for churn.
        start_noise: See above; 0 but for churn.
        variance: float64 ``[S, 2]``: s_0 and s_v, where the model says its own variance: it answers
            with twice the channels, m and then v. ``None`` where it does not. Not with history.
        rows: All that once more as numbers; made of the tensors if not given.
    """

    name: str
    coefficients: Tensor
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor
    step_index: Tensor
    noise_levels: Tensor
    history: int
    order: int
    init_noise_sigma: float
    start_scale: float = 1.0
    start_noise: float = 0.0
    variance: Tensor | None = None
    rows: tuple[Row, ...] = field(default=(), repr=False)
    _copies: dict[torch.device, SolverTable] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.rows:
            return
        said: list[Any] = [None] * len(self)
        if self.variance is not None:
            if self.variance.shape != (len(self), 2) or self.history:
                raise ValueError(
                    f"variance must have shape [{len(self)}, 2] in a table without history, got "
                    f"{list(self.variance.shape)} and history={self.history}"
                )
            said = self.variance.tolist()
        rows, before = [], -1
        for c, v, sigma, scale, step in zip(
            self.coefficients.tolist(),
            said,
            self.sigma.tolist(),
            self.input_scale.tolist(),
            self.step_index.tolist(),
            strict=True,
        ):
            reads = max((k for k in (1, 2, 3) if c[READ][k - 1] != 0), default=0)
            keeps = any(c[KEPT]) or reads > 1  # of those that read more there is no other kernel
            if v is not None and c[3] != 0:
                how = learned_plan((*c[:PLAIN], *v))
            else:
                how = plan(tuple(c[: columns_read(reads, keeps)]), reads, keeps, noisy=c[3] != 0)
            rows.append(Row(tuple(c), how, sigma, scale, step, begins=step != before))
            before = step
        object.__setattr__(self, "rows", tuple(rows))

    def __getstate__(self) -> dict[str, Any]:
        """What makes the rest: kernels and copies on other devices are not pickled."""
        return {**self.__dict__, "rows": (), "_copies": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make them again."""
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        """S, the number of calls of the model."""
        return len(self.coefficients)

    @property
    def num_steps(self) -> int:
        """The number of steps, of one or two calls each."""
        return int(self.step_index[-1]) + 1

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise, or the start does."""
        return self.start_noise != 0 or any(row.noisy for row in self.rows)

    def step(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        history: Sequence[Tensor] = (),
        *,
        noise: Noise | None = None,
        model_output_uncond: Tensor | None = None,
        guidance_scale: Coef | None = None,
        threshold: Coef | None = None,
        variance_output: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Row i, in one launch: from x and what the model said of it to the next x.

        Nothing is remembered here: what later steps need of this one is returned, and handed to the
        next. So a table serves any number of threads and loops at once::

            for i in range(len(table)):
                x, history = table.step(i, x, model(...), history, noise=...)

        Args:
            i: The row: an int; or a tensor beside the samples, ``[B]``, a row for each of them, or
                one element (a counter), with the copy of this table on that device.
            x: ``[B, ...]``.
            model_output: m, ``[B, ...]``; see ``ops.reverse_step``, as for the others.
            history: What the step before returned; ``()`` for the first.
            noise: z, or a recipe for it. A row without noise does not read it.
            model_output_uncond: m_u, for classifier-free guidance.
            guidance_scale: w, a number or ``[B]``.
            threshold: Bound of x_0, a number or ``[B]``.
            variance_output: v, ``[B, ...]``, for a table with a ``variance``, and only then. A row
                without noise does not read it.

        Returns:
            x', and the history: a tuple of as many tensors as later rows read at most.

        Raises:
            ValueError: No such row, too short a history, a v too many or too few, or as
                ``ops.reverse_step``.
        """
        if type(i) is int and 0 <= i < len(self.rows):
            how, t = self.rows[i].plan, None
        else:
            how, t = self._plan(i)
        earlier = tuple(history)
        if len(earlier) != how.reads or how.padding:
            earlier = self._earlier(i, how, x, earlier)
            if t is not None:
                history = earlier[: how.reads]
        if self.variance is not None or variance_output is not None:
            earlier = self._said(how, variance_output)
        if not how.noisy:
            noise = None
        elif noise is None:
            raise ValueError(f"row {i} of {self.name} adds noise, got none")
        found: Any
        if guidance_scale is None and model_output_uncond is None and threshold is None:
            inputs = (x, model_output, *earlier)  # nothing is left to be worked out
            if noise is None:
                found = run(how.kernel, inputs, how.coefs, t)
            else:
                found = noised(how.kernel, inputs, noise, how.coefs, t)
        else:
            found = take(
                *(how, x, model_output, earlier, t),
                *(noise, model_output_uncond, guidance_scale, threshold),
            )
        if not self.history:
            return found, ()
        # Where nothing is kept, x stands in for it: no later row reads that.
        x_next, left = found if how.keeps else (found, x)
        return x_next, (left,) if self.history == 1 else (left, *history)[: self.history]

    def _plan(self, i: int | Tensor) -> tuple[Plan, Tensor | None]:
        """How to take row i; with a tensor of rows, all that any of them needs."""
        if not isinstance(i, Tensor):
            index = operator.index(i)
            if not 0 <= index < len(self.rows):
                raise ValueError(f"i must be a row of {self.name}, 0 .. {len(self) - 1}, got {i}")
            return self.rows[index].plan, None
        reads, keeps = self.history, self.history > 0
        here = self.to(i.device)
        columns = here.coefficients[:, : columns_read(reads, keeps)]
        if here.variance is not None and self.stochastic:
            return learned_plan((columns, here.variance)), i
        return plan((columns,), reads, keeps, self.stochastic), i

    def _said(self, how: Plan, variance_output: Tensor | None) -> tuple[Tensor, ...]:
        """What a kernel reads of the variance that a model says."""
        if self.variance is None:
            raise ValueError(
                f"{self.name} knows its variance, got a variance_output; wanted a table with a "
                "learned one (ddpm_table(variance_type='learned'))"
            )
        if variance_output is None:
            raise ValueError(
                f"{self.name} has a learned variance, got no variance_output; wanted what the "
                "model says of it, the second half of its channels"
            )
        return (variance_output,) if how.noisy else ()

    def _earlier(
        self, i: int | Tensor, how: Plan, x: Tensor, history: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """As many h as the kernel reads; what stands in for those that the row does not, is x."""
        if not isinstance(i, Tensor) and len(history) < how.reads:
            raise ValueError(
                f"row {i} of {self.name} reads {how.reads} tensors of history, got {len(history)}: "
                "hand on what the step before returned"
            )
        history = history[: how.reads]
        return (*history, *(x,) * (how.reads + how.padding - len(history)))

    def denoised(
        self,
        i: int,
        x: Tensor,
        model_output: Tensor,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: Coef | None = None,
        threshold: Coef | None = None,
    ) -> Tensor:
        """The clean sample x0 that the model predicts at row i, as the step clips it.

        Args:
            i: The row.
            x: ``[B, ...]``.
            model_output: See ``step``, as for the others.
            model_output_uncond: m_u.
            guidance_scale: w.
            threshold: Bound of x_0.

        Returns:
            x0, ``[B, ...]``.
        """
        x0: Tensor = reverse_step(
            x,
            model_output,
            (*TO_X0, *self.rows[i].coefficients[4:8]),
            model_output_uncond=model_output_uncond,
            guidance_scale=guidance_scale,
            threshold=threshold,
        )
        return x0

    def column(self, name: str) -> Tensor:
        """One column of the coefficients, float64 ``[S]``.

        Args:
            name: One of ``COLUMNS``.

        Returns:
            A view.
        """
        check_choice("name", name, COLUMNS)
        return self.coefficients[:, COLUMNS.index(name)]

    def to(self, device: torch.device | str) -> SolverTable:
        """This table with its tensors on a device: copied at the first call, then found again.

        Args:
            device: Where to.

        Returns:
            This table, if it is there, else a copy.
        """
        device = torch.device(device)
        if device.index is None and device.type != "cpu":
            device = torch.empty(0, device=device).device  # "cuda" is the current CUDA device
        if self.coefficients.device == device:
            return self
        copy = self._copies.get(device)
        if copy is None:
            with torch.inference_mode(False):
                copy = replace(
                    self,
                    coefficients=self.coefficients.to(device),
                    timesteps=self.timesteps.to(device),
                    alpha=self.alpha.to(device),
                    sigma=self.sigma.to(device),
                    input_scale=self.input_scale.to(device),
                    step_index=self.step_index.to(device),
                    noise_levels=self.noise_levels.to(device),
                    variance=None if self.variance is None else self.variance.to(device),
                )
            copy = self._copies.setdefault(device, copy)
        return copy
