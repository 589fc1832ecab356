"""Turns a row of step coefficients into one launch: a single row, or the rows of a solver's table.

It lies below ``solvers``, so that a table is data that holds one ``RowLauncher``, and
``SolverTable.step`` is a call of it. It takes numbers and tensors, not a table: this module imports
no solver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffcore._checks import as_int
from diffcore._devices import to_device
from diffcore._engine.dispatch import run
from diffcore._engine.kept import Traced, constant_in_traces, made_plainly
from diffcore._kernels.step import (
    PLAIN,
    TABLE_STEP,
    Plan,
    columns_read,
    learned_plan,
    plan,
)
from diffcore._types import Coef, Coefs, Row, Step, Tensors
from diffcore.coefficients.step import HISTORY_READ, HISTORY_WRITTEN, STEP_COLUMNS
from diffcore.guidance import CFGPlusPlus, Guidance, Weighted
from diffcore.noise import Noise
from diffcore.ops._arguments import as_table, columns_of, converted
from diffcore.ops._guided import Guided, bound_of, guided_by, halves, known_guidance
from diffcore.ops._noise import run_noisy

_compiling = torch.compiler.is_dynamo_compiling

GivenGuidance = tuple[Tensor | None, Coef | None, Guidance | None]
"""``model_output_uncond``, ``guidance_scale`` and ``guidance`` of a call."""
_ALL = len(STEP_COLUMNS)
_Tensors = tuple[Tensor, Tensor | None, Tensor | None]
_NOISE = STEP_COLUMNS.index("c_z")


class LearnedVariance(NamedTuple):
    """A predicted variance, ``c_z exp(s_0 + s_v v)``: v, and the columns s_0 and s_v."""

    output: Tensor
    coefficients: Row


def launch(
    plan: Plan,
    x: Tensor,
    model_output: Tensor,
    others: Tensors,
    t: Step,
    noise: Noise | None,
    guided: Guided | None = None,
    threshold: Coef | None = None,
    out: Tensor | None = None,
) -> Any:
    """Takes a planned step in one launch.

    Args:
        plan: The kernel and the coefficients.
        x: The current samples.
        model_output: m, or m_c under guidance.
        others: The other tensors that the kernel reads: history, or a predicted variance.
        t: The row, where the plan holds a table.
        noise: z or a noise key; given if the plan is noisy.
        guided: ``None`` without guidance.
        threshold: Bound of x_0, or ``None``.
        out: Tensor to write to.

    Returns:
        x', or (x', h') if the plan keeps history.
    """
    coefs = plan.coefs
    if guided is None:
        kernel, inputs = plan.kernel, (x, model_output, *others)
        if threshold is not None:
            coefs = (*coefs[:4], bound_of(threshold), *coefs[5:])
    else:
        uncond, w, g = guided
        kernel, inputs = plan.guided, (x, model_output, uncond, *others)
        bound = 0.0 if threshold is None else bound_of(threshold)
        coefs = (w, g, coefs[2], coefs[3], bound, *coefs[5:])
    if noise is None:
        try:
            return run(kernel, inputs, coefs, t, False, out)
        except TypeError as error:
            coefs, t = converted(error, coefs, t, x)
        return run(kernel, inputs, coefs, t, False, out)
    return run_noisy(kernel, inputs, noise, coefs, t, out)


def variance_of(output: Tensor | None, coefficients: Row | None) -> LearnedVariance:
    """The predicted variance of a call, whose two parts come together."""
    if output is None or coefficients is None:
        raise ValueError(
            "variance_output and variance_coefficients must be given together, got one"
        )
    return LearnedVariance(output, coefficients)


def history_of(history: Sequence[Tensor]) -> Tensors:
    """The h of earlier steps as a tuple."""
    try:
        return tuple(history)
    except (TypeError, RuntimeError):  # of a tensor that cannot be iterated
        kind = type(history).__name__
        raise TypeError(f"history must be a sequence of tensors, got {kind}") from None


def step_columns(row: Row, columns: int) -> Coefs:
    """The first columns of a step, of a row or table that may have all of them."""
    return _columns("coefficients", row, columns, (columns, _ALL) if columns == PLAIN else (_ALL,))


def variance_columns(row: Row) -> Coefs:
    """s_0 and s_v."""
    return _columns("variance_coefficients", row, 2, (2,))


def _columns(name: str, row: Row, columns: int, widths: tuple[int, ...]) -> Coefs:
    if isinstance(row, tuple):
        named = type(row) is not tuple and hasattr(row, "coefficients")
        if named or len(row) not in widths:
            if named:  # a Row of a solver's table, which is a tuple too
                raise TypeError(
                    f"{name} must be a tuple of numbers or a tensor, got {type(row).__name__}; "
                    "pass table.rows[i].coefficients, or table.coefficients with t=i"
                )
            counts = " or ".join(map(str, widths))
            raise ValueError(f"{name} must hold {counts} numbers, got {len(row)}")
        return row[:columns]
    table = as_table(name, row, *widths)
    return (table if table.shape[1] == columns else columns_of(name, table, 0, columns),)


class RowLauncher:
    """Launches the rows of one solver table.

    It remembers nothing between steps: any number of threads may use it at once.

    Args:
        name: Name of the solver, for errors.
        rows: The coefficients of each row, as numbers in the order of ``STEP_COLUMNS``.
        variances: s_0 and s_v of each row, ``None`` where the variance is fixed.
        unconds: c_u and e_u of each row, ``None`` where m_u is not read itself.
        history: How many h its rows read, 0 to 3.
        tensors: The same as float64 tensors ``[S, 14]``, ``[S, 2]`` or ``None``, ``[S, 2]`` or
            ``None``; read when a row is selected by a tensor.
    """

    __slots__ = (
        "_copies",
        "_digest",
        "_history",
        "_learned",
        "_name",
        "_plans",
        "_rows",
        "_stochastic",
        "_tensors",
        "_traced",
        "_uncond",
    )

    def __init__(
        self,
        name: str,
        rows: Sequence[tuple[float, ...]],
        variances: Sequence[tuple[float, ...] | None],
        unconds: Sequence[tuple[float, ...] | None],
        history: int,
        tensors: _Tensors,
    ) -> None:
        self._name = name
        self._rows = tuple(zip(rows, variances, unconds, strict=True))
        self._plans = tuple([row_plan(*row) for row in self._rows])
        self._stochastic = any(how.noisy for how in self._plans)
        self._digest = digest(rows, variances, unconds)
        self._history = history
        self._learned, self._uncond = tensors[1] is not None, tensors[2] is not None
        self._tensors = tensors
        # Per device: the tensors, for rows that a tensor selects there.
        self._copies = {tensors[0].device: tensors}
        self._traced = Traced()

    def step(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        history: Sequence[Tensor],
        noise: Noise | None,
        model_output_uncond: Tensor | None,
        guidance_scale: Coef | None,
        threshold: Coef | None,
        variance_output: Tensor | None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Row i in one launch: see ``SolverTable.step``, which has the same arguments."""
        if _compiling():
            how, t = self._traced_plan(i, x)
        elif type(i) is int and 0 <= i < len(self._plans):
            how, t = self._plans[i], None
        else:
            how, t = self._plan(i, x)
        earlier = history_of(history)
        if len(earlier) != how.reads or how.padding:
            earlier = self._filled(i, how, x, earlier)
            if t is not None:
                history = earlier[: how.reads]
        if self._learned or variance_output is not None:
            earlier = self._variance_inputs(how, variance_output)
        if not how.noisy:
            noise = None
        elif noise is None:
            raise ValueError(
                f"noise must be given at row {i} of {self._name}, which adds noise, got None; pass "
                "a tensor or a PhiloxNoise"
            )
        guided = None
        if guidance is not None:
            model_output, guided = self.guided(
                i, x, model_output, model_output_uncond, guidance_scale, guidance
            )
        elif guidance_scale is not None or model_output_uncond is not None:
            model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale)
        if self._uncond and guided is None:
            self._refuse_no_guidance()
        found = launch(how, x, model_output, earlier, t, noise, guided, threshold)
        if not self._history:
            return found, ()
        # A row that writes no h returns x in its place, which no later row reads.
        x_next, left = found if how.keeps else (found, x)
        return x_next, (left,) if self._history == 1 else (left, *history)[: self._history]

    def guided(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        model_output_uncond: Tensor | None,
        guidance_scale: Coef | None,
        guidance: Guidance | None,
        remember: bool = True,
    ) -> tuple[Tensor, Guided | None]:
        """The conditional prediction and the guidance at row i; see ``guided_by``."""
        self.check_guidance(guidance)
        if guidance is not None and guidance_scale is not None:
            raise ValueError("guidance_scale must be None with guidance, got both")
        if isinstance(guidance, Guidance) and guidance.by_row:
            if isinstance(i, Tensor):
                raise ValueError(
                    "guidance must be the same in every row where i is a tensor, got "
                    f"{type(guidance).__name__} with an interval or zero_init_steps"
                )
            guidance = self.rule_at(self.index(i), guidance)
            if guidance is None:  # m is m_c
                if model_output_uncond is None:
                    model_output, _ = halves(x, model_output)
                return model_output, None
        return guided_by(
            x, model_output, model_output_uncond, guidance_scale, guidance, True, remember
        )

    def plan_at(self, i: int | Tensor, x: Tensor) -> tuple[Plan, Tensor | None]:
        """The plan of row i, and i if it is a tensor."""
        return self._traced_plan(i, x) if _compiling() else self._plan(i, x)

    def planned(
        self, i: int | Tensor, x: Tensor, history: Sequence[Tensor], variance_output: Tensor | None
    ) -> tuple[Plan, Tensors, Tensor | None]:
        """The plan of row i, what it reads beside the predictions, and i if it is a tensor."""
        how, t = self.plan_at(i, x)
        if self._learned or variance_output is not None:
            return how, self._variance_inputs(how, variance_output), t
        return how, self._filled(i, how, x, history_of(history)), t

    def guided_or_refused(
        self,
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        given: GivenGuidance,
        remember: bool,
    ) -> tuple[Tensor, Guided | None]:
        """``guided``, and an error without guidance where a row reads m_u itself."""
        output, guided = self.guided(i, x, model_output, *given, remember)
        if self._uncond and guided is None:
            self._refuse_no_guidance()
        return output, guided

    def check_fixed_variance(self, name: str) -> None:
        """Refuses a table of learned variance for a method that takes none."""
        if self._learned:
            raise ValueError(
                f"{name} must be called on a table of fixed variance, got {self._name}, whose "
                "variance is learned; normal_kl takes two variances"
            )

    def _refuse_no_guidance(self) -> NoReturn:
        raise ValueError(
            f"guidance must be given for {self._name}, which reads the unconditional prediction, "
            "got None"
        )

    def rule_at(self, i: int, guidance: Guidance) -> Guidance | None:
        """The rule at row i; ``None`` where m is m_c and the row does not read m_u itself."""
        here = guidance.at(i, len(self._plans))
        return Weighted(1.0, 0.0) if here is None and self._uncond else here

    def check_guidance(self, guidance: Guidance | None) -> None:
        """Refuses CFG++ for a table that does not read m_u itself."""
        if isinstance(guidance, CFGPlusPlus) and not self._uncond:
            raise ValueError(
                f"guidance must not be CFGPlusPlus for {self._name}, which takes the noise from "
                "the guided prediction; use solvers.cfg_pp_table or dpmpp_2m_cfg_pp_table"
            )

    def _plan(self, i: int | Tensor, x: Tensor) -> tuple[Plan, Tensor | None]:
        """The plan of row i; for a tensor of rows, one that covers the needs of every row."""
        if not isinstance(i, Tensor):
            return self._plans[self.index(i)], None
        if i.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"i must be an int or an int64 or int32 tensor, got {i.dtype}")
        if i.ndim > 1:
            raise ValueError(f"i must be one row, or [B], got shape {tuple(i.shape)}")
        reads, keeps = self._history, self._history > 0
        # Beside the samples, so that only the device of i can be another one.
        on_device = self._on((x if isinstance(x, Tensor) else i).device)
        coefficients, variance, uncond = on_device
        columns = coefficients[:, : columns_read(reads, keeps)]
        if variance is not None and self._stochastic:
            return learned_plan((columns, variance), TABLE_STEP), i
        of_uncond = () if uncond is None else (uncond[:, :1], uncond[:, 1:])
        return plan((columns,), reads, keeps, self._stochastic, TABLE_STEP, of_uncond), i

    def _traced_plan(self, i: int | Tensor, x: Tensor) -> tuple[Plan, Tensor | None]:
        """The plan of row i, made again by a trace from numbers that are constants to it.

        Compiled code checks what it was compiled for at each call. For the plans themselves these
        checks took longer than the steps; here they are one comparison of two strings.
        """
        if isinstance(i, Tensor):
            return self._plan(i, x)
        texts = self._row_text(self._digest, i).split(";")
        coefficients, variance, uncond = [tuple([float(c) for c in x.split()]) for x in texts]
        return row_plan(coefficients, variance or None, uncond or None), None

    @constant_in_traces
    def _row_text(self, digest: str, i: int) -> str:  # noqa: ARG002
        """The numbers of a row, as a trace can read them; ``digest`` is for its guard alone."""
        self.index(i)  # refuses a wrong row
        return ";".join(" ".join(map(repr, numbers or ())) for numbers in self._rows[i])

    def index(self, i: int) -> int:
        """The number of a row, checked."""
        index = as_int("i", i)
        if not 0 <= index < len(self._plans):
            raise ValueError(
                f"i must be a row of {self._name}, 0 .. {len(self._plans) - 1}, got {i}"
            )
        return index

    def _on(self, device: torch.device) -> _Tensors:
        """The tensors on a device: copied once, then found again."""
        if torch.compiler.is_dynamo_compiling():
            traced: _Tensors = getattr(self._traced, self._traced_on(device))
            return traced
        found = self._copies.get(device)
        if found is None:
            found = self._copies.setdefault(device, made_plainly(lambda: self._copy(device)))
        return found

    def _copy(self, device: torch.device) -> _Tensors:
        first, *rest = self._tensors
        variance, uncond = [None if x is None else to_device(x, device) for x in rest]
        return to_device(first, device), variance, uncond

    @constant_in_traces
    def _traced_on(self, device: torch.device) -> str:
        return self._traced.name(device, lambda: self._on(device))

    def _variance_inputs(self, how: Plan, variance_output: Tensor | None) -> Tensors:
        """What the kernel reads of a predicted variance."""
        if not self._learned:
            raise ValueError(
                f"variance_output must be None for {self._name}, whose variance is fixed, got a "
                f"{type(variance_output).__name__}; only a table such as "
                "ddpm_table(variance_type='learned') takes one"
            )
        if variance_output is None:
            raise ValueError(
                f"variance_output must be given for {self._name}, whose variance is learned, got "
                "None; pass the second half of the model's channels"
            )
        return (variance_output,) if how.noisy else ()

    def _filled(self, i: int | Tensor, how: Plan, x: Tensor, history: Tensors) -> Tensors:
        """As many h as the kernel has inputs for; x fills those that have the coefficient 0."""
        if not isinstance(i, Tensor) and len(history) < how.reads:
            raise ValueError(
                f"history must hold at least {how.reads} tensors at row {i} of {self._name}, got "
                f"{len(history)}; pass what the step before returned"
            )
        history = history[: how.reads]
        return (*history, *(x,) * (how.reads + how.padding - len(history)))


