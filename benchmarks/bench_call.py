"""Shows where the time of a small call goes, on the host.

    python -m benchmarks.bench_call [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

Each row is a part of one call of ``add_noise`` on 64 elements, or the call itself, beside what
torch takes for the same. On CUDA the time ends when the work is enqueued.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.timing import Budget, call_overhead
from diffcore import ops
from diffcore._engine import native
from diffcore._kernels.linear import LINEAR_COMBINATION


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The parts, from the inside out."""
    x, z = torch.randn(2, 4, 16, device=device)
    assert native._C is not None
    launch, index = native._C.launch, LINEAR_COMBINATION.reading.index
    inputs, coefs = (x, z), (0.8, 0.6)
    return {
        "a Python function that does nothing": lambda: None,
        "torch: the number of active modes, once": torch._C._len_torch_dispatch_stack,
        "torch: x.is_neg()": x.is_neg,
        "torch: empty_like(x), the output": lambda: torch.empty_like(x),
        "module: what torch is asked before each launch": lambda: launch(
            index, inputs, coefs, None, None, True
        ),
        "module: the call": lambda: launch(index, inputs, coefs, None, None, False),
        "add_noise(x, z, 0.8, 0.6)": lambda: ops.add_noise(x, z, 0.8, 0.6),
        "torch: 0.8 * x + 0.6 * z": lambda: 0.8 * x + 0.6 * z,
    }


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "call" section."""
    torch.set_num_threads(1)
    found = call_overhead(calls(device), device, Budget(0.3 if args.quick else 3.0))
    return {"rows": [{"what": name, **asdict(timing)} for name, timing in found.items()]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"call": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
