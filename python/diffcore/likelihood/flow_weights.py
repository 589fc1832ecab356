"""How a solver table integrates the divergence of its flow: a weight for each row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffcore.solvers import SolverTable
from diffcore.solvers.table import COLUMNS


@dataclass(frozen=True)
class FlowWeights:
    """The weights of the divergences of the model's outputs, from the coefficients of a table.

    A table is linear in x and the outputs m_r. For outputs m_r = a_r x_r it multiplies x by R(a).
    The exact flow multiplies it by e to an integral that is linear in a, and a table of order q
    agrees with that up to O(h^q) for every a. So do the first two terms of log R(a) at a reference
    b: log R(b) + sum_r w_r (a_r - b_r), w_r = d log R / d a_r, which is linear in a.

    For the order any b will do. That of the best model for data from N(0, I) makes the error about
    as small as that of log R(a) itself; b = 0, which is another model for each prediction type, can
    be ten times worse. It also keeps R(b) above 0 where alpha ends at 0.

    Attributes:
        log_factor: log R(b) - sum_r w_r b_r, for each dimension.
        of_rows: w_r times the factor of x in the model's input, for each row.
    """

    log_factor: float
    of_rows: tuple[float, ...]

    @classmethod
    def of(cls, table: SolverTable) -> FlowWeights:
        """The weights of a table.

        Args:
            table: A solver without noise and clip, of levels that rise.

        Returns:
            Its weights.

        Raises:
            TypeError: Not a ``SolverTable``.
            ValueError: A table of another kind.
        """
        _check(table)
        slopes = _reference(table)
        rows = [_Row.of(row.coefficients, b) for row, b in zip(table.rows, slopes, strict=True)]
        factors = []  # x_r / x
        x, history = 1.0, (0.0, 0.0, 0.0)
        for row in rows:
            factors.append(x)
            new = row.of_x * x + sum(c * h for c, h in zip(row.of_history, history, strict=True))
            x, history = new, (row.kept_x * x, history[0], history[1])
        # The derivative of x_T by x and by the history, from the end back to each row.
        by_x, by_history = 1.0, (0.0, 0.0, 0.0)
        outputs = []  # of x_T by m_r
        for row in reversed(rows):
            outputs.append(row.of_output * by_x + row.kept_output * by_history[0])
            c_1, c_2, c_3 = row.of_history
            by_x, by_history = (
                row.of_x * by_x + row.kept_x * by_history[0],
                (c_1 * by_x + by_history[1], c_2 * by_x + by_history[2], c_3 * by_x),
            )
        outputs.reverse()
        if not x > 0:
            raise ValueError(
                "table must have more steps: for data from N(0, I) it multiplies x by "
                f"{x:.6g}, got {table!r}"
            )
        weights = [w * p / x for w, p in zip(outputs, factors, strict=True)]
        constant = math.fsum([math.log(x), *(-w * b for w, b in zip(weights, slopes, strict=True))])
        scales = (row.input_scale for row in table.rows)
        return cls(constant, tuple(scale * w for w, scale in zip(weights, scales, strict=True)))


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as x' = of_x x + of_history h, h' = kept_x x, and the derivatives by the output."""

    of_x: float
    of_output: float
    of_history: tuple[float, float, float]
    kept_x: float
    kept_output: float

    @classmethod
    def of(cls, coefficients: tuple[float, ...], slope: float) -> _Row:
        """The row for the output ``slope`` times x."""
        c = dict(zip(COLUMNS, coefficients, strict=True))
        of_output = c["c_m"] + c["c_0"] * c["a_m"]
        kept_output = c["e_m"] + c["e_0"] * c["a_m"]
        return cls(
            c["c_x"] + c["c_0"] * c["a_x"] + of_output * slope,
            of_output,
            (c["c_1"], c["c_2"], c["c_3"]),
            c["e_x"] + c["e_0"] * c["a_x"] + kept_output * slope,
            kept_output,
        )


def _reference(table: SolverTable) -> list[float]:
    """The slope of the best output for data from N(0, I) at each row: m_r = b_r x_r."""
    at_x, at_m = COLUMNS.index("a_x"), COLUMNS.index("a_m")
    slopes: list[float | None] = []
    for row in table.rows:
        a_x, a_m = row.coefficients[at_x], row.coefficients[at_m]
        # The predicted x_0 is a_x x + a_m m, and the best one alpha / (alpha² + sigma²) x.
        best = row.alpha / (row.alpha**2 + row.sigma**2)
        slopes.append((best - a_x) / a_m if a_m else None)
    # Without noise x_0 does not determine m: the slope of the next row is close.
    after = 0.0
    found = []
    for slope in reversed(slopes):
        after = after if slope is None else slope
        found.append(after)
    return found[::-1]


def _check(table: SolverTable) -> None:
    if not isinstance(table, SolverTable):
        raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
    if table.stochastic:
        raise ValueError(f"table must be of a solver without noise, got {table!r}")
    if table.uncond is not None:
        raise ValueError(f"table must not need guidance, got {table!r}")
    first = table.rows[0]
    # sigma / alpha rises, without a division by alpha = 0.
    if not first.sigma * table.final_alpha < table.final_sigma * first.alpha:
        raise ValueError(
            f"table must have levels that rise, from data to noise, got {table!r} from "
            f"sigma {first.sigma:.6g} to {table.final_sigma:.6g}; pass levels.reversed()"
        )
    low, high = (COLUMNS.index(name) for name in ("clip_min", "clip_max"))
    for row in table.rows:
        c = row.coefficients
        if c[low] != -math.inf or c[high] != math.inf:
            raise ValueError(
                f"table must not clip the predicted x_0, got a clip to [{c[low]:.6g}, "
                f"{c[high]:.6g}]; pass clip_range=None"
            )
