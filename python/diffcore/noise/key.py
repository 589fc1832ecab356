"""``PhiloxNoise``, the noise key: noise that is generated where it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from diffcore._checks import as_device, as_flag, as_int, as_real, as_shape
from diffcore._devices import in_float64
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.window import Window
from diffcore._kernels.noise import RANDN, pairs
from diffcore._types import NoiseParts
from diffcore.noise import parts as p
from diffcore.reference import philox

__all__ = ["GroupNoise", "Noise", "PhiloxNoise", "ShardNoise", "StepNoise", "draw"]

Device = torch.device | str | None

_MAX_TIMESTEPS = 2**31


class PhiloxNoise:
    """A noise key, used like a JAX key: ``z = normal(seed, sample id, stream, element)``.

    Every ``noise=`` argument takes a key in place of a tensor. The kernel then generates the
    standard normal noise and never stores it, and can generate it again: the same key gives the
    same bits in any batch split or order, memory layout, number of threads and instruction set. The
    CUDA kernels compile the same source (docs/gpu.md has what has run on a GPU). The noise is
    generated in float32 and rounded to the dtype of the samples, so ``op(noise=key)`` equals
    ``op(noise=key.tensor(shape, dtype=..., device=...))`` to the bit.

    Philox4x32-10 with the seed as its key and the counter (element // 4, stream, sample id), and
    Box-Muller on its words; ``element`` counts along the row-major order inside a sample, whatever
    the memory layout. A sample is an entry of the first dimension. Keys are immutable, can be
    pickled (``torch.load(weights_only=True)`` reads them too), and compare by value. A
    ``DataLoader`` makes one key for a batch of a batch of keys.

    Args:
        seed: Any 64-bit int (negative ones are their two's complement), or an int64 or uint64
            tensor beside the samples: 0-dim, ``[1]``, or ``[2]``, a key (seed, offset) as made by
            ``torch.func._random.key``, whose offset is added to the stream. A tensor is read by
            the kernel: a captured CUDA graph uses its new value, and ``torch.compile`` does not
            compile again for it.
        sample_ids: Which samples these are: ``None`` for 0 .. B-1, an int (or a 0-dim tensor) for
            that and the B-1 following, or ``[B]`` ids: an integer tensor, a NumPy array of ints or
            a list of ints. An int64 tensor is kept as it is; others become one on the CPU (a tensor
            stays on its device).
        stream: Which noise of a sample this is, for example the step of a sampler: an int in
            0 .. 2^32 - 1, or an int64 tensor of one element (its low 32 bits count).
        first_element: Where the tensors begin inside their samples, if they are shards of them: a
            multiple of 4 in 0 .. 2^34 - 4. ``for_shard`` finds it, and makes keys of other shards.

    Raises:
        TypeError, ValueError: An argument of another type, shape or range.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """

    __module__ = "diffcore.noise"  # what files of pickles name
    __slots__ = ("_parts",)
    _parts: NoiseParts

    def __init__(
        self,
        seed: int | Tensor,
        sample_ids: int | Tensor | Sequence[int] | None = None,
        stream: int | Tensor = 0,
        first_element: int = 0,
    ) -> None:
        parts = (
            p.seed_part(seed),
            p.ids_part(sample_ids),
            p.stream_part(stream),
            p.first_part(first_element),
        )
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
        return cls(p.seed_of(generator, device))

    @classmethod
    def from_key(
        cls, key: Tensor, sample_ids: int | Tensor | Sequence[int] | None = None
    ) -> PhiloxNoise:
        """The noise key of a key of ``torch.func._random``: its seed, and its offset as stream.

        Keys that ``torch.func._random.split`` and ``fold_in`` derive give other noise. The numbers
        are those of ``PhiloxNoise``, not those of ``torch.func._random.normal``.

        Args:
            key: A key, uint64 ``[2]``. It is read by the kernel, on its device.
            sample_ids: As for the constructor.

        Returns:
            ``PhiloxNoise(key, sample_ids)``.

        Raises:
            RuntimeError: This torch has no ``torch.func._random``.
            TypeError: Another type or dtype.
            ValueError: Another shape, such as a batch of keys.
        """
        return cls(p.torch_key(key), sample_ids)

    def at(self, stream: int | Tensor) -> PhiloxNoise:
        """The same key at another stream: independent noise of the same samples."""
        seed, ids, _, first = self._parts
        return self._with((seed, ids, p.stream_part(stream), first))

    def for_samples(self, sample_ids: int | Tensor | Sequence[int] | None) -> PhiloxNoise:
        """The same key for other samples: a slice of the batch, another process, ..."""
        seed, _, stream, first = self._parts
        return self._with((seed, p.ids_part(sample_ids), stream, first))

    def for_shard(
        self, shape: Sequence[int], local_shape: Sequence[int], offset: Sequence[int]
    ) -> PhiloxNoise:
        """The key of a shard: it gives the noise of one box of the tensor that this key is for.

        ``key.for_shard(shape, local_shape, offset).tensor(local_shape)`` has the bits of that box
        in ``key.tensor(shape)``, without generating the rest. So processes that hold parts of a
        sample (channels, rows, columns or frames) use the noise that one process would.

        A box that is one run of elements and begins at a multiple of 4, such as some of the
        channels, gives a plain key with ``first_element``, which kernels generate in place. For any
        other box the noise is generated into a tensor of the shard's size, run by run.

        Args:
            shape: The shape of the tensor that this key is for, ``[B, ...]``.
            local_shape: The shape of the shard, with as many dimensions.
            offset: The index of the shard's first entry, for each dimension. Dimension 0 selects
                sample ids.

        Returns:
            A key for tensors of ``local_shape``, or with another number of samples. Its
            ``for_shard`` gives shards of the shard.

        Raises:
            TypeError: An argument is no sequence of ints.
            ValueError: Their lengths differ, or the box is not inside the tensor.
        """
        full, local, at = p.box(shape, local_shape, offset)
        window = self._window(Window(full[1:], at[1:], local[1:]))
        seed, ids, stream, first = self._parts
        if isinstance(ids, Tensor) and ids.ndim:
            if len(ids) != full[0]:
                raise ValueError(
                    f"shape must have {len(ids)} samples, one for each of sample_ids, got {full}"
                )
            ids = ids[at[0] : at[0] + local[0]]
        else:
            ids = p.plus(ids, at[0])
        if 0 in window.sizes:
            return PhiloxNoise(seed, ids, stream, first)
        if window.is_run and (first + window.start) % 4 == 0:
            return PhiloxNoise(seed, ids, stream, first + window.start)
        return ShardNoise(seed, ids, stream, first, *window)

    def for_groups(self, group_ids: Tensor | Sequence[Sequence[int]], dim: int) -> PhiloxNoise:
        """The same key for samples whose groups have ids: the frames of a video, for example.

        The noise of a group is that of a sample with the group's id and shape, whatever its place:
        a window that moves over a video gets the same noise for the same frames. The sample ids of
        this key do not count.

        Args:
            group_ids: An id of each group of each sample, ``[B, G]`` ints. Groups with the same id
                get the same noise, also in different samples.
            dim: The dimension of the groups in ``[B, ...]``, such as 2 for the frames of
                ``[B, C, F, H, W]``.

        Returns:
            A key for tensors with B samples and G entries along ``dim``. An op that is called with
            the same ``group_dim`` generates its noise in the kernel, where groups begin at
            multiples of 4 elements; any other op reads it from a tensor. Its ``timesteps`` are
            ``[B, G]``.

        Raises:
            TypeError: ``group_ids`` are no integers.
            ValueError: They are not ``[B, G]``, or ``dim`` is less than 1.
        """
        ids = p.group_ids_part(group_ids)
        seed, _, stream, first = self._parts
        parts = (seed, ids.reshape(-1), stream, first)
        return GroupNoise(*parts, as_int("dim", dim, 1), ids.shape[1])

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
        messages.check_dtype(dtype)
        return self._normals(as_shape("shape", shape), dtype, self._device(device))

    def uniform(
        self,
        shape: Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniform numbers from the key: ``low + (high - low) u(seed, sample id, stream, element)``.

        Like the noise, they do not depend on the batch, and are independent of the key's noise and
        timesteps. They have the same bits on every device.

        Args:
            shape: ``[B, ...]``; the first dimension counts samples.
            low: The smallest number.
            high: The upper end; it occurs only by rounding, and never for the default.
            dtype: float32, float64, bfloat16 or float16; torch's default if ``None``. u is a
                multiple of 2^-24, 2^-53, 2^-8 or 2^-11: the float64 number, rounded down.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            ``shape``.

        Raises:
            ValueError: A sample has more than 2^33 elements.
        """
        messages.check_dtype(dtype)
        low, high = as_real("low", low), as_real("high", high)
        sizes = as_shape("shape", shape)
        batch, *rest = sizes or (1,)
        self._check_batch(batch)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        u = philox.uniforms(self._uniform_words(batch, tuple(rest), self._device(device)), dtype)
        if (low, high) != (0.0, 1.0):
            u = (low + (high - low) * in_float64(u)).to(dtype).to(u.device)
        return u.reshape(sizes)

    def timesteps(
        self,
        num_timesteps: int,
        batch: int,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A timestep of each sample, uniform in 0 .. T-1: a function of (seed, sample id, stream).

        So a training run that takes timesteps and noise from one key needs no state of a generator
        to be resumed, and every rank gets the timesteps of its own samples. They are independent of
        the key's noise and uniform numbers, do not depend on ``first_element`` or the shard, and
        have the same bits on every device. The probabilities of two timesteps differ by at most
        2^-64.

        Args:
            num_timesteps: T, at most 2^31.
            batch: The number of samples, B.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            int64 ``[B]``.
        """
        if not isinstance(num_timesteps, torch.SymInt):
            num_timesteps = as_int("num_timesteps", num_timesteps, 1)
        if num_timesteps > _MAX_TIMESTEPS:
            raise ValueError(f"num_timesteps must be at most 2^31, got {num_timesteps}")
        if not isinstance(batch, torch.SymInt):
            batch = as_int("batch", batch, 0)
        self._check_batch(batch)
        words = pairs(self._parts, 0, 1, batch, philox.INTEGER_SALT, self._device(device))
        return philox.integers(words, num_timesteps)[:, 0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PhiloxNoise:
        """The same key with its tensors on a device, where the kernels of that device read them.

        Args:
            device: The device.
            non_blocking: Do not wait for copies from pinned memory.

        Returns:
            A key; this one where it holds no tensors.
        """
        device, non_blocking = as_device("device", device), as_flag("non_blocking", non_blocking)
        if not any(isinstance(part, Tensor) for part in self._parts):
            return self
        seed, ids, stream = (
            x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x
            for x in self._parts[:3]
        )
        return self._with((seed, ids, stream, self._parts[3]))

    def _with(self, parts: NoiseParts) -> PhiloxNoise:
        """A key of the same kind, of parts that are known to be right."""
        key = object.__new__(PhiloxNoise)
        object.__setattr__(key, "_parts", parts)
        return key

    def _check_batch(self, batch: int) -> None:
        ids = self._parts[1]
        if isinstance(ids, Tensor) and ids.ndim and len(ids) != batch:
            raise ValueError(
                f"sample_ids must have {batch} entries, one for each sample, got {len(ids)}"
            )

    def _device(self, device: Device) -> Device:
        if device is not None:
            return as_device("device", device)
        return next((x.device for x in self._parts if isinstance(x, Tensor)), None)

    def _window(self, box: Window) -> Window:
        """A box of the samples of this key, as one of the samples that it is a shard of."""
        return box

    def _uniform_words(self, batch: int, shape: tuple[int, ...], device: Device) -> philox.Pair:
        """The words of the uniform numbers of ``[B, *shape]``, ``[B, n]``."""
        count, first = math.prod(shape), self._parts[3]
        p.check_uniform_end(first + count)
        return pairs(self._parts, first, count, batch, philox.UNIFORM_SALT, device)

    def _normals(self, shape: tuple[int, ...], dtype: torch.dtype | None, device: Device) -> Tensor:
        return draw(self, torch.empty(shape, dtype=dtype, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a PhiloxNoise is immutable; cannot set {name}: see at, for_samples")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a PhiloxNoise is immutable; cannot delete {name}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False if isinstance(other, PhiloxNoise) else NotImplemented
        return all(map(p.same_part, self._parts, other._parts))

    def __hash__(self) -> int:
        return hash(tuple(part for part in self._parts if not isinstance(part, Tensor)))

    def __reduce__(self) -> tuple[Any, ...]:
        return PhiloxNoise, self._parts

    def __repr__(self) -> str:
        seed, ids, stream, first = self._parts
        shard = f", first_element={first}" if first else ""
        return f"PhiloxNoise({seed}, sample_ids={ids}, stream={stream}{shard})"


class ShardNoise(PhiloxNoise):
    """The key of a shard that is no run of its samples' elements: see ``PhiloxNoise.for_shard``.

    Args:
        seed, sample_ids, stream, first_element: As for ``PhiloxNoise``.
        sample: The shape of a sample.
        offset: The index of the shard's first entry in its sample.
        sizes: The shape of the shard of one sample.
    """

    __module__ = "diffcore.noise"
    __slots__ = ("_box",)
    _box: Window

    def __init__(
        self,
        seed: int | Tensor,
        sample_ids: int | Tensor,
        stream: int | Tensor,
        first_element: int,
        sample: tuple[int, ...],
        offset: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> None:
        super().__init__(seed, sample_ids, stream, first_element)
        object.__setattr__(self, "_box", Window(sample, offset, sizes))

    def _with(self, parts: NoiseParts) -> PhiloxNoise:
        return ShardNoise(*parts, *self._box)

    def _window(self, box: Window) -> Window:
        self._check_shape(box.sample)
        both = zip(self._box.offset, box.offset, strict=True)
        return Window(self._box.sample, tuple(a + b for a, b in both), box.sizes)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self._box.sizes:
            wanted = ", ".join(["B", *map(str, self._box.sizes)])
            raise ValueError(
                f"shape must be that of the noise key's shard, ({wanted}), got "
                f"({', '.join(['B', *map(str, shape)])})"
            )

    def _uniform_words(self, batch: int, shape: tuple[int, ...], device: Device) -> philox.Pair:
        self._check_shape(shape)
        first = self._parts[3]
        p.check_uniform_end(first + self._box.end)
        elements = self._box.elements(device) + first
        return philox.pairs(self._parts, elements, batch, philox.UNIFORM_SALT)

    def _normals(self, shape: tuple[int, ...], dtype: torch.dtype | None, device: Device) -> Tensor:
        if not shape:
            shape = (1,)
        self._check_shape(shape[1:])
        seed, ids, stream, first = self._parts

        def run_of(first_element: int, count: int) -> Tensor:
            key = PhiloxNoise(seed, ids, stream, first_element)
            return draw(key, torch.empty(shape[0], count, dtype=dtype, device=device))

        return self._box.generate(first, run_of)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self._box == other._box  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((super().__hash__(), self._box))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardNoise, (*self._parts, *self._box)

    def __repr__(self) -> str:
        sample, offset, sizes = self._box
        plain = PhiloxNoise.__repr__(self)
        shapes = ", ".join(str((1, *shape)) for shape in (sample, sizes))
        return f"{plain}.for_shard({shapes}, {(0, *offset)})"


class GroupNoise(PhiloxNoise):
    """The key of samples whose groups have ids: see ``PhiloxNoise.for_groups``.

    Args:
        parts: Seed, ids int64 ``[B G]``, stream and first element, as for ``PhiloxNoise``; the
            dimension of the groups in ``[B, ...]``; and G.
    """

    __module__ = "diffcore.noise"
    __slots__ = ("_place",)
    _place: tuple[int, int]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts[:-2])
        object.__setattr__(self, "_place", parts[-2:])

    @property
    def dim(self) -> int:
        """The dimension of the groups in ``[B, ...]``."""
        return self._place[0]

    @property
    def group_ids(self) -> Tensor:
        """The id of each group, int64 ``[B, G]``."""
        return cast(Tensor, self._parts[1]).view(-1, self._place[1])

    @property
    def groups_as_samples(self) -> PhiloxNoise:
        """The key of the groups as samples: for ``[B G, ...]``."""
        return PhiloxNoise(*self._parts)

    def for_samples(self, sample_ids: int | Tensor | Sequence[int] | None) -> PhiloxNoise:
        """The key of samples without groups."""
        return self.groups_as_samples.for_samples(sample_ids)

    def timesteps(
        self, num_timesteps: int, batch: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        """A timestep of each group, int64 ``[B, G]``: see ``PhiloxNoise.timesteps``."""
        batch = as_int("batch", batch, 0)
        flat = self.groups_as_samples.timesteps(
            num_timesteps, batch * self._place[1], device=device
        )
        return flat.view(batch, self._place[1])

    def _window(self, box: Window) -> Window:
        del box
        raise ValueError(
            "a key with group_ids has no shards; make the key of the groups that this process holds"
        )

    def _with(self, parts: NoiseParts) -> PhiloxNoise:
        return GroupNoise(*parts, *self._place)

    def _of_group(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a group of samples of this shape, checked."""
        dim, ids = self.dim, self.group_ids
        if len(shape) <= dim or (shape[0], shape[dim]) != tuple(ids.shape):
            raise ValueError(
                f"shape must have {len(ids)} samples with {self._place[1]} groups in dimension "
                f"{dim}, as group_ids has, got {shape}"
            )
        return shape[1:dim] + shape[dim + 1 :]

    def _check_batch(self, batch: int) -> None:
        if len(self.group_ids) != batch:
            raise ValueError(
                f"group_ids must have {batch} rows, one for each sample, got {len(self.group_ids)}"
            )

    def _uniform_words(self, batch: int, shape: tuple[int, ...], device: Device) -> philox.Pair:
        group = self._of_group((batch, *shape))
        words = self.groups_as_samples._uniform_words(batch * self._place[1], group, device)
        high, low = (self._in_place(w.reshape(-1, *group)).reshape(batch, -1) for w in words)
        return high, low

    def _normals(self, shape: tuple[int, ...], dtype: torch.dtype | None, device: Device) -> Tensor:
        group = self._of_group(shape)
        z = torch.empty(shape[0] * self._place[1], *group, dtype=dtype, device=device)
        return self._in_place(draw(self.groups_as_samples, z)).contiguous()

    def _in_place(self, groups: Tensor) -> Tensor:
        """``[B G, ...]`` as ``[B, ..., G, ...]``."""
        return groups.view(-1, self._place[1], *groups.shape[1:]).movedim(1, self.dim)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self._place == other._place  # type: ignore[attr-defined]

    __hash__ = PhiloxNoise.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupNoise, (*self._parts, *self._place)

    def __repr__(self) -> str:
        plain = PhiloxNoise.__repr__(self.for_samples(None))
        return f"{plain}.for_groups({self.group_ids}, {self.dim})"


Noise: TypeAlias = Tensor | PhiloxNoise
"""Noise as a tensor, or as the key that a kernel generates it from."""

StepNoise: TypeAlias = Tensor | PhiloxNoise | Callable[[int, Tensor], Tensor | PhiloxNoise]
"""The noise of each step: ``[S, B, ...]``, a key read at one stream per step, or a function."""


def draw(noise: PhiloxNoise, out: Tensor) -> Tensor:
    """The noise in shape, dtype and layout of ``out``; in ``out`` itself unless compiled."""
    into = out if plain_eager() else None
    if type(noise) is not PhiloxNoise:
        found = noise._normals(tuple(out.shape), out.dtype, out.device)
        return found if into is None else into.copy_(found)
    return run(RANDN, (out,), (), None, False, into, noise._parts)


def _rebuilt(*parts: Any) -> PhiloxNoise:
    """Loads pickles of the first releases."""
    return PhiloxNoise(*parts)
