"""Turns a row of step coefficients into one launch: a single row, or the rows of a solver's table.

It lies below ``solvers``, so that a table is data that holds one ``RowLauncher``, and
``SolverTable.step`` is a call of it. It takes numbers and tensors, not a table: this module imports
no solver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._checks import as_int, check_dense
from diffcore._engine.dispatch import run
from diffcore._engine.kept import Traced, constant_in_traces, made_plainly
from diffcore._kernels.step import PLAIN, TABLE_STEP, Plan, columns_read, learned_plan, plan
from diffcore._types import Coef, Coefs, Row, Step, Tensors
from diffcore.coefficients.step import HISTORY_READ, HISTORY_WRITTEN, STEP_COLUMNS
from diffcore.noise import Noise
from diffcore.ops._arguments import as_coef, as_table, columns_of, converted
from diffcore.ops._noise import run_noisy

_compiling = torch.compiler.is_dynamo_compiling

_ALL = len(STEP_COLUMNS)
_NOISE = STEP_COLUMNS.index("c_z")


class Guidance(NamedTuple):
    """Classifier-free guidance, ``m = m_u + w (m_c - m_u)``, as the user passed it.

    Without ``output_uncond`` the model output holds both predictions, m_u first.
    """

    output_uncond: Tensor | None
    scale: Coef | None


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
    guidance: Guidance | None = None,
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
        guidance: ``None`` without guidance.
        threshold: Bound of x_0, or ``None``.
        out: Tensor to write to.

    Returns:
        x', or (x', h') if the plan keeps history.
    """
    if guidance is None and threshold is None:
        kernel, inputs, coefs = plan.kernel, (x, model_output, *others), plan.coefs
    else:
        tensors, leading = predictions(x, model_output, guidance, threshold)
        kernel = plan.kernel if len(tensors) == 2 else plan.guided
        inputs, coefs = (*tensors, *others), leading + plan.coefs[2:]
    if noise is None:
        try:
            return run(kernel, inputs, coefs, t, False, out)
        except TypeError as error:
            coefs, t = converted(error, coefs, t, x)
        return run(kernel, inputs, coefs, t, False, out)
    return run_noisy(kernel, inputs, noise, coefs, t, out)


def predictions(
    x: Tensor, model_output: Tensor, guidance: Guidance | None, threshold: Coef | None
) -> tuple[Tensors, tuple[Coef, Coef]]:
    """The tensors that every step reads, and the coefficients that no table holds."""
    bound: Coef = 0.0
    if threshold is not None:
        bound = as_coef("threshold", threshold, None)
        if isinstance(bound, float) and bound < 0:
            raise ValueError(f"threshold must be at least 0, got {bound}")
    if guidance is None:
        return (x, model_output), (1.0, bound)
    uncond, scale = guidance
    if scale is None:
        raise ValueError("guidance_scale must be given with model_output_uncond, got None")
    scale = as_coef("guidance_scale", scale, None)
    if uncond is None:
        pair = isinstance(x, Tensor) and isinstance(model_output, Tensor) and x.ndim > 0
        if pair:
            check_dense("x", x)
            check_dense("model_output", model_output)
        if not pair or model_output.ndim == 0 or model_output.shape[0] != 2 * x.shape[0]:
            raise ValueError(
                "model_output_uncond must be given with guidance_scale, got None; or pass a "
                "model_output [2 B, ...] with the unconditional batch first"
            )
        uncond, model_output = model_output.chunk(2)
    return (x, model_output, uncond), (scale, bound)


