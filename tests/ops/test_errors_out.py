"""What ops refuse of out=, strings and the rest, by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffcore import ops
from diffcore._engine import native
from support.cases import BY_NAME, OpCase, step_table
from support.refusals import any_of, no_kernel_runs, pair, read_by, refused  # noqa: F401

# ---- out= ---------------------------------------------------------------------------------------


def test_out_that_cannot_be_written(device: str) -> None:
    x, y = pair(device)

    def call(out: Any) -> Any:
        return ops.add_noise(x, y, 0.8, 0.6, out=out)

    refused(TypeError, "^out must be a torch.Tensor, got str", call, "out")
    refused(ValueError, "^out must have the shape of x0", call, torch.empty(4, 4, device=device))
    refused(ValueError, "^out must have the shape of x0", call, torch.empty(12, device=device))
    refused(
        TypeError, "^out must have the dtype of x0", call, torch.empty_like(x, dtype=torch.float64)
    )
    refused(ValueError, "^out must have the device of x0", call, torch.empty_like(x, device="meta"))
    refused(ValueError, "^out must not require grad", call, torch.empty_like(x, requires_grad=True))
    refused(ValueError, "out", call, torch.empty(1, 3, device=device).expand(4, 3))


@pytest.mark.parametrize("case", [c for c in BY_NAME.values() if c.out], ids=lambda c: c.name)
def test_out_where_a_gradient_is_needed(case: OpCase, device: str) -> None:
    for name in case.tensors:
        args = case.make((4, 3), torch.float32, device)
        args.tensors[name].requires_grad_()
        args.options["out"] = torch.empty(4, 3, device=device)
        refused(ValueError, "out", case.native, args)


def test_out_where_a_coefficient_needs_a_gradient(device: str) -> None:
    x, y = pair(device)
    alpha = torch.rand(4, device=device, requires_grad=True)
    refused(ValueError, "out", ops.add_noise, x, y, alpha, 0.6, out=torch.empty_like(x))


# ---- strings and the rest -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["eps", "", "EPSILON", None, 3], ids=repr)
def test_unknown_prediction_types(bad: Any) -> None:
    x, y = pair()
    kinds = (ValueError, TypeError)
    for f in (
        lambda: ops.predict_x0(x, y, 0.8, 0.6, prediction_type=bad),
        lambda: ops.predict_epsilon(x, y, 0.8, 0.6, prediction_type=bad),
        lambda: ops.ddpm_step(x, y, 0.8, 0.6, 0.9, 0.4, prediction_type=bad),
        lambda: ops.ddim_step(x, y, 0.8, 0.6, 0.9, 0.4, prediction_type=bad),
        lambda: ops.denoising_loss(x, y, y, prediction_type=bad),
    ):
        with pytest.raises(kinds, match="prediction_type"):
            f()


@pytest.mark.parametrize("name", ["normal_kl", "standard_normal_kl", "gaussian_nll"])
@pytest.mark.parametrize("bad", ["avg", "", None, 0], ids=repr)
def test_unknown_reductions(name: str, bad: Any) -> None:
    args = BY_NAME[name].make((4, 3), torch.float32)
    kind = ValueError if isinstance(bad, str) else TypeError
    refused(kind, "^reduction must be", BY_NAME[name].op, **args.tensors, reduction=bad)


def test_unknown_variance_types_and_clip_ranges() -> None:
    x, y = pair()
    with pytest.raises((ValueError, TypeError), match="variance_type"):
        ops.ddpm_step(x, y, 0.8, 0.6, 0.9, 0.4, variance_type="learned")
    for bad in ("1", (1.0,), (1.0, -1.0), (0.0, math.nan), -1.0):
        for step in (ops.ddpm_step, ops.ddim_step):
            with pytest.raises((ValueError, TypeError), match="clip_range"):
                step(x, y, 0.8, 0.6, 0.9, 0.4, clip_range=bad)


@pytest.mark.parametrize("eta", [-0.1, 1.1, "0", None, math.nan], ids=repr)
def test_eta_out_of_range(eta: Any) -> None:
    x, y = pair()
    with pytest.raises((ValueError, TypeError), match="eta"):
        ops.ddim_step(x, y, 0.8, 0.6, 0.9, 0.4, eta=eta)


def test_guidance_needs_both_arguments(device: str) -> None:
    x, m = pair(device)
    rows = step_table().to(device)
    with pytest.raises(ValueError, match=r"^guidance_scale must be given"):
        ops.reverse_step(x, m, rows, t=0, model_output_uncond=m)
    with pytest.raises(ValueError, match=r"^model_output_uncond must be given"):
        ops.reverse_step(x, m, rows, t=0, guidance_scale=2.0)


def test_v_prediction_loss_needs_the_levels() -> None:
    x, y = pair()
    with pytest.raises(ValueError, match=r"^sigma must be given"):
        ops.denoising_loss(x, y, y, prediction_type="v_prediction", alpha=0.8)


def test_noise_and_generator_exclude_each_other() -> None:
    x, y = pair()
    for op in (ops.reparameterize, ops.reparameterize_kl):
        refused(ValueError, "^generator must be None", op, x, y, y, generator=torch.Generator())
        refused(TypeError, "^mean must be a", op, [1.0], y)


def test_impossible_levels() -> None:
    x, y = pair()
    refused(ValueError, "alpha", ops.predict_x0, x, y, 0.0, 1.0)
    refused(ValueError, "sigma", ops.predict_epsilon, x, y, 1.0, 0.0, prediction_type="sample")
    refused(ValueError, "sigma", ops.ddpm_step, x, y, 1.0, 0.0, 1.0, 0.0)


def test_meta_tensors_have_no_kernels_and_no_values() -> None:
    x, y = pair("meta")
    assert not native.has_kernels(x.device)
    assert ops.add_noise(x, y, 0.8, 0.6).device.type == "meta"
