"""bits_per_dim: streaming, and the stratified estimator."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from diffcore import GaussianDiffusion, PhiloxNoise, bits_per_dim, make_betas
from diffcore.likelihood.strata import Strata
from support.bits import DIFFUSION, KEY, N, T, data, model, same_bits

# ---- every timestep -----------------------------------------------------------------------------


def test_exact_is_the_mean_of_the_loop():
    found = bits_per_dim(DIFFUSION, model, data(), noise=KEY, batch_size=5)
    loop = DIFFUSION.calc_bpd_loop(model, data(), noise=KEY)
    loop = {name: value.double() for name, value in loop.items()}
    total = loop["prior_bpd"] + loop["vb"].sum(1)
    assert found.total == pytest.approx(total.mean().item(), rel=1e-14)
    assert found.prior == pytest.approx(loop["prior_bpd"].mean().item(), rel=1e-14)
    assert found.standard_error == pytest.approx(total.std().item() / math.sqrt(N), rel=1e-12)
    for name in ("xstart_mse", "mse"):
        torch.testing.assert_close(getattr(found, name), loop[name].mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.terms, loop["vb"].mean(0), rtol=1e-13, atol=0)
    assert found.visits.tolist() == [N] * T
    assert (found.samples, found.dimensions, found.model_calls) == (N, 9, 3 * T)
    assert found.nats_per_sample == pytest.approx(found.total * 9 * math.log(2))
    assert str(found).startswith(f"{found.total:.4f} ± {found.standard_error:.4f} bits/dim (12 ")


def test_batches_and_their_size_do_not_matter():
    loader = DataLoader(TensorDataset(data(), torch.arange(N)), batch_size=7)
    for options in ({}, {"timesteps": 6, "draws": 2}):
        whole = bits_per_dim(DIFFUSION, model, data(), noise=KEY, batch_size=N, **options)
        ones = bits_per_dim(DIFFUSION, model, data(), noise=KEY, batch_size=1, **options)
        loaded = bits_per_dim(DIFFUSION, model, loader, noise=KEY, **options)
        streamed = bits_per_dim(DIFFUSION, model, iter(data().split(5)), noise=KEY, **options)
        for other in (ones, loaded, streamed):
            same_bits(other, whole, but=["model_calls"])


def test_it_clips_where_the_diffusion_does():
    unclipped = GaussianDiffusion(DIFFUSION.betas, clip_sample=False)
    options = {"noise": KEY, "decoder": "gaussian"}
    latents = 3 * data()
    found = bits_per_dim(unclipped, model, latents, **options)
    same_bits(found, bits_per_dim(unclipped, model, latents, clip_denoised=False, **options))
    assert bits_per_dim(DIFFUSION, model, latents, **options).total > 2 * found.total


def test_one_noise_for_all_timesteps_makes_them_go_together():
    # Samples that are all the same: what differs is due to the noise.
    x = data(1).expand(300, -1, -1, -1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    shared = bits_per_dim(DIFFUSION, model, x, noise=noise, batch_size=300)
    fresh = bits_per_dim(DIFFUSION, model, x, noise=KEY, batch_size=300)
    assert shared.estimator_variance == pytest.approx(shared.standard_error**2)
    assert fresh.estimator_variance == pytest.approx(fresh.standard_error**2, rel=0.3)


def test_noise_is_a_tensor_a_key_or_the_seed_of_torch():
    noise = torch.randn(data().shape)
    found = bits_per_dim(DIFFUSION, model, data(), noise=noise, batch_size=5)
    loop = DIFFUSION.calc_bpd_loop(model, data(), noise=noise)["total_bpd"]
    assert found.total == pytest.approx(loop.double().mean().item(), rel=1e-6)
    totals = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        totals.append(bits_per_dim(DIFFUSION, model, data()).total)
    assert totals[0] == totals[1] != totals[2]
    tensor_seed = PhiloxNoise(torch.tensor(5), sample_ids=torch.tensor(100), stream=7)
    same = bits_per_dim(DIFFUSION, model, data(), noise=tensor_seed)
    assert same.total == bits_per_dim(DIFFUSION, model, data(), noise=KEY).total


def test_model_kwargs_may_depend_on_the_batch():
    def labeled(x, t, labels):
        assert len(labels) == len(x)
        return model(x, t) + 0.1 * labels.reshape(-1, 1, 1, 1)

    loader = DataLoader(TensorDataset(data(), torch.arange(N) % 2), batch_size=5)
    found = bits_per_dim(
        DIFFUSION, labeled, loader, noise=KEY, model_kwargs=lambda b: {"labels": b[1]}
    )
    whole = bits_per_dim(
        DIFFUSION, labeled, data(), noise=KEY, model_kwargs={"labels": torch.arange(N) % 2}
    )
    assert found.total == pytest.approx(whole.total, rel=1e-13)
    assert found.total != bits_per_dim(DIFFUSION, model, data(), noise=KEY).total


def test_a_model_with_parameters_says_where_to_work():
    net = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    found = bits_per_dim(
        DIFFUSION, lambda x, t: net(x), data(dtype=torch.float64), timesteps=3, device="cpu"
    )
    assert math.isfinite(found.total)
    one = bits_per_dim(DIFFUSION, model, data(1), timesteps=3)
    assert math.isnan(one.standard_error)
    assert math.isnan(one.estimator_variance)


def test_bound_of_a_process_of_one_timestep():
    one = GaussianDiffusion(torch.tensor([0.3], dtype=torch.float64))
    found = bits_per_dim(one, model, data(), noise=KEY)
    assert found.terms.shape == (1,)
    assert found.total == pytest.approx(found.prior + found.terms[0].item(), rel=1e-14)
    with pytest.raises(ValueError, match=r"timesteps must be in 1 .* = 0, got 1"):
        bits_per_dim(one, model, data(), timesteps=1)


def test_learned_variances_are_split_off():
    learned = GaussianDiffusion(DIFFUSION.betas, variance_type="learned_range")

    def both(x, t):
        return torch.cat([model(x, t), torch.full_like(x, -1.0)], dim=1)

    # -1 says log beta_tilde: the same bound as with that variance
    found = bits_per_dim(learned, both, data(), noise=KEY, timesteps=5)
    plain = bits_per_dim(DIFFUSION, model, data(), noise=KEY, timesteps=5)
    assert found.total == pytest.approx(plain.total, rel=1e-5)


def test_a_bar_counts_calls(capsys):
    bits_per_dim(DIFFUSION, model, data(), timesteps=4, batch_size=5, progress=True)
    shown = capsys.readouterr().err
    assert "15/15" in shown
    assert "bits/dim" in shown
    bits_per_dim(DIFFUSION, model, data(), timesteps=4, progress=None)  # no terminal here
    assert capsys.readouterr().err == ""


# ---- the estimator ------------------------------------------------------------------------------


def test_strata_cover_all_timesteps_in_even_shares():
    log_snr = GaussianDiffusion(make_betas("linear", 1000)).schedule.log_snr
    weights = torch.expm1(log_snr[:-1] - log_snr[1:])
    for count in (1, 2, 7, 16, 998, 999):
        strata = Strata.of(log_snr, count)
        assert len(strata.starts) == count + 1
        assert strata.starts[0] == 0
        assert strata.sizes[0] == 1
        assert (strata.sizes >= 1).all()
        assert torch.equal(strata.starts.cumsum(0)[:0], strata.starts[:0])
        assert torch.equal(strata.starts[1:], strata.sizes.cumsum(0)[:-1])
        assert strata.sizes.sum() == 1000
    strata = Strata.of(log_snr, 16)
    shares = [
        weights[start - 1 : start - 1 + size].sum().item()
        for start, size in zip(strata.starts.tolist()[1:], strata.sizes.tolist()[1:], strict=True)
    ]
    mean = weights.sum().item() / 16
    assert max(shares) < 2 * mean
    assert min(shares[4:]) > 0.8 * mean
    empty = GaussianDiffusion(torch.tensor([0.3]).double()).schedule.log_snr
    assert Strata.of(empty, 0).sizes.tolist() == [1]
    ends = torch.tensor([2.0, 1.0, -math.inf], dtype=torch.float64)
    assert Strata.of(ends, 2).sizes.tolist() == [1, 1, 1]


def test_timesteps_are_uniform_in_their_strata():
    strata = Strata(torch.tensor([0, 1, 4]), torch.tensor([1, 3, 46]))
    t = strata.timesteps(PhiloxNoise(3), (20_000, 2))
    assert (t[:, 0] == 0).all()
    for k, draw in ((1, 0), (1, 1), (2, 0), (2, 1)):
        start, size = strata.starts[k].item(), strata.sizes[k].item()
        counts = torch.bincount(t[:, k, draw] - start, minlength=size).double()
        assert len(counts) == size
        chi2 = ((counts - 20_000 / size) ** 2 / (20_000 / size)).sum().item()
        assert chi2 < size - 1 + 5 * math.sqrt(2 * (size - 1))
    assert not torch.equal(t[:, 2, 0], t[:, 2, 1])


def test_all_strata_of_one_timestep_are_the_exact_bound():
    exact = bits_per_dim(DIFFUSION, model, data(), noise=KEY)
    found = bits_per_dim(DIFFUSION, model, data(), noise=KEY, timesteps=T - 1)
    same_bits(dataclasses.replace(found, timesteps=None), exact)


COPIES = 800
SMALL = GaussianDiffusion(make_betas("squaredcos_cap_v2", 16))


@functools.cache
def measure(timesteps, draws=1, seed=0):
    """One image many times: each has noise and timesteps of its own, and nothing else differs.

    So the variance between samples, known from many, is that of the estimator.
    """
    return bits_per_dim(
        *(SMALL, model, data(1).repeat(COPIES, 1, 1, 1)),
        noise=PhiloxNoise(seed),
        timesteps=timesteps,
        draws=draws,
        batch_size=COPIES,
    )


@pytest.mark.parametrize(("timesteps", "draws"), [(4, 1), (4, 2), (4, 3), (None, 2)])
def test_the_estimator_is_unbiased_and_says_its_variance(timesteps, draws):
    found, exact = measure(timesteps, draws), measure(None, seed=1)
    assert abs(found.total - exact.total) < 4 * math.hypot(
        found.standard_error, exact.standard_error
    )
    # Two estimates from 800 samples of a distribution with some tail
    assert found.estimator_variance == pytest.approx(found.standard_error**2, rel=0.3)
    calls = (16 if timesteps is None else 5) * draws
    assert found.model_calls == calls
    assert found.visits.sum() == COPIES * calls
    assert (found.visits > 0).all()


def test_one_draw_bounds_the_variance_and_leaves_timesteps_out():
    many = data(400)
    options = {"noise": KEY, "timesteps": 4, "batch_size": 400}
    found = bits_per_dim(SMALL, model, many, **options)
    truth = bits_per_dim(SMALL, model, many, draws=8, **options)
    assert found.estimator_variance > 0.6 * 8 * truth.estimator_variance  # of 400, with a tail
    found = bits_per_dim(DIFFUSION, model, data(), noise=KEY, timesteps=6)
    visited = found.visits > 0
    assert visited[0]
    assert not visited.all()
    assert found.terms[visited].isfinite().all()
    assert found.terms[~visited].isnan().all()
    assert found.visits.sum() == 7 * N


def test_more_strata_vary_less():
    assert measure(8).standard_error < 0.7 * measure(1).standard_error


def test_the_default_device_does_not_matter():
    """Sums and tables stay on the CPU, data on theirs, whatever ``with torch.device`` says."""
    key = PhiloxNoise(3)
    x = data()
    wanted = bits_per_dim(DIFFUSION, model, x, timesteps=3, noise=key)
    with torch.device("meta"):
        found = bits_per_dim(DIFFUSION, model, x, timesteps=3, noise=key)
    same_bits(found, wanted)


# ---- mistakes ----------------------------------------------------------------------------------


def never(x, t):
    raise AssertionError("the model was called")


def test_bad_arguments_are_named():
    x = data()
    for name, options in (
        ("timesteps must be in 1 .. T - 1 = 24, got 25", {"timesteps": 25}),
        ("timesteps must be in 1 .. T - 1 = 24, got 0", {"timesteps": 0}),
        ("draws must be at least 1, got 0", {"draws": 0}),
        ("batch_size must be at least 1, got -1", {"batch_size": -1}),
        ("decoder", {"decoder": "categorical"}),
        ("noise must be a PhiloxNoise with", {"noise": x, "timesteps": 3}),
        ("noise must have the shape of the data", {"noise": x[:5]}),
        ("noise must have the shape of the data", {"noise": data(N + 1)}),
        (
            "checkpoint must be a file in a folder that can be written",
            {"checkpoint": "nowhere/bits.json"},
        ),
        ("checkpoint must be a file in a folder that can be written", {"checkpoint": "."}),
        ("sample_ids must have one id for each", {"noise": PhiloxNoise(1, torch.arange(N - 1))}),
        ("sample_ids must have one id for each", {"noise": PhiloxNoise(1, torch.arange(N + 1))}),
        ("sample_ids must have one id for each", {"sample_ids": range(N - 1)}),
        ("sample_ids must have one id for each", {"sample_ids": lambda _: [0]}),
        ("sample_ids must be None", {"sample_ids": [0], "noise": PhiloxNoise(1, torch.arange(N))}),
        ("noise must be a PhiloxNoise where sample_ids", {"sample_ids": [0], "noise": x}),
        ("got id 0 for two samples that differ", {"sample_ids": [0] * N}),
    ):
        with pytest.raises(ValueError, match=name):
            bits_per_dim(DIFFUSION, model, x, **options)
    for name, options in (
        ("timesteps must be an int, got float", {"timesteps": 3.0}),
        ("draws must be an int, got bool", {"draws": True}),
        ("sample_ids must be ids .N., or a function, got int", {"sample_ids": 3}),
        ("sample_ids must be .*, got float", {"sample_ids": [0.5]}),
        ("noise must be a tensor or a PhiloxNoise, got int", {"noise": 3}),
    ):
        with pytest.raises(TypeError, match=name):
            bits_per_dim(DIFFUSION, model, x, **options)
    with pytest.raises(ValueError, match="data must be pixels"):
        bits_per_dim(DIFFUSION, never, x * 0.99)
    with pytest.raises(ValueError, match="data must have at least one sample"):
        bits_per_dim(DIFFUSION, model, x[:0])
    with pytest.raises(ValueError, match="data must have at least one sample"):
        bits_per_dim(DIFFUSION, model, [])
    with pytest.raises(TypeError, match="data must be a tensor or an iterable of batches, got int"):
        bits_per_dim(DIFFUSION, model, 3)
    with pytest.raises(TypeError, match="data must yield tensors, got int"):
        bits_per_dim(DIFFUSION, model, [3])
    with pytest.raises(TypeError, match="data must be a floating-point tensor"):
        bits_per_dim(DIFFUSION, model, x.long())
    with pytest.raises(ValueError, match="batch_size must be None"):
        bits_per_dim(DIFFUSION, model, [x], batch_size=3)
    with pytest.raises(ValueError, match="data must have one shape and dtype in all batches"):
        bits_per_dim(DIFFUSION, model, [x, x[..., :2]], timesteps=2)
