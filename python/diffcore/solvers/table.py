"""A solver as a table: one row of coefficients for each call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from diffcore._checks import as_device, as_int, as_real, check_choice
from diffcore._devices import to_device
from diffcore._engine.kept import Traced, constant_in_traces, made_plainly
from diffcore._kernels.step import MOST_HISTORY
from diffcore._types import Coef
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.guidance import Guidance, Weighted
from diffcore.noise import Noise
from diffcore.ops import reverse_step
from diffcore.ops._density import kl_of_row, log_prob_of_row
from diffcore.ops._launch import RowLauncher
from diffcore.solvers.stepping import step_with_more

COLUMNS = STEP_COLUMNS
TO_X0 = (0.0, 0.0, 1.0, 0.0)  # c_x, c_m, c_0, c_z of a step that stops at the predicted x_0

# The fields that are tensors, and their sizes after S.
_TENSORS: dict[str, tuple[int, ...]] = {
    "coefficients": (len(COLUMNS),),
    "timesteps": (),
    "alpha": (),
    "sigma": (),
    "input_scale": (),
    "step_index": (),
    "noise_levels": (2,),
    "variance": (2,),
    "uncond": (2,),
    "target_timesteps": (),
}
_OPTIONAL = ("variance", "uncond", "target_timesteps")
_NUMBERS = ("init_noise_sigma", "start_scale", "start_noise", "final_alpha", "final_sigma")
_DERIVED = ("rows", "_launcher", "_copies", "_traced")


class Row(NamedTuple):
    """One row of a table, as numbers.

    Attributes:
        coefficients: In the order of ``COLUMNS``. They lack c_u and e_u, so those of a table for
            CFG++ are for ``SolverTable.step`` only.
        variance: s_0 and s_v, ``None`` where the variance is fixed.
        uncond: c_u and e_u, ``None`` in a table that does not read m_u itself.
        alpha: Signal in the x that the model is called with.
        sigma: Noise in it.
        input_scale: The model is called with x times this.
        next_alpha: Signal in x'.
        next_sigma: Noise in it.
        step: Index of the step that the row belongs to.
        begins: Whether it is the first row of that step.
    """

    coefficients: tuple[float, ...]
    variance: tuple[float, ...] | None
    uncond: tuple[float, ...] | None
    alpha: float
    sigma: float
    input_scale: float
    next_alpha: float
    next_sigma: float
    step: int
    begins: bool

    @property
    def noisy(self) -> bool:
        """Whether the row adds noise."""
        return self.coefficients[_NOISE] != 0


_NOISE = COLUMNS.index("c_z")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """All numbers of a solver, from noise to a sample; row r belongs to the r-th call of the model.

    With m the output of the model for ``input_scale[r] * x`` at ``timesteps[r]``, z standard normal
    noise, and h_1, h_2, h_3 what the last three rows wrote, row r is

        x0 = clip(a_x x + a_m m, clip_min, clip_max)
        x' = c_x x + c_m m + c_0 x0 + c_1 h_1 + c_2 h_2 + c_3 h_3 + c_z z
        h' = e_x x + e_m m + e_0 x0

    Under guidance (``diffcore.guidance``) m is made of m_c and m_u; a table made for CFG++ adds c_u
    m_u to x' and e_u m_u to h'. Where the model predicts its own variance, the noise is c_z exp(s_0
    + s_v v) z with v that prediction. Then x' is the next row's x, and h' its h_1 (h_1 becomes h_2,
    h_2 becomes h_3).
    A row whose e are all 0 writes no h, because no later row reads it; a row with c_k = 0 does not
    read h_k. Before the first row, x = start_scale x + start_noise z.

    A table is immutable data: it compares by identity, can be pickled and copied, and serves any
    number of threads at once.

    Args:
        name: Name of the solver.
        coefficients: float64 ``[S, 14]``, columns as in ``COLUMNS``.
        timesteps: ``[S]``, int64 or float64: the timestep input of the model.
        alpha: float64 ``[S]``: signal coefficient of the x that the model is called with (before
            ``input_scale``).
        sigma: float64 ``[S]``: noise coefficient of it.
        input_scale: float64 ``[S]``: the model is called with x times this.
        step_index: int64 ``[S]``: which of the solver's steps the row belongs to.
        noise_levels: float64 ``[S, 2]``: sigma / alpha before and after the row's noise, for noise
            that is a function of an interval (k-diffusion's ``noise_sampler``).
        history: How many h its rows read, 0 to 3.
        order: Order of convergence to the probability flow (1 for a solver that adds noise).
        init_noise_sigma: Standard deviation of the x to start from; where levels rise, of the x at
            the end.
        start_scale: See above; 1 unless churn raises the start.
        start_noise: See above; 0 unless churn raises the start.
        final_alpha: Signal coefficient of what the last row returns; 1 for clean samples.
        final_sigma: Noise coefficient of it; 0 for clean samples.
        variance: float64 ``[S, 2]``: s_0 and s_v, where the model predicts its own variance and
            returns twice the channels, m and then v; else ``None``. Not with history.
        uncond: float64 ``[S, 2]``: c_u and e_u, in a table that needs guidance; else ``None``. Not
            with ``variance``.
        target_timesteps: ``[S]``, int64 or float64: a second timestep input of the model, by the
            name ``target_name``, for the level that the row reaches (flow maps); else ``None``.
        target_name: The keyword argument of the model that gets it.
        rows: The same rows as numbers; derived from the tensors if not given.

    Raises:
        TypeError: A field of the wrong type.
        ValueError: A field of the wrong shape, a history outside 0 .. 3, or a ``variance`` in a
            table with history.
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
    final_alpha: float = 1.0
    final_sigma: float = 0.0
    variance: Tensor | None = None
    uncond: Tensor | None = None
    target_timesteps: Tensor | None = None
    target_name: str = "r"
    rows: tuple[Row, ...] = field(default=(), repr=False)
    # Plans, and copies on other devices: not part of the data, and never pickled.
    _launcher: RowLauncher = field(init=False, repr=False)
    _copies: dict[torch.device, SolverTable] = field(init=False, repr=False)
    _traced: Traced = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        rows = self.rows or self._as_numbers()
        launcher = RowLauncher(
            self.name,
            [row.coefficients for row in rows],
            [row.variance for row in rows],
            [row.uncond for row in rows],
            self.history,
            (self.coefficients, self.variance, self.uncond),
        )
        derived: tuple[object, ...] = (rows, launcher, {}, Traced())
        for name, value in zip(_DERIVED, derived, strict=True):
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        """Refuses fields of the wrong type or shape; reads no value of a tensor."""
        for name, wanted in _TENSORS.items():
            value = getattr(self, name)
            if name in _OPTIONAL and value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            rows = value.shape[0] if name == "coefficients" and value.ndim else len(self)
            if rows == 0 or value.shape != (rows, *wanted):
                shape = f"[S, {len(COLUMNS)}]" if name == "coefficients" else (rows, *wanted)
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        as_int("order", self.order, 1)
        for name in _NUMBERS:
            as_real(name, getattr(self, name))
        for name in ("name", "target_name"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {type(value).__name__}")
        if not 0 <= as_int("history", self.history) <= MOST_HISTORY:
            raise ValueError(f"history must be in 0 .. {MOST_HISTORY}, got {self.history}")
        if self.variance is not None and self.history:
            raise ValueError(
                f"variance must be None in a table with history, got a tensor and {self.history}"
            )
        if self.variance is not None and self.uncond is not None:
            raise ValueError("variance must be None in a table with uncond, got both")

    def _as_numbers(self) -> tuple[Row, ...]:
        steps = self.step_index.tolist()
        variances = [None] * len(self) if self.variance is None else self.variance.tolist()
        unconds = [None] * len(self) if self.uncond is None else self.uncond.tolist()
        columns = zip(
            self.coefficients.tolist(),
            variances,
            unconds,
            self.alpha.tolist(),
            self.sigma.tolist(),
            self.input_scale.tolist(),
            [*self.alpha.tolist()[1:], self.final_alpha],
            [*self.sigma.tolist()[1:], self.final_sigma],
            steps,
            [None, *steps],
            strict=False,
        )
        return tuple(
            Row(
                tuple(c),
                None if v is None else tuple(v),
                None if u is None else tuple(u),
                *(alpha, sigma, scale, next_alpha, next_sigma, step, step != before),
            )
            for c, v, u, alpha, sigma, scale, next_alpha, next_sigma, step, before in columns
        )

    def __getstate__(self) -> dict[str, Any]:
        """The data alone: the rest is built again."""
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the data, check it, and build the rest."""
        known = {f.name for f in fields(self) if f.init and f.name != "rows"}
        if state.keys() != known:
            wrong = ", ".join(sorted(known ^ state.keys()))
            raise ValueError(
                f"state must have the fields of this version's SolverTable, got {wrong} too many "
                "or too few; make the table again"
            )
        self.__dict__.update(state, rows=())
        self.__post_init__()

    def __len__(self) -> int:
        """S, the number of calls of the model."""
        return len(self.coefficients)

    def __repr__(self) -> str:
        """One line: the solver, its steps and model calls, and what it needs."""
        kinds = (
            (self.stochastic, "stochastic"),
            (self.variance is not None, "learned variance"),
            (self.uncond is not None, "needs guidance"),
            (self.target_timesteps is not None, f"target timestep {self.target_name!r}"),
            (self.history > 0, f"history={self.history}"),
        )
        return (
            f"SolverTable({self.name!r}, {self.num_steps} steps, {len(self)} model calls, "
            f"order {self.order}{''.join(f', {what}' for holds, what in kinds if holds)})"
        )

    @property
    def num_steps(self) -> int:
        """The number of steps, of one or two calls each."""
        return self.rows[-1].step + 1

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise, or the start does."""
        return self.start_noise != 0 or any(row.noisy for row in self.rows)

    @overload
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
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
        variance_output: Tensor | None = None,
        return_log_prob: Literal[False] = False,
        reduction: str = "sum",
        mask: Tensor | None = None,
        known: Tensor | None = None,
        known_noise: Noise | None = None,
        group_dim: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    @overload
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
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
        variance_output: Tensor | None = None,
        return_log_prob: Literal[True],
        reduction: str = "sum",
        mask: Tensor | None = None,
        known: Tensor | None = None,
        known_noise: Noise | None = None,
        group_dim: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]: ...
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
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
        variance_output: Tensor | None = None,
        return_log_prob: bool = False,
        reduction: str = "sum",
        mask: Tensor | None = None,
        known: Tensor | None = None,
        known_noise: Noise | None = None,
        group_dim: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Row i in one launch: from x and the model's output to the next x.

        The table keeps no state: what later steps read of this one is returned, for the caller to
        pass to the next. So a table serves any number of threads and loops at once::

            for i in range(len(table)):
                x, history = table.step(i, x, model(...), history, noise=...)

        Args:
            i: The row: an int; or a tensor on the device of the samples, ``[B]`` (a row for each
                sample) or with one element (a counter).
            x: Current samples ``[B, ...]``.
            model_output: m, ``[B, ...]``; see ``ops.reverse_step``, which describes these in full.
            history: What the step before returned; ``()`` for the first.
            noise: z, like ``x``, or a noise key for it. Not read by a row without noise.
            model_output_uncond: m_u, for guidance.
            guidance_scale: w of classifier-free guidance, a number or ``[B]``.
            guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
            threshold: Bound of x_0, a number or ``[B]``.
            variance_output: v, ``[B, ...]``: required for a table with a ``variance``, and refused
                for others. Not read by a row without noise.
            return_log_prob: Return the log-probability of x' as well (``log_prob``), of x' as it is
                stored and as a constant.
            reduction: Of the log-probability, "sum" or "mean" over the elements of a sample.
            mask: 1 where x' is the step's, 0 where it is the known samples at the level that the
                row reaches: a second launch, see ``ops.blend_known``. The history is that of the
                model's outputs, with no known part.
            known: The known clean samples, ``[B, ...]``, in the dtype of x; with ``mask``.
            known_noise: Their noise ``[B, ...]``, or its noise key; with ``mask``.
            group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
                frames of ``[B, C, F, H, W]``: i, guidance_scale and threshold may then be
                ``[B, G]``.

        Returns:
            x' ``[B, ...]``, and the history: a tuple of as many tensors as later rows read at most;
            with ``return_log_prob`` also the log-probability ``[B]``.

        Raises:
            ValueError: No such row, no noise for a row that adds some, too short a history, a
                missing or superfluous v, or as ``ops.reverse_step`` and ``ops.blend_known``.
        """
        plain = group_dim is None and mask is known is known_noise is None
        if plain and return_log_prob is False and reduction == "sum":
            return self._launcher.step(
                i,
                x,
                model_output,
                history,
                noise,
                model_output_uncond,
                guidance_scale,
                threshold,
                variance_output,
                guidance,
            )
        return step_with_more(
            self,
            i,
            x,
            model_output,
            history,
            noise=noise,
            given=(model_output_uncond, guidance_scale, guidance),
            threshold=threshold,
            variance_output=variance_output,
            scored=(return_log_prob, reduction),
            blend=(mask, known, known_noise),
            group_dim=group_dim,
        )

    def log_prob(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        x_next: Tensor,
        history: Sequence[Tensor] = (),
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: Coef | None = None,
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
        variance_output: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """The log p(x' | x) of a step that row i took before, differentiable.

        See ``ops.step_log_prob``. With the predictions of ``step(return_log_prob=True)`` it has the
        same bits. A row without noise gives 0.

        Args:
            i: As for ``step``.
            x: The samples before the step ``[B, ...]``.
            model_output: m, ``[B, ...]``.
            x_next: x', the samples after it ``[B, ...]``.
            history: What the step read.
            model_output_uncond: As for ``step``.
            guidance_scale: As for ``step``.
            guidance: As for ``step``; not a rule with momentum.
            threshold: As for ``step``.
            variance_output: As for ``step``.
            reduction: "sum" or "mean" over the elements of a sample.

        Returns:
            ``[B]``, float32 (float64 for float64 samples), in nats.

        Raises:
            ValueError: As ``step``, or a rule with momentum.
        """
        given = (model_output_uncond, guidance_scale, guidance)
        return log_prob_of_row(
            self._launcher,
            i,
            x,
            model_output,
            x_next,
            history,
            given,
            threshold,
            variance_output,
            reduction,
        )

    def step_kl(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        reference_output: Tensor,
        *,
        model_output_uncond: Tensor | None = None,
        reference_output_uncond: Tensor | None = None,
        guidance_scale: Coef | None = None,
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """KL(p || p_ref) of the steps that two models take at row i from the same x.

        See ``ops.step_kl``. The history that both steps read cancels. A row without noise gives 0.

        Args:
            i: As for ``step``.
            x: The samples before the step ``[B, ...]``.
            model_output: m, ``[B, ...]``.
            reference_output: m of the other model ``[B, ...]``.
            model_output_uncond: m_u beside ``model_output``, for guidance.
            reference_output_uncond: m_u beside ``reference_output``, for guidance.
            guidance_scale: w of classifier-free guidance, for both models.
            guidance: Another rule of ``diffcore.guidance``, for both; not one with momentum.
            threshold: As for ``step``.
            reduction: "sum" or "mean" over the elements of a sample.

        Returns:
            ``[B]``, float32 (float64 for float64 samples), in nats.

        Raises:
            ValueError: As ``step``, a rule with momentum, or a table of learned variance.
        """
        return kl_of_row(
            self._launcher,
            i,
            x,
            (model_output, reference_output),
            (model_output_uncond, reference_output_uncond),
            guidance_scale,
            guidance,
            threshold,
            reduction,
        )

    def denoised(
        self,
        i: int,
        x: Tensor,
        model_output: Tensor,
        *,
        model_output_uncond: Tensor | None = None,
        guidance_scale: Coef | None = None,
        guidance: Guidance | None = None,
        threshold: Coef | None = None,
    ) -> Tensor:
        """The clean sample x0 that the model predicts at row i, clipped as the step clips it.

        Args:
            i: The row, an int.
            x: Current samples ``[B, ...]``.
            model_output: m, ``[B, ...]``; see ``ops.reverse_step``, which describes these in full.
            model_output_uncond: m_u, for guidance.
            guidance_scale: w of classifier-free guidance, a number or ``[B]``.
            guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
            threshold: Bound of x_0, a number or ``[B]``.

        Returns:
            x0, ``[B, ...]``.
        """
        row = self.rows[self._launcher.index(i)]
        rule = uncond = None
        if guidance is not None or guidance_scale is not None or model_output_uncond is not None:
            given = (model_output_uncond, guidance_scale, guidance)
            model_output, guided = self._launcher.guided(i, x, model_output, *given, remember=False)
            if guided is not None:
                uncond, rule = guided.uncond, Weighted(guided.w, guided.g)
        x0: Tensor = reverse_step(
            x,
            model_output,
            (*TO_X0, *row.coefficients[4:8]),
            model_output_uncond=uncond,
            guidance=rule,
            threshold=threshold,
        )
        return x0

    def column(self, name: str) -> Tensor:
        """One column of the coefficients.

        Args:
            name: One of ``COLUMNS``.

        Returns:
            float64 ``[S]``, a view.

        Raises:
            ValueError: There is no such column.
        """
        check_choice("name", name, COLUMNS)
        return self.coefficients[:, COLUMNS.index(name)]

    def to(self, device: torch.device | str) -> SolverTable:
        """This table with its tensors on a device: copied at the first call, then found again.

        Args:
            device: Where to.

        Returns:
            This table if it is there, else the copy.
        """
        device = as_device("device", device)
        if device.index is None and device.type != "cpu":
            device = torch.empty(0, device=device).device  # "cuda" is the current CUDA device
        if self.coefficients.device == device:
            return self
        if torch.compiler.is_dynamo_compiling():
            traced: SolverTable = getattr(self._traced, self._traced_on(device))
            return traced
        copy = self._copies.get(device)
        if copy is None:
            copy = self._copies.setdefault(device, made_plainly(lambda: self._copy(device)))
        return copy

    def _copy(self, device: torch.device) -> SolverTable:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        moved: Any = {n: x if x is None else to_device(x, device) for n, x in tensors.items()}
        return replace(self, **moved)

    @constant_in_traces
    def _traced_on(self, device: torch.device) -> str:
        return self._traced.name(device, lambda: self.to(device))