def guidance_of_row(
    launcher: RowLauncher,
    i: int | Tensor,
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    guidance: Guidance | None,
) -> tuple[Tensor, Tensor | None, Guidance | None]:
    """m_c, m_u and the guidance at row i as numbers, before samples are viewed in another shape."""
    given = (model_output_uncond, guidance_scale, guidance)
    if guidance is None:
        return known_guidance(x, model_output, *given)
    model_output, guided = launcher.guided(i, x, model_output, *given)
    if guided is None:
        return model_output, None, None
    return model_output, guided.uncond, Weighted(guided.w, guided.g)


def digest(*numbers: Any) -> str:
    """A string that differs where the numbers do."""
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def row_plan(
    coefficients: tuple[float, ...],
    variance: tuple[float, ...] | None,
    uncond: tuple[float, ...] | None = None,
) -> Plan:
    """The kernel of one row, and the numbers that it takes.

    Args:
        coefficients: The row, in the order of ``STEP_COLUMNS``.
        variance: s_0 and s_v where the model predicts the variance, else ``None``.
        uncond: c_u and e_u where m_u is read itself, else ``None``.

    Returns:
        A plan that reads and writes only the tensors that the row needs.
    """
    noisy = coefficients[_NOISE] != 0
    if variance is not None and noisy:
        return learned_plan((*coefficients[:PLAIN], *variance), TABLE_STEP)
    used = [k for k, c in enumerate(coefficients[HISTORY_READ], 1) if c != 0]
    reads = max(used, default=0)
    # Kernels that read more than one h exist only in the form that writes one too.
    keeps = any(coefficients[HISTORY_WRITTEN]) or reads > 1
    if uncond is not None and uncond[1] != 0:
        keeps = True
    columns = coefficients[: columns_read(reads, keeps)]
    return plan(columns, reads, keeps, noisy, TABLE_STEP, uncond or ())
