"""Which dimensions of z a VAE uses: the KL of each, and the variance of its posterior mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_real
from diffcore._devices import widened


@dataclass(frozen=True, eq=False)
class LatentReport:
    """The use of each dimension of z, over the samples of a data set.

    Attributes:
        kl: Mean KL of each dimension to N(0, 1), float64 ``[...]``, nats.
        mean: Mean over the samples of the posterior mean, float64 ``[...]``.
        variance: Variance over the samples of the posterior mean, float64 ``[...]``: squares
            divided by the number of samples.
        samples: Number of samples.
    """

    kl: Tensor
    mean: Tensor
    variance: Tensor
    samples: int

    @classmethod
    def combine(cls, reports: Sequence[LatentReport]) -> LatentReport:
        """The report of all samples, from those of several batches.

        Args:
            reports: At least one report, all of one shape.

        Returns:
            A ``LatentReport``.

        Raises:
            TypeError: An entry is no ``LatentReport``.
            ValueError: No reports, or reports of different shapes.
        """
        if not reports:
            raise ValueError("reports must have at least one entry, got none")
        for report in reports:
            if not isinstance(report, LatentReport):
                raise TypeError(f"reports must be LatentReport, got {type(report).__name__}")
        shapes = {tuple(report.kl.shape) for report in reports}
        if len(shapes) > 1:
            raise ValueError(f"reports must have one shape, got {sorted(shapes)}")
        total = sum(report.samples for report in reports)
        parts = [report.samples / total for report in reports]
        kl = _average(parts, [report.kl for report in reports])
        mean = _average(parts, [report.mean for report in reports])
        # Variance within the batches, and that of their means: no difference of large squares.
        squares = [r.variance + (r.mean.to(mean.device) - mean).square() for r in reports]
        return cls(kl, mean, _average(parts, squares), total)

    def active(self, threshold: float = 0.01) -> Tensor:
        """The dimensions whose posterior mean has a variance above the threshold.

        Args:
            threshold: 0.01 in the paper.

        Returns:
            Bools, ``[...]``.

        Source:
            Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519) section 5.2.
        """
        return self.variance > as_real("threshold", threshold)

    def num_active(self, threshold: float = 0.01) -> int:
        """The number of active dimensions.

        Args:
            threshold: 0.01 in the paper.

        Returns:
            Their number.
        """
        return int(self.active(threshold).sum())

    def __str__(self) -> str:
        return (
            f"KL {self.kl.sum().item():.4f} nats, {self.num_active()} of {self.kl.numel()} "
            f"dimensions active ({self.samples} samples)"
        )


@torch.no_grad()
def latent_report(mean: Tensor, logvar: Tensor) -> LatentReport:
    """The KL of each dimension of z and the variance of its posterior mean, over a batch.

    For a data set, make one of each batch, and combine them with ``LatentReport.combine``.

    Args:
        mean: Mean of the posterior of z, ``[B, ...]``.
        logvar: Log-variance of the posterior of z, like ``mean``.

    Returns:
        A ``LatentReport`` of tensors ``[...]``.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: Shapes that do not match, or no samples.

    Source:
        Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519) section 5.2.
    """
    kl = ops.standard_normal_kl(mean, logvar)
    if kl.ndim == 0 or len(kl) == 0:
        raise ValueError(f"mean must have at least one sample, got shape {tuple(mean.shape)}")
    mean = widened(mean)
    variance, center = torch.var_mean(mean, dim=0, correction=0)
    return LatentReport(widened(kl).mean(0), center, variance, len(mean))


def _average(parts: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = parts[0] * values[0]
    for part, value in zip(parts[1:], values[1:], strict=True):
        total = total + part * value.to(total.device)
    return total
