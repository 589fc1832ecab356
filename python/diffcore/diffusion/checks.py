"""Checks of samples, timesteps, pixels and noise that the diffusion and its bound share."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffcore._checks import (
    as_int,
    as_real,
    as_tensor,
    check_choice,
    check_dense,
    check_float_tensor,
)
from diffcore._devices import in_float64, wide_dtype
from diffcore._engine import messages, native
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import per_sample, shard_of
from diffcore._types import Coef
from diffcore.coefficients.bound import DECODERS
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._arguments import as_step
from diffcore.ops._masks import MASK_REDUCTIONS, checked_mask
from diffcore.ops._noise import default_key
from diffcore.ops._robust import LOSSES, robust_of
from diffcore.ops.likelihood import MOST_BITS
from diffcore.schedules.tensors import check_has_values

# Without a search for other tracers, because every training step asks.
compiling = torch.compiler.is_dynamo_compiling


def can_read_values(x: Tensor) -> bool:
    """Whether values can be read on the host without a graph break or a wait for the device."""
    return plain_eager() and (x.device.type == "cpu" or native.DEBUG)


def has_values(x: Tensor) -> bool:
    """Whether there are values to read, maybe after a wait for the device."""
    return plain_eager() and x.device.type != "meta"


def check_batch(name: str, x: Tensor) -> None:
    """Refuse what is not a floating-point tensor ``[B, ...]``.

    Args:
        name: Name of the argument in the caller.
        x: The argument.

    Raises:
        TypeError: Another type or dtype, or a tensor without dimensions or not dense.
        ValueError: A tensor whose memory was freed.
    """
    check_float_tensor(name, x)
    if x.dim() == 0:
        raise TypeError(f"{name} must be a floating-point tensor [B, ...], got a 0-dim tensor")
    if x.dtype not in messages.DTYPES:
        messages.check_tensor(name, x)


def check_decoder(decoder: str, name: str, x: Tensor, bits: int = 8) -> None:
    """Refuse an unknown decoder, and data for which the discretized decoder has no bins.

    Args:
        decoder: One of ``DECODERS``.
        name: Name of the data in the caller.
        x: The data. Their values are read in a plain eager call, which waits for their device.
        bits: Depth of the pixels.

    Raises:
        ValueError: ``decoder`` is unknown, or ``x`` does not fit it.
    """
    check_choice("decoder", decoder, DECODERS)
    if decoder == "discretized" and has_values(x):
        check_pixels(name, x, bits)


def check_noised(name: str, x: Tensor, clean_name: str, clean: Tensor) -> None:
    """Refuses noised samples that are not those of the clean ones."""
    check_batch(clean_name, clean)
    check_batch(name, x)
    if x.shape != clean.shape or x.device != clean.device:
        raise ValueError(
            f"{name} must have the shape and device of {clean_name}, {tuple(clean.shape)} on "
            f"{clean.device}, got {tuple(x.shape)} on {x.device}"
        )


def check_noise(noise: Noise | None, like: Tensor, name: str = "noise") -> Noise:
    """The given noise if it fits; for ``None`` a noise key seeded by torch's generator.

    Args:
        noise: A tensor, a noise key or ``None``.
        like: The samples that the noise is for.
        name: Name of the argument in the caller.

    Returns:
        A tensor or a noise key.

    Raises:
        TypeError: Another type.
        ValueError: A tensor of another shape.
    """
    if noise is None:
        return default_key(like)
    if isinstance(noise, Tensor):
        check_dense(name, noise)
        if noise.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of the samples, {tuple(like.shape)}, "
                f"got {tuple(noise.shape)}"
            )
    elif not isinstance(noise, PhiloxNoise):
        raise TypeError(f"{name} must be a tensor or a PhiloxNoise, got {type(noise).__name__}")
    return noise


def check_pixels(name: str, x: Tensor, bits: int = 8) -> None:
    """Refuse values that are not pixels, to rounding: k/127.5 - 1, k = 0 .. 255, for 8 bits.

    16-bit numbers must be the value nearest to a pixel, of 8 bits at most. float64 pixels may have
    been rounded to float32 before.

    Args:
        name: Name of the data in the caller.
        x: The data. Their values are read, which waits for their device.
        bits: Depth of the pixels: they are 2 k / (2^bits - 1) - 1, k = 0 .. 2^bits - 1.

    Raises:
        ValueError: Some values are not pixels.
    """
    x = shard_of(x)
    most = 2**bits - 1
    half = most / 2
    if bits > 8 and x.dtype.itemsize < 4:
        raise ValueError(f"{name} must be float32 or float64 for {bits} bits, got {x.dtype}")
    x = x.detach()
    exact = in_float64(x)
    grid = (exact * half + half).round().clamp(0, most) / half - 1
    if x.dtype.itemsize < 4:
        good = grid.to(x.dtype) == x.to(grid.device)
    else:
        good = (exact - grid).abs() <= 4 * torch.finfo(torch.float32).eps
    if bool(good.all()):
        return
    bad, (low, high) = exact[~good], (end.item() for end in exact.aminmax())
    fix = f"use decoder='gaussian' for latents and other data that are not {bits}-bit pixels"
    if low >= 0 and high > low:  # as ToTensor makes them, or in their integers
        scaled = _from_images(name, high, half)
        fix = f"pass {scaled} for images in [0, {most if high > 2 else 1}]; {fix}"
    raise ValueError(
        f"{name} must be pixels k/{half} - 1, k = 0 .. {most}, with decoder='discretized', "
        f"got {bad.numel()} of {x.numel()} values off this grid, such as {bad[0].item():.6g}; {fix}"
    )


def exact_pixels(x: Tensor, bits: int) -> Tensor:
    """Pixels as they were before they were rounded to the dtype of ``x``, float64.

    Args:
        x: Values that ``check_pixels`` accepts.
        bits: Depth of the pixels.

    Returns:
        The nearest pixels, like ``x``.
    """
    half = (2**bits - 1) / 2
    exact: Tensor = (in_float64(x) * half + half).round() / half - 1
    return exact


def check_bits(bits: int, decoder: str) -> int:
    """The depth of pixels as an int.

    Args:
        bits: The depth.
        decoder: One of ``DECODERS``.

    Returns:
        The depth.

    Raises:
        TypeError: ``bits`` is no integer.
        ValueError: A depth out of range, or one without "discretized".
    """
    if type(bits) is int and bits == 8:
        return bits
    bits = as_int("bits", bits, 1)
    if bits > MOST_BITS:
        raise ValueError(f"bits must be in 1 .. {MOST_BITS}, got {bits}")
    if bits != 8 and decoder != "discretized":
        raise ValueError(f"bits must be 8, its default, with decoder={decoder!r}, got {bits}")
    return bits


def _from_images(name: str, high: float, half: float = 127.5) -> str:
    """How to scale images whose largest value is ``high`` to [-1, 1]."""
    return f"{name} / {half} - 1" if high > 2 else f"{name} * 2 - 1"


def warn_of_images(name: str, x: Tensor) -> bool:
    """Warn of images or videos that have no negative value, on the CPU.

    Args:
        name: Name of the data in the caller.
        x: The data. Their values are read.

    Returns:
        Whether this is settled: not while something traces the call.
    """
    if not plain_eager():
        return False
    x = shard_of(x)
    if x.ndim < 4 or x.numel() == 0 or x.device.type != "cpu":
        return True
    low, high = (float(end) for end in torch.aminmax(x.detach()))
    if not (low >= 0 and high > low):
        return True
    warnings.warn(
        f"{name} has values from {low:.4g} to {high:.4g} and none below 0: the noise has mean 0, "
        f"and so should the data; for images pass {_from_images(name, high)}",
        UserWarning,
        stacklevel=3,
    )
    return True


def check_timestep_values(t: Tensor, num_timesteps: int) -> None:
    """Refuse timesteps outside 0 .. T-1, for callers that use them before a kernel checks them.

    Reads the values of a CPU tensor in a plain eager call. Values on another device are not read,
    because that would wait for the device; traced and batched timesteps have none to read.

    Args:
        t: Timesteps, integer ``[B]``.
        num_timesteps: T.

    Raises:
        ValueError: A timestep is out of range.
    """
    t = shard_of(t)
    if t.device.type != "cpu" or not t.numel() or not plain_eager():
        return
    low, high = int(t.min()), int(t.max())
    if low < 0 or high >= num_timesteps:
        raise ValueError(f"t must be in 0 .. {num_timesteps - 1}, got values from {low} to {high}")


def check_timesteps(
    t: Tensor | int, x: Tensor, num_timesteps: int, name: str = "x_start"
) -> Tensor:
    """Timesteps as an integer ``[B]`` tensor on the device of ``x``.

    Checks type, shape and device. The values of a tensor are not read: kernels check them on the
    CPU, and ``check_timestep_values`` where no kernel comes first.

    Args:
        t: Timesteps: one int, or ``[B]`` ints (an int64 or int32 tensor, a NumPy array, a list);
            one entry counts for all samples.
        x: Samples ``[B, ...]``.
        num_timesteps: T.
        name: Name of ``x`` in the caller.

    Returns:
        ``t``, or a tensor filled with it; beside a DTensor, a DTensor sharded like its samples.

    Raises:
        TypeError: ``t`` or ``x`` of another type or dtype.
        ValueError: ``t`` of another shape or device, or an int out of range.
    """
    # Called for every sample: the condition of check_batch without its calls; kernels have others.
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        check_batch(name, x)
    try:
        batch = x.shape[:1]
    except RuntimeError:  # of a nested tensor
        check_batch(name, x)
        raise
    if not isinstance(t, Tensor):
        t = _given_timesteps(t, num_timesteps, x.device)
        if not isinstance(t, Tensor):
            t = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
            return per_sample(t, x)
    if t.dtype not in (torch.int64, torch.int32):
        _refuse_dtype(t, num_timesteps)
    if t.device != x.device:
        raise ValueError(
            f"t must be on {x.device}, the device of {name}, got {t.device}; t.to({name}.device)"
        )
    if t.shape != batch:
        if t.numel() != 1:
            _refuse_shape(t, x)
        t = t.reshape(1).repeat(x.shape[0])
    return per_sample(t, x)


def check_weights(weights: Any, num_timesteps: int, device: torch.device) -> Tensor:
    """Loss weights as a tensor ``[T]``.

    Args:
        weights: The argument: a tensor, a NumPy array or a list.
        num_timesteps: T.
        device: Where they will be needed.

    Returns:
        The tensor, or float64 on the CPU.

    Raises:
        TypeError: Not numbers.
        ValueError: Another shape.
    """
    found = as_tensor("weights", weights, "a tensor of [T] numbers")
    if found.shape != (num_timesteps,):
        raise ValueError(f"weights must have shape ({num_timesteps},), got {tuple(found.shape)}")
    if device.type != "meta":
        check_has_values("weights", found)
    return found


def check_reduction(reduction: Any, group_dim: Any) -> None:
    """Refuses what ``training_losses`` does not reduce to.

    Args:
        reduction: The argument.
        group_dim: The argument.

    Raises:
        ValueError: Another reduction, or "group" without groups.
    """
    check_choice("reduction", reduction, ("sample", "group"))
    if reduction == "group" and group_dim is None:
        raise ValueError("group_dim must be given with reduction='group', got None")


def check_mask(mask: Any, mask_reduction: Any, x_start: Tensor) -> None:
    """Refuses a mask or its reduction before the model is called.

    Args:
        mask: The argument, ``None`` for none.
        mask_reduction: The argument.
        x_start: The samples.

    Raises:
        TypeError: A mask of the wrong type.
        ValueError: A mask of another shape or values, or an unknown reduction.
    """
    if mask is not None:
        checked_mask(mask, x_start, "x_start")
    check_choice("mask_reduction", mask_reduction, MASK_REDUCTIONS)


def check_robust(
    loss: Any, delta: Any, loss_type: str, num_timesteps: int, device: torch.device
) -> Coef:
    """The delta of a loss of errors other than their square.

    Args:
        loss: The argument of ``training_losses``.
        delta: The argument.
        loss_type: Of the constructor.
        num_timesteps: T.
        device: That of the samples.

    Returns:
        A number, or ``[T]`` there, float64 (float32 where there is no float64).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown loss; no delta or a wrong one; a loss_type without squares.
    """
    check_choice("loss", loss, LOSSES)
    if loss_type not in ("mse", "rescaled_mse"):
        raise ValueError(f"loss must be 'mse' with loss_type={loss_type!r}, got {loss!r}")
    number, _ = robust_of(loss, delta, None)
    if not isinstance(number, Tensor) or number.ndim == 0:
        return number
    if number.shape != (num_timesteps,):
        raise ValueError(
            f"delta must be a number or have shape ({num_timesteps},), got {tuple(number.shape)}"
        )
    return number.to(device=device, dtype=wide_dtype(device))


def check_perturbation(strength: Any, noise: Any) -> float:
    """The strength of input perturbation, whose second noise is that of a key.

    Args:
        strength: The argument.
        noise: The noise of the call.

    Raises:
        TypeError: Not a number.
        ValueError: Negative or infinite, or a tensor of noise.
    """
    found = as_real("input_perturbation", strength)
    if not 0 <= found < float("inf"):
        raise ValueError(f"input_perturbation must be at least 0 and finite, got {found}")
    if not isinstance(noise, PhiloxNoise):
        raise ValueError(
            "noise must be a PhiloxNoise or None with input_perturbation, whose second noise comes "
            f"from the key, got {type(noise).__name__}"
        )
    return found


def _given_timesteps(t: Any, num_timesteps: int, device: torch.device) -> int | Tensor:
    """A checked int; or a tensor, from a list or an array of ints."""
    try:
        step = as_step(t, device)
    except TypeError:
        raise TypeError(
            f"t must be an int, an int64 or int32 tensor, or a list of ints, got {type(t).__name__}"
        ) from None
    if isinstance(step, Tensor):
        check_timestep_values(step, num_timesteps)
    elif not 0 <= step < num_timesteps:
        raise ValueError(f"t must be in 0 .. {num_timesteps - 1}, got {step}")
    return step


def _refuse_dtype(t: Tensor, num_timesteps: int) -> NoReturn:
    fix = (
        f"; timesteps are the integers 0 .. {num_timesteps - 1}: for a continuous time take "
        "ContinuousTimeGaussianDiffusion"
    )
    raise TypeError(
        f"t must be an int or an int64 or int32 tensor, got {t.dtype}"
        f"{fix if t.is_floating_point() else ''}"
    )


def _refuse_shape(t: Tensor, x: Tensor) -> NoReturn:
    frames = t.ndim > 1 and t.numel() != x.shape[0]
    fix = "; for a timestep of each frame pass [B, F] with group_dim" if frames else ""
    raise ValueError(f"t must have shape {tuple(x.shape[:1])}, got {tuple(t.shape)}{fix}")


def constant_eta(eta: float) -> float:
    """The number, and the default as a constant: with dynamic=True Dynamo takes it for dynamic."""
    eta = as_real("eta", eta)
    return 0.0 if eta == 0 else eta
