from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for _package in ("matplotlib", "PIL", "safetensors", "tqdm", "sklearn"):
    pytest.importorskip(_package)

from diffcore.demo import checkpoint, data, ddpm, flow, likelihood, vae  # noqa: E402
from diffcore.demo.classes import CLASSES  # noqa: E402
from diffcore.demo.config import DemoConfig, quick_config  # noqa: E402
from diffcore.demo.run import (  # noqa: E402
    MODELS,
    build_trainers,
    choose_config,
    choose_device,
    run_demo,
)
from diffcore.demo.training import Interrupted, Trainer, TrainingConfig  # noqa: E402

CPU = torch.device("cpu")
PICTURES = (
    "vae_training.png",
    "vae_samples.png",
    "vae_reconstructions.png",
    "ddpm_training.png",
    "ddpm_samples.png",
    "ddpm_bits.png",
    "ddim_samples.png",
    "flow_training.png",
    "flow_samples.png",
    "forward.png",
    "reverse.png",
)


# ---- training, interruption, resuming -----------------------------------------------------------


Data = tuple[Tensor, Tensor]


def _trainers(folder: Path, steps: int, seed: int = 0) -> tuple[dict[str, Trainer], Data]:
    config = DemoConfig(
        **{
            **quick_config("digits").__dict__,
            "steps": steps,
            "vae_steps": steps,
            "flow_steps": steps,
            "warmup_steps": 2,
            "seed": seed,
            "batch_size": 16,
        }
    )
    images = data.load_images("digits")
    trainers = build_trainers(config, images, folder, CPU)
    return trainers, (images.train, images.train_labels)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    return {
        **checkpoint.prefixed("model", trainer.model.state_dict()),
        **checkpoint.prefixed("ema", trainer.ema.state_dict()),
        **checkpoint.optimizer_tensors(trainer.model, trainer.optimizer),
        "history": trainer.history,
        "generator": trainer.generator.get_state(),
    }


def _assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("which", MODELS)
def test_resuming_gives_the_same_bits(tmp_path: Path, which: str) -> None:
    steps = 8
    trainers, train = _trainers(tmp_path / "whole", 2 * steps)
    whole = trainers[which]
    whole.fit(*train, name="whole", progress=False)

    first = _trainers(tmp_path / "parts", 2 * steps)[0][which]
    plain_loss = first.loss

    def interrupted(model: nn.Module, *batch: Any) -> Tensor:
        if first.step == steps - 1:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of the step
        return plain_loss(model, *batch)

    first.loss = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"first: saved at step {steps} of {2 * steps}"):
        first.fit(*train, name="first", progress=False)
    assert signal.getsignal(signal.SIGINT) is before

    second = _trainers(tmp_path / "parts", 2 * steps)[0][which]
    second.load()
    assert second.step == steps
    _assert_same_bits(_state(first), _state(second))
    second.fit(*train, name="second", progress=False)
    _assert_same_bits(_state(whole), _state(second))


def test_a_keyboard_interrupt_inside_a_step_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    trainers, train = _trainers(tmp_path, 8)
    trainer = trainers["ddpm"]
    trainer.config = TrainingConfig(**{**trainer.config.__dict__, "checkpoint_every": 3})
    plain_loss = trainer.loss

    def interrupted(model: nn.Module, *batch: Any) -> Tensor:
        if trainer.step == 5:
            raise KeyboardInterrupt
        return plain_loss(model, *batch)

    trainer.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(*train, name="x", progress=False)
    again = _trainers(tmp_path, 8)[0]["ddpm"]
    again.load()
    assert again.step == 3


