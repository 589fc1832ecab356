"""A region in which the host may not wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes every operation that synchronizes raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoReadback(TorchDispatchMode):
    """Refuses every op that would make the host wait for what a device computes."""

    refused = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.refused:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))
