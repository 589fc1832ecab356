"""Every op in one function of tensors, for compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from support.cases import BY_NAME, CASES

Given = dict[str, dict[str, Tensor]]


def calls_of(shape: tuple[int, ...]) -> tuple[Given, dict[str, Callable[..., Any]]]:
    """Every op: the tensors by call and name, the first with a gradient, and the call of these."""
    cases = list(CASES)
    for name in ("normal_kl", "standard_normal_kl", "gaussian_nll"):
        for reduction in ("sum", "mean", "batchmean"):  # a factor that depends on the sizes
            options = {"reduction": reduction}
            cases.append(
                replace(BY_NAME[name], name=f"{name}_{reduction}", options=lambda _, o=options: o)
            )
    tensors: Given = {}
    calls = {}
    for case in cases:
        args = case.make(shape, torch.float32)
        for name in case.differentiable[:1]:  # of more, a loss makes no gradient of its own
            args.tensors[name].requires_grad_()
        options = {k: v for k, v in args.options.items() if isinstance(v, Tensor)}
        tensors[case.name] = {**args.tensors, **options}
        fixed = {k: v for k, v in args.options.items() if not isinstance(v, Tensor)}
        calls[case.name] = partial(case.op, **fixed)
    return tensors, calls


def outputs_and_gradients(f: Callable[[Given], Any], tensors: Given) -> dict[str, Any]:
    outputs = f(tensors)
    sum(y.sum() for ys in outputs.values() for y in ys if y.requires_grad).backward()
    return {
        name: (*ys, *(x.grad for x in tensors[name].values() if x.grad is not None))
        for name, ys in outputs.items()
    }
