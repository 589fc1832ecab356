from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for _package in ("matplotlib", "PIL", "safetensors", "tqdm", "sklearn", "mlxtend"):
    pytest.importorskip(_package)

from diffcore import PhiloxNoise  # noqa: E402
from diffcore.demo import data, ddpm, flow, likelihood, networks, pictures  # noqa: E402
from diffcore.demo.classes import CLASSES  # noqa: E402
from diffcore.demo.config import full_config, quick_config  # noqa: E402

# ---- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "train", "test"), [("mnist", 28, 4500, 500), ("digits", 8, 1618, 179)]
)
def test_data_shapes_and_range(name: str, side: int, train: int, test: int) -> None:
    images = data.load_images(name)
    assert images.train.shape == (train, 1, side, side)
    assert images.test.shape == (test, 1, side, side)
    assert images.train.dtype == torch.float32
    assert images.train.min() == -1
    assert images.train.max() == 1


def test_data_come_in_the_same_order_each_time() -> None:
    once, again = data.load_images("digits"), data.load_images("digits")
    assert torch.equal(once.train, again.train)
    assert torch.equal(once.test, again.test)


def test_digits_are_the_originals_and_nothing_is_in_both_parts() -> None:
    from sklearn.datasets import load_digits

    images = data.load_images("digits")
    both = torch.cat([images.train, images.test]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)
    original = torch.from_numpy(load_digits().data).float()
    assert torch.equal(((both + 1) * 8).sort(0).values, original.sort(0).values)


def _write_idx(path: Path, pixels: np.ndarray) -> None:
    sizes = struct.pack(f">{pixels.ndim}I", *pixels.shape)
    header = b"\x00\x00\x08" + bytes([pixels.ndim]) + sizes
    path.write_bytes(gzip.compress(header + pixels.tobytes()))


def test_fashion_reads_idx_and_auto_prefers_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 28, 28), np.uint8) for n in (7, 3))
    train[0, 0, :2] = 0, 255
    assert data.resolve("auto", tmp_path / "absent") == "mnist"
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.load_images("fashion", tmp_path)
    _write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    _write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", test)
    classes = rng.integers(0, 10, 7, np.uint8)
    _write_idx(tmp_path / "train-labels-idx1-ubyte.gz", classes)
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", classes[:3])
    images = data.load_images("auto", tmp_path)
    assert images.name == "fashion"
    assert images.train[0, 0, 0, :2].tolist() == [-1, 1]
    assert images.train_labels.tolist() == classes.tolist()
    assert images.test_labels.tolist() == classes[:3].tolist()
    exact = test.astype(np.float64) / 127.5 - 1
    assert np.abs(images.test[:, 0].numpy() - exact).max() <= 2 * np.finfo(np.float32).eps


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be one of auto, mnist, fashion, digits, got"):
        data.load_images("cifar")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\x00\x00\x0d\x01"))
    with pytest.raises(ValueError, match="must be an IDX file"):
        data.read_idx(tmp_path / "x.gz")


def test_pixels_go_to_the_nearest_grey_level_of_eight_bits() -> None:
    mnist, digits = (data.load_images(name).test for name in ("mnist", "digits"))
    moved = (likelihood.on_grid(mnist) - mnist).abs().max()
    assert moved <= 2 * torch.finfo(torch.float32).eps  # they are there
    found = likelihood.on_grid(digits)
    levels = (found * 127.5 + 127.5).unique()
    assert len(levels) == 17
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (found - digits).abs().max() <= 0.5001 / 127.5


# ---- networks -----------------------------------------------------------------------------------


def test_noise_of_a_density_stays_inside_the_gray_level() -> None:
    gray = torch.linspace(-1, 1, 256).repeat(8, 4, 1, 1)
    inside = (flow.dequantized(gray, PhiloxNoise(3)) - gray).double() * 127.5
    assert inside.abs().max() <= 0.5 + 1e-4
    assert inside.min() < -0.49
    assert inside.max() > 0.49
    assert abs(inside.mean()) < 5 * math.sqrt(1 / 12 / inside.numel())


