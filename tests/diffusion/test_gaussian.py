"""GaussianDiffusion: conventions, edges, refusals. Its numbers: test_gaussian_world.py."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys

import pytest
import torch

from diffcore.diffusion import GaussianDiffusion, checks
from diffcore.noise import PhiloxNoise
from diffcore.schedules import make_betas
from support.toys import BETAS, EPS, Recorder, half
from support.waiting import NoReadback, no_waiting

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# ---- tables -------------------------------------------------------------------------------------


def test_tables_are_float64_and_consistent():
    d = GaussianDiffusion(make_betas("linear", 1000))
    names = [
        "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod posterior_mean_coef1",
        "sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod posterior_mean_coef2",
        "posterior_variance posterior_log_variance_clipped",
    ]
    for name in " ".join(names).split():
        table = getattr(d, name)
        assert table.dtype == torch.float64
        assert table.shape == (1000,)
    assert d.num_timesteps == 1000
    assert d.alphas_cumprod_prev[0] == 1
    assert torch.equal(d.alphas_cumprod_prev[1:], d.alphas_cumprod[:-1])
    product = torch.cumprod(1 - d.betas, 0)
    # Two products of 1000 factors, each rounded 1000 times.
    torch.testing.assert_close(d.alphas_cumprod, product, rtol=2000 * EPS, atol=0)
    variance = d.betas * (1 - d.alphas_cumprod_prev) / (1 - d.alphas_cumprod)
    # The right-hand side subtracts alphas_cumprod from 1, which loses its digits.
    torch.testing.assert_close(d.posterior_variance, variance, rtol=0, atol=1000 * EPS)
    assert d.posterior_variance[0] == 0
    assert d.posterior_log_variance_clipped[0] == d.posterior_log_variance_clipped[1]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_variance_at_the_first_step_is_guided_diffusions(variance_type):
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    x, t = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 5])
    out = d.p_mean_variance(half, x, t)
    small = variance_type == "fixed_small"
    first = d.posterior_variance[1]
    rest = d.posterior_variance[[1, 5]] if small else d.betas[[1, 5]]
    variance = torch.cat([torch.zeros(1, dtype=torch.float64) if small else first[None], rest])
    log_variance = torch.cat([first[None], rest]).log()
    assert torch.equal(out["variance"], variance[:, None].expand(3, 2))
    assert torch.equal(out["log_variance"], log_variance[:, None].expand(3, 2))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_variance_of_a_process_of_one_timestep(variance_type):
    d = GaussianDiffusion(torch.tensor([0.25]), "sample", variance_type)
    x = torch.randn(2, 3, dtype=torch.float64)
    t = torch.zeros(2, dtype=torch.int64)
    out = d.p_mean_variance(lambda x, t: 0.1 * x, x, t)
    assert torch.equal(out["log_variance"], torch.full_like(x, 0.25).log())
    assert torch.equal(out["mean"], 0.1 * x)
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        assert torch.equal(loop(lambda x, t: 0.1 * x, (2, 3), noise=x), 0.1 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_16_bit_noising_rounds_each_coefficient_once(name, dtype):
    # Casting alphas_cumprod first makes sigma 0 at the first ten steps of "linear" in bfloat16.
    d = GaussianDiffusion(make_betas(name, 1000))
    t = torch.arange(1000)
    one, zero = torch.ones(1000, 1, dtype=dtype), torch.zeros(1000, 1, dtype=dtype)
    info, compute = torch.finfo(dtype), torch.finfo(torch.float32)
    for x_start, noise, exact in (
        (one, zero, d.sqrt_alphas_cumprod),
        (zero, one, d.sqrt_one_minus_alphas_cumprod),
    ):
        got = d.q_sample(x_start, t, noise=noise).squeeze(1).double()
        # Half a unit in the last place, float32 before it, and subnormals.
        spacing = info.eps * exact.clamp(min=info.smallest_normal)
        assert ((got - exact).abs() <= 0.5 * spacing + compute.eps * exact).all()
        assert (got > 0).all()


# ---- conventions --------------------------------------------------------------------------------


def test_loops_tell_the_model_training_timesteps():
    d = GaussianDiffusion(BETAS)
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        model = Recorder()
        loop(model, (3, 2), num_steps=4, timestep_spacing="trailing")
        assert [t.tolist() for t in model.t] == [[t] * 3 for t in (19, 14, 9, 4)]
        assert all(t.dtype == torch.int64 for t in model.t)
        model = Recorder()
        loop(model, (3, 2))
        assert [t[0].item() for t in model.t] == list(range(20))[::-1]


def test_respaced_diffusions_tell_the_model_training_timesteps():
    spaced = GaussianDiffusion(BETAS).respace([3, 19, 7])
    assert spaced.num_timesteps == 3
    x = torch.randn(3, 2)
    t = torch.tensor([0, 2, 1])
    for call in (
        lambda m: spaced.training_losses(m, x, t),
        lambda m: spaced.p_mean_variance(m, x, t),
        lambda m: spaced.p_sample(m, x, t),
        lambda m: spaced.ddim_sample(m, x, t),
    ):
        model = Recorder()
        call(model)
        assert model.t[0].tolist() == [3, 19, 7]
    model = Recorder()
    spaced.respace(2, "trailing").p_sample_loop(model, (1, 2))
    assert [t.tolist() for t in model.t] == [[19], [7]]
    model = Recorder()
    spaced.ddim_sample_loop(model, (1, 2), num_steps=2, timestep_spacing="linspace")
    assert [t.tolist() for t in model.t] == [[19], [3]]


def test_unchecked_timesteps_are_clamped_before_the_model_gets_them(monkeypatch):
    class GotThemError(Exception):
        """Ends the call before a kernel of the CPU checks t once more."""

    def model(x, t):
        raise GotThemError(t.tolist())

    # In a compiled graph and on CUDA the values of t are not read.
    monkeypatch.setattr(checks, "plain_eager", lambda: False)
    spaced = GaussianDiffusion(BETAS).respace([3, 19, 7])
    with pytest.raises(GotThemError) as got:
        spaced.p_mean_variance(model, torch.randn(4, 2), torch.tensor([-5, 0, 2, 3]))
    assert got.value.args == ([3, 3, 19, 19],)


def test_step_noise_is_asked_for_at_every_step_but_the_last():
    d = GaussianDiffusion(BETAS)
    for loop, options, expected in (
        (d.p_sample_loop, {}, range(19)),
        (d.p_sample_loop, {"num_steps": 5}, range(4)),
        (d.ddim_sample_loop, {"num_steps": 5, "eta": 0.5}, range(4)),
        (d.ddim_sample_loop, {"num_steps": 5}, ()),
        (d.p_sample_loop, {"num_steps": 1}, ()),
    ):
        asked = []

        def draw(i, x, asked=asked):
            asked.append(i)
            return torch.zeros_like(x)

        loop(half, (2, 3), step_noise=draw, **options)
        assert asked == list(expected)


def test_single_steps_add_no_noise_at_time_zero():
    d = GaussianDiffusion(BETAS, variance_type="fixed_large")
    x, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 4])
    for step in (
        lambda z: d.p_sample(half, x, t, noise=z)["sample"],
        lambda z: d.ddim_sample(half, x, t, eta=1.0, noise=z)["sample"],
    ):
        without, with_noise = step(torch.zeros_like(x)), step(torch.ones_like(x))
        assert torch.equal(without[0], with_noise[0])
        assert (without[1] != with_noise[1]).all()


def test_loops_replay_exactly():
    d = GaussianDiffusion(BETAS)
    noise, z = torch.randn(2, 3), torch.randn(20, 2, 3)
    kept = noise.clone()
    one = d.p_sample_loop(half, (2, 3), noise=noise, step_noise=lambda i, x: z[i])
    assert torch.equal(noise, kept)
    assert torch.equal(
        one, d.p_sample_loop(half, (2, 3), noise=noise, step_noise=lambda i, x: z[i])
    )
    x = noise
    for i, t in enumerate(reversed(range(20))):
        x = d.p_sample(half, x, t, noise=z[i])["sample"]
    assert torch.equal(one, x)


def test_generators_and_torchs_own_seed_seed_the_noise():
    d = GaussianDiffusion(BETAS)
    for loop in (d.p_sample_loop, lambda *a, **k: d.ddim_sample_loop(*a, eta=1.0, **k)):
        draws = [
            loop(half, (2, 3), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        torch.manual_seed(7)
        first = loop(half, (2, 3))
        torch.manual_seed(7)
        assert torch.equal(first, loop(half, (2, 3)))


@pytest.mark.parametrize("dtype", FLOATING)
def test_everything_keeps_the_dtype_of_the_samples(dtype):
    d = GaussianDiffusion(BETAS)
    x, t = torch.randn(4, 2, 3).to(dtype), torch.tensor([0, 1, 10, 19])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = Recorder()
    assert d.q_sample(x, t).dtype == dtype
    assert d.training_losses(model, x, t)["loss"].dtype == wide
    for mean, variance, log_variance in (
        d.q_mean_variance(x, t),
        d.q_posterior_mean_variance(x, x, t),
    ):
        assert (mean.dtype, variance.dtype, log_variance.dtype) == (dtype, wide, wide)
        assert mean.shape == variance.shape == log_variance.shape == x.shape
    out = d.p_mean_variance(model, x, t)
    assert {k: v.dtype for k, v in out.items()} == {
        "mean": dtype,
        "variance": wide,
        "log_variance": wide,
        "pred_xstart": dtype,
    }
    assert d.p_sample_loop(model, (2, 3), dtype=dtype).dtype == dtype
    assert d.ddim_sample_loop(model, x.shape, noise=x, num_steps=3, eta=1.0).dtype == dtype
    assert set(model.dtype) == {dtype}


def test_a_model_may_answer_in_another_dtype():
    d = GaussianDiffusion(BETAS, clip_sample=False)
    x, t = torch.randn(2, 3), torch.tensor([4, 9])

    def narrow(x, t):
        return (0.5 * x).bfloat16()

    def widened(x, t):
        return narrow(x, t).float()

    for call in (
        lambda m: d.p_mean_variance(m, x, t)["mean"],
        lambda m: d.training_losses(m, x, t, noise=x)["loss"],
        lambda m: d.ddim_sample_loop(m, (2, 3), noise=x),
    ):
        assert call(narrow).dtype == torch.float32
        assert torch.equal(call(narrow), call(widened))


def test_model_kwargs_reach_the_model():
    d = GaussianDiffusion(BETAS, clip_sample=False)
    x, t = torch.randn(2, 3), torch.tensor([4, 9])
    for call in (
        lambda m, k: d.p_mean_variance(m, x, t, model_kwargs=k)["mean"],
        lambda m, k: d.p_sample(m, x, t, noise=x, model_kwargs=k)["sample"],
        lambda m, k: d.ddim_sample(m, x, t, model_kwargs=k)["sample"],
        lambda m, k: d.training_losses(m, x, t, noise=x, model_kwargs=k)["loss"],
        lambda m, k: d.p_sample_loop(m, (2, 3), noise=x, num_steps=1, model_kwargs=k),
        lambda m, k: d.ddim_sample_loop(m, (2, 3), noise=x, model_kwargs=k),
    ):
        assert torch.equal(call(Recorder(), {"scale": 0.5}), call(half, None))
        assert not torch.equal(call(Recorder(), {"scale": 0.25}), call(half, None))


def test_clipping_follows_the_constructor_by_default():
    x, t = torch.full((1, 2), 3.0, dtype=torch.float64), 10
    for clip_sample in (True, False):
        d = GaussianDiffusion(BETAS, "sample", clip_sample=clip_sample, clip_sample_range=0.5)
        for told, clips in ((None, clip_sample), (True, True), (False, False)):
            expected = torch.full_like(x, 0.5) if clips else 0.5 * x
            moments = d.p_mean_variance(half, x, t, clip_denoised=told)
            assert torch.equal(moments["pred_xstart"], expected)
            mean = d.q_posterior_mean_variance(expected, x, t)[0]
            # The same sum of the same two terms, in one order or the other.
            torch.testing.assert_close(moments["mean"], mean, rtol=2 * EPS, atol=0)
            final = d.p_sample_loop(half, (1, 2), num_steps=1, noise=x, clip_denoised=told)
            assert torch.equal(final, expected)
            final = d.ddim_sample_loop(half, (1, 2), num_steps=1, noise=x, clip_denoised=told)
            assert torch.equal(final, expected)


def test_device_and_dtype_of_a_loop_come_from_the_model_or_the_noise():
    d = GaussianDiffusion(BETAS)

    class Net(torch.nn.Linear):
        def forward(self, x, t):
            self.seen = x.device
            return torch.zeros_like(x) if x.is_meta else super().forward(x)

    net = Net(3, 3, device="meta")
    with contextlib.suppress(Exception):  # ops may refuse tensors without data
        d.p_sample_loop(net, (2, 3), num_steps=1)
    assert net.seen == torch.device("meta")
    out = d.p_sample_loop(half, (2, 3), noise=torch.randn(2, 3), dtype=torch.float64)
    assert out.dtype == torch.float64
    assert not d.p_sample_loop(Net(3, 3), (2, 3)).requires_grad


def test_progress_shows_a_bar(capsys):
    d = GaussianDiffusion(BETAS)
    quiet = d.p_sample_loop(half, (1, 2), noise=torch.ones(1, 2), num_steps=1)
    assert capsys.readouterr().err == ""
    shown = d.p_sample_loop(half, (1, 2), noise=torch.ones(1, 2), num_steps=1, progress=True)
    assert "1/1" in capsys.readouterr().err
    assert torch.equal(quiet, shown)
    d.p_sample_loop(half, (1, 2))
    assert "tqdm" in sys.modules


# ---- no waiting for the device ------------------------------------------------------------------


def test_loops_never_read_back():
    d = GaussianDiffusion(BETAS)
    with NoReadback(), pytest.raises(AssertionError, match="reads from the device"):
        torch.ones(1).item()  # the guard itself works
    x = torch.randn(2, 3)

    def everything():
        d.p_sample_loop(half, (2, 3), noise=x)
        d.p_sample_loop(half, (2, 3), num_steps=3)
        d.ddim_sample_loop(half, (2, 3), num_steps=3, eta=0.5, noise=x)

    everything()  # checks the tables it builds, on the host and once
    with NoReadback():
        everything()


@pytest.mark.cuda
def test_loops_never_wait_for_the_gpu():
    d = GaussianDiffusion(BETAS)
    x = torch.randn(2, 3, device="cuda")
    t = torch.tensor([3, 9], device="cuda")

    def everything():
        d.p_sample_loop(half, (2, 3), noise=x)
        d.ddim_sample_loop(half, (2, 3), num_steps=3, eta=0.5, noise=x)
        d.training_losses(half, x, t)
        d.p_mean_variance(half, x, t)

    everything()  # moves the tables, once
    with no_waiting():
        everything()


def test_tables_made_under_inference_mode_serve_training():
    x, t = torch.randn(2, 3), torch.tensor([3, 9])
    net = torch.nn.Linear(3, 3)
    with torch.inference_mode():
        d = GaussianDiffusion(BETAS, "v_prediction")
        before = d.training_losses(lambda x, t: net(x), x, t, noise=x)["loss"].clone()
    assert not any(table.is_inference() for table in d.tables.noise.values())
    loss = d.training_losses(lambda x, t: net(x), x, t, noise=x)["loss"]
    loss.mean().backward()
    assert torch.equal(loss.detach(), before)
    assert net.weight.grad.abs().sum() > 0


def test_a_used_diffusion_can_be_pickled():
    d, noise = GaussianDiffusion(BETAS), PhiloxNoise(3)
    wanted = d.p_sample_loop(half, (2, 3), num_steps=5, noise=noise)
    d.p_sample(half, torch.zeros(2, 3), 4)
    again = pickle.loads(pickle.dumps(d))
    assert list(again.tables.ddpm(1.0)) == [torch.device("cpu")]  # other copies stay behind
    assert torch.equal(again.p_sample_loop(half, (2, 3), num_steps=5, noise=noise), wanted)


def test_copies_do_not_share_what_they_cache():
    d = GaussianDiffusion(BETAS)
    d.q_sample(torch.zeros(1, 2), 0)
    twin = copy.deepcopy(d)
    for copies in (d, twin):
        copies.q_sample(torch.zeros(1, 2), 0)
    for table in twin.tables.noise.values():
        table.zero_()
    assert d.q_sample(torch.ones(1, 2), 0, noise=torch.zeros(1, 2)).abs().sum() > 0