def test_the_seed_governs_training(tmp_path: Path) -> None:
    histories = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(histories))  # the global generator must not matter
        trainers, train = _trainers(tmp_path, 3, seed)
        trainer = trainers["ddpm"]
        trainer.fit(*train, name="x", progress=False)
        histories.append(trainer.history)
    assert torch.equal(histories[0], histories[1])
    assert not torch.equal(histories[0], histories[2])


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainingConfig(
        steps=100,
        batch_size=1,
        learning_rate=2.0,
        warmup_steps=10,
        ema_decay=0.9,
        seed=0,
        checkpoint_every=1,
    )
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(50) == pytest.approx(1.0)
    assert 0 < config.learning_rate_at(99) < 0.001


def test_checkpoint_of_another_length_is_refused(tmp_path: Path) -> None:
    _trainers(tmp_path, 8)[0]["ddpm"].save()
    longer = _trainers(tmp_path, 9)[0]["ddpm"]
    with pytest.raises(ValueError, match=r"steps must be 9, as in config.json, .* got 8"):
        longer.load()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load_checkpoint(tmp_path / "none.safetensors")


# ---- settings -----------------------------------------------------------------------------------


def _choose(out: Path, **changes: object) -> DemoConfig:
    options = {"data": None, "steps": None, "vae_steps": None, "flow_steps": None, "seed": None}
    return choose_config(out, **{**options, "quick": False, "resume": False, **changes})  # type: ignore[arg-type]


def test_resume_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    config = _choose(tmp_path, quick=True, steps=12, seed=3)
    config.save(tmp_path / "config.json")
    assert _choose(tmp_path, resume=True) == config
    assert _choose(tmp_path, resume=True, steps=12, data="digits") == config
    with pytest.raises(ValueError, match=r"steps must be 12 to resume the run in .*, got 13"):
        _choose(tmp_path, resume=True, steps=13)
    with pytest.raises(ValueError, match=r"data must be digits to resume the run in .*, got mnist"):
        _choose(tmp_path, resume=True, data="mnist")
    with pytest.raises(FileNotFoundError, match="out must hold a run to resume"):
        _choose(tmp_path / "empty", resume=True)
    (tmp_path / "config.json").write_text('{"data": "digits", "color": 3}')
    with pytest.raises(ValueError, match="must be the settings of a demo run"):
        _choose(tmp_path, resume=True)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steps must be in 1 \.\. 10000000, got 0"):
        _choose(tmp_path, steps=0)
    with pytest.raises(ValueError, match="data must be digits with --quick, got mnist"):
        _choose(tmp_path, quick=True, data="mnist")
    with pytest.raises(ValueError, match="samples must be a multiple of 10, got 36"):
        quick_config("digits").replace({"samples": 36})
    with pytest.raises(ValueError, match="device must be auto or a torch device, got 'gpu'"):
        choose_device("gpu")


