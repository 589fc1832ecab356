"""DDIM up the noise levels: single steps, and the loop from samples to the noise behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag, as_real
from diffcore._types import Model
from diffcore.coefficients.bound import LEARNED
from diffcore.diffusion import reverse
from diffcore.diffusion.settings import Settings
from diffcore.diffusion.tables import DiffusionTables
from diffcore.guidance import Guidance
from diffcore.noise import PhiloxNoise
from diffcore.sampling.loop import run_table
from diffcore.sampling.model import check_model_kwargs, check_samples, predict
from diffcore.sampling.progress import progress_bar
from diffcore.sampling.sample import guidance_rule
from diffcore.sampling.step import timestep_inputs
from diffcore.solvers.table import TO_X0

# No row of the solver adds noise.
_NOT_READ = PhiloxNoise(0)


class Inversion(Settings):
    """The methods of ``GaussianDiffusion`` that go up the noise levels."""

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        *,
        rederive_epsilon: bool = True,
    ) -> dict[str, Tensor]:
        """One DDIM step up, from t to t + 1: the model is called at t, and no noise is added.

        ``x' = sqrt(alphas_cumprod_{t+1}) pred_xstart + sqrt(1 - alphas_cumprod_{t+1}) epsilon``.
        From t = T - 1 the step goes to alphas_cumprod = 0, where x' = epsilon. A predicted variance
        is not read. For longer steps call it on ``respace(...)``.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
                A clip that bites cannot be inverted.
            denoised_fn: Function of the predicted x_0, before the clip; epsilon is then computed
                from its result. ``None`` for none.
            model_kwargs: More arguments for the model.
            eta: 0.
            rederive_epsilon: Compute epsilon from the clipped x_0 (OpenAI's rule) instead of using
                that of the model. The same without clipping.

        Returns:
            ``sample`` (x_{t+1}) and ``pred_xstart``, like ``x``.

        Raises:
            ValueError: eta other than 0, or ``rederive_epsilon=False`` with ``denoised_fn``.

        Source:
            Song et al. 2021 (arXiv 2010.02502) section 4.3.
        """
        _check_no_noise(eta, "ddim_reverse_sample")
        flag = as_flag("rederive_epsilon", rederive_epsilon)
        _check_denoised_fn(denoised_fn, flag)
        t = self._timesteps_of(x, t)
        clip = self._clip_range(clip_denoised)
        return _step(self.tables, model, x, t, clip, denoised_fn, model_kwargs, flag)

    def ddim_reverse_sample_loop(
        self,
        model: Model,
        x: Tensor,
        *,
        clip_denoised: bool | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        eta: float = 0.0,
        num_steps: int | None = None,
        timestep_spacing: str = "leading",
        rederive_epsilon: bool = True,
        guidance_scale: float | Tensor | None = None,
        guidance: Guidance | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """DDIM inversion: from samples up to the x_T that ``ddim_sample_loop`` makes them from.

        Visits the noise levels of ``ddim_sample_loop`` with the same arguments in the opposite
        order. The first step starts at the clean sample itself, alpha = 1, where the model is
        called at timestep 0 and epsilon is what it predicts; each of the others calls it at the
        timestep of its x, as ``ddim_reverse_sample``. The way up and the way down differ by the
        error of a first-order method. Runs under ``torch.no_grad()``.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: Clean samples, ``[B, ...]``.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
                A clip that bites cannot be inverted.
            denoised_fn: As for ``ddim_reverse_sample``. Not called at the clean sample, where
                the predicted x_0 is x. Not under guidance.
            model_kwargs: More arguments for the model.
            progress: Show a progress bar (tqdm).
            eta: 0.
            num_steps: How many timesteps to visit; ``None`` for all T.
            timestep_spacing: Which timesteps: "leading", "trailing" or "linspace".
            rederive_epsilon: As for ``ddim_reverse_sample``.
            guidance_scale: As for ``diffcore.sample``. Guidance makes the error of the way back
                larger.
            guidance: As for ``diffcore.sample``.
            uncond_kwargs: As for ``diffcore.sample``.

        Returns:
            x_T, like ``x``: pass it as ``noise`` to ``ddim_sample_loop``.

        Raises:
            ValueError: eta other than 0, prediction_type "sample", which does not determine the
                noise of a clean sample, or ``denoised_fn`` with guidance or
                ``rederive_epsilon=False``.

        Source:
            Song et al. 2021 (arXiv 2010.02502) section 4.3.
        """
        _check_no_noise(eta, "ddim_reverse_sample_loop")
        if self.prediction_type == "sample":
            raise ValueError(
                "prediction_type must not be 'sample' for ddim_reverse_sample_loop, got 'sample': "
                "a prediction of x_0 does not determine the noise of a clean sample; call "
                "ddim_reverse_sample from t = 0 up"
            )
        check_samples(x)
        rows = self.tables.rows(num_steps, timestep_spacing)
        clip, flag = self._clip_range(clip_denoised), as_flag("rederive_epsilon", rederive_epsilon)
        rule = guidance_rule(guidance_scale, guidance, uncond_kwargs)
        if denoised_fn is not None:
            _check_denoised_fn(denoised_fn, flag)
            if rule is not None:
                raise ValueError("denoised_fn must be None under guidance, got a function")
            return _adjusted_loop(
                self.tables, model, x, rows, clip, denoised_fn, model_kwargs, progress
            )
        return run_table(
            model,
            x,
            self.tables.ddim_reverse_solver(rows, clip, flag),
            _NOT_READ,
            guidance=rule,
            model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs,
            progress=progress,
            learned=self.tables.variance_type in LEARNED,
        )


def _step(
    tables: DiffusionTables,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip: float | None,
    denoised_fn: Callable[[Tensor], Tensor] | None,
    model_kwargs: Mapping[str, Any] | None,
    rederive_epsilon: bool,
) -> dict[str, Tensor]:
    """One step from t to t + 1: see ``ddim_reverse_sample``."""
    output, _ = reverse.predict(tables, model, x, t, model_kwargs)
    if denoised_fn is None:
        table = tables.ddim_reverse(clip, rederive_epsilon, tables.prediction_type)
        x0 = reverse.predicted_x0(tables, x, output, t, clip)
    else:  # a model that predicts x_0
        table = tables.ddim_reverse(clip, rederive_epsilon, "sample")
        output = _adjusted(denoised_fn, reverse.predicted_x0(tables, x, output, t, None))
        x0 = output if clip is None else output.clamp(-clip, clip)
    return {"sample": reverse.step(x, output, t, table, None), "pred_xstart": x0}


@torch.no_grad()
def _adjusted_loop(
    tables: DiffusionTables,
    model: Model,
    x: Tensor,
    rows: tuple[int, ...] | None,
    clip: float | None,
    denoised_fn: Callable[[Tensor], Tensor],
    model_kwargs: Mapping[str, Any] | None,
    progress: bool,
) -> Tensor:
    """The loop with a function of the predicted x_0 between the model and each step."""
    check_model_kwargs(model_kwargs)
    # An infinite clip: rows in x and x_0, not in the prediction.
    solver = tables.ddim_reverse_solver(rows, math.inf if clip is None else clip, True)
    timesteps, learned = timestep_inputs(solver, x), tables.variance_type in LEARNED
    for i, row in enumerate(progress_bar(solver.rows, solver.name, progress)):
        output, _, _ = predict(model, x, timesteps[i], model_kwargs, learned=learned)
        if i == 0:
            x, _ = solver.step(i, x, output)
            continue
        moves, of_x0, bounds = row.coefficients[:4], row.coefficients[4:6], row.coefficients[6:8]
        x0 = ops.reverse_step(x, output, (*TO_X0, *of_x0, -math.inf, math.inf))
        x = ops.reverse_step(x, _adjusted(denoised_fn, x0), (*moves, 0.0, 1.0, *bounds))
    return x


def _check_denoised_fn(denoised_fn: Any, rederive_epsilon: bool) -> None:
    """Refuse what is no function, or one that leaves epsilon as it is."""
    if denoised_fn is None:
        return
    if not callable(denoised_fn):
        kind = type(denoised_fn).__name__
        raise TypeError(f"denoised_fn must be a function, got {kind}")
    if not rederive_epsilon:
        raise ValueError("rederive_epsilon must be True with denoised_fn, got False")


def _adjusted(denoised_fn: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """What ``denoised_fn`` returns for the predicted x_0, checked."""
    found = denoised_fn(x0)
    if not isinstance(found, Tensor):
        raise TypeError(f"denoised_fn must return a torch.Tensor, got {type(found).__name__}")
    if found.shape != x0.shape or found.dtype != x0.dtype:
        raise ValueError(
            f"denoised_fn must return the shape and dtype of x, {tuple(x0.shape)} and {x0.dtype}, "
            f"got {tuple(found.shape)} and {found.dtype}"
        )
    return found


def _check_no_noise(eta: float, name: str) -> None:
    """Refuse noise on the way up.

    Args:
        eta: Its strength.
        name: Name of the method.

    Raises:
        TypeError: Not a number.
        ValueError: Not 0.
    """
    if as_real("eta", eta) != 0:
        raise ValueError(f"eta must be 0 for {name}, because noise cannot be inverted, got {eta}")