def guidance_of(output_uncond: Tensor | None, scale: Coef | None) -> Guidance | None:
    """The guidance of a call, or ``None`` if there is none."""
    return None if output_uncond is None and scale is None else Guidance(output_uncond, scale)


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
        if len(row) not in widths:
            if hasattr(row, "coefficients"):  # a Row of a solver's table, which is a tuple too
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
        history: How many h its rows read, 0 to 3.
        coefficients: The same rows as a float64 tensor ``[S, 14]``, read when a row is selected by
            a tensor.
        variance: s_0 and s_v as a tensor ``[S, 2]``, or ``None``.
    """

    __slots__ = (
        "_coefficients",
        "_copies",
        "_digest",
        "_history",
        "_learned",
        "_name",
        "_plans",
        "_rows",
        "_stochastic",
        "_traced",
        "_variance",
    )

    def __init__(
        self,
        name: str,
        rows: Sequence[tuple[float, ...]],
        variances: Sequence[tuple[float, ...] | None],
        history: int,
        coefficients: Tensor,
        variance: Tensor | None,
    ) -> None:
        self._name = name
        self._rows = tuple(zip(rows, variances, strict=True))
        self._plans = tuple([row_plan(c, v) for c, v in self._rows])
        self._stochastic = any(how.noisy for how in self._plans)
        self._digest = digest(rows, variances)
        self._history = history
        self._learned = variance is not None
        self._coefficients = coefficients
        self._variance = variance
        # Per device: the tensors above, for rows that a tensor selects there.
        self._copies = {coefficients.device: (coefficients, variance)}
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
        guidance = None
        if model_output_uncond is not None or guidance_scale is not None:
            guidance = Guidance(model_output_uncond, guidance_scale)
        found = launch(how, x, model_output, earlier, t, noise, guidance, threshold)
        if not self._history:
            return found, ()
        # A row that writes no h returns x in its place, which no later row reads.
        x_next, left = found if how.keeps else (found, x)
        return x_next, (left,) if self._history == 1 else (left, *history)[: self._history]

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
        coefficients, variance = self._on((x if isinstance(x, Tensor) else i).device)
        columns = coefficients[:, : columns_read(reads, keeps)]
        if variance is not None and self._stochastic:
            return learned_plan((columns, variance), TABLE_STEP), i
        return plan((columns,), reads, keeps, self._stochastic, TABLE_STEP), i

    def _traced_plan(self, i: int | Tensor, x: Tensor) -> tuple[Plan, Tensor | None]:
        """The plan of row i, made again by a trace from numbers that are constants to it.

        Compiled code checks what it was compiled for at each call. For the plans themselves these
        checks took longer than the steps; here they are one comparison of two strings.
        """
        if isinstance(i, Tensor):
            return self._plan(i, x)
        coefficients, _, variance = self._row_text(self._digest, i).partition(";")
        numbers = tuple([float(c) for c in coefficients.split()])
        variances = tuple([float(c) for c in variance.split()])
        return row_plan(numbers, variances or None), None

    @constant_in_traces
    def _row_text(self, digest: str, i: int) -> str:  # noqa: ARG002
        """The numbers of a row, as a trace can read them; ``digest`` is for its guard alone."""
        self.index(i)  # refuses a wrong row
        coefficients, variance = self._rows[i]
        return f"{' '.join(map(repr, coefficients))};{' '.join(map(repr, variance or ()))}"

    def index(self, i: int) -> int:
        """The number of a row, checked."""
        index = as_int("i", i)
        if not 0 <= index < len(self._plans):
            raise ValueError(
                f"i must be a row of {self._name}, 0 .. {len(self._plans) - 1}, got {i}"
            )
        return index

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Coefficients and variance on a device: copied once, then found again."""
        if torch.compiler.is_dynamo_compiling():
            traced: tuple[Tensor, Tensor | None] = getattr(self._traced, self._traced_on(device))
            return traced
        found = self._copies.get(device)
        if found is None:
            found = self._copies.setdefault(device, made_plainly(lambda: self._copy(device)))
        return found

    def _copy(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        variance = None if self._variance is None else self._variance.to(device)
        return self._coefficients.to(device), variance

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


def digest(*numbers: Any) -> str:
    """A string that differs where the numbers do."""
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def row_plan(coefficients: tuple[float, ...], variance: tuple[float, ...] | None) -> Plan:
    """The kernel of one row, and the numbers that it takes.

    Args:
        coefficients: The row, in the order of ``STEP_COLUMNS``.
        variance: s_0 and s_v where the model predicts the variance, else ``None``.

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
    columns = coefficients[: columns_read(reads, keeps)]
    return plan(columns, reads, keeps, noisy, TABLE_STEP)
