"""A whole sampling loop, model included, as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine import native
from diffcore._types import Model
from diffcore.noise import PhiloxNoise
from diffcore.sampling.loop import thresholding, walk
from diffcore.solvers import SolverTable


def capture(
    model: Model,
    table: SolverTable,
    shape: Sequence[int],
    *,
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CapturedSampler:
    """Record ``sample``, every call of the model included, as one CUDA graph.

    What is returned samples by a single launch. Noise is drawn in the kernels from a seed in device
    memory, so another seed, other samples and other tensors in ``model_kwargs`` need no recording
    anew; another shape, table or number among the arguments do. The loop runs once before it is
    recorded. On devices without graphs, the CPU above all, the same loop runs as it is.

    Args:
        model: As for ``sample``; it has to be capturable: no waiting for the device.
        table: The solver.
        shape: Of the samples, ``[B, ...]``.
        guidance_scale: As for ``sample``.
        model_kwargs: As for ``sample``. Tensors are copied; a call may bring others.
        uncond_kwargs: As for ``sample``, likewise.
        dynamic_thresholding_ratio: As for ``sample``.
        sample_max_value: As for ``sample``.
        dtype: Of the samples; ``None`` for torch's default.
        device: Where to sample; ``None`` for that of the model's parameters, else torch's default.

    Returns:
        A function of noise, see ``CapturedSampler``.

    Raises:
        TypeError: ``table`` is no SolverTable.
        ValueError: As ``sample``.
    """
    if not isinstance(table, SolverTable):
        raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
    if uncond_kwargs is not None and guidance_scale is None:
        raise ValueError("uncond_kwargs is given; wanted a guidance_scale with it")
    if device is None and isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if x.ndim == 0:
        raise ValueError("shape is (); wanted [B, ...]")
    if guidance_scale is not None:
        scale = torch.as_tensor(guidance_scale, dtype=torch.float64)
        guidance_scale = scale.to(x.device, copy=True)
    options = {
        "guidance_scale": guidance_scale,
        "model_kwargs": _kept(model_kwargs),
        "uncond_kwargs": _kept(uncond_kwargs),
        "threshold": thresholding(dynamic_thresholding_ratio, sample_max_value, guidance_scale),
    }
    return CapturedSampler(model, table, x, options)


class CapturedSampler:
    """Samples by replaying a recorded loop; made by ``capture``.

    It owns the memory that it reads and writes: do not call one from two threads, or two streams,
    at once. (A ``SolverTable`` may be shared; record the loop twice.)
    """

    def __init__(
        self,
        model: Model,
        table: SolverTable,
        x: Tensor,
        options: dict[str, Any],
    ) -> None:
        self._table, self._x, self._options = table, x, options
        # A seed, and an offset to every stream; the ids of the samples.
        self._key = torch.zeros(2, dtype=torch.int64, device=x.device)
        self._ids = torch.arange(x.shape[0], device=x.device)
        noise = PhiloxNoise(self._key, sample_ids=self._ids)

        def loop() -> Tensor:
            return walk(model, self._x, table, noise, **options)

        self._replay = _recorded(loop, x.device)

    def __call__(
        self,
        noise: PhiloxNoise | None = None,
        *,
        x: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Sample once more; the same as ``sample`` with the same arguments, bit for bit.

        Args:
            noise: A recipe: of x at its own stream, of row r at the stream 1 + r after that.
                ``None`` for one seeded by torch's generator.
            x: What to start from; by default drawn from ``noise``, times
                ``table.init_noise_sigma``.
            guidance_scale: Another one; of the shape of the one recorded, a number or ``[B]``.
            model_kwargs: Tensors to replace those recorded under the same names.
            uncond_kwargs: The same for the unconditional call.

        Returns:
            The samples, in memory of their own.

        Raises:
            TypeError, ValueError: What came does not fit what was recorded.
        """
        if noise is None:
            noise = PhiloxNoise.from_generator(device=self._x.device)
        if not isinstance(noise, PhiloxNoise):
            raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
        if noise.first_element:
            raise ValueError("noise.first_element must be 0 in a recorded loop")
        if x is None:
            ops.randn(self._x.shape, noise, dtype=self._x.dtype, device=self._x.device, out=self._x)
            self._x.mul_(self._table.init_noise_sigma)
        else:
            _replace("x", self._x, x)
        self._set_noise(noise)
        if guidance_scale is not None:
            _replace("guidance_scale", self._options["guidance_scale"], guidance_scale)
        for name, new in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            for key, value in (new or {}).items():
                _replace(f"{name}[{key!r}]", (self._options[name] or {}).get(key), value)
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
            torch.arange(len(self._ids), out=self._ids)
            self._ids += ids


def _kept(kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if kwargs is None:
        return None
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def _replace(name: str, old: Any, new: Any) -> None:
    if not isinstance(old, Tensor):
        raise ValueError(f"{name} was not recorded as a tensor; record the loop anew")
    if not isinstance(new, Tensor):
        new = torch.as_tensor(new, dtype=old.dtype)
    if new.shape != old.shape:
        raise ValueError(f"{name} must have shape {list(old.shape)}, got {list(new.shape)}")
    old.copy_(new)


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
