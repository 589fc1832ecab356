"""The training loop of both models: counts steps, stops at any, resumes bit for bit."""

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

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from diffcore.demo import checkpoint

LossFunction = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


class Interrupted(Exception):
    """Training was stopped by Ctrl-C, after its state was saved."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        steps: Optimiser steps, also the length of the cosine decay.
        batch_size: Images a step, drawn with replacement.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps of linear warm-up.
        ema_decay: Decay of the averaged weights.
        seed: Governs initial weights, batches, and what the loss draws.
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
        """Return the learning rate of a step: linear warm-up times cosine decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


class Trainer:
    """Trains one model and keeps its averaged weights, loss history and checkpoint.

    All randomness comes from one CPU generator, whose state is in the checkpoint, so that a run on
    any device sees the same batches and noise, and a resumed run goes on where the other stopped.
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
        """Build the model and its optimiser.

        Args:
            build: Makes the model; runs under `config.seed`.
            loss: From model, batch ``[B, ...]`` and generator to metrics ``[len(metrics)]``; the
                first is minimised.
            metrics: Their names.
            config: How to train.
            path: Where the training state is saved.
            device: Where to train.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build()
        # torch's stubs do not know this argument of Module.to
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
        """Whether every step is done."""
        return self.step >= self.config.steps

    @property
    def averaged_model(self) -> nn.Module:
        """The model with averaged weights."""
        module: nn.Module = self.ema.module
        return module

    def fit(self, images: Tensor, *, name: str, progress: bool = True) -> None:
        """Train until every step is done.

        Args:
            images: ``[N, C, H, W]``, on the training device.
            name: Shown beside the progress bar.
            progress: Whether to show one; never shown where there is no terminal.

        Raises:
            Interrupted: After Ctrl-C. The step under way was finished and its state saved.
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
                self._train_step(images)
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
                    raise Interrupted(f"{name}: saved at step {self.step} of {self.config.steps}")

    def _train_step(self, images: Tensor) -> None:
        index = torch.randint(len(images), (self.config.batch_size,), generator=self.generator)
        values = self.loss(self.model, images[index.to(self.device)], self.generator)
        self.optimizer.zero_grad()
        values[0].backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.history[self.step] = values.detach()  # stays on the device: no wait for the number
        self.step += 1

    def save(self) -> None:
        """Save all that `load` needs to go on as if nothing had happened."""
        tensors = {
            **checkpoint.prefixed("model", self.model.state_dict()),
            **checkpoint.prefixed("ema", self.ema.state_dict()),
            **checkpoint.prefixed(
                "optimizer", checkpoint.optimizer_tensors(self.model, self.optimizer)
            ),
            "generator": self.generator.get_state(),
            "history": self.history,
        }
        scalars = {"step": self.step, "steps": self.config.steps, "seconds": self.seconds}
        checkpoint.save_checkpoint(self.path, tensors, scalars)

    def load(self) -> None:
        """Go back to the state that `save` left in `path`.

        Raises:
            FileNotFoundError: If nothing was saved.
            ValueError: If it was saved by a run of another length.
        """
        tensors, scalars = checkpoint.load_checkpoint(self.path)
        if scalars["steps"] != self.config.steps:
            raise ValueError(
                f"{self.path} belongs to a run of {scalars['steps']} steps, not "
                f"{self.config.steps}: the learning rate's decay depends on it"
            )
        self.model.load_state_dict(checkpoint.stripped("model", tensors))
        self.ema.load_state_dict(checkpoint.stripped("ema", tensors))
        checkpoint.restore_optimizer(
            self.model, self.optimizer, checkpoint.stripped("optimizer", tensors)
        )
        self.generator.set_state(tensors["generator"])
        self.history.copy_(tensors["history"])
        self.step, self.seconds = scalars["step"], scalars["seconds"]


@contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is torn; the second acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
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
