"""A complete sampling loop, model included, as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_device, as_shape, check_dense, check_memory, check_not_compiling
from diffcore._devices import wide_dtype
from diffcore._engine import messages, native
from diffcore._types import CondFn, Model
from diffcore.guidance import Guidance, Weighted
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._masks import check_mask_values
from diffcore.sampling.classifier import Classifier
from diffcore.sampling.known import BlendAt, known_part
from diffcore.sampling.loop import run_table
from diffcore.sampling.model import check_model_kwargs, model_device
from diffcore.sampling.sample import guidance_rule
from diffcore.sampling.threshold import threshold_rule
from diffcore.solvers import SolverTable


def capture(
    model: Model,
    table: SolverTable,
    shape: Sequence[int],
    *,
    guidance_scale: float | Tensor | None = None,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    cond_fn: CondFn | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Noise | None = None,
    blend_at: BlendAt = "after_step",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CapturedSampler:
    """Record ``sample``, every call of the model included, as one CUDA graph.

    The returned object samples with a single launch, under ``torch.no_grad()``. The kernels
    generate the noise from a seed in device memory, so another seed, other sample ids and other
    tensors in ``model_kwargs`` need no new recording; another shape, table or number among the
    arguments does. It returns no trajectory; ``sample`` does. The loop runs once before it is
    recorded. It takes neither ``before_model`` nor ``callback``, which a replay would not call. On
    devices without graphs, such as the CPU, the same loop runs without recording.

    Args:
        model: As for ``sample``. It must be capturable, so it must not wait for the device.
        table: The solver.
        shape: Shape of the samples, ``[B, ...]``.
        guidance_scale: As for ``sample``; a call may replace it.
        guidance: As for ``sample``.
        model_kwargs: As for ``sample``. Tensors are copied; a call may replace them.
        uncond_kwargs: As for ``sample``. Tensors are copied; a call may replace them.
        cond_fn: As for ``sample``. It must be capturable too.
        dynamic_thresholding_ratio: As for ``sample``.
        sample_max_value: As for ``sample``.
        mask: As for ``sample``. Copied; a call may replace it.
        known: As for ``sample``. Copied; a call may replace it.
        known_noise: As for ``sample``: ``None`` for the noise of each call. A tensor is copied, and
            a call may replace it.
        blend_at: As for ``sample``.
        dtype: Dtype of the samples; ``None`` for torch's default.
        device: Where to sample; ``None`` for that of the model's parameters, else torch's default.

    Returns:
        A function of noise, see ``CapturedSampler``.

    Raises:
        TypeError: ``table`` is not a SolverTable.
        ValueError: ``shape`` is empty, or as ``sample``.
    """
    check_not_compiling("capture", "compile the model that it gets")
    if not isinstance(table, SolverTable):
        raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
    rule = guidance_rule(guidance_scale, guidance, uncond_kwargs)
    check_model_kwargs(model_kwargs)
    check_model_kwargs(uncond_kwargs, "uncond_kwargs")
    messages.check_dtype(dtype)
    device = model_device(model) if device is None else as_device("device", device)
    x = torch.empty(as_shape("shape", shape), dtype=dtype, device=device)
    if x.ndim == 0:
        raise ValueError("shape must be [B, ...], got ()")
    if guidance_scale is not None:
        if not isinstance(guidance_scale, Tensor):  # a number or an array, checked above
            guidance_scale = torch.tensor(guidance_scale, dtype=torch.float64, device="cpu")
        guidance_scale = guidance_scale.to(x.device, wide_dtype(x.device), copy=True)
        rule = Weighted(guidance_scale, 0.0)
    options = {
        "guidance": rule,
        "model_kwargs": _copied(model_kwargs),
        "uncond_kwargs": _copied(uncond_kwargs),
        "threshold": threshold_rule(dynamic_thresholding_ratio, sample_max_value),
        "classifier": None if cond_fn is None else Classifier(cond_fn),
        "known": known_part(_copy(mask), _copy(known), _copy(known_noise), blend_at),
    }
    return CapturedSampler(model, table, x, options, guidance_scale)


class CapturedSampler:
    """Samples by replaying a recorded loop; made by ``capture``.

    It owns the memory that it reads and writes: do not call one from two threads, or on two
    streams, at once. (Two recordings may share a ``SolverTable``.)
    """

    def __init__(
        self,
        model: Model,
        table: SolverTable,
        x: Tensor,
        options: dict[str, Any],
        guidance_scale: Tensor | None,
    ) -> None:
        self._table, self._x, self._options = table, x, options
        self._guidance_scale = guidance_scale
        # The noise key in device memory: a seed, an offset to every stream, the sample ids.
        self._key = torch.zeros(2, dtype=torch.int64, device=x.device)
        self._ids = torch.arange(x.shape[0], device=x.device)
        noise = PhiloxNoise(self._key, sample_ids=self._ids)

        def loop() -> Tensor:
            return run_table(model, self._x, table, noise, **options)

        self._replay = _recorded(loop, x.device)

    def __call__(
        self,
        noise: PhiloxNoise | None = None,
        *,
        x: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        known_noise: Tensor | None = None,
    ) -> Tensor:
        """Sample once more; the same as ``sample`` with the same arguments, bit for bit.

        Args:
            noise: A noise key: x takes its own stream, and row r the stream 1 + r after that.
                ``None`` for a key seeded by torch's generator.
            x: Samples to start from; by default generated from ``noise``, times
                ``table.init_noise_sigma``.
            guidance_scale: Another one, of the shape of the recorded one, a number or ``[B]``.
            model_kwargs: Tensors to replace those recorded under the same names.
            uncond_kwargs: The same for the unconditional call.
            mask: Another one, of the shape and dtype of the recorded one.
            known: Other known samples.
            known_noise: Other noise, where a tensor was recorded.

        Returns:
            The samples, in newly allocated memory.

        Raises:
            TypeError: ``noise`` is not a noise key.
            ValueError: Shapes differ from the recorded ones, an argument was not recorded as a
                tensor, or ``noise`` is the key of a shard.
        """
        if noise is None:
            noise = PhiloxNoise.from_generator(device=self._x.device)
        if not isinstance(noise, PhiloxNoise):
            raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
        if noise.first_element or type(noise) is not PhiloxNoise:
            raise ValueError(f"noise must be of complete samples in a recorded loop, got {noise}")
        if x is None:
            ops.randn(self._x.shape, noise, dtype=self._x.dtype, device=self._x.device, out=self._x)
            self._x.mul_(self._table.init_noise_sigma)
        else:
            _replace("x", self._x, x)
        self._set_noise(noise)
        if guidance_scale is not None:
            _replace("guidance_scale", self._guidance_scale, guidance_scale)
        for name, new in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            check_model_kwargs(new, name)
            for key, value in (new or {}).items():
                _replace(f"{name}[{key!r}]", (self._options[name] or {}).get(key), value)
        part = self._options["known"]
        if isinstance(mask, Tensor):
            check_mask_values(mask)
        tensors = {"mask": mask, "known": known, "known_noise": known_noise}
        for name, value in tensors.items():
            if value is not None:
                _replace(name, getattr(part, name, None), value)
        return self._replay()

    def _set_noise(self, noise: PhiloxNoise) -> None:
        seed, ids, stream = noise.seed, noise.sample_ids, noise.stream
        if isinstance(seed, Tensor) and seed.numel() == 2:
            self._key.copy_(seed)
        elif isinstance(seed, Tensor):
            self._key[0].copy_(seed.reshape(()))
            self._key[1] = 0
        else:
            self._key[0] = seed
            self._key[1] = 0
        self._key[1] += stream.reshape(()) if isinstance(stream, Tensor) else stream
        if isinstance(ids, Tensor) and ids.ndim:
            self._ids.copy_(ids)
        else:
            torch.arange(len(self._ids), device=self._ids.device, out=self._ids)
            self._ids += ids


def _copied(kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if kwargs is None:
        return None
    return {k: _copy(v) for k, v in kwargs.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _replace(name: str, old: Any, new: Any) -> None:
    if not isinstance(old, Tensor):
        raise ValueError(
            f"{name} must be None, because it was not recorded as a tensor, got a "
            f"{type(new).__name__}; record the loop again"
        )
    if not isinstance(new, Tensor):
        new = _values(name, new, old)
    check_dense(name, new)
    check_memory(name, new)
    if new.device.type == "meta" != old.device.type:
        raise ValueError(f"{name} must have values, got a tensor on meta")
    if new.shape != old.shape:
        raise ValueError(
            f"{name} must have the recorded shape, {tuple(old.shape)}, got {tuple(new.shape)}"
        )
    old.copy_(new)


def _values(name: str, new: Any, old: Tensor) -> Tensor:
    """Numbers, or lists and arrays of them, as a tensor on the CPU."""
    try:
        return torch.tensor(new, dtype=old.dtype, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(new).__name__}") from None


def _recorded(loop: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    if device.type != "cuda":
        return loop
    with torch.cuda.device(device):
        native.warm_up(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            samples = loop()

    def replay() -> Tensor:
        graph.replay()
        return samples.clone()

    return replay
