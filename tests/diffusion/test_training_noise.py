"""A training step with a noise key: results, launches and allocated memory."""

from __future__ import annotations

import pytest
import torch

from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.losses import edm_weights, min_snr_weights
from diffcore.testing import assert_within_bound
from support import formulas
from support.bounds import each_low_dtype
from support.toys import BETAS

each_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
WEIGHTS = {
    "none": lambda snr, prediction_type: None,
    "table": lambda snr, prediction_type: torch.linspace(0.5, 2, len(snr), dtype=torch.float64),
    "min-SNR": lambda snr, prediction_type: min_snr_weights(snr, prediction_type=prediction_type),
    "EDM": lambda snr, prediction_type: edm_weights(snr, prediction_type=prediction_type),
}
each_weight = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())


# ---- numbers ------------------------------------------------------------------------------------


def eager_step(diffusion, x0, noise, model_output, t, weights, upstream):
    """The eager equivalent: x_t, loss and gradient in the dtype of the samples, noise stored."""
    alpha, sigma = diffusion.schedule.alpha, diffusion.schedule.sigma
    m = model_output.detach().requires_grad_()
    loss = formulas.denoising_loss(
        torch, m, x0, noise, diffusion.prediction_type, alpha, sigma, weights, t
    )
    x_t = formulas.add_noise(torch, x0, noise, alpha, sigma, t)
    return x_t, loss.detach(), torch.autograd.grad(loss, m, upstream.to(loss.dtype))[0]


@each_low_dtype
@each_weight
@each_prediction
def test_a_training_step_is_eagers_with_the_same_noise(prediction_type, weights, dtype):
    diffusion = GaussianDiffusion(BETAS, prediction_type)
    table = weights(diffusion.schedule.snr, prediction_type)
    x0, output = torch.randn(2, 16, 3, 7).to(dtype)
    key = PhiloxNoise(2, stream=9)
    noise = key.tensor(x0.shape, dtype=dtype)
    seen = {}

    def model(x, t):
        seen["x_t"] = x
        return seen.setdefault("m", output.detach().requires_grad_())

    for time in (0, 3, 19):  # one at a time: errors scale with their weights
        t = torch.full((16,), time)
        for upstream in (torch.full((16,), 1 / 16), torch.randn(16)):
            loss = diffusion.training_losses(model, x0, t, noise=key, weights=table)["loss"]
            (slope,) = torch.autograd.grad(loss, seen["m"], upstream)
            with torch.no_grad():
                untrained = diffusion.training_losses(model, x0, t, noise=key, weights=table)[
                    "loss"
                ]
            assert torch.equal(untrained, loss)
            actual = (seen["x_t"], loss.detach(), slope)
            eager = eager_step(diffusion, x0, noise, output, t, table, upstream)
            wide = (v.double() for v in (x0, noise, output))
            truth = eager_step(diffusion, *wide, t, table, upstream)
            for name, a, e, true in zip(
                ("x_t", "loss", "gradient"), actual, eager, truth, strict=True
            ):
                assert_within_bound(a, e, true, name=f"{name} at t = {time}")


# ---- launches -----------------------------------------------------------------------------------


def training_step(diffusion, x, t, m, noise, weights):
    """q_sample, loss and gradient, with a model that costs nothing."""
    loss = diffusion.training_losses(lambda x, t: m, x, t, noise=noise, weights=weights)[
        "loss"
    ].mean()
    return loss, torch.autograd.grad(loss, m)


def batch(diffusion, rows, columns, dtype, device):
    x, m = torch.randn(2, rows, columns, device=device).to(dtype)
    t = torch.randint(diffusion.num_timesteps, (rows,), device=device)
    return x, t, m.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_weight
