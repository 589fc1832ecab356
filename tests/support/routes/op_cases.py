"""Every op case of the tests, and for each that takes noise the same call with a noise key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.cases import ALPHAS_CUMPROD, CASES, OpCase, step_table
from support.routes.case import Case

KEY = PhiloxNoise(2**40 + 5, sample_ids=100, stream=7)

KINDS = {
    "linear": "add_noise q_sample velocity linear_combination predict_x0 predict_epsilon"
    " classifier_guidance",
    "step": "reverse_step _with_history step_log_prob _log_prob_with_history step_kl ddpm_step"
    " ddim_step",
    "gaussian": "normal_kl standard_normal_kl gaussian_nll reparameterize reparameterize_kl"
    " discretized_gaussian_log_likelihood",
    "mask": "blend_known",
    "loss": "denoising_loss masked_denoising_loss",
    "bound": "vlb_term prior_kl",
}
PUBLIC = {"_with_history": "reverse_step", "_log_prob_with_history": "step_log_prob"}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


def _of(case: OpCase, noise: str) -> Case:
    constants = {k: v for k, v in case.options(3).items() if not isinstance(v, Tensor)}

    def others(batch: int) -> dict[str, Tensor]:
        return {k: v for k, v in case.options(batch).items() if isinstance(v, Tensor)}

    def call(subject: Any, given: dict[str, Tensor]) -> Any:
        if noise == "tensor":
            return case.op(**given, **constants)
        return case.op(**given, **constants, noise=subject)

    op = case.op.__name__
    public = f"ops.{PUBLIC.get(op, op.removeprefix('masked_'))}"
    name = case.name if noise == "tensor" else f"{case.name}, {noise}"
    left = () if noise == "tensor" else ("noise",)
    found = Case(
        name,
        public,
        KIND_OF[op],
        call,
        tuple(n for n in case.tensors if n not in left),
        tuple(n for n in case.differentiable if n not in left),
        others,
    )
    if noise == "key":
        return replace(found, subject=lambda: KEY, reading=_of(case, "tensor"))
    return found


def _takes_none(case: OpCase) -> bool:
    return case.op in (ops.reparameterize, ops.reparameterize_kl)


OP_CASES: list[Case] = [
    *(_of(case, "tensor") for case in CASES),
    *(_of(case, "key") for case in CASES if "noise" in case.tensors),
    *(_of(case, "default noise") for case in CASES if _takes_none(case)),
    Case(
        "randn, key",
        "ops.randn",
        "noise",
        lambda key, given: ops.randn(
            given["like"].shape, key, dtype=given["like"].dtype, device=given["like"].device
        ),
        ("like",),
        subject=lambda: KEY,
    ),
    Case(
        "tensor, key",
        "PhiloxNoise.tensor",
        "noise",
        lambda key, given: key.for_samples(given["ids"]).tensor(
            given["like"].shape, dtype=given["like"].dtype, device=given["like"].device
        ),
        ("like",),
        others=lambda batch: {"ids": torch.arange(batch) * 3 + 5},
        subject=lambda: KEY,
    ),
    Case(
        "dynamic_threshold",
        "ops.dynamic_threshold",
        "threshold",
        lambda _, given: ops.dynamic_threshold(**given, ratio=0.8, sample_max_value=5.0),
        ("x", "model_output"),
        others=lambda batch: {
            "coefficients": step_table(),
            "t": (torch.arange(batch) * 17 + 3) % len(ALPHAS_CUMPROD),
        },
    ),
]
