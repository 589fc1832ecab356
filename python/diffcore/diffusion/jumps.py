"""Jumps of the forward process, from a timestep to a noisier one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import replicated, shard_of
from diffcore._kernels.linear import LINEAR_COMBINATION
from diffcore._types import Coefs
from diffcore.diffusion.checks import (
    check_batch,
    check_noise,
    check_timestep_values,
    check_timesteps,
    compiling,
)
from diffcore.diffusion.tables import DiffusionTables
from diffcore.noise import Noise
from diffcore.ops._noise import run_noisy

_JUMPED = LINEAR_COMBINATION.renamed(("x_t", "noise"), ("alpha_u / alpha_t", "deviation"))


def jumped(
    tables: DiffusionTables, x_t: Tensor, t: Tensor | int, u: Tensor | int, noise: Noise | None
) -> Tensor:
    """x_u from x_t: see ``GaussianDiffusion.q_sample_jump``."""
    if type(t) is int and type(u) is int and not compiling():
        check_batch("x_t", x_t)
        factors = _of_numbers(tables, t, u)
    else:
        factors = _of_samples(tables, x_t, t, u)
    noise = check_noise(noise, x_t)
    x_u: Tensor = run_noisy(_JUMPED, (x_t,), noise, factors)
    return x_u


def _of_numbers(tables: DiffusionTables, t: int, u: int) -> Coefs:
    """The factors of x_t and of the noise, the same for all samples."""
    last = len(tables) - 1
    for name, step in (("t", t), ("u", u)):
        if not 0 <= step <= last:
            raise ValueError(f"{name} must be in 0 .. {last}, got {step}")
    if u < t:
        raise _falls(t, u)
    if u == t:
        return 1.0, 0.0
    levels = tables.level_pairs()
    (alpha, sigma), (alpha_u, sigma_u) = levels[t], levels[u]
    r = alpha_u / alpha
    kept = r * sigma / sigma_u  # of the deviation at u, the part that is in x_t already
    return r, sigma_u * math.sqrt((1 - kept) * (1 + kept))


def _of_samples(tables: DiffusionTables, x_t: Tensor, t: Tensor | int, u: Tensor | int) -> Coefs:
    """The factors ``[B]``, in the operations of ``_of_numbers``, which all round correctly."""
    steps = []
    for name, given in (("t", t), ("u", u)):
        try:
            step = check_timesteps(given, x_t, len(tables), "x_t")
            check_timestep_values(step, len(tables))
        except (TypeError, ValueError) as error:
            message = str(error)
            if name == "t" or not message.startswith("t "):
                raise
            raise type(error)(f"{name}{message[1:]}") from None
        steps.append(step)
    before, after = steps
    _check_rises(before, after)
    # Out of range on a device that cannot report it must not read out of bounds either.
    rows = [step.clamp(0, len(tables) - 1) for step in steps]
    table = tables.noise[x_t.device]
    (alpha, sigma), (alpha_u, sigma_u) = (replicated(table, row)[row].unbind(-1) for row in rows)
    same = before == after
    r = torch.where(same, 1.0, alpha_u / alpha)
    kept = r * sigma / sigma_u
    return r, torch.where(same, 0.0, sigma_u * ((1 - kept) * (1 + kept)).sqrt())


def _check_rises(before: Tensor, after: Tensor) -> None:
    """Refuses u < t where both can be read without waiting for a device."""
    before, after = shard_of(before), shard_of(after)
    if before.device.type != "cpu" or not before.numel() or not plain_eager():
        return
    falls = after < before
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise _falls(int(before[i]), int(after[i]))


def _falls(t: int, u: int) -> ValueError:
    return ValueError(
        f"u must be at least t, {t}, got {u}; a jump adds noise, p_sample and ddim_sample remove it"
    )
