"""cond_fn of GaussianDiffusion: Dhariwal and Nichol's algorithms, step by step and in the loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore.guidance import RescaledCFG

T = 30
BETAS = diffcore.make_betas("linear", T, scale_to_1000=True, beta_end=0.01)
KEY = PhiloxNoise(7)
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
X = torch.randn(T, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALL = torch.arange(T)


def diffusion(variance: str = "fixed_small", prediction: str = "epsilon") -> GaussianDiffusion:
    return GaussianDiffusion(BETAS, prediction, variance, clip_sample_range=0.8)


def network(variance: str = "fixed_small") -> Callable[..., Tensor]:
    def model(x: Tensor, t: Tensor, y: float = 0.4) -> Tensor:
        time = t.to(x).reshape(-1, 1, 1, 1) / T
        m = torch.tanh(x + time) + 0.3 * y
        v = torch.sin(3 * x) - 3 * (variance == "learned")
        return torch.cat([m, v], 1) if "learned" in variance else m

    return model


def slope(x: Tensor, t: Tensor, y: float = 0.4) -> Tensor:
    return (y - x) * (1 + t.to(x).reshape(-1, 1, 1, 1) / T)


def column(table: Tensor, t: Tensor) -> Tensor:
    return table[t].reshape(-1, 1, 1, 1)


def wanted_p_sample(d: GaussianDiffusion, x: Tensor, t: Tensor, z: Tensor, y: float) -> Tensor:
    """Algorithm 1: N(mean + variance gradient, variance), the mean from the clipped x_0."""
    out = d.p_mean_variance(network(d.variance_type), x, t, model_kwargs={"y": y})
    train = t if d.tables.timestep_map is None else torch.tensor(d.tables.timestep_map)[t]
    mean = out["mean"] + out["variance"] * slope(x, train, y)
    return mean + (t > 0).reshape(-1, 1, 1, 1) * (0.5 * out["log_variance"]).exp() * z


def wanted_ddim(
    d: GaussianDiffusion, x: Tensor, t: Tensor, z: Tensor, y: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2: epsilon of the clipped x_0, less sigma times the gradient; then the step."""
    x0 = d.p_mean_variance(network(d.variance_type), x, t, model_kwargs={"y": y})["pred_xstart"]
    train = t if d.tables.timestep_map is None else torch.tensor(d.tables.timestep_map)[t]
    bar, previous = column(d.alphas_cumprod, t), column(d.alphas_cumprod_prev, t)
    epsilon = (x - bar.sqrt() * x0) / (1 - bar).sqrt() - (1 - bar).sqrt() * slope(x, train, y)
    x0 = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
    s = eta * ((1 - previous) / (1 - bar) * (1 - bar / previous)).sqrt()
    return previous.sqrt() * x0 + (1 - previous - s**2).clamp_min(0).sqrt() * epsilon + s * z, x0


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p_sample(variance: str, prediction: str) -> None:
    d, model = diffusion(variance, prediction), network(variance)
    z = KEY.tensor(X.shape, dtype=torch.float64)
    found = d.p_sample(model, X, ALL, cond_fn=slope, model_kwargs={"y": 0.9}, noise=z)
    close(found["sample"], wanted_p_sample(d, X, ALL, z, 0.9))
    assert torch.equal(
        found["pred_xstart"], d.p_sample(model, X, ALL, model_kwargs={"y": 0.9})["pred_xstart"]
    )
    again = d.p_sample(model, X, ALL, cond_fn=slope, model_kwargs={"y": 0.9}, noise=KEY)
    assert torch.equal(again["sample"], found["sample"])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_sample(eta: float, prediction: str) -> None:
    for variance in ("fixed_small", "learned"):
        d, model = diffusion(variance, prediction), network(variance)
        z = KEY.tensor(X.shape, dtype=torch.float64)
        given: dict[str, Any] = {"cond_fn": slope, "model_kwargs": {"y": 0.9}, "eta": eta}
        found = d.ddim_sample(model, X, ALL, noise=z, **given)
        sample, x0 = wanted_ddim(d, X, ALL, z, 0.9, eta)
        close(found["sample"], sample)
        close(found["pred_xstart"], x0)
        assert float(found["pred_xstart"].abs().max()) > 0.8  # it is not clipped again


