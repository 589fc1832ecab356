"""Noise as a function of (seed, sample id, stream, element), generated where it is used."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager, run
from diffcore._kernels.noise import RANDN

__all__ = ["PhiloxNoise"]

_WORDS = 2**32
_MAX_FIRST = 4 * _WORDS


class PhiloxNoise:
    """A noise key, used like a JAX key: ``z = normal(seed, sample id, stream, element)``.

    Every ``noise=`` argument takes a key in place of a tensor. The kernel then generates the
    standard normal noise and never stores it, and can generate it again: the same key gives the
    same bits in any batch split or order, memory layout, number of threads and instruction set. The
    CUDA kernels compile the same source; their bits have not been compared on a GPU yet. The noise
    is generated in float32 and rounded to the dtype of the samples, so ``op(noise=key)`` equals
    ``op(noise=key.tensor(shape, dtype=..., device=...))`` to the bit.

    Philox4x32-10 with the seed as its key and the counter (element // 4, stream, sample id), and
    Box-Muller on its words; ``element`` counts along the row-major order inside a sample, whatever
    the memory layout. A sample is an entry of the first dimension. Keys are immutable, can be
    pickled, and compare by value.

    Args:
        seed: Any 64-bit int (negative ones are their two's complement), or an int64 or uint64
            tensor beside the samples: 0-dim, ``[1]``, or ``[2]``, a key (seed, offset) as made by
            ``torch.func._random.key``, whose offset is added to the stream. A tensor is read by
            the kernel: a captured CUDA graph uses its new value, and ``torch.compile`` does not
            compile again for it.
        sample_ids: Which samples these are: ``None`` for 0 .. B-1, an int (or a 0-dim int64
            tensor) for that and the B-1 following, or int64 ``[B]``.
        stream: Which noise of a sample this is, for example the step of a sampler: an int in
            0 .. 2^32 - 1, or an int64 tensor of one element (its low 32 bits count).
        first_element: Where the tensors begin inside their samples, if they are shards of them: a
            multiple of 4 in 0 .. 2^34 - 4.

    Raises:
        TypeError, ValueError: An argument of another type, shape or range.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """

    __slots__ = ("_parts",)
    _parts: tuple[int | Tensor, int | Tensor, int | Tensor, int]

    def __init__(
        self,
        seed: int | Tensor,
        *,
        sample_ids: int | Tensor | None = None,
        stream: int | Tensor = 0,
        first_element: int = 0,
    ) -> None:
        parts = (
            _seed(seed),
            _integer("sample_ids", 0 if sample_ids is None else sample_ids, -(2**63), 2**63),
            _integer("stream", stream, 0, _WORDS),
            _integer("first_element", first_element, 0, _MAX_FIRST),
        )
        _check_shapes(*parts)
        object.__setattr__(self, "_parts", parts)

    @property
    def seed(self) -> int | Tensor:
        """The seed: an int in -2^63 .. 2^63 - 1, or an int64 tensor."""
        return self._parts[0]

    @property
    def sample_ids(self) -> int | Tensor:
        """The first of consecutive ids, or an int64 tensor ``[B]``."""
        return self._parts[1]

    @property
    def stream(self) -> int | Tensor:
        """The stream."""
        return self._parts[2]

    @property
    def first_element(self) -> int:
        """Where the tensors begin inside their samples."""
        return self._parts[3]

    @classmethod
    def from_generator(
        cls,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> PhiloxNoise:
        """A key whose seed comes from torch's generator, so that ``torch.manual_seed`` sets it.

        Args:
            generator: ``None`` for the default one of the device.
            device: Where the noise will be needed; ``None`` for the generator's device, else the
                CPU. On the CPU the seed is an int; elsewhere, and under ``torch.compile``, it is a
                tensor, so that nothing waits and a captured graph uses a new seed at each replay.

        Returns:
            Stream 0 of samples 0 .. B-1.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        source = torch.device("cpu") if generator is None else generator.device
        at = source if device is None else torch.device(device)
        seeded_on = at if generator is None else source
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=seeded_on)
        if seeded_on.type == "cpu" and plain_eager():
            return cls(int(seed))
        return cls(seed.to(at))

    def at(self, stream: int | Tensor) -> PhiloxNoise:
        """The same key at another stream: independent noise of the same samples."""
        seed, ids, _, first = self._parts
        return PhiloxNoise(seed, sample_ids=ids, stream=stream, first_element=first)

    def for_samples(self, sample_ids: int | Tensor | None) -> PhiloxNoise:
        """The same key for other samples: a slice of the batch, another process, ..."""
        seed, _, stream, first = self._parts
        return PhiloxNoise(seed, sample_ids=sample_ids, stream=stream, first_element=first)

    def tensor(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The noise itself, ``[B, ...]``.

        Args:
            shape: Its shape; the first dimension counts samples.
            dtype: float32, float64, bfloat16 or float16; torch's default if ``None``.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            Standard normal noise, generated in float32 and rounded to ``dtype``.
        """
        if device is None:
            device = next((p.device for p in self._parts if isinstance(p, Tensor)), None)
        if dtype is not None and dtype not in messages.DTYPES:
            allowed = "float32, float64, bfloat16 or float16"
            raise TypeError(f"dtype must be {allowed}, got {dtype}")
        return draw(self, torch.empty(_sizes(shape), dtype=dtype, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a PhiloxNoise is immutable; cannot set {name}: see at, for_samples")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PhiloxNoise is immutable; cannot delete {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PhiloxNoise):
            return NotImplemented
        return all(map(_same, self._parts, other._parts))

    def __hash__(self) -> int:
        return hash(tuple(p for p in self._parts if not isinstance(p, Tensor)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._parts

    def __repr__(self) -> str:
        seed, ids, stream, first = self._parts
        shard = f", first_element={first}" if first else ""
        return f"PhiloxNoise({seed}, sample_ids={ids}, stream={stream}{shard})"


Noise: TypeAlias = Tensor | PhiloxNoise
"""Noise as a tensor, or as the key that a kernel generates it from."""

StepNoise: TypeAlias = Tensor | PhiloxNoise | Callable[[int, Tensor], Tensor | PhiloxNoise]
"""The noise of each step: ``[S, B, ...]``, a key read at one stream per step, or a function."""


def draw(noise: PhiloxNoise, out: Tensor) -> Tensor:
    """The noise in shape, dtype and layout of ``out``; in ``out`` itself unless compiled."""
    into = out if plain_eager() else None
    return run(RANDN, (out,), (), None, False, into, noise._parts)


def _sizes(shape: Any) -> tuple[int, ...]:
    allowed = "a sequence of sizes, such as (64, 3, 32, 32)"
    came = type(shape).__name__ if isinstance(shape, Tensor) else repr(shape)
    ints = (int, torch.SymInt)
    try:
        sizes: Any = tuple(n if isinstance(n, ints) else operator.index(n) for n in shape)
    except (TypeError, RuntimeError):
        raise TypeError(f"shape must be {allowed}, got {came}") from None
    if any(isinstance(n, bool) for n in sizes):
        raise TypeError(f"shape must be {allowed}, got {came}")
    if any(n < 0 for n in sizes):
        raise ValueError(f"shape must be {allowed}, got {came}")
    return tuple(sizes)


def _rebuilt(*parts: Any) -> PhiloxNoise:
    seed, ids, stream, first = parts
    return PhiloxNoise(seed, sample_ids=ids, stream=stream, first_element=first)


def _same(a: int | Tensor, b: int | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and bool((a == b).all()))
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def _seed(seed: Any) -> Any:
    if isinstance(seed, Tensor):
        words = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed
        key = _integer("seed", words, 0, 0)
        return key.contiguous() if key.ndim else key
    number = _integer("seed", seed, -(2**63), 2**64)
    return number - 2**64 if number >= 2**63 else number


def _integer(name: str, value: Any, low: int, high: int) -> Any:
    """An int in low .. high - 1, or an int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or name == "first_element":
            raise TypeError(f"{name} must be {_ALLOWED[name]}, got a tensor of {value.dtype}")
        return value
    # A compiler's symbolic int is an int to isinstance, but has no __index__.
    is_int = isinstance(value, int)
    if isinstance(value, bool) or not (is_int or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be {_ALLOWED[name]}, got {type(value).__name__}")
    if not is_int and not isinstance(value, torch.SymInt):
        value = value.__index__()
    if not low <= value < high:
        raise ValueError(f"{name} must be {_ALLOWED[name]}, got {value}")
    return value


def _check_shapes(seed: Any, sample_ids: Any, stream: Any, first_element: int) -> None:
    for name, part, most in (
        ("seed", seed, 2),
        ("sample_ids", sample_ids, 0),
        ("stream", stream, 1),
    ):
        if not isinstance(part, Tensor):
            continue
        messages.check_dense(name, part)
        if part.ndim > 1 or (most and not 1 <= part.numel() <= most):
            raise ValueError(f"{name} must be {_ALLOWED[name]}, got shape {tuple(part.shape)}")
    if first_element % 4:
        raise ValueError(f"first_element must be {_ALLOWED['first_element']}, got {first_element}")


_ALLOWED = {
    "seed": "a 64-bit int, or an int64 or uint64 tensor of shape [], [1] or [2]",
    "sample_ids": "None, a 64-bit int, or an int64 tensor [B]",
    "stream": "an int in 0 .. 2^32 - 1, or an int64 tensor of one element",
    "first_element": "a multiple of 4 in 0 .. 2^34 - 4",
}
