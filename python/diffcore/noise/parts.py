"""The parts of a noise key as users pass them, checked and converted to what kernels take."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_device, as_shape, check_dense
from diffcore._engine.dispatch import plain_eager

_WORDS = 2**32
_MAX_FIRST = 4 * _WORDS
_MAX_UNIFORM = 2 * _WORDS  # elements of a sample: each takes two of its 2^34 words

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_ALLOWED = {
    "seed": "a 64-bit int, or an int64 or uint64 tensor of shape [], [1] or [2]",
    "sample_ids": "None, a 64-bit int, or [B] ints: a tensor, an array or a list",
    "stream": "an int in 0 .. 2^32 - 1, or an int64 tensor of one element",
    "first_element": "a multiple of 4 in 0 .. 2^34 - 4",
}


def seed_part(seed: Any) -> Any:
    """An int of 64 bits with a sign, or an int64 tensor ``[]``, ``[1]`` or ``[2]``."""
    if not isinstance(seed, Tensor):
        number = _integer("seed", seed, -(2**63), 2**64)
        return number - 2**64 if number >= 2**63 else number
    words = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed
    key = _checked("seed", words, 2)
    return key.contiguous() if key.ndim else key


def seed_of(generator: Any, device: Any) -> int | Tensor:
    """A seed from a generator: see ``PhiloxNoise.from_generator``."""
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        each = isinstance(generator, (list, tuple))
        fix = "; for a seed of each sample pass a PhiloxNoise with sample_ids" if each else ""
        raise TypeError(f"generator must be a torch.Generator, got {kind}{fix}")
    source = torch.device("cpu") if generator is None else generator.device
    at = source if device is None else as_device("device", device)
    seeded_on = at if generator is None else source
    eager = plain_eager()
    if generator is None and not eager:
        drawn: Tensor = torch.ops.diffcore.draw_seed(device=seeded_on)
        return drawn
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=seeded_on)
    return int(seed) if seeded_on.type == "cpu" and eager else seed.to(at)


def torch_key(key: Any) -> Tensor:
    """A key of ``torch.func._random``, checked: uint64 ``[2]``."""
    if not torch.compiler.is_compiling() and not _torch_has_keys():
        raise RuntimeError(
            f"from_key needs torch.func._random, which torch {torch.__version__} lacks; pass an "
            "int seed to PhiloxNoise"
        )
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be a key of torch.func._random, got {type(key).__name__}")
    if key.dtype != torch.uint64:
        raise TypeError(f"key must be a key of torch.func._random, uint64, got {key.dtype}")
    check_dense("key", key)
    if key.shape != (2,):
        batch = key.ndim > 1 and key.shape[-1] == 2
        fix = "; one key gives every sample noise, by its sample id" if batch else ""
        raise ValueError(f"key must have shape (2,), got {tuple(key.shape)}{fix}")
    return key


@functools.cache
def _torch_has_keys() -> bool:
    return importlib.util.find_spec("torch.func._random") is not None


def ids_part(sample_ids: Any) -> Any:
    """An int, or an int64 tensor ``[]`` or ``[B]``."""
    if sample_ids is None:
        return 0
    if isinstance(sample_ids, (list, tuple, range)):
        sample_ids = _list_of_ids(sample_ids)
    elif not isinstance(sample_ids, (Tensor, int)) and _is_array(sample_ids):
        sample_ids = _array_of_ids(sample_ids)
    if not isinstance(sample_ids, Tensor):
        return _integer("sample_ids", sample_ids, -(2**63), 2**63)
    if sample_ids.dtype in _INTEGERS:
        sample_ids = sample_ids.long()
    return _checked("sample_ids", sample_ids, 0)


def group_ids_part(group_ids: Any) -> Tensor:
    """An int64 tensor ``[B, G]``."""
    ids = group_ids if isinstance(group_ids, Tensor) else torch.as_tensor(group_ids)
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"group_ids must be integers, got {ids.dtype}")
    check_dense("group_ids", ids)
    if ids.ndim != 2:
        raise ValueError(f"group_ids must have shape [B, G], got {tuple(ids.shape)}")
    return ids.long()


def stream_part(stream: Any) -> Any:
    """An int of 32 bits, or an int64 tensor of one element."""
    if isinstance(stream, Tensor):
        return _checked("stream", stream, 1)
    return _integer("stream", stream, 0, _WORDS)


def first_part(first_element: Any) -> Any:
    """A multiple of 4."""
    if isinstance(first_element, Tensor):
        raise _wrong("first_element", f"a tensor of {first_element.dtype}")
    first = _integer("first_element", first_element, 0, _MAX_FIRST)
    if first % 4:
        raise ValueError(f"first_element must be {_ALLOWED['first_element']}, got {first}")
    return first


def same_part(a: int | Tensor, b: int | Tensor) -> bool:
    """Whether two parts are equal numbers, or tensors of equal numbers on one device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and bool((a == b).all()))
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def plus(ids: int | Tensor, offset: int) -> int | Tensor:
    """Consecutive ids that begin later, modulo 2^64 like those that a kernel counts."""
    if isinstance(ids, int) and isinstance(offset, int):
        return (ids + offset + 2**63) % 2**64 - 2**63
    return ids + offset


