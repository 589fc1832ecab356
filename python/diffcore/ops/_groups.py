"""A level for each group of a sample: the frames of a video, the tokens of a sequence.

A group is one entry of a dimension of the samples. In memory the elements of a group are one run,
or several of the same length. So samples are viewed as ``[R, n]``, a row for each run, and the
levels ``[B, G]`` as one for each row: the kernels are those of a level for each sample. Nothing but
levels is copied, unless the samples are spaced in memory as no view can express.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from diffcore._checks import as_int, as_tensor, check_dense
from diffcore._engine import native
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.kept import made_plainly
from diffcore.guidance import Weighted
from diffcore.noise import GroupNoise, PhiloxNoise

_MAX_ELEMENTS = 2**34  # of a sample's noise


class Groups(NamedTuple):
    """How samples are viewed as rows.

    Args:
        sample_shape: The shape of the samples, ``[B, ...]``.
        dim: Which of its dimensions is that of the groups.
        order: Their dimensions in memory order, the samples first; ``None`` if it is theirs.
        counts: B, the runs of a group in memory, and G.
        run: The elements of a run.
    """

    sample_shape: tuple[int, ...]
    dim: int
    order: tuple[int, ...] | None
    counts: tuple[int, int, int]
    run: int

    @classmethod
    def of(cls, name: str, x: Any, group_dim: int) -> Groups:
        """The groups of some samples.

        Args:
            name: What the caller calls the samples, for errors.
            x: The samples ``[B, ...]``.
            group_dim: The dimension of the groups.

        Raises:
            TypeError: ``x`` is no tensor, or ``group_dim`` no int.
            ValueError: ``x`` has no such dimension, or it is that of the samples.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        check_dense(name, x)
        dim, dims = as_int("group_dim", group_dim), x.ndim
        if not -dims <= dim < dims or dim % dims == 0:
            raise ValueError(
                f"group_dim must be a dimension of {name} other than 0, in 1 .. {dims - 1}, got "
                f"{group_dim}"
            )
        dim %= dims
        shape = sizes = tuple(x.shape)
        order, axis = None, dim
        if not x.is_contiguous() and (order := _memory_order(x)) is not None:
            sizes, axis = tuple([shape[d] for d in order]), order.index(dim)
        counts = (shape[0], math.prod(sizes[1:axis]), shape[dim])
        return cls(shape, dim, order, counts, math.prod(sizes[axis + 1 :]))

    def rows(self, name: str, x: Any) -> Any:
        """Tensors like the samples as rows ``[R, n]``; anything else as it is."""
        if isinstance(x, tuple):
            return tuple([self.rows(name, each) for each in x])
        if not isinstance(x, Tensor):
            return x
        check_dense(name, x)
        if x.shape != self.sample_shape:
            raise ValueError(
                f"{name} must have the shape of the samples, {self.sample_shape}, got "
                f"{tuple(x.shape)}"
            )
        if self.order is not None:
            x = x.permute(self.order)
        batch, runs, groups = self.counts
        return x.reshape(batch * runs * groups, self.run)

    def written_rows(self, out: Tensor | None) -> Tensor | None:
        """``out`` as rows, which must be a view."""
        if out is not None and not isinstance(out, Tensor):
            raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
        found: Tensor | None = self.rows("out", out)
        if found is None or out is None or found.numel() == 0:
            return found
        if found.data_ptr() != out.data_ptr():
            raise ValueError(
                "out must lie in memory as the samples do with group_dim, got strides "
                f"{out.stride()}"
            )
        return found

    def levels(self, name: str, value: Any) -> Any:
        """Levels ``[B, G]`` or ``[B]`` as one for each row; what is one for all, as it is."""
        if isinstance(value, Weighted):
            return Weighted(self.levels("guidance_scale", value.w), self.levels("g", value.g))
        if not isinstance(value, Tensor):
            is_array = hasattr(value, "__array__") and value.ndim > 0
            if not isinstance(value, (list, tuple)) and not is_array:
                return value
            value = as_tensor(name, value)
        if value.ndim == 0:
            return value
        check_dense(name, value)
        batch, runs, groups = self.counts
        if value.shape == (batch, groups):
            return (value if runs == 1 else value.repeat(1, runs)).reshape(-1)
        if value.numel() == 1 == len(value):
            return value.reshape(1)
        if value.ndim == 1:
            value = value.unsqueeze(1)
        return self._by_row(name, value, "[B, G]")

    def table(self, name: str, value: Any) -> Any:
        """Rows of numbers ``[B, G, n]`` or ``[B, n]``, as one for each row; one for all stays."""
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        check_dense(name, value)
        if value.ndim == 2:
            if len(value) == 1:
                return value
            value = value.unsqueeze(1)
        return self._by_row(name, value, "[B, G, n]")

    def _by_row(self, name: str, value: Tensor, wanted: str) -> Tensor:
        batch, runs, groups = self.counts
        of_levels = value.ndim == wanted.count(",") + 1
        if not of_levels or tuple(value.shape[:2]) not in ((batch, groups), (batch, 1)):
            came = value.squeeze(1) if value.shape[1] == 1 else value
            raise ValueError(
                f"{name} must have shape {wanted}, B = {batch} and G = {groups}, or one for each "
                f"sample, with group_dim, got {tuple(came.shape)}"
            )
        times = runs if value.shape[1] == groups else runs * groups
        if times > 1:
            value = value.repeat(1, times, *(1,) * (value.ndim - 2))
        return value.flatten(0, 1)

    def restored(self, rows: Any, mean: bool = False) -> Any:
        """Rows as samples, and a sum or mean of each row as one of each group."""
        if isinstance(rows, tuple):
            return tuple([self.restored(x, mean) for x in rows])
        if rows.ndim == 1:
            of_runs = rows.view(self.counts)
            return of_runs.mean(1) if mean else of_runs.sum(1)
        order = self.order
        if order is None:
            return rows.view(self.sample_shape)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return rows.view([self.sample_shape[d] for d in order]).permute(inverse)

    def noise(
        self, key: PhiloxNoise, like: Tensor, samples: Iterable[Any], levels: Iterable[Any]
    ) -> Tensor | PhiloxNoise:
        """The noise of a key, as rows: from the kernel where it generates runs, else a tensor.

        Args:
            key: For tensors like the samples.
            like: The samples, not as rows.
            samples: The tensors that the call reads with them.
            levels: Its coefficients and steps.
        """
        if self._generates(key, like, samples, levels):
            return self._key(key, like.device)
        z: Tensor = self.rows("noise", key.tensor(like.shape, dtype=like.dtype, device=like.device))
        return z

    def _generates(
        self, key: PhiloxNoise, like: Tensor, samples: Iterable[Any], levels: Iterable[Any]
    ) -> bool:
        """Whether the kernel of a plain call can generate the noise of rows.

        Beside a gradient of a level, under a mode, or on a device without kernels a call takes
        another route, where the first element of a key is one number.
        """
        batch, runs, groups = self.counts
        if isinstance(key, GroupNoise):
            if key.dim != self.dim or tuple(key.group_ids.shape) != (batch, groups):
                return False  # where it does not fit, making the tensor raises the error
            aligned = runs == 1 or self.run % 4 == 0
        else:
            aligned = type(key) is PhiloxNoise and self.run % 4 == 0
        if not (aligned and self.order is None and native._C is not None and plain_eager()):
            return False
        elements = batch * runs * groups * self.run
        if not elements or key.first_element + elements > _MAX_ELEMENTS:
            return False
        tensors = [x for x in samples if isinstance(x, Tensor)]
        others = [x for x in (*levels, *key._parts) if isinstance(x, Tensor)]
        return (
            like.device.type in ("cpu", "cuda")
            and all(type(x) in (Tensor, Parameter) for x in (*tensors, *others))
            and all(x.device == like.device for x in (*tensors, *others))
            and all(x.dtype == like.dtype for x in tensors)
            and not any(x.requires_grad for x in others)
        )

    def _key(self, key: PhiloxNoise, device: torch.device) -> PhiloxNoise:
        """The key of rows, which only a kernel reads: each begins at an element of its sample."""
        batch, runs, groups = self.counts
        seed, ids, stream, first = key._parts
        key._check_batch(batch)
        if isinstance(key, GroupNoise):
            per_row = self.levels("group_ids", key.group_ids)
            key = key.groups_as_samples
            if runs == 1:
                return key.for_samples(per_row)
            begins = _begins(self.counts, self.run, True, device)
        else:
            if not isinstance(ids, Tensor) or ids.ndim == 0:
                ids = _count(batch, device) + ids
            per_row = ids.unsqueeze(1).expand(batch, runs * groups).reshape(-1)
            begins = _begins(self.counts, self.run, False, device)
        parts: Any = (seed, per_row, stream, begins + first if first else begins)
        return key._with(parts)