@each_prediction
def test_a_training_step_is_two_launches(launched, prediction_type, weights, dtype, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("on CUDA noise in double is drawn by a launch of its own")
    diffusion = GaussianDiffusion(BETAS, prediction_type)
    table = weights(diffusion.schedule.snr, prediction_type)
    x, t, m = batch(diffusion, 4, 9, dtype, device)
    loss = {
        "epsilon": ["target_loss_gradient*"],
        "sample": ["target_loss_gradient"],
    }.get(prediction_type, ["mixed_target_loss_gradient*"])
    # Rescaling the gradient launches nothing if it was made for the incoming gradient.
    forward, rescaled = ["linear_combination*", *loss], ["rescale"]
    for noise in (None, PhiloxNoise(1), PhiloxNoise(torch.tensor(1, device=device))):
        training_step(diffusion, x, t, m, noise, table)
        assert launched == forward + rescaled
        launched.clear()
    with torch.no_grad():
        diffusion.training_losses(lambda x, t: m, x, t, weights=table)
    assert launched == [name.replace("_gradient", "") for name in forward]


def test_rescale_touches_nothing_after_a_mean_over_the_batch():
    diffusion = GaussianDiffusion(BETAS)
    x, t, m = batch(diffusion, 4, 9, torch.float32, "cpu")
    losses = []
    for reduction in (torch.mean, torch.sum):
        loss = diffusion.training_losses(lambda x, t: m, x, t)["loss"]
        made = loss.grad_fn.saved_tensors[-1]
        before = made.clone()
        (slope,) = torch.autograd.grad(reduction(loss), m)
        assert slope.data_ptr() == made.data_ptr()
        losses.append(torch.equal(slope, before))
    assert losses == [True, False]


def test_a_noised_sample_and_a_step_are_one_launch(launched):
    diffusion = GaussianDiffusion(BETAS)
    x, t, m = batch(diffusion, 4, 9, torch.float32, "cpu")
    diffusion.q_sample(x, t)
    assert launched == ["linear_combination*"]
    launched.clear()
    diffusion.p_sample_loop(lambda x, t: m.detach(), x.shape, num_steps=3)
    assert launched == ["randn*", "reverse_step_noise*", "reverse_step_noise*", "reverse_step"]


# ---- memory -------------------------------------------------------------------------------------


def bytes_allocated(call, device):
    """The bytes that a call allocates, including those that it frees."""
    call()  # tables are built once
    if device == "cuda":
        name = "requested_bytes.all.allocated"
        before = torch.cuda.memory_stats()[name]
        kept = call()
        del kept
        return torch.cuda.memory_stats()[name] - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    events = profile.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def eager_training_step(diffusion, x, t, m, weights):
    """The same step with noise and target as tensors; ``m`` is the model's output."""
    schedule = diffusion.schedule
    alpha, sigma = (v.to(x.device, x.dtype)[t, None] for v in (schedule.alpha, schedule.sigma))
    noise = torch.randn_like(x)
    x_t = alpha * x + sigma * noise
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: x,
        "v_prediction": lambda: alpha * noise - sigma * x,
        "flow_prediction": lambda: noise - x,
    }[diffusion.prediction_type]()
    loss = (m - target).square().mean(1) * weights[t].to(x.dtype)
    return x_t, torch.autograd.grad(loss.mean(), m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_prediction
def test_a_training_step_asks_for_x_t_and_the_gradient_alone(prediction_type, dtype, device):
    diffusion = GaussianDiffusion(BETAS, prediction_type)
    weights = WEIGHTS["table"](diffusion.schedule.snr, prediction_type).to(device)

    def beyond(rows, columns):
        """Bytes besides x_t and the gradient."""
        x, t, m = batch(diffusion, rows, columns, dtype, device)
        asked = bytes_allocated(
            lambda: training_step(diffusion, x, t, m, PhiloxNoise(1), weights), device
        )
        eager = bytes_allocated(lambda: eager_training_step(diffusion, x, t, m, weights), device)
        report = f"{asked / x.nbytes:.2f} tensors like x; eager {eager / x.nbytes:.2f}"
        assert asked < 3 * x.nbytes < eager, report
        return asked - 2 * x.nbytes

    # Scalars, and scalars per sample: as many for long samples as for short ones.
    some, twice = beyond(8, 4096), beyond(16, 4096)
    assert some == beyond(8, 16384)
    assert 0 < twice - some <= some
