"""The KL of Gaussians with full covariances."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import check_float_tensor


def full_covariance_kl(
    mean1: Tensor,
    covariance1: Tensor | None = None,
    mean2: Tensor | None = None,
    covariance2: Tensor | None = None,
    *,
    scale_tril1: Tensor | None = None,
    scale_tril2: Tensor | None = None,
) -> Tensor:
    """KL(N1 || N2) of Gaussians with full covariances, from their Cholesky factors.

    With covariances L1 L1^T and L2 L2^T, the lower triangular M = L2^-1 L1 and
    d_i = 2 log M_ii::

        1/2 [ sum_i (expm1(d_i) - d_i) + sum_{i>j} M_ij^2 + |L2^-1 (mean1 - mean2)|^2 ]

    No terms cancel, so that the KL of Gaussians that are close to each other is accurate. It is
    plain torch and differentiable in every argument.

    Args:
        mean1: ``[..., n]``.
        covariance1: ``[..., n, n]``, symmetric and positive definite; only its lower triangle is
            read.
        mean2: ``[..., n]``; ``None`` for 0.
        covariance2: Like ``covariance1``; ``None`` for the identity.
        scale_tril1: L1 ``[..., n, n]``, lower triangular with a positive diagonal, instead of
            ``covariance1``; what is above the diagonal is not read.
        scale_tril2: L2, like ``scale_tril1``, instead of ``covariance2``.

    Returns:
        ``[...]``, nats.

    Raises:
        TypeError: An argument is no floating-point tensor, of float32 or float64.
        ValueError: Shapes that do not match, a covariance that is not positive definite, or both or
            neither of ``covariance1`` and ``scale_tril1``.

    Source:
        Kullback and Leibler 1951; the lecture's theorem for a full covariance.
    """
    check_float_tensor("mean1", mean1)
    if mean1.dtype.itemsize < 4:
        raise TypeError(f"mean1 must be float32 or float64, got {mean1.dtype}")
    if mean1.ndim == 0:
        raise ValueError("mean1 must have shape [..., n], got a 0-dim tensor")
    first = _factor("1", covariance1, scale_tril1, mean1)
    if first is None:
        raise ValueError("covariance1 must be given, or scale_tril1, got neither")
    second = _factor("2", covariance2, scale_tril2, mean1)
    delta = mean1
    if mean2 is not None:
        check_float_tensor("mean2", mean2)
        if mean2.shape[-1:] != mean1.shape[-1:] or mean2.dtype != mean1.dtype:
            raise ValueError(
                f"mean2 must have {mean1.shape[-1]} dimensions of {mean1.dtype}, as mean1, "
                f"got {tuple(mean2.shape)} of {mean2.dtype}"
            )
        delta = mean1 - mean2
    if second is not None:
        first = torch.linalg.solve_triangular(second, first, upper=False)
        delta = torch.linalg.solve_triangular(second, delta.unsqueeze(-1), upper=False).squeeze(-1)
    log_ratio = 2 * first.diagonal(dim1=-2, dim2=-1).log()
    diagonal = ops.normal_kl(torch.zeros_like(log_ratio), log_ratio, 0, 0).sum(-1)
    below = first.tril(-1).square().sum((-2, -1))
    return diagonal + 0.5 * (below + delta.square().sum(-1))


def _factor(
    number: str, covariance: Tensor | None, scale_tril: Tensor | None, mean: Tensor
) -> Tensor | None:
    """The Cholesky factor of one Gaussian."""
    if covariance is None and scale_tril is None:
        return None
    if covariance is not None and scale_tril is not None:
        raise ValueError(
            f"covariance{number} must be None where scale_tril{number} is given, got both"
        )
    name = f"covariance{number}" if scale_tril is None else f"scale_tril{number}"
    matrix = covariance if scale_tril is None else scale_tril
    check_float_tensor(name, matrix)
    assert matrix is not None
    n = mean.shape[-1]
    if matrix.shape[-2:] != (n, n) or matrix.dtype != mean.dtype:
        raise ValueError(
            f"{name} must have shape [..., {n}, {n}] of {mean.dtype}, as mean1, "
            f"got {tuple(matrix.shape)} of {matrix.dtype}"
        )
    if scale_tril is not None:
        return scale_tril.tril()
    try:
        factor: Tensor = torch.linalg.cholesky(matrix)
    except RuntimeError as error:  # a LinAlgError
        raise ValueError(f"{name} must be positive definite, got a matrix that is not") from error
    return factor
