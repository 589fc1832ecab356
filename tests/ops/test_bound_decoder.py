"""The bound where it ends: the decoder's term of the samples at t = 0, beside KLs of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore.coefficients.bound import VARIANCE_TYPES, log_variances, vlb_coefficients
from support.worlds import ALPHA, SIGMA

SHAPE = (6, 3, 4, 5)
TIMES = torch.tensor([0, 1, 0, 500, 999, 0])
LOG_SMALL, LOG_LARGE = log_variances(ALPHA, SIGMA)


def pixels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, SHAPE, generator=generator).double() / 127.5 - 1


def inputs(variance: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x0 = pixels(generator)
    noise, m, v = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    alpha, sigma = (c[TIMES].reshape(-1, 1, 1, 1) for c in (ALPHA, SIGMA))
    found = {"x0": x0, "model_output": noise + 0.3 * m, "x_t": alpha * x0 + sigma * noise}
    if variance.startswith("learned"):
        found["variance_output"] = 0.4 * v - 6 * (variance == "learned")
    return {name: x.to(dtype) for name, x in found.items()}


def table(variance: str, **options: Any) -> Tensor:
    return vlb_coefficients(ALPHA, SIGMA, variance_type=variance, **options)


def log_scales(variance: str, v: Tensor | None) -> Any:
    if v is None:
        return LOG_SMALL[0] / 2
    if variance == "learned":
        return v / 2
    return ((v + 1) * LOG_LARGE[0] + (1 - v) * LOG_SMALL[0]) / 4


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_it_is_the_discretized_likelihood_of_the_prediction(variance, clip, device) -> None:
    x = inputs(variance)
    rows = table(variance, clip_range=clip)
    found = ops.vlb_term(
        **{name: v.to(device) for name, v in x.items()},
        coefficients=rows.to(device),
        t=TIMES.to(device),
    ).cpu()
    kl = ops.vlb_term(
        **x, coefficients=table(variance, clip_range=clip, decoder="gaussian"), t=TIMES
    )
    first = TIMES == 0
    assert torch.equal(found[~first], kl[~first])
    predicted = (x["x_t"] - SIGMA[0] * x["model_output"]) / ALPHA[0]
    if clip:
        predicted = predicted.clamp(-clip, clip)
    scales = log_scales(variance, x.get("variance_output")) + torch.zeros_like(predicted)
    likelihood = ops.discretized_gaussian_log_likelihood(
        x["x0"], means=predicted, log_scales=scales, reduction="sample"
    )
    assert torch.allclose(found[first], -likelihood[first], rtol=1e-11)


@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_gradients(variance: str, decoder: str, device: str) -> None:
    x = {name: v.to(device) for name, v in inputs(variance).items()}
    rows = table(variance, decoder=decoder).to(device)
    names = [name for name in x if "output" in name]

    def of(*outputs: Tensor) -> Tensor:
        now = {**x, **dict(zip(names, outputs, strict=True))}
        return ops.vlb_term(**now, coefficients=rows, t=TIMES.to(device), scale=0.01)

    leaves = [x[name].clone().requires_grad_() for name in names]
    torch.autograd.gradcheck(of, leaves, eps=1e-7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_gradients_are_those_of_the_reference(variance: str) -> None:
    x = inputs(variance)
    weights = torch.linspace(0.5, 2, len(TIMES), dtype=torch.float64)
    found = {}
    for through in ("kernels", "reference"):
        # A gradient of x_0 is asked of the reference, and brings the others along.
        now = {
            n: v.clone().requires_grad_("output" in n or through == "reference")
            for n, v in x.items()
        }
        loss = ops.vlb_term(**now, coefficients=table(variance, clip_range=1.0), t=TIMES)
        (loss * weights).sum().backward()
        found[through] = {n: v.grad for n, v in now.items()}
    for name in x:
        if "output" in name:
            kernel, plain = found["kernels"][name], found["reference"][name]
            assert torch.allclose(kernel, plain, rtol=1e-9, atol=1e-12 * float(plain.abs().max()))


def test_what_the_clip_stops_passes_no_gradient(device: str) -> None:
    x = {name: v.to(device) for name, v in inputs("learned_range").items()}
    x["model_output"].fill_(1e4).requires_grad_()  # predicts far below -1
    x["variance_output"].requires_grad_()
    rows = table("learned_range", clip_range=1.0).to(device)
    ops.vlb_term(**x, coefficients=rows, t=TIMES.to(device)).sum().backward()
    assert not x["model_output"].grad.any()
    assert x["variance_output"].grad.all()


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_a_dead_branch_poisons_nothing(variance: str, device: str) -> None:
    """At t > 0 the decoder could overflow, at t = 0 the KL: neither is computed there."""
    x = {name: v.to(device) for name, v in inputs(variance, torch.float32).items()}
    x["model_output"].requires_grad_()
    if variance == "learned":
        v = x["variance_output"]
        v[3:5] = 60.0  # a scale of e^30 pixels, where no pixel is
        v[0] = -80.0  # and one so small that e^{-v} squared is beyond float32
        x["model_output"].data[0] = (x["x_t"][0] - float(ALPHA[0]) * x["x0"][0]) / float(SIGMA[0])
        v.requires_grad_()
    rows = table(variance).to(device)
    found = ops.vlb_term(**x, coefficients=rows, t=TIMES.to(device))
    found.sum().backward()
    for tensor in (found, x["model_output"].grad, x.get("variance_output", found)):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_inputs_and_nothing_else(dtype: torch.dtype, device: str) -> None:
    x = {name: v.to(device) for name, v in inputs("learned_range", dtype).items()}
    rows = table("learned_range", clip_range=1.0).to(device)
    found = ops.vlb_term(**x, coefficients=rows, t=TIMES.to(device))
    wide = {name: v.double() for name, v in x.items()}
    exact = ops.vlb_term(**wide, coefficients=rows, t=TIMES.to(device))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=2e-6)


@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
def test_infinite_log_variances(decoder: str, device: str) -> None:
    x0 = torch.full((4, 1), 51 / 127.5 - 1, device=device)
    m = x0 + torch.tensor([[0.0], [0.3], [0.0], [0.3]], device=device)
    v = torch.tensor([[torch.inf], [torch.inf], [-torch.inf], [-torch.inf]], device=device)
    rows = table("learned", decoder=decoder, prediction_type="sample").to(device)
    kl, first = (ops.vlb_term(x0, m, rows, t=t, x_t=x0, variance_output=v).tolist() for t in (5, 0))
    assert kl[:2] == first[:2] == [torch.inf, torch.inf]
    assert kl[2:] == [torch.inf, torch.inf]  # the KL to a point, whatever its place
    if decoder == "discretized":
        assert first[2:] == [0, torch.inf]
    else:
        assert first[2] == -torch.inf  # the density of a point at the point
        assert first[3] != first[3]  # inf - inf


def test_bad_arguments_are_named() -> None:
    x = inputs("learned")
    rows = table("learned")
    with pytest.raises(
        ValueError, match=r"coefficients must have shape \[T, 12\], got \(1000, 15\)"
    ):
        ops.vlb_term(x["x0"], x["model_output"], rows, t=TIMES, x_t=x["x_t"])
    with pytest.raises(ValueError, match="x_t must be None where noise is given"):
        ops.vlb_term(x["x0"], x["model_output"], rows, t=TIMES, x_t=x["x_t"], noise=x["x_t"])
    with pytest.raises(TypeError, match=r"x_t must be a torch.Tensor where noise is None"):
        ops.vlb_term(x["x0"], x["model_output"], rows, t=TIMES)
    with pytest.raises(ValueError, match="variance_output must have the shape of x0"):
        ops.vlb_term(**{**x, "variance_output": x["x0"][:, :1]}, coefficients=rows, t=TIMES)
    with pytest.raises(ValueError, match=r"sigma must be positive, got 0\.0"):
        ops.prior_kl(x["x0"], 1.0, 0.0)
    with pytest.raises(TypeError, match="alpha must be a number, got Tensor"):
        ops.prior_kl(x["x0"], torch.ones(()), 1.0)
    for name, value in (("variance_type", "large"), ("decoder", "pixels"), ("given", "x")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            vlb_coefficients(ALPHA, SIGMA, **{name: value})
