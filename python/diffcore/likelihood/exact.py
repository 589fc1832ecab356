"""Sums of float64 numbers without rounding, so that the order of the numbers does not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 32
_MASK = 2**_BITS - 1
_DIGITS = 70  # of 32 bits: from below the least float64 to above the largest
_SCALE = 36 * _BITS  # a sum is an integer times 2^-_SCALE


@dataclass
class ExactSums:
    """Exact sums of float64 numbers, one for each column.

    A sum is a number with digits to the base 2^32, which are whole numbers in float64. They are
    added digit by digit, so sums of parts of the data add up to the sum of all data, to the bit.

    Attributes:
        digits: Of all columns, lowest first, ``[71 · columns]`` float64 on the CPU. The last digit
            of a column is not one: it is the sum of the numbers that are not finite.
    """

    digits: Tensor

    @classmethod
    def zero(cls, columns: int) -> ExactSums:
        """Sums of nothing."""
        return cls(torch.zeros((_DIGITS + 1) * columns, dtype=torch.float64, device="cpu"))

    @property
    def columns(self) -> int:
        """The number of columns."""
        return len(self.digits) // (_DIGITS + 1)

    def add(self, values: Tensor, columns: Tensor) -> None:
        """Add numbers.

        Args:
            values: Fewer than 2^19 float64 numbers for each column, on the CPU.
            columns: The column of each number, int64 of the same shape.
        """
        values, columns = values.flatten(), columns.flatten()
        finite = values.isfinite()
        x = torch.where(finite, values, 0.0)
        mantissa, exponent = torch.frexp(x)
        whole = (mantissa.abs() * 2.0**53).long()
        place = exponent.long() + (_SCALE - 53)  # x = ± whole 2^(place - _SCALE)
        digit, shift = place // _BITS, place % _BITS
        low, high = (whole & _MASK) << shift, (whole >> _BITS) << shift
        parts = (low & _MASK, (low >> _BITS) + (high & _MASK), high >> _BITS)
        for k, part in enumerate(parts):
            at = (digit + k) * self.columns + columns
            self.digits.index_add_(0, at, part.double().copysign(x))
        at = _DIGITS * self.columns + columns
        self.digits.index_add_(0, at, torch.where(finite, 0.0, values))
        self._carry()

    def merge(self, other: ExactSums) -> None:
        """Add the sums of other data."""
        self.digits += other.digits
        self._carry()

    def integers(self) -> list[int | float]:
        """Each sum as an integer, in units of 2^-1152; inf or nan if it is not finite."""
        rows = self.digits.reshape(_DIGITS + 1, self.columns)
        found: list[int] = [0] * self.columns
        for k in rows[:-1].any(dim=1).nonzero().flatten().tolist():
            for c, digit in enumerate(rows[k].tolist()):
                found[c] += int(digit) << _BITS * k
        beyond = rows[-1].tolist()
        return [b if b != 0 else i for i, b in zip(found, beyond, strict=True)]

    def means(self, counts: list[int]) -> Tensor:
        """Each sum divided by a count and rounded once, float64 ``[columns]``; nan for 0 / 0."""
        quotients = zip(self.integers(), counts, strict=True)
        return _tensor([_divide(i, n << _SCALE) for i, n in quotients])

    def _carry(self) -> None:
        """Make the digits less than about 2^32 again; the highest one has the sign."""
        rows = self.digits.reshape(_DIGITS + 1, self.columns)
        carry = torch.floor(rows[: _DIGITS - 1] * 2.0**-_BITS)
        rows[: _DIGITS - 1] -= carry * 2.0**_BITS
        rows[1:_DIGITS] += carry


@dataclass
class Moments:
    """Count, mean and variance of rows, exact until they are read."""

    count: int
    sums: ExactSums
    squares: ExactSums

    @classmethod
    def zero(cls, columns: int) -> Moments:
        """The moments of no rows."""
        return cls(0, ExactSums.zero(columns), ExactSums.zero(columns))

    @property
    def mean(self) -> Tensor:
        """The mean of each column, float64; nan for no rows."""
        return self.sums.means([self.count] * self.sums.columns)

    def add(self, rows: Tensor) -> None:
        """Add rows, float64 ``[B, columns]`` on the CPU."""
        at = torch.arange(rows.shape[1], device="cpu").expand_as(rows)
        self.sums.add(rows, at)
        for part in _exact_squares(rows):
            self.squares.add(part, at)
        self.count += len(rows)

    def merge(self, other: Moments) -> None:
        """Add the rows of other data."""
        self.sums.merge(other.sums)
        self.squares.merge(other.squares)
        self.count += other.count

    def variance_of_mean(self) -> Tensor:
        """The unbiased variance over the rows, divided by their number; nan for one row."""
        n = self.count
        both = zip(self.sums.integers(), self.squares.integers(), strict=True)
        found = []
        for total, square in both:
            if n < 2 or isinstance(total, float) or isinstance(square, float):
                found.append(math.nan)
            else:
                deviations = (n * square << _SCALE) - total**2
                found.append(_divide(deviations, n**2 * (n - 1) << 2 * _SCALE))
        return _tensor(found)


def _exact_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """x² rounded, and what rounding took from it (Dekker's product)."""
    square = x * x
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    low = x - high
    error = ((high * high - square) + 2 * high * low) + low * low
    return square, torch.where(error.isfinite(), error, 0.0)


def _divide(a: int | float, b: int) -> float:
    if isinstance(a, float):
        return a
    if b == 0:
        return math.nan
    try:
        return a / b  # of ints: rounded once, however large they are
    except OverflowError:
        return math.copysign(math.inf, a)


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
