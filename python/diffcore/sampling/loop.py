"""The sampling loop: every sampler of the package runs a solver table here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag
from diffcore._types import BeforeModel, Callback, Model, Tensors
from diffcore.guidance import Guidance, Weighted
from diffcore.noise import StepNoise
from diffcore.sampling.classifier import Classifier, gradient_of
from diffcore.sampling.known import Known, KnownPart
from diffcore.sampling.model import Prediction, check_model_kwargs, predict
from diffcore.sampling.noise import check_noise_rows, noise_of_row
from diffcore.sampling.progress import progress_bar
from diffcore.sampling.step import (
    CallbackState,
    answer,
    callback_state,
    target_inputs,
    timestep_inputs,
)
from diffcore.sampling.threshold import Threshold
from diffcore.sampling.trajectory import Recorder
from diffcore.solvers import SolverTable
from diffcore.solvers.table import COLUMNS

_C_Z = COLUMNS.index("c_z")


def run_table(
    model: Model,
    x: Tensor,
    table: SolverTable,
    step_noise: StepNoise,
    *,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    threshold: Threshold | None = None,
    before_model: BeforeModel | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
    checkpoint: bool = False,
    classifier: Classifier | None = None,
    known: KnownPart | None = None,
    noise_name: str = "step_noise",
    learned: bool = False,
    callback_first: bool = False,
    recorder: Recorder | None = None,
) -> Tensor:
    """Run a solver table from its first row to its last.

    Rows are selected by Python ints, so nothing is read back from the device.

    Args:
        model: See ``diffcore.sample``, also for the arguments that are not explained here.
        x: Samples to start from.
        table: The solver.
        step_noise: ``(row, x) -> noise``; a noise key, of which row r takes the stream 1 + r after
            its own; or a tensor ``[S, B, ...]``. The noise that churn adds before the first step is
            that of row S.
        guidance: A rule of guidance.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for its unconditional call.
        threshold: Function that gives the bound of x_0.
        before_model: Called once a step, before its model call.
        callback: Called once a step, after it.
        progress: Show a bar; ``None`` for one on terminals only.
        differentiable: Whether autograd records the loop.
        checkpoint: Whether it keeps only the samples between the rows, and runs each row again in
            the backward pass.
        classifier: Guidance by the gradient of a classifier.
        known: The known part of the samples.
        noise_name: What the caller calls ``step_noise``, for errors.
        learned: Whether the model predicts its variance although the table does not read it. A
            table that reads it needs no such hint.
        callback_first: Whether the callback is called between the first model call of a step and
            the change of x, with the x before it, as in k-diffusion. Its answer is not read then.
        recorder: Keeps states and log-probabilities; ``None`` for neither.

    Returns:
        The samples.
    """
    for name, function in (("callback", callback), ("before_model", before_model)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    check_model_kwargs(model_kwargs)
    check_model_kwargs(uncond_kwargs, "uncond_kwargs")
    _check_target(table, classifier, model_kwargs, uncond_kwargs)
    check_noise_rows(step_noise, x, table, noise_name)
    table._launcher.check_guidance(guidance)
    differentiable = as_flag("differentiable", differentiable)
    checkpoint = as_flag("checkpoint", checkpoint)
    if checkpoint and not differentiable:
        raise ValueError("checkpoint must be False without differentiable=True, got True")
    if checkpoint and guidance is not None and guidance.remembers:
        raise ValueError(
            "checkpoint must be False under guidance with momentum, which a row changes, got True"
        )
    loop = _Loop(
        model,
        table,
        step_noise,
        guidance,
        model_kwargs,
        uncond_kwargs,
        threshold,
        before_model,
        callback,
        classifier,
        known,
        noise_name,
        learned or table.variance is not None,
        callback_first,
        recorder,
    )
    if differentiable:
        return loop.run(x, progress, checkpoint)
    with torch.no_grad():
        return loop.run(x, progress, False)


def _check_target(
    table: SolverTable,
    classifier: Classifier | None,
    *model_kwargs: Mapping[str, Any] | None,
) -> None:
    """Refuses what a model with a second timestep input cannot be called with."""
    if table.target_timesteps is None:
        return
    if classifier is not None:
        raise ValueError(
            f"cond_fn must be None for {table.name}, whose model predicts an average over the step "
            "and not x_0"
        )
    for name, kwargs in zip(("model_kwargs", "uncond_kwargs"), model_kwargs, strict=True):
        if table.target_name in (kwargs or {}):
            raise ValueError(
                f"{name} must not hold {table.target_name!r}, which {table.name} passes to the "
                "model; see target_name of the table"
            )


@dataclass(slots=True)
class _Loop:
    """The arguments of ``run_table``, checked."""

    model: Model
    table: SolverTable
    step_noise: StepNoise
    guidance: Guidance | None
    model_kwargs: Mapping[str, Any] | None
    uncond_kwargs: Mapping[str, Any] | None
    threshold: Threshold | None
    before_model: BeforeModel | None
    callback: Callback | None
    classifier: Classifier | None
    known: KnownPart | None
    noise_name: str
    learned: bool
    callback_first: bool
    recorder: Recorder | None
    state: dict[str, Any] = field(default_factory=dict)
    """Of the step that is taken, for the callback after it."""
    targets: Tensor | None = None
    """The second timestep input of every row, if the table has one."""

    def run(self, x: Tensor, progress: bool | None, checkpoint: bool) -> Tensor:
        table = self.table
        if table.start_noise:
            churn = noise_of_row(self.step_noise, len(table), x, self.noise_name)
            x = ops.add_noise(x, churn, table.start_scale, table.start_noise)
        if self.recorder is not None:
            self.recorder.keep(x)
        known = None if self.known is None else self.known.beside(x, self.step_noise)
        timesteps, self.targets = timestep_inputs(table, x), target_inputs(table, x)
        history: Tensors = ()
        rule = None if self.guidance is None else self.guidance.begin()
        for i, row in enumerate(progress_bar(table.rows, table.name, progress)):
            t = timesteps[i]
            if self.before_model is not None and row.begins:
                state = CallbackState(x=x, i=row.step, t=t, alpha=row.alpha, sigma=row.sigma)
                x = answer("before_model", self.before_model, state)
            if checkpoint:
                x, history, *scored = self._again(i, x, t, history, rule, known)
            else:
                x, history, *scored = self._row(i, x, t, history, rule, known, self._call)
            if self.recorder is not None:
                self.recorder.keep(x, scored)
            if self.callback is not None and not self.callback_first and self._ends(i):
                x = answer("callback", self.callback, CallbackState(self.state, x=x))
        return x

    def _ends(self, i: int) -> bool:
        """Whether row i is the last of its step."""
        return i + 1 == len(self.table) or self.table.rows[i + 1].begins

    def _row(
        self,
        i: int,
        x: Tensor,
        t: Tensor,
        history: Tensors,
        rule: Guidance | None,
        known: Known | None,
        call: Callable[..., None] | None,
    ) -> tuple[Any, ...]:
        """One row: the model, the state of the step by ``call``, and what the step returns."""
        table, row = self.table, self.table.rows[i]
        if known is not None:
            x = known.before(x, row.alpha, row.sigma)
        here = None if rule is None else table._launcher.rule_at(i, rule)
        scaled = x if row.input_scale == 1 else row.input_scale * x
        model_kwargs, uncond_kwargs = self.model_kwargs, self.uncond_kwargs
        if self.targets is not None:
            target = {table.target_name: self.targets[i]}
            model_kwargs = {**(model_kwargs or {}), **target}
            uncond_kwargs = None if uncond_kwargs is None else {**uncond_kwargs, **target}
        prediction = predict(
            self.model,
            scaled,
            t,
            model_kwargs,
            None if here is None else uncond_kwargs,
            # Without a second call the model returns both predictions in every row.
            rule is not None and (here is not None or self.uncond_kwargs is None),
            self.learned,
        )
        prediction, here = _guided(prediction, here)
        classifier, gradient = self.classifier, None
        if classifier is not None:
            gradient = gradient_of(classifier.cond_fn, scaled, t, self.model_kwargs)
            prediction, here = classifier.of_prediction(row, gradient, prediction, here)
        bound = None if self.threshold is None else self.threshold(row, x, prediction, here)
        if call is not None and self.callback is not None and row.begins:
            call(table, i, x, t, prediction, here, bound)
        output, uncond, variance = prediction
        noisy = row.coefficients[_C_Z] != 0  # row.noisy, a property, stops torch 2.10's compiler
        x, history, *scored = table.step(
            i,
            x,
            output,
            history,
            noise=noise_of_row(self.step_noise, i, x, self.noise_name) if noisy else None,
            model_output_uncond=uncond,
            guidance=here,
            threshold=bound,
            variance_output=variance if table.variance is not None else None,
            **({} if self.recorder is None else self.recorder.options),
        )
        if classifier is not None and gradient is not None:
            x = classifier.of_result(i, x, gradient, variance)
        if known is not None:
            x = known.after(x, row.next_alpha, row.next_sigma, i + 1 == len(table))
        return x, history, *scored

    def _call(self, *known: Any) -> None:
        """Keeps the state of a step for the callback after it; see ``callback_state``."""
        self.state = callback_state(*known)
        if self.callback_first:
            assert self.callback is not None
            self.callback(self.state)

    def _again(
        self,
        i: int,
        x: Tensor,
        t: Tensor,
        history: Tensors,
        rule: Guidance | None,
        known: Known | None,
    ) -> tuple[Any, ...]:
        """A row that is run again in the backward pass, then without ``call``."""
        # Without gradients, else the callback would save tensors the first time only.
        calls = [] if self.callback is None else [torch.no_grad()(self._call)]

        def row(x: Tensor, *history: Tensor) -> tuple[Tensor, ...]:
            # A compiler takes no change of a list from outside: none without a callback.
            call = calls.pop() if self.callback is not None and calls else None
            x, history, *scored = self._row(i, x, t, history, rule, known, call)
            return (x, *scored, *history)

        x, *rest = torch.utils.checkpoint.checkpoint(row, x, *history, use_reentrant=False)
        scored = 0 if self.recorder is None or not self.recorder.options else 1
        return x, tuple(rest[scored:]), *rest[:scored]


def _guided(prediction: Prediction, rule: Guidance | None) -> tuple[Prediction, Guidance | None]:
    """The predictions that a step reads, and the rule as numbers that are computed once a row."""
    output, uncond, variance = prediction
    if rule is None or uncond is None:
        return (output, None, variance), None
    if not rule.reads_predictions:
        return prediction, rule
    uncond = rule.moved(output, uncond)
    numbers = rule.numbers(output, uncond)
    rule.remember(output, uncond)
    return (output, uncond, variance), Weighted(*numbers)
