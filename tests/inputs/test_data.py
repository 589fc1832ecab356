"""Data and schedules that are not what they should be: named, or warned of once."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import ops, schedules
from diffcore.diffusion import GaussianDiffusion
from diffcore.schedules import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from support.toys import BETAS, half

D = GaussianDiffusion(BETAS)
BYTES = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
FLOATS = BYTES / 127.5 - 1

# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.BETA_SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20, 1000])
def test_alphas_cumprod_and_reversed_betas_are_named(name: str, steps: int) -> None:
    betas = make_betas(name, steps)
    d = GaussianDiffusion(betas, "v_prediction")
    for wrong in (d.alphas_cumprod, d.sqrt_alphas_cumprod, d.alphas_cumprod.numpy()):
        with pytest.raises(ValueError, match=r"^betas must not fall .* betas_from_alphas_cumprod"):
            GaussianDiffusion(wrong, "v_prediction")
    if betas[-1] <= 0.5:
        with pytest.raises(ValueError, match=r"^betas must not fall .* pass betas\.flip\(0\)"):
            GaussianDiffusion(betas.flip(0))
    again = GaussianDiffusion(schedules.betas_from_alphas_cumprod(d.alphas_cumprod), "sample")
    torch.testing.assert_close(again.betas, betas, rtol=1e-9, atol=1e-12)


def test_betas_that_need_not_rise() -> None:
    for betas in ([0.1], [0.2, 0.1], [0.1] * 5, [0.1, 0.3, 0.2], [0.3, 0.2, 0.1]):
        assert GaussianDiffusion(betas).betas.tolist() == betas
    # Over gaps that get shorter the betas of a respaced diffusion fall.
    spaced = GaussianDiffusion(make_betas("linear", 1000)).respace([900, 950, 960, 962])
    assert bool((spaced.betas[1:] < spaced.betas[:-1]).all())
    assert spaced.num_timesteps == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("linear", r"got str; make_betas\('linear', 1000\)$"),
        (NoiseSchedule.rectified_flow(9), r"got NoiseSchedule; .* schedule.table"),
    ],
)
def test_what_is_no_betas_says_how_to_make_them(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^betas must be a tensor of real numbers, {message}"):
        GaussianDiffusion(given)


def test_no_signal_left_in_float32() -> None:
    # alpha = sqrt(1e-3 ** 26) = 1e-39, so 1 / alpha is no float32: nan where epsilon is predicted.
    for prediction in ("v_prediction", "sample", "flow_prediction"):
        d = GaussianDiffusion([0.999] * 26, prediction)
        sample = d.p_sample(lambda x, t: 0.1 * x, torch.ones(1, 2), 25)["sample"]
        assert sample.isfinite().all()
    with pytest.raises(ValueError, match=r"^betas must leave some signal .* got alpha = 1e-39 "):
        GaussianDiffusion([0.999] * 26)
    d = GaussianDiffusion([0.999] * 25)  # alpha = 3e-38
    assert d.p_sample(lambda x, t: 0 * x, torch.ones(1, 2), 24)["sample"].isfinite().all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        GaussianDiffusion(rescale_zero_terminal_snr(BETAS))


def test_schedules_by_another_name() -> None:
    with pytest.raises(ValueError, match=r"got 'cosine'; .* is 'squaredcos_cap_v2'"):
        make_betas("cosine", 10)
    with pytest.raises(ValueError, match=r"got 'cos'$"):
        make_betas("cos", 10)
    for f in (
        lambda s: schedules.clipped_length(s, -5.0),
        lambda s: schedules.timesteps_to_sigmas(s, torch.tensor([1.0])),
        lambda s: schedules.sigmas_to_timesteps(s, torch.tensor([1.0])),
        lambda s: diffcore.solvers.NoiseLevels.from_schedule(s, [1, 0]),
    ):
        with pytest.raises(TypeError, match=r"schedule must be a NoiseSchedule.*from_betas\(betas"):
            f(BETAS)


# ---- images --------------------------------------------------------------------------------------

EIGHT_BITS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "q_sample": ("x_start", lambda x: D.q_sample(x, 3)),
    "training_losses": ("x_start", lambda x: D.training_losses(half, x, 3)),
    "p_sample": ("x", lambda x: D.p_sample(half, x, 3)),
    "prior": ("x_start", lambda x: D.prior_bpd(x)),
    "sample": ("x", lambda x: diffcore.sample(half, x, diffcore.solvers.euler_table([1.0, 0.0]))),
    "add_noise": ("x0", lambda x: ops.add_noise(x, FLOATS, 0.5, 0.5)),
    "vae": ("x", lambda x: diffcore.vae_loss(x, FLOATS, torch.zeros(2))),
    "recon": ("x_recon", lambda x: diffcore.vae.reconstruction_loss(FLOATS, x)),
}


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_8_bit_images_say_how_to_scale_them(name: str) -> None:
    argument, call = EIGHT_BITS[name]
    fix = rf"^{argument} must .*got torch.uint8.*; for 8-bit images pass {argument} / 127.5 - 1"
    with pytest.raises(TypeError, match=fix):
        call(BYTES)
    if name in ("q_sample", "p_sample", "training_losses"):
        with pytest.raises(TypeError, match=rf"got ndarray; pass torch.from_numpy\({argument}\)"):
            call(FLOATS.numpy())


def warned(d: GaussianDiffusion, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        d.training_losses(half, x, 3)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_images_in_another_range_are_warned_of_once() -> None:
    for x, fix in (
        (BYTES / 255, "x_start * 2 - 1"),
        (BYTES.float(), "x_start / 127.5 - 1"),
        ((BYTES / 255).half()[:, :, None], "x_start * 2 - 1"),
    ):
        d = GaussianDiffusion(BETAS)
        (message,) = warned(d, x)
        assert message.startswith("x_start has values from ")
        assert message.endswith(f"for images pass {fix}")
        assert warned(d, x) == []
        (again,) = warned(GaussianDiffusion(BETAS), x)
        assert again == message


@pytest.mark.parametrize(
    "x",
    [
        FLOATS,
        torch.zeros(2, 3, 4, 4),
        torch.rand(8, 2),  # points, no images
        torch.rand(2, 16, 7),
        torch.rand(0, 3, 4, 4),
        torch.full((1, 1, 2, 2), math.nan),
        torch.randn(2, 3, 4, 4),
    ],
)
def test_other_data_are_not_warned_of(x: Tensor) -> None:
    assert warned(GaussianDiffusion(BETAS), x) == []


def test_only_the_first_call_is_checked() -> None:
    d = GaussianDiffusion(BETAS)
    assert warned(d, FLOATS) == []
    assert warned(d, BYTES / 255) == []
    assert warned(d.respace(5), BYTES / 255) != []
    for again in (pickle.loads(pickle.dumps(d)), copy.deepcopy(d)):
        assert warned(again, FLOATS) == []


def test_other_devices_are_not_waited_for() -> None:
    # A meta tensor has no values: reading them would raise.
    d, x = GaussianDiffusion(BETAS), torch.rand(2, 3, 4, 4, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert d.training_losses(half, x, t)["loss"].device.type == "meta"


def test_a_table_beside_samples_says_how_to_read_it() -> None:
    schedule = NoiseSchedule.from_betas(BETAS)
    with pytest.raises(ValueError, match=r"alpha must have 1 or 2 entries.*20; .* alpha\[t\]"):
        ops.add_noise(FLOATS, FLOATS, schedule.alpha, schedule.sigma)
    with pytest.raises(ValueError, match=r"one number per sample.*pass \[B, F\] with group_dim"):
        ops.add_noise(FLOATS, FLOATS, torch.rand(2, 1, 4, 1, 1), 0.5)


def test_a_traced_call_leaves_the_warning_to_the_first_plain_one() -> None:
    d, x = GaussianDiffusion(BETAS), BYTES / 255
    torch.func.vmap(lambda x: d.training_losses(half, x, 3)["loss"], randomness="same")(x[None])
    assert warned(d, x) != []


@pytest.mark.parametrize("name", ["x_start", "data"])
def test_the_bound_says_how_to_scale_images(name: str) -> None:
    def call(x: Tensor) -> Any:
        return D.calc_bpd_loop(half, x) if name == "x_start" else diffcore.bits_per_dim(D, half, x)

    call(FLOATS)
    for x, fix in (
        (BYTES / 255, rf"; pass {name} \* 2 - 1 for images in \[0, 1\]; use decoder='gaussian'"),
        (BYTES.float(), rf"; pass {name} / 127.5 - 1 for images in \[0, 255\]; use decoder="),
        (torch.randn(2, 3, 4, 4), r"such as -?\d\.\d+; use decoder='gaussian' for latents"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be pixels .*{fix}"):
            call(x)
