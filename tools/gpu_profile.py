"""Runs five kernels once each, for a profiler that starts at cudaProfilerStart.

    ncu --profile-from-start off --target-processes all python tools/gpu_profile.py --device cuda

The five bound by different things: memory, generated noise in 16 bits, sums over samples, a long
formula, and channels_last with generated noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from diffcore import PhiloxNoise, ops

Call = Callable[[], object]


def calls(device: str, batch: int) -> list[Call]:
    """The five calls.

    Args:
        device: Where to run.
        batch: How many images of 3×256×256.
    """
    key = PhiloxNoise(5)
    x, m, z = torch.randn(3, batch, 3, 256, 256, device=device)
    x16, m16 = x.bfloat16(), m.bfloat16()
    last = x16.to(memory_format=torch.channels_last)
    return [
        lambda: ops.add_noise(x, z, 0.8, 0.6),
        lambda: ops.add_noise(x16, key, 0.8, 0.6),
        lambda: ops.denoising_loss(m16, x16, key),
        lambda: ops.discretized_gaussian_log_likelihood(x, means=m, log_scales=z),
        lambda: ops.add_noise(last, key, 0.8, 0.6),
    ]


def main() -> None:
    """Runs the calls, then once more between start and stop of the profiler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device: str = parser.parse_args().device
    found = calls(device, 64 if device == "cuda" else 1)
    for call in found:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in found:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"{len(found)} calls on {device}")


if __name__ == "__main__":
    main()
