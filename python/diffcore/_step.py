"""The kernels of one reverse step, one for each set of tensors that it touches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore import reference
from diffcore._kernels import SCALE, Needs, Tensors
from diffcore._registry import Call, Grads, Kernel, drawing, run, run_tuple, split_coefs
from diffcore.coefficients import STEP_COLUMNS

# Guidance and threshold, then columns of a solver's table.
LEADING = ("guidance_scale", "threshold")
PLAIN, KEPT = 8, 11  # columns that every step has, and one that keeps a history
MOST_HISTORY = 3

STILL, NOISY, LEARNED = range(3)
_NOISE_INPUTS: tuple[tuple[str, ...], ...] = ((), ("noise",), ("variance_output", "noise"))


def _inputs(guided: bool) -> tuple[str, ...]:
    return ("x", "model_output") + ("model_output_uncond",) * guided


def _reverse_step(guided: bool, history: int, keeps: bool, noise: int) -> Kernel:
    first = len(_inputs(guided))
    columns = KEPT + history if keeps or history else PLAIN

    def plain(*args: Any) -> Any:
        tensors, coefs = args[: first + history + noise], args[first + history + noise :]
        return reference.reverse_step(
            tensors[0],
            tensors[1],
            coefs[2 : 2 + columns],
            guidance_scale=coefs[0],
            threshold=coefs[1],
            model_output_uncond=tensors[2] if guided else None,
            history=tensors[first : first + history],
            keeps=keeps,
            noise=tensors[-1] if noise else None,
            variance_output=tensors[-2] if noise == LEARNED else None,
            variance_coefs=coefs[2 + columns :],
        )

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        _, coefs, step, _, _ = call
        (g,) = grads
        assert g is not None
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs[:first]):
            found[:first] = run_tuple(STEP_BACKWARD[guided], (g, *inputs[:first]), coefs, step)
        if len(needs) > first and needs[first]:
            found[first] = run(SCALE, (g,), (split_coefs(coefs)[5],), step)
        return found

    def through_reference(*_: Any) -> None:
        return None  # rare

    names = [
        "reverse_step",
        *["guided"] * guided,
        *[f"h{history}"] * (history > 0),
        *["keep"] * keeps,
        *["learned"] * (noise == LEARNED),
        *["noise"] * (noise != STILL),
    ]
    inputs = _inputs(guided) + tuple(f"history_{k + 1}" for k in range(history))
    kernel = Kernel(
        "_".join(names),
        inputs + _NOISE_INPUTS[noise],
        LEADING + STEP_COLUMNS[:columns] + ("s_0", "s_v") * (noise == LEARNED),
        outputs=1 + keeps,
        reference=plain,
        backward=through_reference if history or noise == LEARNED else backward,
    )
    return drawing(kernel) if noise else kernel


def _log_prob(guided: bool) -> Kernel:
    first = len(_inputs(guided))

    def plain(*args: Any, whole: bool) -> Tensor:
        x, m, *rest = args[: first + 1]
        guidance, threshold, *coefs = args[first + 1 :]
        return reference.step_log_prob(
            x,
            m,
            rest[-1],
            coefs,
            guidance_scale=guidance,
            threshold=threshold,
            model_output_uncond=rest[0] if guided else None,
        )

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        _, coefs, step, _, _ = call
        (g,) = grads
        assert g is not None
        if needs[0] or needs[-1]:
            return None  # of the samples themselves: rare, through the reference
        found: Any = run(LOG_PROB_BACKWARD[guided], inputs, (*coefs, g), step)
        return [None, *(found if guided else (found,)), None]

    return Kernel(
        "step_log_prob" + "_guided" * guided,
        (*_inputs(guided), "x_next"),
        LEADING + STEP_COLUMNS[:PLAIN],
        outputs=0,
        sums=1,
        reference=plain,
        backward=backward,
    )


_GUIDANCE = (False, True)
# (history, keeps): what there are instances of.
_SETS = ((0, False), (1, False), (1, True), (MOST_HISTORY, True))
REVERSE_STEP = {
    (guided, *which, noise): _reverse_step(guided, *which, noise)
    for guided in _GUIDANCE
    for which in _SETS
    for noise in (STILL, NOISY, LEARNED)
    if noise != LEARNED or which == (0, False)
}
SOLVER_STEP = {
    key: kernel.named(("x_t", *kernel.inputs[1:]))
    for key, kernel in REVERSE_STEP.items()
    if key[1:3] == (0, False)
}
STEP_BACKWARD = {
    guided: Kernel(
        "reverse_step" + "_guided" * guided + "_backward",
        ("grad", *_inputs(guided)),
        LEADING + STEP_COLUMNS[:PLAIN],
        outputs=2 + guided,
    )
    for guided in _GUIDANCE
}
STEP_LOG_PROB = {guided: _log_prob(guided) for guided in _GUIDANCE}
LOG_PROB_BACKWARD = {
    guided: Kernel(
        "step_log_prob" + "_guided" * guided + "_backward",
        (*_inputs(guided), "x_next"),
        (*LEADING, *STEP_COLUMNS[:PLAIN], "grad"),
        outputs=1 + guided,
    )
    for guided in _GUIDANCE
}
