"""Every op once, forward and backward, on a GPU: what `make gpu-check` runs compute-sanitizer over.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tools/sanitizer_run.py

Without torch's caching allocator every tensor is an allocation of its own, so that a read or write
one element past its end is seen. Sizes are odd, so that packs have tails; views start one element
in, so that they are not aligned.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import CASES, Arguments, OpCase, as_tuple

SHAPES = ((3, 1023), (2, 5, 7, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` that starts one element into its memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = memory[1:].view(x.shape)
    return view.copy_(x)


def exercise(case: OpCase, args: Arguments) -> None:
    """One call and its gradient."""
    leaves = [args.tensors[name].requires_grad_() for name in case.differentiable]
    outs = as_tuple(case.native(args))
    torch.autograd.grad([out.float().sum() for out in outs], leaves)


def main() -> None:
    """Run all cases, then wait, so that every error has come out."""
    if not torch.cuda.is_available():
        sys.exit("no GPU")
    runs = 0
    for case in CASES:
        for shape in SHAPES:
            for dtype in DTYPES:
                args = case.make(shape, dtype, "cuda")
                exercise(case, args)
                exercise(case, args.map(lambda x: shifted(x.detach())))
                runs += 2
    torch.cuda.synchronize()
    print(f"{runs} calls, forward and backward, of {len(CASES)} cases")


if __name__ == "__main__":
    main()
