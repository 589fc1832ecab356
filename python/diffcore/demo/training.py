"""The training loop of all models. A stopped run resumes with the same bits."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from diffcore.demo import checkpoint

LossFunction = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


class Interrupted(Exception):
    """Training was stopped by Ctrl-C and its state was saved."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training.

    Attributes:
        steps: Optimizer steps, also the length of the cosine decay.
        batch_size: Images per step, sampled with replacement.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps of linear warmup.
        ema_decay: Decay of the averaged weights.
        seed: Seed of initial weights, batches, and random numbers of the loss.
        checkpoint_every: Steps between two saves.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    seed: int
    checkpoint_every: int

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warmup times cosine decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


class Trainer:
    """Trains one model and keeps its averaged weights, loss history and checkpoint.

    All randomness comes from one CPU generator, whose state is saved in the checkpoint. Batches and
    noise are therefore the same on every device, and a resumed run continues the interrupted one.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: LossFunction,
        metrics: tuple[str, ...],
        config: TrainingConfig,
        *,
        path: Path,
        device: torch.device,
    ) -> None:
        """Build the model and its optimizer.

        Args:
            build: Builds the model. Called with torch seeded by ``config.seed``.
            loss: Maps model, images ``[B, ...]``, their classes ``[B]`` and generator to metrics
                ``[len(metrics)]``, the first of which is minimized.
            metrics: Names of the metrics.
            config: Settings of the training.
            path: File of the training state.
            device: Device to train on.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build()
        # The type stubs of torch lack this argument of Module.to.
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = loss
        self.metrics = metrics
        self.config = config
        self.path = path
        self.device = device
        self.step = 0
        self.seconds = 0.0
        self.history = torch.zeros(config.steps, len(metrics), device=device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema.eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    @property
    def averaged_model(self) -> nn.Module:
        """The model with averaged weights."""
        module: nn.Module = self.ema.module
        return module

    def fit(self, images: Tensor, labels: Tensor, *, name: str, progress: bool = True) -> None:
        """Train until all steps are done.

        Args:
            images: ``[N, C, H, W]``, on the training device.
            labels: Their classes ``[N]``, on the training device.
            name: Label of the progress bar.
            progress: Whether to show a progress bar; without a terminal none is shown.

        Raises:
            Interrupted: After Ctrl-C. The current step was finished and its state saved.
        """
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=name,
            disable=None if progress else True,
            unit="step",
        )
        with bar, _stop_on_ctrl_c() as stop:
            started = time.perf_counter()
            while not self.finished:
                self._train_step(images, labels)
                bar.update()
                if self.step % 25 == 0 and not bar.disable:
                    recent = self.history[self.step - 25 : self.step, 0].mean().item()
                    bar.set_postfix_str(f"{self.metrics[0]} {recent:.4g}")
                stopped = stop.is_set()
                if stopped or self.finished or self.step % self.config.checkpoint_every == 0:
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    self.seconds += time.perf_counter() - started
                    self.save()
                    started = time.perf_counter()
                if stopped:
                    done = f"step {self.step} of {self.config.steps}"
                    raise Interrupted(f"{name}: saved at {done} in {self.path}")

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        index = torch.randint(len(images), (self.config.batch_size,), generator=self.generator)
        index = index.to(self.device)
        values = self.loss(self.model, images[index], labels[index], self.generator)
        self.optimizer.zero_grad()
        values[0].backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.history[self.step] = values.detach()  # on the device, so that no step waits for it
        self.step += 1

    def save(self) -> None:
        """Save the complete training state, from which ``load`` continues with the same bits."""
        scalars = {"step": self.step, "steps": self.config.steps, "seconds": self.seconds}
        checkpoint.save_checkpoint(self.path, self._tensors(), scalars)

    def load(self) -> None:
        """Restore the state that ``save`` wrote to ``path``.

        Raises:
            FileNotFoundError: If there is no saved state.
            DamagedFileError: If the file is damaged, another file, or of a run of other settings.
        """
        tensors, scalars = checkpoint.load_checkpoint(self.path, self._check)
        self.model.load_state_dict(checkpoint.stripped("model", tensors))
        self.ema.load_state_dict(checkpoint.stripped("ema", tensors))
        checkpoint.restore_optimizer(
            self.model, self.optimizer, checkpoint.stripped("optimizer", tensors)
        )
        self.generator.set_state(tensors["generator"])
        self.history.copy_(tensors["history"])
        self.step, self.seconds = scalars["step"], scalars["seconds"]

    def _check(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Check all of a saved state, so that a refused one changes nothing."""
        step, steps, seconds = (scalars.get(name) for name in ("step", "steps", "seconds"))
        if type(steps) is not int or steps != self.config.steps:
            raise ValueError(
                f"steps must be {self.config.steps}, as in config.json, for the learning rate "
                f"depends on it, got {steps!r}"
            )
        if type(step) is not int or not 0 <= step <= steps:
            raise ValueError(f"step must be in 0 .. {steps}, got {step!r}")
        if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be a float of at least 0, got {seconds!r}")
        expected = checkpoint.specs(self._tensors())
        if step > 0:
            moments = checkpoint.optimizer_specs(self.model)
            expected |= checkpoint.prefixed("optimizer", moments)
        checkpoint.check_tensors(tensors, expected)
        try:
            torch.Generator().set_state(tensors["generator"])
        except RuntimeError as error:
            raise ValueError(f"generator must be the state of a CPU generator: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        """The complete state. A new optimizer has none before its first step."""
        return {
            **checkpoint.prefixed("model", self.model.state_dict()),
            **checkpoint.prefixed("ema", self.ema.state_dict()),
            **checkpoint.prefixed(
                "optimizer", checkpoint.optimizer_tensors(self.model, self.optimizer)
            ),
            "generator": self.generator.get_state(),
            "history": self.history,
        }


@contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, read between steps; the second acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can install handlers
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
