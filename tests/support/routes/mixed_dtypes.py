"""Tensors of several dtypes, and models that round as under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from support.routes import method_cases
from support.routes.case import Call, Case
from support.routes.route import (
    WIDE,
    Tensors,
    gradients,
    same_bits,
    values,
)

STORED = ("x0", "x", "x_t", "mean")
"""The first of these is what the noise of a key is added to: it is generated in its dtype."""


def mixed(context: Callable[[], Any]) -> Callable[[Case], None]:
    """One tensor is narrower than the others: the result is that of the widest dtype.

    Its own gradient has its dtype.
    """

    def check(case: Case) -> None:
        call = case.make(WIDE, torch.float32)
        measure = gradients if case.differentiable else values
        f = call.of_tensors(case.subject())
        for name in call.tensors:
            narrow = {n: x.bfloat16() if n == name else x for n, x in call.tensors.items()}
            if all(x.dtype == torch.bfloat16 for x in narrow.values()):
                continue
            wide, same = {n: x.float() for n, x in narrow.items()}, case
            if case.reading is not None:
                same = case.reading
                x = next(narrow[n] for n in STORED if n in narrow)
                wide["noise"] = case.subject().tensor(x.shape, dtype=x.dtype).float()
            with context():
                found = measure(f, Call(case, narrow, call.others))
            wanted = list(_in_full(same, wide, case, call))
            if name in case.differentiable:
                place = len(wanted) - sum(call.needs) + _place(call, name)
                wanted[place] = wanted[place].bfloat16()
            same_bits(found, tuple(wanted), f"{case.name}, {name} in bfloat16")

    return check


def _in_full(reading: Case, tensors: dict[str, Tensor], case: Case, call: Call) -> Tensors:
    """Outputs and gradients of the call that reads its noise, of one dtype."""
    ordered = {n: tensors[n] for n in reading.tensors}
    only = replace(reading, differentiable=case.differentiable)
    same = Call(only, ordered, call.others)
    return (gradients if case.differentiable else values)(same.of_tensors(None), same)


def several_tensors(case: Case) -> bool:
    """Whether an op takes several tensors, or a tensor and a noise key.

    Left out: the distribution, which takes one, and a sum over K samples of a gradient, which torch
    itself rounds to bfloat16 before it adds.
    """
    several = len(case.tensors) > 1 and case.public.startswith(("ops.", "vae."))
    left = ("Diagonal", "importance_weighted")
    return several and not any(x in case.public for x in left) and not torchs_generator(case)


def check_rounding_model(case: Case) -> None:
    """A model whose outputs are bfloat16, as under autocast: as if float32 of the same values."""
    call = case.make(WIDE, torch.float32)
    measure = gradients if case.differentiable else values
    with method_cases.model_rounds(lambda y: y.bfloat16().to(y.dtype)):
        wanted = measure(call.of_tensors(case.subject()), call)
    with torch.autocast("cpu", torch.bfloat16), method_cases.model_rounds(Tensor.bfloat16):
        found = measure(call.of_tensors(case.subject()), call)
    same_bits(found, wanted, case.name)


def _place(call: Call, name: str) -> int:
    return [n for n, needed in zip(call.tensors, call.needs, strict=True) if needed].index(name)


def torchs_generator(case: Case) -> bool:
    return "default noise" in case.name
