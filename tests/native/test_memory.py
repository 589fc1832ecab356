"""No call leaves memory behind: not one that is refused, nor the words of noise.

What malloc has in use is counted, because the resident size of a process moves by a megabyte in a
loop that does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


_mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
X = torch.ones(2, 3)
KEY = PhiloxNoise(1, torch.arange(2))


def in_use() -> int:
    assert _mallinfo2 is not None
    _mallinfo2.restype = _Mallinfo2
    found = _mallinfo2()
    return int(found.uordblks + found.hblkhd)


def freed(size: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.ones(40, dtype=dtype)[3 : 3 + size]
    x.untyped_storage().resize_(0)
    return x


def refused(call: Callable[[], object]) -> None:
    with contextlib.suppress(ValueError):
        call()
        raise AssertionError("not refused")


CALLS: dict[str, Callable[[], object]] = {
    "results": lambda: ops.add_noise(X, X, 0.6, 0.8),
    "freed samples": lambda: refused(lambda: ops.add_noise(freed(), X[:1].view(3), 0.6, 0.8)),
    "freed coefficient": lambda: refused(lambda: ops.add_noise(X, X, freed(2), 0.8)),
    "freed out": lambda: refused(lambda: ops.add_noise(X, X, 0.6, 0.8, out=freed().view_as(X))),
    "freed ids": lambda: refused(
        lambda: ops.add_noise(X, PhiloxNoise(1, freed(2, torch.int64)), 0.6, 0.8)
    ),
    "wrong shape": lambda: refused(lambda: ops.add_noise(X, X[:1], 0.6, 0.8)),
    "sums": lambda: ops.standard_normal_kl(X, X, reduction="sample"),
    "words": lambda: KEY.timesteps(1000, 2),
    "wrong batch": lambda: refused(lambda: KEY.timesteps(1000, 3)),
}


@pytest.mark.skipif(_mallinfo2 is None, reason="another malloc than that of glibc")
@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_no_memory_behind(name: str) -> None:
    call, calls = CALLS[name], 500

    def grown() -> int:
        for _ in range(50):
            call()
        gc.collect()
        before = in_use()
        for _ in range(calls):
            call()
        gc.collect()
        return in_use() - before

    gc.freeze()  # what exists is not searched again at each collection
    try:
        # Other threads and caches allocate too, but not each time.
        assert min(grown() for _ in range(3)) < 8 * calls
    finally:
        gc.unfreeze()
