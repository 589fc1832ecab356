"""Noise keys in data loaders and in files: one key for a batch of them, and ``weights_only``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from diffcore.noise.key import GroupNoise, PhiloxNoise, ShardNoise


def collate(
    keys: Sequence[PhiloxNoise],
    *,
    collate_fn_map: dict[Any, Callable[..., Any]] | None = None,  # noqa: ARG001 - torch passes it
) -> PhiloxNoise:
    """One key for a batch, of one key for each sample: what ``default_collate`` calls.

    Args:
        keys: Keys that differ in their sample ids only, each of which is one id.
        collate_fn_map: Not used; ``default_collate`` passes it.

    Returns:
        The key with ``sample_ids`` ``[B]``, on the CPU.

    Raises:
        ValueError: The keys differ in more than their sample ids, or one has several ids.
    """
    first, ids = keys[0].for_samples(0), []
    for key in keys:
        if key.for_samples(0) != first:
            raise ValueError(
                "a batch of noise keys must differ in sample_ids only, got "
                f"{first!r} and {key.for_samples(0)!r}; collate sample ids and make the key of "
                "the batch from them"
            )
        if isinstance(key.sample_ids, Tensor) and key.sample_ids.numel() != 1:
            raise ValueError(
                "each noise key of a batch must have one sample id, got "
                f"{key.sample_ids.numel()} of them"
            )
        ids.append(int(key.sample_ids))
    return first.for_samples(torch.tensor(ids, dtype=torch.int64, device="cpu"))


def register() -> None:
    """Tell torch's collate function and its ``weights_only`` loader about noise keys."""
    default_collate_fn_map[PhiloxNoise] = collate
    torch.serialization.add_safe_globals([PhiloxNoise, ShardNoise, GroupNoise])