def test_timestep_embedding_is_its_formula() -> None:
    t = torch.tensor([0, 3, 199])
    embedding = networks.timestep_embedding(t, 8)
    for row, time in zip(embedding, t.tolist(), strict=True):
        angles = [time * 10_000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # float32 angles: an absolute error of the angle's own rounding, a few times over
        bound = 4 * torch.finfo(torch.float32).eps * max(1, time)
        assert (row.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bound
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        networks.timestep_embedding(t, 7)


def test_unet_is_small_keeps_shape_and_starts_at_zero() -> None:
    config = full_config("mnist")
    model = ddpm.build_network(config, (1, 28, 28))
    assert 0.25e6 < sum(p.numel() for p in model.parameters()) < 0.35e6
    output = model(torch.randn(2, 1, 28, 28), torch.tensor([0, 199]), torch.tensor([9, CLASSES]))
    assert output.shape == (2, 1, 28, 28)
    assert output.is_contiguous()
    assert not output.any()


def test_unet_sees_the_timestep() -> None:
    model = networks.UNet(width=8, patch=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    one, other = model(x, torch.tensor([0, 150]))
    assert not torch.allclose(one, other)


def test_vae_shapes_and_refusal() -> None:
    model = networks.ConvVAE((1, 28, 28), width=8, latent_dim=5)
    x = torch.randn(3, 1, 28, 28)
    assert model.encode(x).shape == (3, 10)
    assert model(x).shape == x.shape
    with pytest.raises(ValueError, match="image_shape must have sides divisible by 4"):
        networks.ConvVAE((1, 28, 30), width=8, latent_dim=5)


# ---- pictures -----------------------------------------------------------------------------------


def test_mosaic_puts_each_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 6).reshape(2, 3, 1, 1).expand(2, 3, 8, 8)
    picture = pictures.mosaic(images)
    assert picture.shape == (2 * 8 + 1, 3 * 8 + 2)
    assert (picture[8] == 1).all()
    for row in range(2):
        for column in range(3):
            tile = picture[row * 9 : row * 9 + 8, column * 9 : column * 9 + 8]
            assert (tile == (images[row, column, 0, 0].item() + 1) / 2).all()
    with pytest.raises(ValueError, match="images must be"):
        pictures.mosaic(images[0])


def test_running_mean_is_its_definition() -> None:
    values = torch.tensor([1.0, 5.0, 3.0, -1.0])
    expected = torch.tensor([1, 3, 4, 1], dtype=torch.float64)
    assert torch.equal(pictures.running_mean(values, 2), expected)


def test_pictures_of_the_strips_start_and_end_where_they_say() -> None:
    diffusion = ddpm.build_diffusion(quick_config("digits"))
    images = data.load_images("digits").test[:2]
    timesteps = ddpm.strip_timesteps(diffusion.num_timesteps, 5)
    assert timesteps[0] == diffusion.num_timesteps - 1
    assert timesteps[-1] == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    strip = ddpm.forward_strip(diffusion, images, timesteps, seed=0)
    assert strip.shape == (2, 5, 8, 8)
    distance = (strip - images).square().mean((0, 2, 3))
    assert torch.equal(distance.argsort(descending=True), torch.arange(5))

    x_T = ddpm.initial_noise((2, 1, 8, 8), 0, torch.device("cpu"))

    def by_class(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (labels / 16).view(-1, 1, 1, 1).expand_as(x)

    labels = torch.tensor([3, 8])
    reverse = ddpm.reverse_strip(
        diffusion, by_class, x_T, labels, timesteps, guidance_scale=2.0, seed=0
    )
    assert reverse.shape == (2, 6, 8, 8)
    assert torch.equal(reverse[:, :1], x_T)
    sample = ddpm.sample_ddpm(
        diffusion, by_class, x_T, labels, guidance_scale=2.0, seed=0, progress=False
    )
    assert torch.equal(reverse[:, -1:], sample)
