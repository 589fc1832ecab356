"""Bits a dimension: the variational bound of a diffusion over a data set, with its error.

Bits = nats / ln 2. What is said of a sample is summed over its dimensions; what is said of a
dimension is that divided by their number. A bound is an upper one of -log2 p: lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._types import Model, Noise
from diffcore.coefficients.bound import DECODERS
from diffcore.diffusion import GaussianDiffusion
from diffcore.diffusion.bound import check_decoder
from diffcore.likelihood.fingerprint import described, digest, of_model
from diffcore.likelihood.strata import Strata, Tally, read_state
from diffcore.noise import PhiloxNoise
from diffcore.sampling.model import model_device
from diffcore.sampling.progress import progress_counter

_BATCH = 64
Kwargs = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound of a data set, in bits a dimension. ``str`` says it in a line.

    Attributes:
        total: The mean over the samples: ``prior`` and all T terms.
        standard_error: Of ``total``, from the differences between samples, which include those of
            their noise and timesteps; nan for one sample.
        prior: The mean of L_T, which no model can change.
        terms: ``[T]``, the mean of L_t where t was visited, L_0 first; nan elsewhere.
        visits: ``[T]``, how often, over all samples.
        xstart_mse: ``[T]``, the mean squared error of the predicted x_0; nan where not visited.
        mse: ``[T]``, that of the noise which it implies; nan where not visited.
        estimator_variance: The part of ``standard_error``² that is due to drawing noise and
            timesteps, the data as they are. From the differences between the draws of a sample;
            with ``draws=1`` there are none, and this is an upper bound, which counts differences
            between samples too (nan for one sample; ``standard_error``² if the noise was a tensor,
            which all timesteps share).
        samples: How many.
        dimensions: Of a sample.
        timesteps: ``None`` where every timestep was visited, else the number of strata.
        draws: In each stratum, for each sample.
        model_calls: Over all batches: ``draws`` (1 + strata) for each of them.
        decoder: "discretized" or "gaussian". The second is a density: compare it with others only.
    """

    total: float
    standard_error: float
    prior: float
    terms: Tensor
    visits: Tensor
    xstart_mse: Tensor
    mse: Tensor
    estimator_variance: float
    samples: int
    dimensions: int
    timesteps: int | None
    draws: int
    model_calls: int
    decoder: str

    @property
    def nats_per_sample(self) -> float:
        """``total`` in nats, summed over a sample."""
        return self.total * self.dimensions * math.log(2)

    def __str__(self) -> str:
        return (
            f"{self.total:.4f} ± {self.standard_error:.4f} bits/dim "
            f"({self.samples} samples, {self.model_calls} calls of the model)"
        )


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    model: Model,
    data: Tensor | Iterable[Any],
    *,
    timesteps: int | None = None,
    draws: int = 1,
    decoder: str = "discretized",
    clip_denoised: bool | None = None,
    model_kwargs: Kwargs | None = None,
    noise: Noise | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
) -> BitsPerDim:
    """The variational bound of a data set, in bits a dimension: exact in t, or estimated.

    With ``timesteps=K``, t = 0 is visited always, and the others are cut into K strata of about
    the same share of the bound; each sample visits ``draws`` timesteps of each, drawn uniformly:

        total = prior + L_0 + sum_k |stratum k| mean_j L_{t_kj}

    which is unbiased, for ``draws (1 + K)`` calls of the model in place of T. K = T - 1 is exact.

    The noise of a sample depends on its place in the data alone, not on the batches.

    Args:
        diffusion: The process and its reverse.
        model: ``model(x_t, t, **model_kwargs)``; put it in ``eval()`` yourself.
        data: x_0, a tensor ``[N, ...]``, or batches of it (a data loader); of a batch that is a
            tuple or a list the first counts.
        timesteps: ``None`` for every t, or the number of strata, 1 .. T - 1.
        draws: Timesteps and noises drawn in each stratum (of one timestep, noises only). From two
            on, they tell the variance of the estimator.
        decoder: "discretized" for pixels k/127.5 - 1, "gaussian" for anything else.
        clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of ``diffusion``.
        model_kwargs: More arguments for the model, or a function of a batch that makes them.
        noise: A recipe, whose first sample is that of the data. Stratum k, which is timestep k if
            every t is visited, draws j at the stream k + j (1 + K) after its own, and the timesteps
            of the strata are chosen from the next one. A tensor ``[N, ...]`` is the noise at every
            t (not with ``timesteps=`` or ``draws=``). ``None`` for a recipe seeded by torch's
            generator.
        batch_size: Of ``data`` if it is a tensor; 64 if ``None``.
        progress: Show a bar (tqdm) of model calls; ``None`` for one on terminals only.
        checkpoint: A file, written after every batch. If it is there, the run goes on where that
            one stopped and ends with the same bits. It knows the data it has counted, ``noise``,
            ``model_kwargs`` and the parameters of a module; functions are yours to keep the same.
        device: Where to work; ``None`` for that of the model's parameters, else of the data.

    Returns:
        A ``BitsPerDim``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Counts out of range, no data, data that are no pixels for "discretized", or a
            checkpoint of other settings, parameters or data.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5; Kingma et al. 2021 (arXiv 2107.00630) section 5.
    """
    last = diffusion.num_timesteps - 1
    _check_count("draws", draws, None)
    if timesteps is not None:
        _check_count("timesteps", timesteps, last)
    if isinstance(noise, Tensor) and (timesteps is not None or draws != 1):
        raise ValueError("noise must be a PhiloxNoise with timesteps= or draws=, got a tensor")
    if isinstance(noise, Tensor) and isinstance(data, Tensor) and noise.shape != data.shape:
        raise ValueError(
            f"noise must have the shape of the data, {list(data.shape)}, got {list(noise.shape)}"
        )
    check_choice("decoder", decoder, DECODERS)
    source, number = _batches(data, batch_size)
    clip = diffusion._clip(clip_denoised)
    settings = {
        "betas": digest(diffusion.betas),
        "prediction_type": diffusion.prediction_type,
        "variance_type": diffusion.variance_type,
        "timesteps": timesteps,
        "draws": draws,
        "decoder": decoder,
        "clip": clip,
        "noise": described(noise),
        "data": list(data.shape) if isinstance(data, Tensor) else "batches",
        "batch_size": (batch_size or _BATCH) if isinstance(data, Tensor) else None,
        **({} if checkpoint is None else of_model(model, model_kwargs)),
    }
    strata = Strata.of(diffusion.schedule.log_snr, last if timesteps is None else timesteps)
    tally = Tally(strata, diffusion.num_timesteps)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"checkpoint must be a file in a folder that is there, got {path}")
    state = None if path is None else read_state(path, settings)
    if state is not None:
        tally.restore(state)
    seed = None
    if noise is None:
        # Of the CPU's generator: a number, which can be written down.
        seed = PhiloxNoise.from_generator(device="cpu").seed if state is None else state["seed"]
        noise = PhiloxNoise(seed)
    device = model_device(model) if device is None else torch.device(device)

    _skip(source, tally, path)
    calls = draws * len(strata.starts)
    total = None if number is None else number * calls
    with progress_counter(total, "bits_per_dim", progress, done=tally.calls, unit="call") as bar:
        for batch, x in source:
            diffusion._check_t(0, x, "data")
            tally.check_kind([list(x.shape[1:]), str(x.dtype)])
            if path is not None:
                tally.seen = digest(x, tally.seen)
            x = x if device is None else x.to(device)
            check_decoder(decoder, "data", x)
            kwargs = model_kwargs(batch) if callable(model_kwargs) else model_kwargs

            def term(
                t: Tensor, noise: Noise, x: Tensor = x, kwargs: Mapping[str, Any] | None = kwargs
            ) -> tuple[Tensor, Tensor]:
                bar.update()
                return diffusion._noised_term(model, x, t, noise, clip, decoder, kwargs)

            t, terms, errors = _visit(term, x, strata, _of_samples(noise, tally.samples, x), draws)
            prior = diffusion.prior_bpd(x).double().cpu()
            tally.add(prior, t, terms, errors, errors * diffusion.schedule.snr[t])
            tally.calls += calls
            if path is not None:
                tally.save(path, settings, seed)
            bar.set_postfix_str(f"{tally.totals.mean[0].item():.4f} bits/dim")
    if tally.samples == 0:
        raise ValueError("data must have samples, got none")
    return _result(tally, timesteps, draws, decoder, shared=isinstance(noise, Tensor))


