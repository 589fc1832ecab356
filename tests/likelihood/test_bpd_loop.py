"""calc_bpd_loop and vb_terms_bpd against guided-diffusion's formulas, written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffcore import GaussianDiffusion, PhiloxNoise, make_betas

T, SHAPE = 40, (3, 2, 4, 4)
TYPES = ["fixed_small", "fixed_large", "learned", "learned_range"]
types = pytest.mark.parametrize("variance_type", TYPES)
schedules = pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])


def pixels(shape=SHAPE, dtype=torch.float64):
    k = torch.randint(256, shape, generator=torch.Generator().manual_seed(1))
    k.view(-1)[:2] = torch.tensor([0, 255])
    return (k.double() / 127.5 - 1).to(dtype)


def network(variance_type):
    """A function of x and t, wrong in places, with a variance where it is learned."""

    def predict(x, t):
        time = (t.to(x) / T).reshape(-1, 1, 1, 1)
        prediction = 0.8 * x + 0.3 * torch.sin(3 * x + time)
        if not variance_type.startswith("learned"):
            return prediction
        said = torch.cos(2 * x + time)
        return torch.cat([prediction, said if variance_type == "learned_range" else said - 5], 1)

    return predict


def betas_of(schedule):
    return make_betas(schedule, T, scale_to_1000=True) if schedule == "linear" else make_betas(
        schedule, T
    )  # fmt: skip


class Transcribed:
    """guided-diffusion's GaussianDiffusion, prediction of epsilon: its lines, not its form.

    One departure: its cdf is the tanh approximation, off by 1e-3; here it is the cdf.
    """

    def __init__(self, betas, variance_type):
        alphas = 1 - betas
        self.bar = np.cumprod(alphas)
        prev = np.append(1.0, self.bar[:-1])
        self.variance = betas * (1 - prev) / (1 - self.bar)
        self.log_clipped = np.log(np.append(self.variance[1], self.variance[1:]))
        self.coef1 = betas * np.sqrt(prev) / (1 - self.bar)
        self.coef2 = (1 - prev) * np.sqrt(alphas) / (1 - self.bar)
        self.betas, self.type = betas, variance_type

    def p_mean_variance(self, output, x_t, t, clip):
        log_small, log_large = self.log_clipped[t], np.log(self.betas[t])
        if self.type.startswith("learned"):
            output, said = output.chunk(2, dim=1)
            log_variance = said
            if self.type == "learned_range":
                frac = (said + 1) / 2
                log_variance = frac * log_large + (1 - frac) * log_small
        else:
            large = np.log(np.append(self.variance[1], self.betas[1:]))[t]
            value = log_small if self.type == "fixed_small" else large
            log_variance = torch.full_like(x_t, float(value))
        x0 = math.sqrt(1 / self.bar[t]) * x_t - math.sqrt(1 / self.bar[t] - 1) * output
        x0 = x0.clamp(-1, 1) if clip else x0
        return self.coef1[t] * x0 + self.coef2[t] * x_t, log_variance, x0

    def vb(self, output, x, x_t, t, clip):
        mean, log_variance, x0 = self.p_mean_variance(output, x_t, t, clip)
        true_mean = self.coef1[t] * x + self.coef2[t] * x_t
        kl = 0.5 * (
            -1
            + log_variance
            - self.log_clipped[t]
            + torch.exp(self.log_clipped[t] - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        centered, inv = x - mean, torch.exp(-0.5 * log_variance)
        plus, minus = inv * (centered + 1 / 255), inv * (centered - 1 / 255)
        normal = torch.distributions.Normal(0.0, 1.0)
        # The same mass from the side where it does not cancel.
        right = normal.cdf(-minus) - normal.cdf(-plus)
        inner = torch.where(centered > 0, right, normal.cdf(plus) - normal.cdf(minus))
        mass = torch.where(x < -0.999, normal.cdf(plus), inner)
        mass = torch.where(x > 0.999, normal.cdf(-minus), mass)
        terms = -torch.log(mass) if t == 0 else kl
        return terms.flatten(1).mean(1) / math.log(2), x0

    def prior(self, x):
        bar = self.bar[-1]
        kl = 0.5 * (-1 - math.log(1 - bar) + (1 - bar) + bar * x**2)
        return kl.flatten(1).mean(1) / math.log(2)

    def everything(self, model, x, noise, clip):
        vb, xstart_mse, mse = [], [], []
        for t in range(len(self.bar)):
            x_t = math.sqrt(self.bar[t]) * x + math.sqrt(1 - self.bar[t]) * noise(t)
            output = model(x_t, torch.full((len(x),), t))
            term, x0 = self.vb(output, x, x_t, t, clip)
            eps = (x_t / math.sqrt(self.bar[t]) - x0) / math.sqrt(1 / self.bar[t] - 1)
            vb.append(term)
            xstart_mse.append((x0 - x).square().flatten(1).mean(1))
            mse.append((eps - noise(t)).square().flatten(1).mean(1))
        names = {"vb": vb, "xstart_mse": xstart_mse, "mse": mse}
        found = {name: torch.stack(rows, dim=1) for name, rows in names.items()}
        prior = self.prior(x)
        return {**found, "prior_bpd": prior, "total_bpd": found["vb"].sum(1) + prior}


@types
@schedules
@pytest.mark.parametrize("clip", [True, False])
def test_loop_is_guided_diffusions(variance_type, schedule, clip):
    betas = betas_of(schedule)
    diffusion = GaussianDiffusion(betas, variance_type=variance_type)
    x, noise, model = pixels(), PhiloxNoise(5, stream=7), network(variance_type)
    tensors = [noise.at(7 + t).tensor(SHAPE, dtype=torch.float64) for t in range(T)]
    truth = Transcribed(betas.numpy(), variance_type).everything(
        model, x, lambda t: tensors[t], clip
    )
    found = diffusion.calc_bpd_loop(model, x, clip_denoised=clip, noise=noise)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        # Their float64 subtracts means and cumulates products: 1e-16 grows by what cancels there.
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)

    # one noise for all t, as a tensor
    fixed = diffusion.calc_bpd_loop(model, x, clip_denoised=clip, noise=tensors[0])
    truth = Transcribed(betas.numpy(), variance_type).everything(
        model, x, lambda t: tensors[0], clip
    )
    torch.testing.assert_close(fixed["total_bpd"], truth["total_bpd"], rtol=1e-9, atol=0)


@types
@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
def test_vb_terms_are_those_of_the_loop(variance_type, decoder):
    diffusion = GaussianDiffusion(betas_of("linear"), variance_type=variance_type)
    x, noise, model = pixels(), PhiloxNoise(5), network(variance_type)
    loop = diffusion.calc_bpd_loop(model, x, noise=noise, decoder=decoder)
    for t in (0, 1, T - 1):
        x_t = diffusion.q_sample(x, t, noise.at(t))
        found = diffusion.vb_terms_bpd(model, x, x_t, t, decoder=decoder)
        torch.testing.assert_close(found["output"], loop["vb"][:, t], rtol=1e-10, atol=0)
        error = (found["pred_xstart"] - x).square().flatten(1).mean(1)
        torch.testing.assert_close(error, loop["xstart_mse"][:, t], rtol=1e-9, atol=1e-14)
        assert found["pred_xstart"].abs().max() <= 1
    # each sample at its own timestep: the decoder's term and KLs in one batch
    t = torch.tensor([0, 5, T - 1])
    x_t = torch.cat([diffusion.q_sample(x, int(i), noise.at(int(i)))[k : k + 1]
                     for k, i in enumerate(t)])  # fmt: skip
    mixed = diffusion.vb_terms_bpd(model, x, x_t, t, decoder=decoder)["output"]
    torch.testing.assert_close(mixed, loop["vb"][torch.arange(3), t], rtol=1e-10, atol=0)


def test_the_terms_have_gradients_and_the_loop_has_none():
    diffusion = GaussianDiffusion(betas_of("linear"), variance_type="learned_range")
    x = pixels()
    weight = torch.tensor([0.9, -0.2], dtype=torch.float64, requires_grad=True)

    def model(x, t):
        return torch.cat([weight[0] * x, weight[1] + 0 * x], dim=1)

    def loss(values):
        weight.data.copy_(values)
        return diffusion.vb_terms_bpd(model, x, x_t, t, clip_denoised=False)["output"].sum()

    t = torch.tensor([0, 4, 20])
    x_t = diffusion.q_sample(x, t, PhiloxNoise(1))
    start = torch.tensor([0.9, -0.2], dtype=torch.float64)
    loss(start).backward()
    for k in range(2):
        step = 1e-6 * torch.eye(2, dtype=torch.float64)[k]
        slope = (loss(start + step) - loss(start - step)).item() / 2e-6
        assert weight.grad[k].item() == pytest.approx(slope, rel=1e-6)
    found = diffusion.calc_bpd_loop(model, x)
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_near_float64(dtype):
    diffusion = GaussianDiffusion(betas_of("linear"))
    model, noise = network("fixed_small"), PhiloxNoise(5)
    truth = diffusion.calc_bpd_loop(model, pixels(), noise=noise)["total_bpd"]
    found = diffusion.calc_bpd_loop(model, pixels(dtype=dtype), noise=noise)
    assert found["total_bpd"].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found["total_bpd"].double(), truth, rtol=200 * eps, atol=0)


def test_bound_of_a_process_of_one_timestep():
    diffusion = GaussianDiffusion(torch.tensor([0.4], dtype=torch.float64))
    x = pixels()
    found = diffusion.calc_bpd_loop(network("fixed_small"), x, noise=torch.zeros_like(x))
    assert found["vb"].shape == (3, 1)
    assert torch.equal(found["total_bpd"], found["vb"][:, 0] + found["prior_bpd"])
    assert found["total_bpd"].isfinite().all()


def test_it_clips_where_the_diffusion_does():
    x, noise = pixels(), PhiloxNoise(2)

    def model(x, t):
        return 3 * x

    for clip in (False, True):
        diffusion = GaussianDiffusion(betas_of("linear"), clip_sample=clip)
        found = diffusion.calc_bpd_loop(model, x, noise=noise)["total_bpd"]
        said = diffusion.calc_bpd_loop(model, x, noise=noise, clip_denoised=clip)["total_bpd"]
        other = diffusion.calc_bpd_loop(model, x, noise=noise, clip_denoised=not clip)["total_bpd"]
        assert torch.equal(found, said)
        assert (found - other).abs().min() > 1


def test_samples_of_no_elements_have_no_bits():
    diffusion = GaussianDiffusion(betas_of("linear"))
    found = diffusion.calc_bpd_loop(lambda x, t: x, torch.zeros(3, 0, 4))
    assert all(not value.any() for value in found.values())


def test_the_model_is_called_once_a_timestep_and_told_those_of_the_training():
    diffusion = GaussianDiffusion(betas_of("linear")).respace([3, 10, 39])
    seen = []

    def model(x, t, extra):
        assert extra == "yes"
        assert not torch.is_grad_enabled()
        seen.append(t.tolist())
        return 0.5 * x

    diffusion.calc_bpd_loop(model, pixels(), model_kwargs={"extra": "yes"})
    assert seen == [[3] * 3, [10] * 3, [39] * 3]


def test_the_seed_of_torch_governs_noise_that_is_not_given():
    diffusion, x = GaussianDiffusion(betas_of("linear")), pixels()
    totals = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        totals.append(diffusion.calc_bpd_loop(network("fixed_small"), x)["total_bpd"])
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


# ---- data that are no pixels, and other mistakes ------------------------------------------------


def never(x, t):
    raise AssertionError("the model was called")


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x + 0.5 / 127.5, lambda x: x * 1.01, lambda x: 2 * x, lambda x: x * math.nan],
    ids=["half a bin", "scaled", "outside", "nan"],
)
def test_data_off_the_grid_are_refused_before_any_call(spoil):
    diffusion, x = GaussianDiffusion(betas_of("linear")), pixels()
    bad = x.clone()
    bad[1] = spoil(x)[1]
    with pytest.raises(ValueError, match=r"x_start must be pixels .* use decoder='gaussian'"):
        diffusion.calc_bpd_loop(never, bad)
    with pytest.raises(ValueError, match=r"x_start must be pixels"):
        diffusion.vb_terms_bpd(never, bad, bad, 0)
    found = diffusion.calc_bpd_loop(network("fixed_small"), x * 1.01, decoder="gaussian")
    assert found["total_bpd"].isfinite().all()


def test_pixels_of_any_dtype_and_making_are_on_the_grid():
    diffusion = GaussianDiffusion(torch.tensor([0.1, 0.2], dtype=torch.float64))
    k = torch.arange(256).reshape(1, -1)
    exact = k.double() / 127.5 - 1
    made = [exact.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    made += [exact, exact.float().double()]
    made += [k.float() / 127.5 - 1, (k.float() / 255 - 0.5) / 0.5, k.float() / 255 * 2 - 1]
    for x in made:
        diffusion.calc_bpd_loop(lambda x, t: x, x)
    nudged = exact.bfloat16()
    nudged[0, 3] = torch.nextafter(nudged[0, 3], torch.tensor(0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="1 of 256 values off this grid"):
        diffusion.calc_bpd_loop(never, nudged)


def test_bad_arguments_are_named():
    diffusion, x = GaussianDiffusion(betas_of("linear")), pixels()
    with pytest.raises(ValueError, match="decoder"):
        diffusion.calc_bpd_loop(never, x, decoder="normal")
    with pytest.raises(ValueError, match="decoder"):
        diffusion.vb_terms_bpd(never, x, x, 0, decoder="normal")
    with pytest.raises(ValueError, match="noise must have the shape"):
        diffusion.calc_bpd_loop(never, x, noise=x[:1])
    with pytest.raises(TypeError, match="noise must be a tensor or a PhiloxNoise, got int"):
        diffusion.calc_bpd_loop(never, x, noise=3)
    with pytest.raises(TypeError, match="x_start must be a floating-point tensor"):
        diffusion.prior_bpd(x.long())
    with pytest.raises(ValueError, match="t must be in"):
        diffusion.vb_terms_bpd(never, x, x, T)
    learned = GaussianDiffusion(betas_of("linear"), variance_type="learned")
    with pytest.raises(ValueError, match=r"model must return the shape \(3, 4, 4, 4\)"):
        learned.calc_bpd_loop(lambda x, t: x, x)
    with pytest.raises(TypeError, match=r"model must return a torch\.Tensor"):
        learned.calc_bpd_loop(lambda x, t: None, x)
