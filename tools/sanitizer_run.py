"""Every op, forward and backward, for memory checkers: `make gpu-check` and `make sanitize` run it.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tools/sanitizer_run.py --device cuda

Without torch's caching allocator, and on the CPU always, every tensor is an allocation of its own,
so that a read or write one element past its end is found. Sizes are odd, so that packs have tails;
views start one element in, so that they are not aligned. `--short` runs one case of each kind of
kernel in two dtypes, for tools that take minutes where memcheck takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import diffcore
from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from support.cases import BY_NAME, CASES, Arguments, OpCase, as_tuple

SHAPES: tuple[tuple[int, ...], ...] = ((3, 1023), (2, 5, 7, 3))
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A row of several blocks, whose sums take a second launch, in place of the other shapes.
SHORT_SHAPES = ((3, 1023), (2, 20_003))
SHORT_DTYPES = (torch.float32, torch.bfloat16)
SHORT_CASES = (
    "q_sample",
    "reverse_step_h3",
    "step_log_prob_guided",
    "normal_kl_sample",
    "discretized_gaussian_log_likelihood_sample",
    "reparameterize_kl",
    "denoising_loss_v_prediction",
    "vlb_term_noise",
)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` that starts one element into its memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = memory[1:].view(x.shape)
    return view.copy_(x)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` whose second dimension is the fastest, where there is one to choose."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def exercise(case: OpCase, args: Arguments) -> None:
    """One call and its gradients: of sums, the graph being kept, and then of means."""
    leaves = [args.tensors[name].requires_grad_() for name in case.differentiable]
    outs = [out.float() for out in as_tuple(case.native(args))]
    torch.autograd.grad([out.sum() for out in outs], leaves, retain_graph=True)
    torch.autograd.grad([out.mean() for out in outs], leaves)


def exercise_drawn(case: OpCase, args: Arguments) -> None:
    """The same with generated noise, keys as numbers and as tensors."""
    like = args.tensors["noise"]
    counter = torch.arange(max(len(like), 2), device=like.device)
    for noise in (
        PhiloxNoise(-1, sample_ids=-1, stream=2**32 - 1, first_element=4),
        PhiloxNoise(counter[:2], sample_ids=counter[: len(like)], stream=counter[1:2]),
    ):
        out = torch.empty_like(like)
        ops.randn(like.shape, noise, out=out)
        tensors = {name: x.detach() for name, x in args.tensors.items() if name != "noise"}
        generated = replace(
            case, differentiable=tuple(n for n in case.differentiable if n != "noise")
        )
        exercise(generated, Arguments(tensors, {**args.options, "noise": noise}))


def exercise_thresholds(device: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    """Thresholds of short and long rows, in every layout; how many calls."""
    table = torch.full((8,), 0.5, dtype=torch.float64, device=device)
    runs = 0
    for shape, dtype in itertools.product((*SHAPES, (3, 40_003)), dtypes):
        x, m, u = torch.randn(3, *shape, device=device).to(dtype)
        for layout in (torch.Tensor.clone, shifted, channels_last):
            tensors = layout(x), layout(m), table
            ops.dynamic_threshold(*tensors)
            ops.dynamic_threshold(*tensors, model_output_uncond=layout(u), guidance_scale=2.0)
            runs += 2
    return runs


def main() -> None:
    """Run all cases, then wait, so that every error has come out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--short", action="store_true", help="one case of each kind of kernel")
    args = parser.parse_args()
    device: str = args.device
    if not native.has_kernels(torch.device(device)):
        sys.exit(f"there are no compiled kernels for {device} here")
    cases, shapes, dtypes = CASES, SHAPES, DTYPES
    if args.short:
        cases, shapes, dtypes = [BY_NAME[n] for n in SHORT_CASES], SHORT_SHAPES, SHORT_DTYPES
    runs = exercise_thresholds(device, dtypes)
    for case, shape, dtype in itertools.product(cases, shapes, dtypes):
        inputs = case.make(shape, dtype, device)
        for layout in (torch.Tensor.clone, shifted, channels_last):
            laid = inputs.map(lambda x, layout=layout: layout(x.detach()))
            exercise(case, laid)
            if "noise" in case.tensors:
                exercise_drawn(case, laid)
            runs += 1 + 2 * ("noise" in case.tensors)
    if device == "cuda":
        torch.cuda.synchronize()
    build = diffcore.info()["build_flags"]
    print(f"{runs} calls, forward and backward, of {len(cases)} cases and of thresholds ({build})")


if __name__ == "__main__":
    main()
