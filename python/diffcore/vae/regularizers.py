"""What a VAE is trained with instead of the KL itself: free bits, capacity, balanced sides."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_int, as_real, check_choice, check_float_tensor

UNITS = ("dimension", "group", "sample")
OVER = ("batch", "sample")


def free_bits(
    kl: Tensor,
    free_nats: float,
    *,
    per: str = "dimension",
    over: str = "batch",
    group_dim: int = 1,
) -> Tensor:
    """The KL with its first ``free_nats`` nats free: sum_j max(free_nats, KL_j) over the units j.

    A unit whose KL is below ``free_nats`` has no gradient, so that nothing pulls it to the prior.
    With ``over="batch"`` KL_j is the mean over the batch, as in the paper: row b of the result is
    sum_j (KL_bj if mean_b KL_bj > free_nats else free_nats), which has the mean
    sum_j max(free_nats, mean_b KL_bj) and its gradient. With ``over="sample"`` it is the KL of each
    sample. For one bit pass ``math.log(2)``.

    Args:
        kl: KL of each dimension in nats, ``[B, ...]``: ``ops.standard_normal_kl(mean, logvar)``.
        free_nats: What is free in each unit, in nats, at least 0.
        per: The unit: "dimension" (every element), "group" (sums over all dimensions but
            ``group_dim``, such as the channels of ``[B, C, H, W]``), or "sample" (the sum over the
            sample).
        over: "batch" or "sample".
        group_dim: The dimension of the groups, with ``per="group"``.

    Returns:
        ``[B]``, nats, for ``vae_loss(kl=)``; float32 for 16-bit tensors.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown ``per`` or ``over``, a negative ``free_nats``, or a ``group_dim``
            that ``kl`` does not have.

    Source:
        Kingma et al. 2016 (arXiv 1606.04934) appendix C.8.
    """
    check_float_tensor("kl", kl)
    check_choice("per", per, UNITS)
    check_choice("over", over, OVER)
    free = as_real("free_nats", free_nats)
    if not free >= 0:
        raise ValueError(f"free_nats must be at least 0, got {free}")
    if kl.ndim == 0:
        raise ValueError("kl must have shape [B, ...], got a 0-dim tensor")
    kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
    if per == "group":
        dim = as_int("group_dim", group_dim, 1)
        if dim >= kl.ndim:
            raise ValueError(
                f"group_dim must be a dimension of kl after the batch, 1 .. {kl.ndim - 1}, "
                f"got {dim}"
            )
        units = kl.movedim(dim, 1).flatten(2).sum(2) if kl.ndim > 2 else kl
    else:
        units = kl.reshape(len(kl), -1)
        if per == "sample":
            units = units.sum(1, keepdim=True)
    if over == "sample":
        return units.clamp(min=free).sum(1)
    above = units.detach().mean(0) > free
    return torch.where(above, units, free).sum(1)


def capacity_loss(kl: Tensor, capacity: float | Tensor, *, beta: float = 1.0) -> Tensor:
    """The loss beta |KL - C|, which holds the KL at a capacity of C nats.

    Add it to the reconstruction loss in place of the KL. C rises during training, such as by
    ``vae.linear_annealing(step, num_steps, end=25.0)``.

    Args:
        kl: The KL in nats: ``[B]``, or its mean over the batch as a 0-dim tensor. The paper takes
            the expectation first; then pass ``kl.mean()``.
        capacity: C, in nats: a number or a 0-dim tensor, at least 0.
        beta: Weight, a number (gamma in the paper).

    Returns:
        Like ``kl``, in nats.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A negative capacity.

    Source:
        Burgess et al. 2018 (arXiv 1804.03599).
    """
    check_float_tensor("kl", kl)
    if not isinstance(capacity, Tensor):
        capacity = as_real("capacity", capacity)
        if not capacity >= 0:
            raise ValueError(f"capacity must be at least 0, got {capacity}")
    elif capacity.numel() != 1:
        raise ValueError(
            f"capacity must be a number or a 0-dim tensor, got {tuple(capacity.shape)}"
        )
    else:
        capacity = capacity.reshape(())
    return as_real("beta", beta) * (kl - capacity).abs()


def balanced_kl(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    *,
    prior_weight: float = 0.8,
    posterior_weight: float | None = None,
    free_nats: float = 0.0,
) -> Tensor:
    """KL(posterior || prior) whose gradient trains the prior and the posterior at different rates.

    With sg() a stop of the gradient, a = ``prior_weight`` and b = ``posterior_weight``::

        a max(f, KL(sg(posterior) || prior)) + b max(f, KL(posterior || sg(prior)))

    Where the KL is above f = ``free_nats``, the value is (a + b) KL.

    Args:
        mean1: Mean of the posterior, ``[B, ...]``.
        logvar1: Log-variance of the posterior, like ``mean1``.
        mean2: Mean of the prior, like ``mean1``.
        logvar2: Log-variance of the prior, like ``mean1``.
        prior_weight: a, the rate of the prior: 0.8 in DreamerV2; 0.5 in DreamerV3.
        posterior_weight: b, the rate of the posterior; ``None`` for 1 - a, as in DreamerV2; 0.1 in
            DreamerV3.
        free_nats: f, nats of each sample below which there is no gradient: 1 in DreamerV3.

    Returns:
        ``[B]``, nats, summed over each sample.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Shapes that do not match, or a negative ``free_nats``.

    Source:
        Hafner et al. 2021 (arXiv 2010.02193) algorithm 2; Hafner et al. 2023 (arXiv 2301.04104).
    """
    prior = as_real("prior_weight", prior_weight)
    rest = 1 - prior if posterior_weight is None else as_real("posterior_weight", posterior_weight)
    free = as_real("free_nats", free_nats)
    if not free >= 0:
        raise ValueError(f"free_nats must be at least 0, got {free}")
    for name, x in (
        ("mean1", mean1),
        ("logvar1", logvar1),
        ("mean2", mean2),
        ("logvar2", logvar2),
    ):
        check_float_tensor(name, x)
    of_prior = ops.normal_kl(mean1.detach(), logvar1.detach(), mean2, logvar2, reduction="sample")
    of_posterior = ops.normal_kl(
        mean1, logvar1, mean2.detach(), logvar2.detach(), reduction="sample"
    )
    if free:
        of_prior, of_posterior = of_prior.clamp(min=free), of_posterior.clamp(min=free)
    return prior * of_prior + rest * of_posterior