def _list_of_ids(ids: Sequence[Any]) -> Tensor:
    numbers = [_integer("sample_ids", i, -(2**63), 2**63) for i in ids]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _is_array(ids: Any) -> bool:
    return len(getattr(ids, "shape", ())) > 0


def _array_of_ids(ids: Any) -> Tensor:
    """The ids of a NumPy array, copied: a key does not change with the array."""
    kind = ids.dtype
    if kind.kind not in "iu" or kind.name == "uint64":
        raise _wrong("sample_ids", f"an array of {kind}")
    return torch.tensor(ids.astype("int64"), device="cpu")


def _checked(name: str, value: Tensor, most: int) -> Tensor:
    """An int64 tensor of 1 .. ``most`` elements, or of any number of them where ``most`` is 0."""
    if value.dtype != torch.int64:
        raise _wrong(name, f"a tensor of {value.dtype}")
    check_dense(name, value)
    if value.ndim > 1 or (most and not 1 <= value.numel() <= most):
        raise ValueError(f"{name} must be {_ALLOWED[name]}, got shape {tuple(value.shape)}")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> Any:
    """An int in low .. high - 1."""
    # A compiler's symbolic int is an int to isinstance, but has no __index__.
    is_int = isinstance(value, int)
    if isinstance(value, bool) or not (is_int or hasattr(value, "__index__")):
        raise _wrong(name, type(value).__name__)
    if not is_int and not isinstance(value, torch.SymInt):
        try:
            value = value.__index__()
        except TypeError:  # of an array
            raise _wrong(name, type(value).__name__) from None
    if not low <= value < high:
        raise ValueError(f"{name} must be {_ALLOWED[name]}, got {value}")
    return value


def _wrong(name: str, came: str) -> TypeError:
    return TypeError(f"{name} must be {_ALLOWED[name]}, got {came}")


def box(
    shape: Sequence[int], local_shape: Sequence[int], offset: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Checks a box inside a tensor."""
    full = as_shape("shape", shape)
    local, at = as_shape("local_shape", local_shape), as_shape("offset", offset)
    if not full:
        raise ValueError("shape must be [B, ...], got ()")
    for name, given in (("local_shape", local), ("offset", at)):
        if len(given) != len(full):
            raise ValueError(
                f"{name} must have the {len(full)} dimensions of shape, {full}, got {given}"
            )
    for size, part, begin in zip(full, local, at, strict=True):
        if begin + part > size:
            raise ValueError(
                f"offset plus local_shape must be at most shape, {full}, got {at} plus {local}"
            )
    return full, local, at


def check_uniform_end(end: int) -> None:
    """Refuses uniform numbers beyond the last element of a sample that has them."""
    if end > _MAX_UNIFORM:
        raise ValueError(f"shape must end before element 2^33 of a sample, got {end}")
