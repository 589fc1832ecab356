from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def _main(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_every_example_is_tested() -> None:
    tested = {
        *("train_and_sample", "vae_loss", "ops_directly"),
        *("same_images_everywhere", "sample_demo_checkpoint", "compare_solvers"),
        *("bits_per_dim", "many_gpus", "train_with_diffusers"),
        "comfyui_nodes",  # by test_comfyui_nodes.py
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_train_and_sample_finds_the_ring() -> None:
    # A Gaussian with the ring's own second moment lies this far from the circle:
    # E|r - 1| for r with density 2 r exp(-r^2).
    grid = [(i + 0.5) / 1000 for i in range(6000)]
    gaussian = sum(abs(r - 1) * 2 * r * math.exp(-r * r) for r in grid) / 1000
    assert _main("train_and_sample")(1000) < 0.5 * gaussian


def test_vae_bound_is_tight_and_below_the_density() -> None:
    samples, dim, latent = 100_000, 8, 2
    bound, density = _main("vae_loss")(1000)
    # One draw of z a sample leaves noise: that of log q(z|x) / p(z). Its variance for a latent of
    # posterior variance v is (1 - v)^2 / 2 + (1 - v) v, at most 1/2, on average over x.
    assert bound < density + 4 * math.sqrt(latent / 2 / samples)
    # A decoder that ignores z reaches E log N(x; 0, I); training closes all but 1 % of that gap.
    torch.manual_seed(0)
    weight = torch.randn(dim, latent)  # the example's own
    power = weight.square().sum().item() + dim
    ignoring = -0.5 * (dim * math.log(2 * math.pi) + power)
    assert density - bound < 0.01 * (density - ignoring)


def _ddpm_std_of_gaussian_data(std: float) -> float:
    """Follow the variance of the ops_directly sampler, an affine map a step, in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0).tolist()

    def gain(i: int) -> float:
        return math.sqrt(alpha_bar[i]) * std**2 / (alpha_bar[i] * std**2 + 1 - alpha_bar[i])

    variance = 1.0
    for i in range(999, 0, -1):
        beta, now, before = betas[i].item(), alpha_bar[i], alpha_bar[i - 1]
        of_x0 = math.sqrt(before) * beta / (1 - now)
        of_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - now)
        factor = of_x0 * gain(i) + of_x_t
        variance = factor**2 * variance + beta * (1 - before) / (1 - now)
    return gain(0) * math.sqrt(variance)


def test_ops_directly_gives_back_the_data() -> None:
    mean, std = _main("ops_directly")(1000)
    expected, count = _ddpm_std_of_gaussian_data(0.2), 1000 * 16
    assert abs(expected - 0.2) < 0.01
    assert abs(mean - 0.3) < 4 * expected / math.sqrt(count)
    assert abs(std - expected) < 4 * expected / math.sqrt(2 * count)


def test_same_images_everywhere(tmp_path: Path) -> None:
    # As a script: the processes that it starts import it.
    picture = tmp_path / "images.png"
    command = [sys.executable, str(EXAMPLES / "same_images_everywhere.py"), "--picture"]
    printed = subprocess.run(
        [*command, str(picture)], capture_output=True, text=True, check=True
    ).stdout
    assert "equal bits: True" in printed
    assert picture.exists() == ("no picture" not in printed)


def test_compare_solvers_ranks_them_by_their_order(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    main, picture = _main("compare_solvers"), tmp_path / "solvers.png"
    few, many = main(16, picture, count=200), main(64, count=200)
    assert picture.stat().st_size > 1000
    # Four times the calls: a quarter of the error of order 1, less than an eighth of order 2.
    assert 0.15 < many["Euler"] / few["Euler"] < 0.4
    for name in ("Heun", "DPM++ 2M", "UniPC"):
        assert many[name] < few[name] / 8
    # DDPM draws another sample of the same data: no solver ends where it does.
    assert many["DDPM"] > 10 * many["Euler"]


def test_bits_per_dim_are_the_entropy() -> None:
    # The best model of Gaussian data: its bound is their entropy, and what is left at T.
    entropy, every, few = _main("bits_per_dim")(200, 8)
    for bits in (every, few):
        assert abs(bits.total - entropy) < 4 * bits.standard_error
        assert bits.standard_error < 0.1
    assert few.model_calls == 18 < every.model_calls
    assert every.prior < 1e-4


def test_many_gpus_is_one_gpu() -> None:
    script = str(EXAMPLES / "many_gpus.py")
    # Standalone: at a free port, as another test may have the default one.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(torchrun, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "processes: 2" in printed
    images, bits = _main("many_gpus")()
    assert images.shape == (10, 1, 8)
    assert bits.total < 8  # which a model that predicts nothing would need
    assert bits.samples == 256
    # Equal but for the rounding of the gradients' sums, and that of the printed digits.
    found = [float(v) for v in re.findall(r"-?\d+\.\d+", printed)]
    wanted = [bits.total, bits.standard_error, *images[0].flatten().tolist()]
    assert found == pytest.approx(wanted, abs=2e-3)


@pytest.mark.filterwarnings("ignore")  # those of diffusers and accelerate
def test_train_with_diffusers(tmp_path: Path) -> None:
    for package in ("accelerate", "sklearn"):
        pytest.importorskip(package)
    diffusers = pytest.importorskip("diffusers")
    losses, images = _main("train_with_diffusers")(40, tmp_path / "pipe", ema=True)
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).float().flatten(1) / 16

    def distance(x: torch.Tensor) -> float:
        return float(torch.cdist(x.flatten(1).float(), digits).min(1).values.mean())

    # Without training the samples are as far from the nearest digit as random pixels.
    assert distance(images) < 0.75 * distance(torch.rand(16, 64))
    # What was saved is a stock pipeline: the same images from the same seed, up to rounding.
    pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    pipe.set_progress_bar_config(disable=True)
    again = pipe(16, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np")
    torch.testing.assert_close(torch.from_numpy(again.images), images, rtol=0, atol=1e-4)


def test_sample_demo_checkpoint_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "PIL", "safetensors", "tqdm", "sklearn"):
        pytest.importorskip(package)
    from diffcore.demo.run import run_demo

    run_demo(tmp_path, quick=True, steps=2, vae_steps=2, flow_steps=2, device="cpu", progress=False)
    picture = tmp_path / "digits.png"
    arguments = [str(tmp_path), str(picture), "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["sample_demo_checkpoint.py", *arguments])
    runpy.run_path(str(EXAMPLES / "sample_demo_checkpoint.py"), run_name="__main__")
    assert picture.stat().st_size > 1000
