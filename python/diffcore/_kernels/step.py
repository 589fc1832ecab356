"""The kernels of one reverse step, one for each set of tensors that it touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from diffcore._engine.dispatch import run, run_tuple
from diffcore._engine.execute import split_coefs
from diffcore._engine.kernel import Call, Grads, Kernel, NoisyKernel
from diffcore._engine.library import define, define_noisy
from diffcore._kernels.linear import SCALE, step_for
from diffcore._kernels.noise import Needs
from diffcore._types import Coefs, Step, StepColumns, Tensors
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.reference import step as formulas

# Before the columns: w and g of guidance m = m_u + g m_u + w (m_c - m_u), the factors of m_u itself
# in x' and in h', and the bound of x0.
LEADING = ("guidance_scale", "guidance_gain", "c_u", "e_u", "threshold")
UNGUIDED: Coefs = formulas.UNGUIDED
_FIRST = len(LEADING)
PLAIN, KEPT = 8, 11  # columns that every step has, and those of one that returns its history
MOST_HISTORY = 3

STILL, NOISY, LEARNED = range(3)
_NOISE_INPUTS: tuple[tuple[str, ...], ...] = ((), ("noise",), ("variance_output", "noise"))


def inputs_of(guided: bool) -> tuple[str, ...]:
    return ("x", "model_output") + ("model_output_uncond",) * guided


def _reverse_step(guided: bool, history: int, keeps: bool, noise: int) -> Kernel | NoisyKernel:
    first = len(inputs_of(guided))
    columns = KEPT + history if keeps or history else PLAIN

    def plain(*args: Any) -> Any:
        tensors, coefs = args[: first + history + noise], args[first + history + noise :]
        return formulas.reverse_step(
            tensors[0],
            tensors[1],
            coefs[_FIRST : _FIRST + columns],
            leading=coefs[:_FIRST],
            model_output_uncond=tensors[2] if guided else None,
            history=tensors[first : first + history],
            keeps=keeps,
            noise=tensors[-1] if noise else None,
            variance_output=tensors[-2] if noise == LEARNED else None,
            variance_coefs=coefs[_FIRST + columns :],
        )

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        _, coefs, step, _, _ = call
        g, *left = grads
        if noise == LEARNED and any(needs[first:]):
            return None  # rare: through the reference
        split = split_coefs(coefs)
        leading, c = tuple(split[:_FIRST]), StepColumns(*split[_FIRST : _FIRST + columns])
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs[:first]):
            outer = (g, left[0] if left else None)
            # The noise of a key is no input. Beside an h', its gradient takes another launch.
            of_noise = noise == NOISY and outer[1] is None and any(needs[first + history :])
            of_step = _of_step(guided, outer, inputs, leading, c, step, of_noise)
            found[:first] = of_step[:first]
            if of_noise:
                found[-1] = of_step[first]
        if g is not None:
            factors = [*(c.c_1, c.c_2, c.c_3)[:history], *[c.c_z] * (noise == NOISY)]
            for k, factor in enumerate(factors, first):
                if k < len(needs) and needs[k] and found[k] is None:
                    found[k] = run(SCALE, (g,), (factor,), step_for(step, factor))
        return found

    names = [
        "reverse_step",
        *["guided"] * guided,
        *[f"h{history}"] * (history > 0),
        *["keep"] * keeps,
        *["learned"] * (noise == LEARNED),
        *["noise"] * (noise != STILL),
    ]
    inputs = inputs_of(guided) + tuple(f"history_{k + 1}" for k in range(history))
    kernel = Kernel(
        "_".join(names),
        inputs + _NOISE_INPUTS[noise],
        LEADING + STEP_COLUMNS[:columns] + ("s_0", "s_v") * (noise == LEARNED),
        outputs=1 + keeps,
        reference=plain,
        backward=backward,
    )
    return define_noisy(kernel) if noise else define(kernel)


def _of_step(
    guided: bool,
    grads: tuple[Tensor | None, Tensor | None],
    inputs: Tensors,
    leading: Coefs,
    columns: StepColumns,
    step: Step,
    of_noise: bool,
) -> Tensors:
    """The gradients of x, m (and m_u, z), from those of x' and of h'."""
    g, left = grads
    if g is None:  # h' alone: its factors take the place of those of x'
        g, left = left, None
        leading = (*leading[:2], leading[3], 0.0, leading[4])
        columns = columns._replace(c_x=columns.e_x, c_m=columns.e_m, c_0=columns.e_0, c_z=0.0)
    assert g is not None
    keeps = left is not None
    upstream = (g,) if left is None else (g, left)
    coefs = (*leading, *columns[: KEPT if keeps else PLAIN])
    kernel = STEP_BACKWARD[guided, keeps, of_noise]
    return run_tuple(kernel, (*upstream, *inputs[: 2 + guided]), coefs, step_for(step, *coefs))


def _log_prob(guided: bool) -> Kernel:
    first = len(inputs_of(guided))

    def plain(*args: Any, reduce_all: bool) -> Tensor:
        x, m, *rest = args[: first + 1]
        coefs = args[first + 1 :]
        return formulas.step_log_prob(
            x,
            m,
            rest[-1],
            coefs[_FIRST:],
            leading=coefs[:_FIRST],
            model_output_uncond=rest[0] if guided else None,
        )

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        _, coefs, step, _, _ = call
        (g,) = grads
        assert g is not None
        of_samples = bool(needs[0] or needs[-1])
        found: Any = run(LOG_PROB_BACKWARD[guided, of_samples], inputs, (*coefs, g), step)
        if of_samples:
            return list(found)
        return [None, *(found if guided else (found,)), None]

    return define(
        Kernel(
            "step_log_prob" + "_guided" * guided,
            (*inputs_of(guided), "x_next"),
            LEADING + STEP_COLUMNS[:PLAIN],
            outputs=0,
            sums=1,
            reference=plain,
            backward=backward,
        )
    )


def _kl_plain(*args: Any, reduce_all: bool) -> Tensor:
    x, m, other, *coefs = args
    return formulas.step_kl(x, m, other, coefs[_FIRST:], leading=coefs[:_FIRST])


def _kl_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
    _, coefs, step, _, _ = call
    (g,) = grads
    assert g is not None
    if needs[0]:
        return None  # rare: through the reference
    x, m, other = inputs
    # The deviations are equal, so the KL is symmetric.
    pairs = ((x, m, other), (x, other, m))
    return [
        None,
        *(
            run(STEP_KL_BACKWARD, pair, (*coefs, g), step) if needed else None
            for pair, needed in zip(pairs, needs[1:], strict=True)
        ),
    ]


def _inputs(kernel: Kernel | NoisyKernel) -> tuple[str, ...]:
    return kernel.inputs if isinstance(kernel, Kernel) else kernel.reading.inputs


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
    key: kernel.renamed(("x_t", *_inputs(kernel)[1:]))
    for key, kernel in REVERSE_STEP.items()
    if key[1:3] == (0, False)
}
TABLE_STEP = {key: kernel.selected_by("i") for key, kernel in REVERSE_STEP.items()}
STEP_BACKWARD = {
    (guided, keeps, noise): define(
        Kernel(
            "reverse_step" + "_guided" * guided + "_keep" * keeps + "_backward" + "_noise" * noise,
            ("grad", *["grad_history"] * keeps, *inputs_of(guided)),
            LEADING + STEP_COLUMNS[: KEPT if keeps else PLAIN],
            outputs=2 + guided + noise,
        )
    )
    for guided in _GUIDANCE
    for keeps, noise in ((False, False), (False, True), (True, False))
}
STEP_LOG_PROB = {guided: _log_prob(guided) for guided in _GUIDANCE}
LOG_PROB_BACKWARD = {
    (guided, of_samples): define(
        Kernel(
            "step_log_prob" + "_guided" * guided + "_backward" + "_all" * of_samples,
            (*inputs_of(guided), "x_next"),
            (*LEADING, *STEP_COLUMNS[:PLAIN], "grad"),
            outputs=1 + guided + 2 * of_samples,
        )
    )
    for guided in _GUIDANCE
    for of_samples in (False, True)
}
_COMPARED = ("x", "model_output", "reference_output")
STEP_KL = define(
    Kernel(
        "step_kl",
        _COMPARED,
        LEADING + STEP_COLUMNS[:PLAIN],
        outputs=0,
        sums=1,
        reference=_kl_plain,
        backward=_kl_backward,
    )
)
TABLE_LOG_PROB = {guided: kernel.selected_by("i") for guided, kernel in STEP_LOG_PROB.items()}
TABLE_KL = STEP_KL.selected_by("i")
STEP_KL_BACKWARD = define(
    Kernel("step_kl_backward", _COMPARED, (*LEADING, *STEP_COLUMNS[:PLAIN], "grad"))
)


class Plan(NamedTuple):
    """What is known of a step before its tensors are."""

    kernel: Any  # a Kernel, or a NoisyKernel where the step is noisy
    guided: Any
    coefs: Coefs  # UNGUIDED, but for c_u and e_u; the columns, zeros for the padding
    reads: int  # how many h
    keeps: bool  # whether it leaves an h
    noisy: bool
    padding: int  # how many h its kernel reads beyond those, with factor 0


def columns_read(reads: int, keeps: bool) -> int:
    """How many columns a step needs that reads so many h, and maybe keeps one."""
    return KEPT + reads if reads or keeps else PLAIN


Kernels = Mapping[tuple[bool, int, bool, int], Kernel | NoisyKernel]


def plan(
    columns: Coefs,
    reads: int,
    keeps: bool,
    noisy: bool,
    kernels: Kernels = REVERSE_STEP,
    of_uncond: Coefs = (),
) -> Plan:
    """How to take a step, given the ``columns_read`` of it, and c_u and e_u if m_u is read."""
    instance = 0 if not (reads or keeps) else 1 if reads <= 1 else MOST_HISTORY
    plain, guided = kernels[False, instance, keeps, noisy], kernels[True, instance, keeps, noisy]
    padding = instance - reads
    leading = UNGUIDED if not of_uncond else (*UNGUIDED[:2], *of_uncond, UNGUIDED[4])
    coefs = (*leading, *columns, *(0.0,) * padding)
    return Plan(plain, guided, coefs, reads, keeps, noisy, padding)


def learned_plan(columns: Coefs, kernels: Kernels = REVERSE_STEP) -> Plan:
    """How to take a step of learned variance: ten columns, the last two s_0 and s_v."""
    plain, guided = kernels[False, 0, False, LEARNED], kernels[True, 0, False, LEARNED]
    return Plan(plain, guided, (*UNGUIDED, *columns), 0, False, True, 0)