def test_ddim_with_the_epsilon_of_the_model() -> None:
    d, model = diffusion(), network()
    plain = d.ddim_sample(model, X, ALL, rederive_epsilon=False)["sample"]
    found = d.ddim_sample(model, X, ALL, rederive_epsilon=False, cond_fn=slope)["sample"]
    both = [d.ddim_sample(model, X, ALL, cond_fn=c)["sample"] for c in (None, slope)]
    close(found - plain, both[1] - both[0])


def test_without_signal_nothing_is_added() -> None:
    betas = torch.cat([BETAS, torch.ones(1)])
    d = GaussianDiffusion(betas, prediction_type="v_prediction")
    t = torch.tensor([T, 3])
    found = d.ddim_sample(network(), X[:2], t, cond_fn=slope)
    plain = d.ddim_sample(network(), X[:2], t)
    for name in ("sample", "pred_xstart"):
        assert torch.equal(found[name][0], plain[name][0])
        assert not torch.equal(found[name][1], plain[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance", VARIANCES)
def test_other_dtypes(variance: str, dtype: torch.dtype) -> None:
    d, model = diffusion(variance), network(variance)
    x, z = X.to(dtype), KEY.tensor(X.shape, dtype=dtype)
    wide: Callable[..., Tensor] = lambda x, t: slope(x.double(), t)  # noqa: E731
    calls: dict[str, Callable[..., Tensor]] = {
        "p": lambda x, z, c: d.p_sample(model, x, ALL, cond_fn=c, noise=z)["sample"],
        "ddim": lambda x, z, c: d.ddim_sample(model, x, ALL, cond_fn=c)["sample"],
    }
    for call in calls.values():
        found = call(x, z, wide)
        assert found.dtype == dtype
        truth = call(x.double(), z.double(), slope)
        error = torch.finfo(dtype).eps * 8
        torch.testing.assert_close(found.double(), truth, rtol=error, atol=error)


def test_gradients() -> None:
    x = X[[3, 17]].clone().requires_grad_()
    t = torch.tensor([3, 17])
    for variance in VARIANCES:
        d, model = diffusion(variance), network(variance)

        def run(x: Tensor, d: Any = d, model: Any = model) -> Tensor:
            found = d.p_sample(model, x, t, False, cond_fn=slope, noise=KEY)["sample"]
            return found + d.ddim_sample(model, x, t, False, cond_fn=slope)["sample"]

        assert torch.autograd.gradcheck(run, (x,), fast_mode=True)


# ---- loops ---------------------------------------------------------------------------------------


def by_autograd(x: Tensor, t: Tensor, y: float = 0.4) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        scale = 1 + t.to(x).reshape(-1, 1, 1, 1) / T
        log_p = -(scale * (y - leaf).square()).sum() / 2
        return torch.autograd.grad(log_p, leaf)[0]


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("variance", VARIANCES)
def test_p_sample_loop(variance: str, steps: int | None) -> None:
    d, model = diffusion(variance), network(variance)
    spaced = d if steps is None else d.respace(steps)
    x = X[:2]
    given: dict[str, Any] = {"model_kwargs": {"y": 0.9}, "noise": x, "step_noise": KEY}
    found = d.p_sample_loop(model, x.shape, cond_fn=by_autograd, num_steps=steps, **given)
    assert not found.requires_grad
    for i, t in enumerate(range(spaced.num_timesteps - 1, -1, -1)):
        z = KEY.at(1 + i).tensor(x.shape, dtype=x.dtype)
        x = wanted_p_sample(spaced, x, torch.full((2,), t), z, 0.9)
    close(found, x)


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_sample_loop(eta: float, steps: int | None) -> None:
    for variance in ("fixed_small", "learned"):
        d, model = diffusion(variance), network(variance)
        spaced = d if steps is None else d.respace(steps)
        x = X[:2]
        found = d.ddim_sample_loop(
            model,
            x.shape,
            noise=x,
            step_noise=KEY,
            cond_fn=by_autograd,
            model_kwargs={"y": 0.9},
            eta=eta,
            num_steps=steps,
        )
        for i, t in enumerate(range(spaced.num_timesteps - 1, -1, -1)):
            z = KEY.at(1 + i).tensor(x.shape, dtype=x.dtype)
            x, _ = wanted_ddim(spaced, x, torch.full((2,), t), z, 0.9, eta)
        close(found, x)


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_the_gradient_is_added_to_the_guided_prediction(name: str) -> None:
    """A loop under guidance is that of a model that returns the guided prediction."""
    d, model, rule = diffusion(), network(), RescaledCFG(2.5, 0.5)
    given: dict[str, Any] = {"noise": X[:2], "step_noise": KEY, "num_steps": 8, "cond_fn": slope}

    def guided(x: Tensor, t: Tensor, y: float = 0.4) -> Tensor:
        return rule.combine(model(x, t, y), model(x, t, -0.2))

    kwargs: dict[str, Any] = {"model_kwargs": {"y": 0.9}}
    found = getattr(d, name)(
        model, X[:2].shape, guidance=rule, uncond_kwargs={"y": -0.2}, **kwargs, **given
    )
    close(found, getattr(d, name)(guided, X[:2].shape, **kwargs, **given))
    unguided = getattr(d, name)(guided, X[:2].shape, **kwargs, **(given | {"cond_fn": None}))
    assert float((found - unguided).abs().max()) > 0.1


# ---- the exact posterior of a Gaussian world -----------------------------------------------------

MEAN, S2, Y, R2 = 0.3, 0.5, 1.2, 0.7  # x_0 ~ N(MEAN, S2), y = x_0 + N(0, R2)
AFTER = S2 * R2 / (S2 + R2)
POSTERIOR = (AFTER * (MEAN / S2 + Y / R2), AFTER)


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_many_small_steps_give_the_posterior(name: str) -> None:
    """The loop is affine in x_T and the noises, so its moments are known from its values."""
    errors = []
    for steps in (100, 200, 400):
        d = GaussianDiffusion(
            diffcore.make_betas("linear", steps, scale_to_1000=True), clip_sample=False
        )
        alpha, sigma = d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod
        total = alpha**2 * S2 + sigma**2

        def best(x: Tensor, t: Tensor, alpha=alpha, total=total) -> Tensor:
            a, v = alpha[t][:, None], total[t][:, None]
            return MEAN + a * S2 / v * (x - a * MEAN)

        def model(x: Tensor, t: Tensor, alpha=alpha, sigma=sigma, best=best) -> Tensor:
            return (x - alpha[t][:, None] * best(x, t)) / sigma[t][:, None]

        def cond_fn(x: Tensor, t: Tensor, alpha=alpha, sigma=sigma, total=total, best=best):
            a, s, v = (c[t][:, None] for c in (alpha, sigma, total))
            return a * S2 / v * (Y - best(x, t)) / (R2 + S2 * s**2 / v)

        # Sample 0 starts at 0 without noise, sample 1 at 1; sample 2 + i has the noise 1 in step i.
        batch = 2 + steps
        x = torch.zeros(batch, 1, dtype=torch.float64)
        x[1] = 1
        noise = torch.zeros(steps, batch, 1, dtype=torch.float64)
        noise[torch.arange(steps), 2 + torch.arange(steps)] = 1
        found = getattr(d, name)(model, x.shape, noise=x, step_noise=noise, cond_fn=cond_fn)
        slopes = (found[1:] - found[0]).flatten()
        mean = float(found[0] + slopes[0] * alpha[-1] * POSTERIOR[0])  # from the exact x_T given y
        slopes[0] *= (alpha[-1] ** 2 * POSTERIOR[1] + sigma[-1] ** 2).sqrt()
        variance = float(slopes.square().sum())
        errors.append(abs(mean - POSTERIOR[0]) + abs(variance - POSTERIOR[1]))
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]  # first order
    assert errors[2] < 0.02


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cond_fn", "error", "message"),
    [
        (3, TypeError, "cond_fn must be a function, got int"),
        (lambda x, t: [x], TypeError, "cond_fn must return a torch.Tensor, got list"),
        (lambda x, t: x.flatten(1).sum(1), ValueError, "cond_fn must return the shape of x, .2, 3"),
    ],
)
def test_what_is_refused(cond_fn: Any, error: type, message: str) -> None:
    d, x = diffusion(), X[:2]
    for call in (
        lambda: d.p_sample(network(), x, 3, cond_fn=cond_fn),
        lambda: d.ddim_sample(network(), x, 3, cond_fn=cond_fn),
        lambda: d.p_sample_loop(network(), x.shape, noise=x, cond_fn=cond_fn),
        lambda: d.ddim_sample_loop(network(), x.shape, noise=x, cond_fn=cond_fn),
    ):
        with pytest.raises(error, match=message):
            call()
