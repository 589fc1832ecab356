"""Bits per dimension: the variational bound of a diffusion over a data set, with its error.

Bits are nats / ln 2. A quantity per sample is summed over the sample's dimensions; a quantity per
dimension is that sum divided by the number of dimensions. The bound is an upper bound of -log2 p,
so lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_device, as_int, check_choice, check_not_compiling
from diffcore._types import Model
from diffcore.coefficients.bound import DECODERS
from diffcore.diffusion import GaussianDiffusion
from diffcore.diffusion.bound import decoder_term, noised_term
from diffcore.diffusion.checks import check_batch, check_bits, check_decoder
from diffcore.likelihood.batches import Batches, noise_of_batch, skip_counted
from diffcore.likelihood.checkpoint import Checkpoint, describe_model, describe_noise, digest
from diffcore.likelihood.identity import (
    Group,
    Ids,
    Part,
    SampleIds,
    gather,
    identified,
    is_first,
)
from diffcore.likelihood.results import BitsPerDim, result_of
from diffcore.likelihood.strata import Strata
from diffcore.likelihood.tally import Tally, merged
from diffcore.noise import Noise, PhiloxNoise
from diffcore.sampling.model import model_device
from diffcore.sampling.progress import progress_counter

Kwargs = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    model: Model,
    data: Tensor | Iterable[Any],
    *,
    timesteps: int | None = None,
    draws: int = 1,
    decoder: str = "discretized",
    bits: int = 8,
    clip_denoised: bool | None = None,
    model_kwargs: Kwargs | None = None,
    noise: Noise | None = None,
    sample_ids: Ids | None = None,
    batch_size: int | None = None,
    process_group: Group | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
) -> BitsPerDim:
    """The variational bound of a data set in bits per dimension, over all t or estimated.

    With ``timesteps=K``, t = 0 is always visited, and the other timesteps are divided into K strata
    with about equal shares of the bound. Each sample visits ``draws`` timesteps of each stratum,
    sampled uniformly:

        total = prior + L_0 + sum_k |stratum k| mean_j L_{t_kj}

    which is unbiased and takes ``draws (1 + K)`` model calls instead of T. K = T - 1 is exact.

    The noise of a sample depends only on its id, by default its position in the data, not on the
    batches. The sums are exact: if the model gives a sample the same bits in every batch, batches
    and processes do not change a bit of the result. Runs under ``torch.no_grad()``.

    Args:
        diffusion: The diffusion process.
        model: ``model(x_t, t, **model_kwargs)``. Call ``model.eval()`` first.
        data: x_0, a tensor ``[N, ...]`` or an iterable of batches (a data loader). The first entry
            of a batch that is a tuple or a list is x_0.
        timesteps: ``None`` for every t, or the number of strata K, 1 .. T - 1.
        draws: Timesteps and noises sampled per stratum and sample. Two or more give the variance of
            the estimator.
        decoder: "discretized" for 8-bit pixels scaled to k/127.5 - 1, "gaussian" for other data.
        bits: Depth of the pixels, 1 to 32, with "discretized": they are 2 k / (2^bits - 1) - 1 for
            k = 0 .. 2^bits - 1, in float32 or float64 where there are more than 8. For
            another depth than 8, L_0 is computed in float64, in several passes.
        clip_denoised: Clip the predicted x_0; ``None`` for the ``clip_sample`` of ``diffusion``.
        model_kwargs: Keyword arguments of the model, or a function that returns them for a batch.
        noise: A noise key; its sample id is that of the first sample, or its ``[N]`` ids are those
            of all samples in the order of the data. Draw j of stratum k (which is
            timestep k if every t is visited) uses the stream ``noise.stream + k + j (1 + K)``, and
            the timesteps come from the stream after the last of these. A tensor ``[N, ...]`` is the
            noise of every t (not with ``timesteps=`` or ``draws=``). ``None`` for a key seeded by
            torch's generator.
        sample_ids: What identifies the samples, for example their indices in the data set: ``[N]``
            in the order of ``data``, or a function that returns the ids of a batch. They are added
            to the key's sample id; ``None`` for 0 .. N-1. A sample whose id was counted before does
            not count again.
        batch_size: Batch size if ``data`` is a tensor; ``None`` for 64.
        process_group: A group of ``torch.distributed`` (``torch.distributed.group.WORLD`` for all
            processes) whose processes call this with their parts of the data, of any size. All get
            the result of all data. Samples that a ``DistributedSampler`` repeats to fill the last
            batches count once, for which ``sample_ids`` or the noise key must have the ids of the
            process's samples. With ``noise=None`` all use the seed of the first process.
        progress: Show a progress bar (tqdm) of model calls; ``None`` for terminals only, and for
            the first process of a group.
        checkpoint: A file, written after every batch. If it exists, the run resumes from it and
            ends with the same bits. It identifies the data counted so far, ``noise``,
            ``model_kwargs`` and the parameters of a module; functions cannot be compared. The file
            is complete at any time. Each process of a group needs its own.
        device: ``None`` for that of the model's parameters, else that of the data.

    Returns:
        A ``BitsPerDim``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Counts out of range, no data, data that are not pixels of that depth with
            "discretized", a checkpoint that is damaged, another file, or of other settings,
            parameters or data, or one id for samples that differ.
        OSError: The checkpoint cannot be written; the old one is kept.
        KeyboardInterrupt: After Ctrl-C; with a checkpoint the message says where the sums are.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5; Kingma et al. 2021 (arXiv 2107.00630) section 5.
    """
    check_not_compiling("bits_per_dim", "compile the model that it gets")
    estimator = _Estimator.of(
        diffusion, model, model_kwargs, timesteps, draws, decoder, bits, clip_denoised
    )
    _check_noise(noise, data, timesteps, draws)
    ids = SampleIds.of(sample_ids, noise)
    if process_group is not None and ids.given is None and noise is None:
        raise ValueError(
            "sample_ids must be given with process_group, got None; or pass a noise key of the "
            "first sample of each process"
        )
    batches = Batches.of(data, batch_size)
    tally = Tally(estimator.strata, diffusion.num_timesteps)
    file, seed = None, None
    if checkpoint is not None:
        settings = {
            **estimator.settings(timesteps),
            "noise": describe_noise(noise),
            "sample_ids": ids.describe(),
            **batches.description,
            **describe_model(model, model_kwargs),
        }
        file = Checkpoint.at(checkpoint, settings)
        seed = file.restore(tally)
    else:
        describe_noise(noise)  # raises for what is not noise
    if noise is None:
        if seed is None:  # from the CPU's generator: a number, which a checkpoint can hold
            seed = int(PhiloxNoise.from_generator(device="cpu").seed)
        seed = gather(seed, process_group)[0]
        noise = PhiloxNoise(seed)
    at = model_device(model) if device is None else as_device("device", device)

    parts = identified(batches, ids, process_group)
    skip_counted(parts, tally)
    total = None if batches.number is None else batches.number * estimator.calls
    if not is_first(process_group):
        progress = progress or False
    bar = progress_counter(total, "bits_per_dim", progress, done=tally.calls, unit="call")
    with bar, nullcontext() if file is None else file.named_by_interrupt():
        for part in parts:
            check_batch("data", part.x)
            tally.check_kind([list(part.x.shape[1:]), str(part.x.dtype)])
            if file is not None:
                tally.digest = digest(part.x, tally.digest)
            part = part if at is None else part._replace(x=part.x.to(at))
            estimator.add_batch(tally, part, noise_of_batch(noise, part), bar)
            if file is not None:
                file.save(tally, seed)
            bar.set_postfix_str(f"{tally.totals.mean[0].item():.4f} bits/dim")
    if process_group is not None:
        tally = merged(gather(tally, process_group))
    if tally.samples == 0:
        raise ValueError("data must have at least one sample, got none")
    shared = isinstance(noise, Tensor)
    return result_of(tally, timesteps, draws, decoder, shared, estimator.bits)


@dataclass(frozen=True, eq=False)
class _Estimator:
    """Estimates the bound of a batch.

    Attributes:
        diffusion, model, model_kwargs: As for ``bits_per_dim``.
        strata: One timestep of each is visited per draw.
        draws: Draws of each stratum, per sample.
        decoder: One of ``DECODERS``.
        bits: Depth of the pixels.
        clip: Bound of the predicted x_0, or ``None``.
    """

    diffusion: GaussianDiffusion
    model: Model
    model_kwargs: Kwargs | None
    strata: Strata
    draws: int
    decoder: str
    bits: int
    clip: float | None

    @classmethod
    def of(
        cls,
        diffusion: GaussianDiffusion,
        model: Model,
        model_kwargs: Kwargs | None,
        timesteps: int | None,
        draws: int,
        decoder: str,
        bits: int,
        clip_denoised: bool | None,
    ) -> _Estimator:
        last = diffusion.num_timesteps - 1
        draws = as_int("draws", draws, 1)
        if timesteps is not None:
            timesteps = as_int("timesteps", timesteps)
            if not 1 <= timesteps <= last:
                raise ValueError(f"timesteps must be in 1 .. T - 1 = {last}, got {timesteps}")
        check_choice("decoder", decoder, DECODERS)
        bits = check_bits(bits, decoder)
        strata = Strata.of(diffusion.schedule.log_snr, last if timesteps is None else timesteps)
        clip = diffusion._clip_range(clip_denoised)
        return cls(diffusion, model, model_kwargs, strata, draws, decoder, bits, clip)

    @property
    def calls(self) -> int:
        """Model calls per batch."""
        return self.draws * len(self.strata.starts)

    def settings(self, timesteps: int | None) -> dict[str, Any]:
        """What two runs must have in common to give the same bits."""
        depth = {} if self.bits == 8 else {"bits": self.bits}  # files had no depth before
        return {
            "betas": digest(self.diffusion.betas),
            "prediction_type": self.diffusion.prediction_type,
            "variance_type": self.diffusion.variance_type,
            "timesteps": timesteps,
            "draws": self.draws,
            "decoder": self.decoder,
            "clip": self.clip,
            **depth,
        }

    def add_batch(self, tally: Tally, part: Part, noise: Noise, bar: Any) -> None:
        """Estimate the terms of a batch and add those of its new samples to the tally."""
        x = part.x
        check_decoder(self.decoder, "data", x, self.bits)
        kwargs = self.model_kwargs(part.batch) if callable(self.model_kwargs) else self.model_kwargs
        t = self._timesteps(x, noise)
        t_on_device = t.permute(1, 2, 0).contiguous().to(x.device)  # one copy for all calls
        count = len(self.strata.starts)
        found = []
        for k in range(count):
            for j in range(self.draws):
                z = noise
                if isinstance(noise, PhiloxNoise):
                    z = noise.at(noise.stream + k + j * count)
                bar.update()
                pair = self._term(x, t_on_device[k, j], z, kwargs, decodes=k == 0)
                found.append(torch.stack(pair))
        # The only wait for the device in a batch.
        values = torch.stack(found, dim=-1).cpu().double().reshape(2, len(x), count, self.draws)
        terms, errors = values[0], values[1]
        prior = self.diffusion.prior_bpd(x).cpu().double()
        rows = (prior, t, terms, errors, errors * self.diffusion.schedule.snr[t])
        tally.add(*rows if part.new is None else [values[part.new] for values in rows])
        tally.ids.append(part.counted_ids)
        tally.batches += 1
        tally.calls += self.calls

    def _term(
        self, x: Tensor, t: Tensor, noise: Noise, kwargs: Mapping[str, Any] | None, decodes: bool
    ) -> tuple[Tensor, Tensor]:
        """The terms of a model call and their errors of x_0; L_0 where it ``decodes``."""
        tables, model = self.diffusion.tables, self.model
        if decodes and self.bits != 8:
            return decoder_term(tables, model, x, noise, self.clip, self.bits, kwargs)
        return noised_term(tables, model, x, t, noise, self.clip, self.decoder, kwargs)

    def _timesteps(self, x: Tensor, noise: Noise) -> Tensor:
        """The timesteps to visit, int64 ``[B, S, draws]`` on the CPU."""
        if isinstance(noise, PhiloxNoise):
            key = noise.at(noise.stream + self.calls)
            return self.strata.timesteps(key, (len(x), self.draws))
        return self.strata.starts.reshape(1, -1, 1).repeat(len(x), 1, 1)


def _check_noise(noise: Noise | None, data: Any, timesteps: int | None, draws: int) -> None:
    if not isinstance(noise, Tensor):
        return
    if timesteps is not None or draws != 1:
        raise ValueError("noise must be a PhiloxNoise with timesteps= or draws=, got a tensor")
    if isinstance(data, Tensor) and noise.shape != data.shape:
        raise ValueError(
            f"noise must have the shape of the data, {list(data.shape)}, got {list(noise.shape)}"
        )
