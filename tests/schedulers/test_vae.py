"""Autoencoders of diffusers with our posterior, beside the stock ones and float64."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="pipelines import it")

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Stock  # noqa: E402

import diffcore.vae  # noqa: E402
from diffcore import PhiloxNoise  # noqa: E402
from diffcore.diffusers import fuse, unfuse  # noqa: E402
from diffcore.diffusers.vae import LatentDistribution, is_kl_autoencoder  # noqa: E402
from diffcore.testing import assert_within_bound  # noqa: E402
from support.pipelines import CASES, generator, vae_2d, vae_3d  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "images": (vae_2d, (2, 3, 16, 16)),
    "videos": (vae_3d, (2, 3, 9, 16, 16)),
}
SHAPES = {"sound": (2, 8, 12), "images": (2, 8, 6, 6), "videos": (2, 8, 3, 6, 6)}
each_model = pytest.mark.parametrize("name", MODELS)
each_shape = pytest.mark.parametrize("name", SHAPES)


def encoded(model: Any, name: str, **options: Any) -> Any:
    with torch.no_grad():
        return model.encode(torch.rand(MODELS[name][1], generator=generator()), **options)


def posteriors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[LatentDistribution, Any]:
    """Ours and the stock one; some log-variances are clamped."""
    parameters = torch.randn(shape, generator=generator(4)).mul(4).to(dtype)
    parameters[0, -1].fill_(40.0)
    stock = Stock(parameters, **options)
    return LatentDistribution.of(stock), stock


def in_float64(stock: Any) -> Any:
    """The same distribution for the truth."""
    return Stock(stock.parameters.double())


# ---- autoencoders --------------------------------------------------------------------------------


@each_model
def test_encode_gives_our_posterior(name: str) -> None:
    make, _ = MODELS[name]
    model = make()
    kind, stock = type(model), encoded(model, name).latent_dist
    assert type(stock) is Stock
    assert fuse(model) is model
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    output = encoded(model, name)
    assert type(output.latent_dist) is LatentDistribution
    assert output["latent_dist"] is output[0] is output.latent_dist
    assert isinstance(output.latent_dist, (Stock, diffcore.vae.DiagonalGaussianDistribution))
    (posterior,) = encoded(model, name, return_dict=False)
    assert type(posterior) is LatentDistribution
    for ours in (output.latent_dist, posterior):
        assert torch.equal(ours.mode(), stock.mode())
        assert torch.equal(ours.logvar, stock.logvar)
        z, wanted = (d.sample(generator(1)) for d in (ours, stock))
        torch.testing.assert_close(z, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert fuse(model) is model  # once more changes nothing
    assert unfuse(unfuse(model)) is model
    assert type(model) is kind
    assert type(encoded(model, name).latent_dist) is Stock


@each_model
def test_forward_with_a_sampled_posterior(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.rand(shape, generator=generator())
    found = []
    for _ in range(2):
        with torch.no_grad():
            y = model(x, sample_posterior=True, generator=generator(1)).sample
        found.append(y)
        fuse(model)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_fused_and_stands_alone(copied: Any) -> None:
    model = fuse(vae_2d())
    twin = copied(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert float(encoded(twin, "images").latent_dist.mean.abs().max()) == 0
    assert float(encoded(model, "images").latent_dist.mean.abs().max()) > 0


def test_a_fused_autoencoder_is_saved_as_a_stock_one(tmp_path: Path) -> None:
    model = fuse(vae_2d())
    model.save_pretrained(tmp_path)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.AutoencoderKL
    mean = encoded(model, "images").latent_dist.mean
    assert torch.equal(encoded(loaded, "images").latent_dist.mean, mean)
    # What its own class loads is fused, as with schedulers.
    assert type(type(model).from_pretrained(tmp_path)) is type(model)


def test_a_pipeline_with_a_fused_autoencoder() -> None:
    case = CASES["img2img"]
    pipe = case.make()
    stock = case.run(pipe)
    fuse(fuse(pipe).vae)
    assert abs(case.run(pipe) - stock).max() < 1e-5


def test_which_models_are_autoencoders_of_the_kind() -> None:
    class Mine(diffusers.AutoencoderKL):
        pass

    def bare(kind: Any) -> Any:
        return kind.__new__(kind)

    kinds = ("AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")
    kinds += ("AutoencoderKLTemporalDecoder", "AutoencoderKLMochi", "AsymmetricAutoencoderKL")
    assert all(is_kl_autoencoder(bare(getattr(diffusers, kind))) for kind in kinds)
    assert is_kl_autoencoder(bare(Mine))
    for kind in (
        "AutoencoderOobleck",
        "AutoencoderTiny",
        "VQModel",
        "UNet2DModel",
        "AutoencoderDC",
    ):
        model = bare(getattr(diffusers, kind))
        assert not is_kl_autoencoder(model)
        with pytest.raises(TypeError, match=f"a KL autoencoder of diffusers, got {kind}"):
            fuse(model)
    with pytest.raises(TypeError, match="target must be a scheduler, a pipeline or a KL auto"):
        fuse(vae_2d(), guidance=True)


# ---- the posterior -------------------------------------------------------------------------------


@each_shape
def test_samples_are_those_of_the_generator(name: str) -> None:
    ours, stock = posteriors(SHAPES[name])
    for seeds in ([1], [1, 2]):  # one generator, or one for each sample
        draws = [[generator(seed) for seed in seeds] for _ in range(2)]
        given = [d if len(seeds) > 1 else d[0] for d in draws]
        z, wanted = ours.sample(given[0]), stock.sample(given[1])
        torch.testing.assert_close(z, wanted, rtol=1e-6, atol=1e-6)
        for a, b in zip(*draws, strict=True):
            assert torch.equal(a.get_state(), b.get_state())
    torch.manual_seed(3)
    z = ours.sample()
    torch.manual_seed(3)
    torch.testing.assert_close(z, stock.sample(), rtol=1e-6, atol=1e-6)
    key = PhiloxNoise(7)
    noise = key.tensor(ours.mean.shape)
    assert torch.equal(ours.sample(noise=key), ours.sample(noise=noise))


@each_shape
def test_the_sample_and_the_kl_in_one_launch(name: str) -> None:
    ours, _ = posteriors(SHAPES[name])
    z, kl = ours.sample_kl(generator(1))
    torch.testing.assert_close(z, ours.sample(generator(1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, ours.kl(), rtol=1e-6, atol=0)


def sums(d: Any, shifted: Tensor, sample: Tensor) -> list[Tensor]:
    """KL to the standard normal, KL to the same variance elsewhere, and NLL, by their formulas."""
    over = tuple(range(1, d.mean.ndim))
    to_normal = 0.5 * (d.mean**2 + d.var - 1 - d.logvar)
    to_shifted = 0.5 * (d.mean - shifted) ** 2 / d.var
    nll = 0.5 * (math.log(2 * math.pi) + d.logvar + (sample - d.mean) ** 2 / d.var)
    return [x.sum(over) for x in (to_normal, to_shifted, nll)]


@each_shape
def test_kl_and_nll_are_sums_over_all_but_the_batch(name: str) -> None:
    (ours, stock), (other, other_stock) = (posteriors(SHAPES[name]) for _ in range(2))
    other.mean = other_stock.mean = stock.mean + 1
    sample = torch.randn(stock.mean.shape, generator=generator(6))
    eager = sums(stock, other.mean, sample)
    truth = sums(in_float64(stock), other.mean.double(), sample.double())
    for theirs in (other, other_stock):
        found = [ours.kl(), ours.kl(theirs), ours.nll(sample)]
        for x, near, right in zip(found, eager, truth, strict=True):
            assert x.shape == (2,)
            assert_within_bound(x, near, right.numpy())


def test_for_images_the_sums_are_those_of_diffusers() -> None:
    ours, stock = posteriors(SHAPES["images"])
    sample = torch.randn(ours.mean.shape, generator=generator(6))
    torch.testing.assert_close(ours.kl(), stock.kl(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.nll(sample), stock.nll(sample), rtol=1e-5, atol=0)


def test_dimensions_of_the_nll() -> None:
    ours, stock = posteriors(SHAPES["videos"])
    sample = torch.randn(ours.mean.shape, generator=generator(6))
    for dims in ([1, 2, 3], (1,), [2, 3, 4]):
        found, wanted = ours.nll(sample, dims), stock.nll(sample, dims)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_closer_to_float64(dtype: torch.dtype) -> None:
    """The sum of the errors over a batch; stock KLs even overflow in float16."""
    ours, stock = posteriors((64, 8, 6, 6), dtype)
    truth = in_float64(stock)
    noise = torch.randn(stock.mean.shape, generator=generator(1), dtype=dtype)
    z = truth.mean + truth.std * noise.double()
    inside = z.abs() < torch.finfo(dtype).max
    sampled = [d.sample(generator(1)) for d in (ours, stock)]
    errors = [(x.double() - z)[inside].abs().sum() for x in sampled]
    assert errors[0] < errors[1]
    assert sampled[0].dtype == sampled[1].dtype == dtype
    kls = [(d.kl().double() - truth.kl()).abs().sum() for d in (ours, stock)]
    assert kls[0] < kls[1] or not kls[1].isfinite()


def test_gradients_are_those_of_diffusers() -> None:
    found = []
    for kind in (LatentDistribution.of, lambda d: d):
        parameters = torch.randn(SHAPES["images"], generator=generator(4)).requires_grad_()
        posterior = kind(Stock(parameters))
        loss = posterior.kl().mean() + posterior.sample(generator(1)).square().mean()
        found.append(torch.autograd.grad(loss, parameters)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_deterministic_posterior() -> None:
    ours, stock = posteriors(SHAPES["videos"], deterministic=True)
    draws = [generator(1), generator(1)]
    assert torch.equal(ours.sample(draws[0]), stock.sample(draws[1]))
    assert torch.equal(draws[0].get_state(), draws[1].get_state())
    assert torch.equal(ours.kl(), torch.zeros(2))
    assert torch.equal(ours.nll(ours.mean), torch.zeros(2))
    assert torch.equal(ours.nll(ours.mean, [1]), torch.zeros(2))
    assert float(ours.std.abs().max()) == float(ours.var.abs().max()) == 0


def test_a_compiled_autoencoder() -> None:
    model = fuse(vae_2d())
    x = torch.rand(2, 3, 16, 16, generator=generator())

    def mode(x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(x).latent_dist
        return posterior.mode(), posterior.kl()

    with torch.no_grad():
        for ours, wanted in zip(torch.compile(mode, backend="eager")(x), mode(x), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
