"""Calls of GaussianDiffusion: order of arguments, unread timesteps, any default device."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffcore.diffusion import GaussianDiffusion
from support.toys import BETAS, half

D = GaussianDiffusion(BETAS)
X, NOISE = torch.randn(2, 2, 3, 4, 4).mul(0.3)
PIXELS = torch.arange(96).reshape(2, 3, 4, 4) / 127.5 - 1
T = torch.tensor([3, 9])


def scaled(x: Tensor, t: Tensor, scale: float = 0.5) -> Tensor:
    return scale * x


# ---- argument order ------------------------------------------------------------------------------

# The parameters of guided-diffusion's methods, in its order.
GUIDED = {
    "q_mean_variance": "x_start t",
    "q_sample": "x_start t noise",
    "q_posterior_mean_variance": "x_start x_t t",
    "p_mean_variance": "model x t clip_denoised denoised_fn model_kwargs",
    "p_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs",
    "p_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device "
    "progress",
    "ddim_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs eta",
    "ddim_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device "
    "progress eta",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs eta",
    "training_losses": "model x_start t model_kwargs noise",
    "calc_bpd_loop": "model x_start clip_denoised model_kwargs",
}


@pytest.mark.parametrize("name", GUIDED)
def test_parameters_keep_the_order_of_guided_diffusion(name: str) -> None:
    theirs = GUIDED[name].split()
    ours = inspect.signature(getattr(D, name)).parameters
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == theirs[: len(positional)]
    shared = [n for n in theirs if n in ours]
    assert [n for n in ours if n in theirs] == shared
    assert set(theirs) - set(shared) <= {"denoised_fn"}
    extra = [p for p in ours.values() if p.name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


SHAPE = (2, 3, 4, 4)
CONDITION = {"scale": 0.25}
CALLS: dict[str, Any] = {
    "image_train": lambda m, kw: D.training_losses(m, X, T, model_kwargs=kw),
    "image_sample": lambda m, kw: D.p_sample_loop(m, SHAPE, clip_denoised=True, model_kwargs=kw),
    "image_sample with use_ddim": lambda m, kw: D.ddim_sample_loop(
        m, SHAPE, clip_denoised=True, model_kwargs=kw
    ),
    "image_nll": lambda m, kw: D.calc_bpd_loop(m, PIXELS, clip_denoised=True, model_kwargs=kw),
    "positional loss": lambda m, kw: D.training_losses(m, X, T, kw),
    "positional loss with noise": lambda m, kw: D.training_losses(m, X, T, kw, NOISE),
    "positional bound": lambda m, kw: D.calc_bpd_loop(m, PIXELS, True, kw),
    "positional moments": lambda m, kw: D.p_mean_variance(m, X, T, True, model_kwargs=kw),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls_of_the_scripts_of_guided_diffusion(call: Any) -> None:
    torch.manual_seed(0)
    found = call(scaled, CONDITION)
    torch.manual_seed(0)
    wanted = call(lambda x, t: scaled(x, t, **CONDITION), None)
    for name in ["sample"] if isinstance(found, Tensor) else found:
        one, other = (r if isinstance(r, Tensor) else r[name] for r in (found, wanted))
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "call",
    [
        lambda: D.p_sample_loop(half, SHAPE, NOISE),
        lambda: D.ddim_sample_loop(half, SHAPE, NOISE, True),
        lambda: D.p_mean_variance(half, X, T, True, None),
        lambda: D.p_sample(half, X, T, True, None, None, {}),
        lambda: D.ddim_sample(half, X, T, True, None, None, {}, 0.0),
        lambda: D.training_losses(half, X, T, None, None, torch.ones(20)),
        lambda: D.calc_bpd_loop(half, PIXELS, True, None, NOISE),
    ],
)
def test_positions_that_would_mean_another_parameter_are_refused(call: Any) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        call()


def test_a_timestep_may_be_a_numpy_integer() -> None:
    assert torch.equal(D.q_sample(X, np.int64(3), NOISE), D.q_sample(X, 3, NOISE))  # type: ignore[arg-type]


def test_the_bound_uses_the_prior_of_a_subclass() -> None:
    class WithoutPrior(GaussianDiffusion):
        def prior_bpd(self, x_start: Tensor) -> Tensor:
            return torch.zeros(len(x_start))

    found = WithoutPrior(BETAS).calc_bpd_loop(half, PIXELS, noise=NOISE)
    assert torch.equal(found["total_bpd"], found["vb"].sum(dim=1))


def test_noise_in_the_place_of_model_kwargs_is_refused() -> None:
    with pytest.raises(TypeError, match="model_kwargs must be a mapping or None, got Tensor"):
        D.training_losses(half, X, T, NOISE)


# ---- timesteps are not read on the host ----------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t, noise: D.q_sample(x, t, noise),
        lambda x, t, noise: D.q_posterior_mean_variance(x, noise, t),
        lambda x, t, noise: D.training_losses(half, x, t, noise=noise)["loss"],
    ],
    ids=["q_sample", "q_posterior_mean_variance", "training_losses"],
)
def test_timesteps_are_left_to_the_kernel(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def watch(name: str) -> None:
        real = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            read.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, watched)

    call(X, T, NOISE)
    for name in ("min", "max", "aminmax", "item", "tolist", "__int__", "__bool__", "any", "all"):
        watch(name)
    call(X, T, NOISE)
    assert read == []


def test_a_tensor_without_values_is_noised() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, t = torch.empty(2, 3), torch.empty(2, dtype=torch.int64)
        x_t = D.q_sample(x, t, torch.empty(2, 3))
    assert x_t.shape == (2, 3)


@pytest.mark.parametrize("t", [torch.tensor([3, 20]), torch.tensor([-1, 3], dtype=torch.int32)])
def test_a_timestep_out_of_range_is_refused_by_the_kernel(t: Tensor) -> None:
    wrong = 20 if 20 in t else -1
    with pytest.raises(ValueError, match=rf"^t .*{wrong}.*") as error:
        D.q_sample(X, t, NOISE)
    assert "0 .. 19" in str(error.value)


# ---- default device ------------------------------------------------------------------------------

TABLES = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"]
)
def test_tables_are_on_the_cpu_under_another_default_device(
    variance_type: str, prediction_type: str
) -> None:
    with torch.device("meta"):
        d = GaussianDiffusion(BETAS, prediction_type, variance_type)
        spaced = d.respace(5)
        built = [d.tables.ddpm(1.0), d.tables.ddim(None, 0.5, True), d.tables.clipped_x0(1.0)]
        built += [d.tables.vlb(1.0, "discretized", "x_t"), d.tables.x0_error(1.0)]
        learned = d.tables.learned_variance(1.0)
    usual = GaussianDiffusion(BETAS, prediction_type, variance_type)
    for name in TABLES:
        table = getattr(d, name)
        assert table.device.type == "cpu", name
        assert table.dtype == torch.float64, name
        assert torch.equal(table, getattr(usual, name)), name
        assert getattr(spaced, name).device.type == "cpu", name
    tables = [*built, d.tables.noise, d.tables.posterior, d.tables.snr, d.tables.x0]
    tables += [] if learned is None else [learned]
    assert all(t.table.device.type == "cpu" and t.table.dtype == torch.float64 for t in tables)
    assert d.schedule.table.device.type == "cpu"


def test_methods_under_another_default_device() -> None:
    def results(d: GaussianDiffusion) -> list[Tensor]:
        moments = d.p_mean_variance(half, X, T)
        terms = d.vb_terms_bpd(half, PIXELS, X, T)
        bits = d.calc_bpd_loop(half, PIXELS, noise=NOISE)
        return [
            d.q_sample(X, T, NOISE),
            *d.q_mean_variance(X, T),
            *d.q_posterior_mean_variance(X, NOISE, T),
            d.training_losses(half, X, 3, noise=NOISE)["loss"],
            *moments.values(),
            d.p_sample(half, X, T, noise=NOISE)["sample"],
            d.ddim_sample(half, X, T, eta=1.0, noise=NOISE)["sample"],
            *terms.values(),
            *bits.values(),
        ]

    wanted = results(GaussianDiffusion(BETAS, variance_type="fixed_large"))
    with torch.device("meta"):
        found = results(GaussianDiffusion(BETAS, variance_type="fixed_large"))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
