"""Compares sums of rows of many lengths with float64, and with those made without clusters.

    python tools/gpu_sums.py [--device cpu|cuda]

Blocks of a thread block cluster add the sums of medium rows in one launch, and two launches make
the same bits; the sums are computed in two processes, the second with DIFFCORE_CUDA_CLUSTERS=0.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import diffcore
from diffcore import ops

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around 1, 8 and 64 rounds of a block, of 512 to 4,096 elements each.
LENGTHS = (513, 8191, 16_385, 49_152, 65_537, 131_072, 196_608, 262_145)
ROW = (0.4, 0.2, -0.3, 0.5, 1.0, -0.5, -3.0, 3.0)

Sum = Callable[[Tensor, Tensor], Tensor]
SUMS: dict[str, Sum] = {
    "normal_kl": lambda x, y: ops.normal_kl(x, 0.5 * y, y, 0.5 * x, reduction="sample"),
    "standard_normal_kl": lambda x, y: ops.standard_normal_kl(x, 0.5 * y, reduction="sample"),
    "denoising_loss": lambda x, y: ops.denoising_loss(x, y, y),
    "step_log_prob": lambda x, y: ops.step_log_prob(x, y, y, ROW),
    "step_kl": lambda x, y: ops.step_kl(x, y, x, ROW),
}


def all_sums(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each sum, and the same in float64 on the CPU."""
    generator = torch.Generator().manual_seed(5)
    for n in LENGTHS:
        wide = [torch.randn(3, n, generator=generator, dtype=torch.float64) for _ in range(2)]
        for dtype in DTYPES:
            x, y = (v.to(dtype) for v in wide)
            for name, op in SUMS.items():
                found = op(x.to(device), y.to(device)).cpu()
                yield f"{name}, {dtype}, {n}", found, op(x.double(), y.double())


def digest(device: str) -> str:
    """A hash of all sums."""
    found = hashlib.sha256()
    for _, sums, _ in all_sums(device):
        found.update(sums.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    """1 if a sum is wrong, or has other bits without clusters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--digest", action="store_true", help="print the hash of the sums only")
    options = parser.parse_args()
    if options.digest:
        print(digest(options.device))
        return 0
    wrong = []
    for name, found, truth in all_sums(options.device):
        # 16-bit inputs are rounded inside no formula, so only the sum's own rounding is left.
        if not torch.allclose(found.double(), truth, rtol=1e-5, atol=0):
            wrong.append(f"{name}: {found.tolist()}, wanted {truth.tolist()}")
    without = subprocess.run(
        [sys.executable, __file__, "--device", options.device, "--digest"],
        cwd=ROOT,
        env={**os.environ, "DIFFCORE_CUDA_CLUSTERS": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if without != digest(options.device):
        wrong.append("other bits with DIFFCORE_CUDA_CLUSTERS=0")
    kinds = len(LENGTHS) * len(DTYPES) * len(SUMS)
    print(f"{kinds} sums on {options.device} (diffcore {diffcore.__version__}): {len(wrong)} wrong")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