def _visit(
    term: Callable[[Tensor, Noise], tuple[Tensor, Tensor]],
    x: Tensor,
    strata: Strata,
    noise: Noise,
    draws: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, terms and errors of x_0 of a batch, ``[B, S, draws]`` on the CPU, float64."""
    count = len(strata.starts)
    if isinstance(noise, PhiloxNoise):
        chosen = noise.at(noise.stream + draws * count)
        t = strata.timesteps(chosen, (len(x), draws), x.device)
    else:
        t = strata.starts.reshape(1, -1, 1).repeat(len(x), 1, 1)
    here = t.permute(1, 2, 0).contiguous().to(x.device)  # one copy for all
    found = []
    for k in range(count):
        for j in range(draws):
            now = noise
            if isinstance(noise, PhiloxNoise):
                now = noise.at(noise.stream + k + j * count)
            found.append(torch.stack(term(here[k, j], now)))
    # The only wait for the device in a batch.
    values = torch.stack(found, dim=-1).double().cpu().reshape(2, len(x), count, draws)
    return t, values[0], values[1]


def _result(
    tally: Tally, timesteps: int | None, draws: int, decoder: str, shared: bool
) -> BitsPerDim:
    """``shared``: one noise at every timestep, so that the terms of a sample go together."""
    total, prior = tally.totals.mean.tolist()
    square = tally.totals.variance_of_mean()[0].item()
    if shared:
        variance = square
    elif draws > 1:
        variance = tally.within.item() / tally.samples**2
    else:
        variance = tally.parts.variance_of_mean().sum().item()
    return BitsPerDim(
        total=total,
        standard_error=math.sqrt(square),
        prior=prior,
        terms=tally.terms / tally.visits,
        visits=tally.visits.long(),
        xstart_mse=tally.xstart_mse / tally.visits,
        mse=tally.mse / tally.visits,
        estimator_variance=variance,
        samples=tally.samples,
        dimensions=math.prod(tally.kind[0]),
        timesteps=timesteps,
        draws=draws,
        model_calls=tally.calls,
        decoder=decoder,
    )


def _batches(
    data: Tensor | Iterable[Any], batch_size: int | None
) -> tuple[Iterator[tuple[Any, Tensor]], int | None]:
    """(batch, its x_0) one after the other, empty ones left out; and how many, where known."""
    if isinstance(data, Tensor):
        if data.ndim == 0:
            raise ValueError("data must be [N, ...], got a tensor of no dimensions")
        if batch_size is not None:
            _check_count("batch_size", batch_size, None)
    elif batch_size is not None:
        raise ValueError("batch_size must be None where data come in batches")
    elif not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor or batches of them, got {type(data).__name__}")
    parts: Iterable[Any] = data
    if isinstance(data, Tensor):
        parts = data.split(batch_size or _BATCH)
    number = len(parts) if isinstance(parts, Sized) else None

    def source() -> Iterator[tuple[Any, Tensor]]:
        for batch in parts:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"data must give tensors, got {type(x).__name__}")
            if len(x):
                yield batch, x

    return source(), number


def _skip(source: Iterator[tuple[Any, Tensor]], tally: Tally, path: Path | None) -> None:
    """Pass over the batches that were counted before an interruption."""
    samples, seen = 0, ""
    for _, (_, x) in zip(range(tally.batches), source, strict=False):
        samples += len(x)
        seen = digest(x, seen)
    gave, had = f"{samples} samples", str(tally.samples)
    if samples == tally.samples and seen != tally.seen:
        gave, had = "values", "others"
    if (samples, seen) != (tally.samples, tally.seen):
        raise ValueError(
            f"data gave {gave} in their first {tally.batches} batches, where the run of checkpoint "
            f"{path} had {had}: not the same batches in the same order"
        )


def _of_samples(noise: Noise, first: int, x: Tensor) -> Noise:
    """The noise of the batch that begins at a sample."""
    if isinstance(noise, PhiloxNoise):
        return noise.for_samples(noise.sample_ids + first)
    part = noise[first : first + len(x)]
    if part.shape != x.shape:
        raise ValueError(
            f"noise must have the shape of the data; for {list(x.shape)} from sample {first} on it "
            f"has {list(part.shape)}"
        )
    return part.to(x)


def _check_count(name: str, value: Any, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1 or (most is not None and value > most):
        wanted = "positive" if most is None else f"in 1 .. T - 1 = {most}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
