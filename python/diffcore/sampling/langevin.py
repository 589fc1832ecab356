"""Langevin steps at a noise level: the corrector of predictor-corrector samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_int, as_positive, check_choice
from diffcore._devices import wide_dtype
from diffcore._types import Model
from diffcore.noise import PhiloxNoise
from diffcore.sampling.model import call_model, check_model_kwargs
from diffcore.sampling.noise import noise_or_default
from diffcore.solvers import SolverTable

NORMS = ("sample", "batch")


class LangevinCorrector:
    """The ``before_model`` of a predictor-corrector sampler: Langevin steps before each step.

    With the score ``s = (alpha x0 - x) / sigma^2`` a step is ``x + e s + sqrt(2 e) z``, of the
    length ``e = 2 a (snr |z| / |s|)^2``, where a is 1 for alpha = 1, and (alpha / alpha')^2 in
    general, alpha' being the signal after the step of the table: 1 - beta_t of a variance
    preserving schedule. Any table is a predictor:
    ``sample(model, x, table, before_model=LangevinCorrector(model, table))``. Where alpha = 0 there
    is nothing to correct.

    Every Langevin step calls the model once and waits for nothing: the lengths stay on the device.

    Args:
        model: As for ``sample``, without guidance: for guided corrections pass a function that
            returns the guided prediction.
        table: The table that is sampled with: its prediction type, clip and levels are read.
        snr: Signal-to-noise ratio r of a step, above 0: 0.16 in score_sde for CIFAR-10.
        num_steps: Langevin steps before each step of the table.
        noise: The noise key, which may be that of the steps: step j before step i takes the stream
            2 + S + num_steps i + j after its own, with S rows in the table. ``None`` for a new key
            of torch's generator in each run.
        model_kwargs: More arguments for the model.
        norms: "sample" for a length of each sample; "batch" for one, from the means of |z| and |s|
            over the batch, as in score_sde and diffusers. Then samples depend on each other.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: snr not above 0, num_steps below 1, or unknown norms.

    Source:
        Song et al. 2021 (arXiv 2011.13456) algorithms 2 to 5.
    """

    def __init__(
        self,
        model: Model,
        table: SolverTable,
        *,
        snr: float = 0.16,
        num_steps: int = 1,
        noise: PhiloxNoise | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        norms: Literal["sample", "batch"] = "sample",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        if not isinstance(table, SolverTable):
            raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
        if noise is not None and not isinstance(noise, PhiloxNoise):
            raise TypeError(f"noise must be a PhiloxNoise or None, got {type(noise).__name__}")
        check_model_kwargs(model_kwargs)
        check_choice("norms", norms, NORMS)
        self._model, self._table, self._model_kwargs = model, table, model_kwargs
        self._snr = as_positive("snr", snr, finite=True)
        self._num_steps = as_int("num_steps", num_steps, 1)
        self._noise, self._norms = noise, norms
        self._firsts = [i for i, row in enumerate(table.rows) if row.begins]
        self._key: PhiloxNoise | None = noise

    def __call__(self, state: Mapping[str, Any]) -> Tensor:
        """The x that the step of the table begins with.

        Args:
            state: That of ``before_model`` of ``sample``.

        Returns:
            Another x.
        """
        x: Tensor = state["x"]
        t, step = state["t"], state["i"]
        i, last = self._firsts[step], [*self._firsts, len(self._table)][step + 1] - 1
        row, after = self._table.rows[i], self._table.rows[last].next_alpha
        if row.alpha == 0:
            return x
        if self._noise is None and (self._key is None or step == 0):
            default = noise_or_default(None, x)
            assert isinstance(default, PhiloxNoise)
            self._key = default
        assert self._key is not None
        length = 2 * (row.alpha / after) ** 2 * self._snr**2
        for j in range(self._num_steps):
            scaled = x if row.input_scale == 1 else row.input_scale * x
            output = call_model(self._model, scaled, t, self._model_kwargs)
            x0 = self._table.denoised(i, x, output)
            inverse = 1 / row.sigma**2
            score = ops.linear_combination(x0, x, (row.alpha * inverse, -inverse))
            stream = 2 + len(self._table) + self._num_steps * step + j
            key = self._key.at(self._key.stream + stream)
            z = ops.randn(x.shape, key, dtype=x.dtype, device=x.device)
            e = length * (self._norm(z) / self._norm(score)) ** 2
            x = ops.linear_combination(x, score, (1.0, e))
            x = ops.add_noise(x, z, 1.0, (2 * e).sqrt())
        return x

    def _norm(self, x: Tensor) -> Tensor:
        """The norm of each sample ``[B]``, or ``[B]`` times their mean."""
        norm: Tensor = torch.linalg.vector_norm(
            x.reshape(len(x), -1), dim=1, dtype=wide_dtype(x.device)
        )
        return norm if self._norms == "sample" else norm.mean().expand(len(norm)).contiguous()