# ---- the smoke run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick demo, run once through the real command."""
    out = tmp_path_factory.mktemp("demo") / "out"
    subprocess.run(
        [
            *(sys.executable, "-m", "diffcore", "demo", "--quick", "--steps", "300"),
            *("--device", "cpu", "--out", str(out)),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # images of 8x8 gain nothing from threads
    )
    return out


def _report(out: Path) -> dict[str, dict[str, float]]:
    report: dict[str, dict[str, float]] = json.loads((out / "report.json").read_text())
    return report


def test_smoke_run_leaves_everything(smoke_run: Path) -> None:
    from PIL import Image

    for name in PICTURES:
        with Image.open(smoke_run / name) as image:
            assert image.width > 400, name
            assert len(image.convert("L").getcolors() or range(99)) > 16, name
    report = _report(smoke_run)
    assert report["config"]["data"] == "digits"
    assert report["environment"]["backend"] in ("native", "reference")
    assert report["ddpm"]["steps"] == report["config"]["steps"]
    assert report["vae"]["train_seconds"] > 0
    assert not list(smoke_run.rglob("*.partial"))


def test_ddpm_learns_more_than_to_rescale_its_input(smoke_run: Path) -> None:
    """The optimal multiple of x_t has an error known in closed form; the U-Net must halve it.

    With second moment m of the pixels, the best c_t x_t leaves alpha^2 m / (alpha^2 m + sigma^2)
    of the noise unexplained. An untrained network predicts 0, which leaves all of it.
    """
    images = data.load_images("digits")
    test, labels = images.test, images.test_labels
    config = quick_config("digits")
    diffusion = ddpm.build_diffusion(config)
    alpha_bar = (1 - diffusion.betas.double()).cumprod(0)
    signal_power = alpha_bar * test.double().square().mean()
    bound = 0.5 * (signal_power / (signal_power + 1 - alpha_bar)).mean().item()

    untrained = ddpm.build_network(config, (1, 8, 8))
    assert ddpm.held_out_loss(diffusion, untrained, test, labels, seed=0) > bound
    assert _report(smoke_run)["ddpm"]["held_out_loss"] < bound


def test_vae_learns_more_than_the_mean_image(smoke_run: Path) -> None:
    """A decoder that ignores its latents is best at the mean image, with KL 0."""
    images = data.load_images("digits")
    config = quick_config("digits")
    variance = config.decoder_std**2
    error = (images.test - images.train.mean(0)).double().square().flatten(1).sum(1).mean().item()
    bound = -0.5 * (64 * math.log(2 * math.pi * variance) + error / variance)

    untrained = vae.build_network(config, (1, 8, 8))
    measured = vae.held_out_elbo(untrained, images.test, decoder_std=config.decoder_std, seed=0)
    assert measured["elbo_nats"] < bound
    assert _report(smoke_run)["vae"]["held_out"]["elbo_nats"] > bound  # type: ignore[index]


def test_the_likelihoods_are_reported(smoke_run: Path) -> None:
    report: Any = _report(smoke_run)
    bits, exact = (report["ddpm"]["held_out_bits"], report["ddpm"]["held_out_bits"]["exact"])
    assert 0 < bits["bits_per_dim"] < 8  # 8 bits: independent uniform pixels
    apart = bits["bits_per_dim"] - exact["bits_per_dim"]
    assert abs(apart) < 5 * math.hypot(bits["standard_error"], exact["standard_error"])
    assert len(exact["terms"]) == report["config"]["num_timesteps"]
    total = exact["prior"] + sum(exact["terms"])
    assert exact["bits_per_dim"] == pytest.approx(total, rel=1e-9)
    assert bits["images"] == report["data"]["test_images"]
    assert exact["images"] == report["config"]["bits_exact_images"]
    config = quick_config("digits")
    untrained = ddpm.build_network(config, (1, 8, 8))
    images = data.load_images("digits")
    some = images.test[:20], images.test_labels[:20]
    diffusion = ddpm.build_diffusion(config)
    worse, _ = likelihood.held_out_bits(diffusion, untrained, *some, config, seed=0, progress=False)
    assert bits["bits_per_dim"] < worse.total

    vae_bound = report["vae"]["held_out"]
    elbo = vae_bound["log_likelihood_nats"] - vae_bound["kl_nats"]
    assert vae_bound["elbo_nats"] == pytest.approx(elbo)
    assert vae_bound["bits_per_dim"] == pytest.approx(-elbo / (64 * math.log(2)))
    assert vae_bound["importance_weighted_nats"] > elbo
    lines = likelihood.summary_of_ddpm(report["ddpm"])
    assert f"{bits['bits_per_dim']:.3f} ± {bits['standard_error']:.3f} bits/dim" in lines[0]
    assert f"ELBO {elbo:.1f} nats" in likelihood.summary_of_vae(report["vae"])[0]


def test_the_ddpm_uses_the_class(smoke_run: Path) -> None:
    """Its loss and its bound are better with the right class than with another one."""
    tensors, scalars = checkpoint.load_checkpoint(smoke_run / "checkpoints" / "ddpm.safetensors")
    config = DemoConfig(**scalars["config"])
    model = ddpm.build_network(config, (1, 8, 8))
    model.load_state_dict(tensors)
    diffusion = ddpm.build_diffusion(config)
    images = data.load_images("digits")
    test, labels = images.test, images.test_labels
    losses, bits = [], []
    for classes in (labels, (labels + 1) % CLASSES):
        losses.append(ddpm.held_out_loss(diffusion, model, test, classes, seed=0))
        found, _ = likelihood.held_out_bits(
            diffusion, model, test, classes, config, seed=0, progress=False
        )
        bits.append(found.total)
    assert losses[0] < losses[1]
    assert bits[0] < bits[1]


def test_the_flow_uses_the_class(smoke_run: Path) -> None:
    """Its loss is better with the right class than with another one."""
    tensors, scalars = checkpoint.load_checkpoint(smoke_run / "checkpoints" / "flow.safetensors")
    config = DemoConfig(**scalars["config"])
    model = flow.build_network(config, (1, 8, 8))
    model.load_state_dict(tensors)
    images = data.load_images("digits")
    test, labels = images.test, images.test_labels
    losses = [
        flow.held_out_loss(model, test, classes, seed=0)
        for classes in (labels, (labels + 1) % CLASSES)
    ]
    assert losses[0] < losses[1]
    report: Any = _report(smoke_run)
    found = report["flow"]
    # The best multiple of x_t, at the mean of x_t, explains less.
    assert found["held_out_loss"] < flow.held_out_loss(
        flow.build_network(config, (1, 8, 8)), test, labels, seed=0
    )
    bits = found["held_out_bits"]
    assert 0 < bits["bits_per_dim"] < 8
    assert f"{bits['bits_per_dim']:.3f} ±" in likelihood.summary_of_flow(found)[0]


def test_one_model_alone(tmp_path: Path) -> None:
    report = run_demo(
        tmp_path, quick=True, steps=2, only="ddpm", device="cpu", progress=False, log=str
    )
    assert "ddpm" in report
    assert not {"vae", "flow"} & report.keys()
    assert not (tmp_path / "flow_samples.png").exists()
    with pytest.raises(ValueError, match="only must be one of 'vae', 'ddpm', 'flow', got 'gan'"):
        run_demo(tmp_path, quick=True, only="gan")


def test_weights_load_into_a_new_model_and_sample(smoke_run: Path) -> None:
    tensors, scalars = checkpoint.load_checkpoint(smoke_run / "checkpoints" / "ddpm.safetensors")
    config = DemoConfig(**scalars["config"])
    model = ddpm.build_network(config, (1, 8, 8))
    model.load_state_dict(tensors)
    diffusion = ddpm.build_diffusion(config)
    x_T = ddpm.initial_noise((4, 1, 8, 8), 0, CPU)

    def sampled() -> Tensor:
        labels = torch.arange(4)
        return ddpm.sample_ddim(
            diffusion, model, x_T, labels, guidance_scale=2.0, num_steps=10, progress=False
        )

    samples = sampled()
    assert samples.shape == x_T.shape
    assert samples.abs().max() <= 1  # the last step ends at the clipped x_0
    assert torch.equal(samples, sampled())


def test_resuming_a_finished_run_only_draws_again(smoke_run: Path) -> None:
    before = _report(smoke_run)
    lines: list[str] = []
    (smoke_run / "reverse.png").unlink()
    after = run_demo(smoke_run, resume=True, device="cpu", progress=False, log=lines.append)
    assert (smoke_run / "reverse.png").exists()
    assert "DDPM: resumed at step 300 of 300" in lines
    assert after["ddpm"]["final_loss"] == before["ddpm"]["final_loss"]  # type: ignore[index]
    assert after["vae"]["held_out"]["kl_nats"] == pytest.approx(  # type: ignore[index]
        before["vae"]["held_out"]["kl_nats"],  # type: ignore[index]
        rel=1e-4,  # the order of sums depends on the thread count
    )
