"""Compares noise, and every op that generates noise, with bits that were computed on a CPU.

    python tools/gpu_bits.py [--device cpu|cuda] [--write]

`tests/cuda/bits.json` has a SHA-256 for each op, dtype and shape, of the elements in logical order.
The same bits must come in every layout, for keys of numbers and of tensors, on every device. The
inputs are multiples of 1/128 that every dtype holds, so no other generator takes part. Where a
formula has an exponential its argument is 0, so that implementations of exp cannot differ.
`--write` computes the file again, on a CPU with fused multiply-add.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from diffcore.coefficients.bound import vlb_coefficients

BITS = Path(__file__).resolve().parents[1] / "tests" / "cuda" / "bits.json"
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
# One element; odd lengths; several packs; images of even and odd size; more rows than a grid of
# blocks has, and a row of several chunks.
SHAPES = ((1,), (3, 5), (65, 1031), (4, 3, 17, 13), (2, 4, 32, 32), (65_537, 2), (2, 20_001))

VALUES = (torch.arange(509) * 405 % 509 - 254) / 128.0

LAYOUTS = ("contiguous", "channels_last", "view")

SEED, FIRST_ID, STREAM = 2**61 + 5, 2**32 - 2, 3
LEVELS = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.28, 0.96]], dtype=torch.float64)
COLUMNS = (0.9, 0.2, -0.3, 0.4, 1.2, -0.7, -1.1, 0.9)  # c_x ... clip_max
HISTORY = (*COLUMNS, 0.4, -0.6, 0.7, 0.3, -0.2, 0.15)
STEP: dict[str, Any] = {"alpha": 0.6, "sigma": 0.8, "alpha_prev": 0.8, "sigma_prev": 0.6}

Outputs = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """Makes the tensors of one call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    layout: str = "contiguous"

    def __call__(self, k: int) -> Tensor:
        """The k-th input: multiples of 1/128 in [-2, 2)."""
        elements = torch.Size(self.shape).numel()
        values = VALUES.repeat(elements // len(VALUES) + 2)[97 * k : 97 * k + elements]
        return self.laid(values.to(self.device, self.dtype).view(self.shape))

    def zeros(self) -> Tensor:
        """An input of zeros."""
        return self.laid(torch.zeros(self.shape, dtype=self.dtype, device=self.device))

    def laid(self, x: Tensor) -> Tensor:
        """The values of x in the layout of this call."""
        if self.layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if self.layout == "view":  # one element into its memory, so not aligned
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        return x

    def steps(self) -> Tensor:
        """A row of LEVELS for each sample."""
        return torch.arange(self.shape[0], device=self.device) % len(LEVELS)


def _randn(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.randn(x.shape, noise, out=x.zeros()),)


def _add_noise(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.add_noise(x(0), noise, 0.8, 0.6),)


def _velocity(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.velocity(x(0), noise, 0.8, 0.6),)


def _q_sample(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.q_sample(x(0), x.steps(), noise, LEVELS.to(x.device)),)


def _q_sample_target(x: Inputs, noise: PhiloxNoise) -> Outputs:
    table = LEVELS.to(x.device)
    return ops.q_sample(x(0), x.steps(), noise, table, return_target="v_prediction")


def _ddpm_step(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.ddpm_step(x(0), x(1), **STEP, noise=noise, clip_range=1.0),)


def _ddim_step(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.ddim_step(x(0), x(1), **STEP, noise=noise, eta=0.7, clip_range=0.8),)


def _reverse_step(x: Inputs, noise: PhiloxNoise) -> Outputs:
    rows = torch.tensor([COLUMNS, COLUMNS[::-1]], dtype=torch.float64, device=x.device)
    return (ops.reverse_step(x(0), x(1), rows, t=x.steps() % 2, noise=noise),)


def _reverse_step_history(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.reverse_step(x(0), x(1), HISTORY, noise=noise, history=[x(2)]),)


def _reverse_step_guided(x: Inputs, noise: PhiloxNoise) -> Outputs:
    guided: dict[str, Any] = {"model_output_uncond": x(2), "guidance_scale": 7.5}
    return (ops.reverse_step(x(0), x(1), COLUMNS, noise=noise, **guided),)


def _reverse_step_kept(x: Inputs, noise: PhiloxNoise) -> Outputs:
    guided: dict[str, Any] = {"model_output_uncond": x(2), "guidance_scale": 7.5, "threshold": 1.5}
    history = [x(3), x(4), x(5)]
    found: Outputs = ops.reverse_step(
        x(0), x(1), HISTORY, noise=noise, history=history, return_history=True, **guided
    )
    return found


def _reverse_step_learned(x: Inputs, noise: PhiloxNoise) -> Outputs:
    variance: dict[str, Any] = {"variance_output": x.zeros(), "variance_coefficients": (0.0, 0.3)}
    return (ops.reverse_step(x(0), x(1), COLUMNS, noise=noise, **variance),)


def _reparameterize(x: Inputs, noise: PhiloxNoise) -> Outputs:
    mean, logvar = x(0).requires_grad_(), x.zeros().requires_grad_()
    z = ops.reparameterize(mean, logvar, noise=noise)
    return (z.detach(), *torch.autograd.grad(z, (mean, logvar), x(1)))


def _reparameterize_kl(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return (ops.reparameterize_kl(x(0), x.zeros(), noise=noise)[0],)


def _gradient(loss: Callable[[Tensor], Tensor], model_output: Tensor) -> Outputs:
    model_output.requires_grad_()
    return torch.autograd.grad(loss(model_output).sum(), model_output)


def _loss_epsilon(x: Inputs, noise: PhiloxNoise) -> Outputs:
    return _gradient(lambda m: ops.denoising_loss(m, x(0), noise, weight=1.5), x(1))


def _loss_v_prediction(x: Inputs, noise: PhiloxNoise) -> Outputs:
    alpha, sigma = LEVELS.to(x.device).unbind(1)
    kind: dict[str, Any] = {
        "prediction_type": "v_prediction",
        "alpha": alpha,
        "sigma": sigma,
        "t": x.steps(),
    }
    return _gradient(lambda m: ops.denoising_loss(m, x(0), noise, **kind), x(1))


def _vlb_term(x: Inputs, noise: PhiloxNoise) -> Outputs:
    # t = 2 for every sample: the decoder of t = 0 takes exponentials
    table = vlb_coefficients(*LEVELS.unbind(1), decoder="gaussian", given="noise").to(x.device)
    return _gradient(lambda m: ops.vlb_term(x(0), m, table, t=2, noise=noise), x(1))


OPS: dict[str, Callable[[Inputs, PhiloxNoise], Outputs]] = {
    "randn": _randn,
    "add_noise": _add_noise,
    "velocity": _velocity,
    "q_sample": _q_sample,
    "q_sample, return_target": _q_sample_target,
    "ddpm_step": _ddpm_step,
    "ddim_step": _ddim_step,
    "reverse_step": _reverse_step,
    "reverse_step, history": _reverse_step_history,
    "reverse_step, guided": _reverse_step_guided,
    "reverse_step, history kept": _reverse_step_kept,
    "reverse_step, learned variance": _reverse_step_learned,
    "reparameterize": _reparameterize,
    "reparameterize_kl": _reparameterize_kl,
    "denoising_loss, gradient": _loss_epsilon,
    "denoising_loss v_prediction, gradient": _loss_v_prediction,
    "vlb_term, gradient": _vlb_term,
}
# Those with the same bits on x86-64-v2, which has no fused multiply-add.
UNFUSED = ("randn", "reparameterize", "reparameterize_kl", "denoising_loss, gradient")


def keys(x: Inputs) -> Iterator[tuple[str, PhiloxNoise]]:
    """Keys that stand for the same noise of tensors like ``x``, in all their forms."""
    ids = torch.arange(x.shape[0], device=x.device) + FIRST_ID
    seed, stream = (torch.tensor(n, device=x.device) for n in (SEED, STREAM))
    yield "numbers", PhiloxNoise(SEED, sample_ids=FIRST_ID, stream=STREAM)
    yield "tensors", PhiloxNoise(seed, sample_ids=ids, stream=stream)
    if len(x.shape) < 2:
        return
    # a part of larger samples: a run from a multiple of 4 on, and boxes that are no run
    key = PhiloxNoise(SEED, sample_ids=FIRST_ID, stream=STREAM, first_element=64)
    yield "offset", key
    full, offset = tuple(n + 3 for n in x.shape), (1,) * len(x.shape)
    yield "box", PhiloxNoise(SEED, stream=STREAM).for_shard(full, x.shape, offset)


class Cell(NamedTuple):
    """One result: what it is, in which form it was asked for, and its tensors."""

    name: tuple[str, str, str]  # op and kind of noise, dtype, shape: the path in the file
    form: str
    outputs: Outputs


def cells(device: str, names: tuple[str, ...] = tuple(OPS)) -> Iterator[Cell]:
    """Every result on a device.

    Args:
        device: Where to run.
        names: The ops.
    """
    for dtype, shape, layout in itertools.product(DTYPES, SHAPES, LAYOUTS):
        if layout == "channels_last" and len(shape) != 4:
            continue
        x = Inputs(shape, DTYPES[dtype], device, layout)
        size = "x".join(map(str, shape))
        for name, (form, noise) in itertools.product(names, tuple(keys(x))):
            if form == "tensors" and layout != "contiguous":
                continue
            if form in ("numbers", "tensors"):
                entry = name
            elif name in ("randn", "add_noise"):
                entry = f"{name}, {form}"
            else:
                continue
            yield Cell((entry, dtype, size), f"{layout}, {form}", OPS[name](x, noise))


def digest(outputs: Outputs) -> str:
    """The SHA-256 of all elements, in logical order."""
    found = hashlib.sha256()
    for y in outputs:
        found.update(y.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def ops_here() -> tuple[str, ...]:
    """The ops that must have the committed bits on this CPU."""
    return UNFUSED if diffcore.info().get("instruction_set") == "v2" else tuple(OPS)


def differences(device: str) -> tuple[int, list[str]]:
    """Compares every result of a device with the file.

    Args:
        device: Where to run.

    Returns:
        The number of results, and a line for each that differs.
    """
    wanted = json.loads(BITS.read_text(encoding="utf-8"))
    count, lines = 0, []
    for cell in cells(device, tuple(OPS) if device != "cpu" else ops_here()):
        count += 1
        op, dtype, size = cell.name
        if digest(cell.outputs) != wanted.get(op, {}).get(dtype, {}).get(size):
            lines.append(f"DIFFERENT {op} {dtype} {size} ({cell.form})")
    return count, lines


def write() -> int:
    """Computes the file on the CPU; the number of entries.

    Raises:
        ValueError: A result depends on the layout or on the form of the key.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells("cpu"):
        op, dtype, size = cell.name
        bits = digest(cell.outputs)
        if found.setdefault(op, {}).setdefault(dtype, {}).setdefault(size, bits) != bits:
            raise ValueError(f"{op} {dtype} {size} differs in the form {cell.form}")
    BITS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return sum(len(sizes) for dtypes in found.values() for sizes in dtypes.values())


def main() -> int:
    """Compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="compute the file again, on the CPU")
    args = parser.parse_args()
    device: str = "cpu" if args.write else args.device
    if not native.has_kernels(torch.device(device)):
        sys.exit(f"there are no compiled kernels for {device} here")
    if args.write:
        if ops_here() != tuple(OPS):
            sys.exit("this CPU has no fused multiply-add")
        print(f"{BITS}: {write()} entries")
        return 0
    count, lines = differences(device)
    print("\n".join(lines))
    print(f"{count - len(lines)} of {count} results on {device} have the committed bits")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