def in_groups(
    op: Callable[..., Any],
    group_dim: int,
    samples: dict[str, Any],
    levels: dict[str, Any],
    tables: dict[str, Any] | None = None,
    mean: bool = False,
    **rest: Any,
) -> Any:
    """Calls an op with a level for each group.

    Args:
        op: The op.
        group_dim: The dimension of the groups.
        samples: Its arguments like the samples, which come first: tensors, a noise key, ``None``.
        levels: Its arguments of one number for each group.
        tables: Its arguments of a row of numbers for each group.
        mean: Whether its results ``[B]`` are means over the elements of a sample, not sums.
        rest: Its other arguments.

    Returns:
        What the op returns: results like the samples, and sums or means ``[B, G]``.
    """
    name, first = next(iter(samples.items()))
    groups = Groups.of(name, first, group_dim)
    at = {k: groups.levels(k, v) for k, v in levels.items()}
    if tables:
        at |= {k: groups.table(k, v) for k, v in tables.items()}
    rows = {k: groups.rows(k, v) for k, v in samples.items()}
    for k, v in rows.items():
        if isinstance(v, PhiloxNoise):
            # A loss may have its prediction in another dtype than x_0, to which noise was added.
            like = samples["x0"] if isinstance(samples.get("x0"), Tensor) else first
            rows[k] = groups.noise(v, like, _flat(samples), (*_flat(at), *_flat(rest)))
    if "out" in rest:
        rest["out"] = groups.written_rows(rest["out"])
    found = op(**rows, **at, **rest)
    return groups.restored(found, mean)


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions of samples from the outermost in memory to the innermost, the samples first.

    ``None`` for row-major samples. In a trace, where strides may be symbols, only row-major and
    channels-last samples are recognized; others are copied.
    """
    dims = tuple(range(x.ndim))
    if torch.compiler.is_dynamo_compiling():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
        if last is not None and x.is_contiguous(memory_format=last):
            return (0, *dims[2:], 1)
        return None
    strides = x.stride()
    order = (0, *sorted(dims[1:], key=lambda d: -strides[d]))
    return None if order == dims else order


def _flat(arguments: dict[str, Any]) -> list[Any]:
    """The values of arguments, those of tuples and of guidance one by one."""
    found: list[Any] = []
    for value in arguments.values():
        if isinstance(value, Weighted):
            found += (value.w, value.g)
        else:
            found += value if isinstance(value, tuple) else (value,)
    return found


@functools.lru_cache(maxsize=64)
def _count(batch: int, device: torch.device) -> Tensor:
    """0 .. B-1."""
    return made_plainly(lambda: torch.arange(batch, device=device))


@functools.lru_cache(maxsize=64)
def _begins(counts: tuple[int, int, int], run: int, by_group: bool, device: torch.device) -> Tensor:
    """Where each row begins inside its sample, or inside its group, in elements."""
    batch, runs, groups = counts

    def begins() -> Tensor:
        rows = torch.arange(batch * runs * groups, device=device)
        at = rows // groups % runs if by_group else rows % (runs * groups)
        return at * run

    return made_plainly(begins)
