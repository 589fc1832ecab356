"""Flow matching: a model of the velocity between data and noise, from its loss to its samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag, as_int, as_positive, as_real, as_shape, check_choice
from diffcore._devices import to_device
from diffcore._engine.kept import FixedSettings, made_plainly
from diffcore._types import Coef, Model
from diffcore.diffusion.checks import check_mask, check_perturbation, check_reduction
from diffcore.flows import shifts, training
from diffcore.flows.convention import TARGETS, Convention
from diffcore.flows.drawing import Law
from diffcore.flows.levels import FlowLevels, in_own_units
from diffcore.guidance import Guidance
from diffcore.noise import Noise, PhiloxNoise, StepNoise
from diffcore.ops._noise import default_key
from diffcore.sampling.noise import initial_sample
from diffcore.sampling.sample import sample
from diffcore.schedules import dynamic_shift_mu, shift_sigmas
from diffcore.solvers import SolverTable, flow_euler_table
from diffcore.solvers.paths import level_vector, refuse_first
from diffcore.timesteps import Density

Weighting = str | Callable[[Tensor], Tensor]


class FlowMatching(FixedSettings):
    """Flow matching with straight paths, x_t = (1 - sigma) x_0 + sigma noise, and its sampler.

    The model predicts the velocity noise - x_0 or x_0 - noise. It is called as ``model(x_t,
    num_train_timesteps * t, **model_kwargs)`` with float32 ``[B]`` (float64 beside float64
    samples), and returns a tensor of the shape of ``x_t``. Under autocast its output may have
    another floating-point dtype; it is converted to that of ``x_t``.

    sigma counts from the data (0) to the noise (1), for densities, shifts and weights. t is sigma
    where the noise is at 1, and 1 - sigma where it is at 0. Direction and sign are never guessed:
    who changes one of them names both. The two conventions in use::

        noise_at=1, target="noise_minus_data"   SD3, Flux, Wan, openpi (the default)
        noise_at=0, target="data_minus_noise"   flow_matching, lucidrains, Matcha-TTS, GR00T

    There are no parameters, and nothing to move by ``.to()``.

    Args:
        timestep_density: The density of sigma: "uniform", "logit_normal", "mode", "cosmap", "beta"
            (``diffcore.timesteps``), or a function from u, float64 ``[B]`` in (0, 1), to sigma.
        density_parameters: Parameters of the named density, such as ``{"mean": 0.5}``.
        stratified: One u in each of B equal parts of (0, 1).
        shift: Shift of sigma in training and sampling, ``spacings.shift_sigmas``: a number, or a
            function of the shape ``[B, ...]`` of the samples, such as ``flows.ResolutionShift()``.
        weighting: "none", "sigma_sqrt", "cosmap" (``losses.flow_weights``), or a function from
            sigma to weights of its shape.
        noise_at: The t of pure noise, 1 or 0; ``None`` for 1.
        target: What the model predicts, "noise_minus_data" or "data_minus_noise"; ``None`` for the
            first.
        sigma_min: The noise that is left at the data (OT-CFM): x_t = (1 - sigma) x_0 + (sigma_min +
            (1 - sigma_min) sigma) noise, and (1 - sigma_min) noise takes the place of the noise in
            the target.
        num_train_timesteps: The timestep input of the model is this times t.
        spacing: The levels of sampling before the shift: a function from num_steps to falling
            values of sigma ``[num_steps + 1]``; ``None`` for equal steps from 1 to 0.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown string, a number out of its range, a direction without a sign or a
            sign without a direction, or parameters that the density does not have.

    Source:
        Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024
        (arXiv 2403.03206) for densities, shifts and weights.
    """

    def __init__(
        self,
        *,
        timestep_density: Density = "uniform",
        density_parameters: Mapping[str, float] | None = None,
        stratified: bool = False,
        shift: shifts.Shift = 1.0,
        weighting: Weighting = "none",
        noise_at: int | None = None,
        target: str | None = None,
        sigma_min: float = 0.0,
        num_train_timesteps: float = 1000.0,
        spacing: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        noise_at, target = _direction_and_sign(noise_at, target)
        sigma_min = as_real("sigma_min", sigma_min)
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min must be in [0, 1), got {sigma_min}")
        scale = as_positive("num_train_timesteps", num_train_timesteps, finite=True)
        if not callable(weighting):
            check_choice("weighting", weighting, training.WEIGHTINGS, "or pass a function of sigma")
        if spacing is not None and not callable(spacing):
            raise TypeError(
                f"spacing must be a function of num_steps, got {type(spacing).__name__}"
            )
        self.timestep_density = timestep_density
        self.density_parameters = dict(density_parameters or {})
        self.stratified = as_flag("stratified", stratified)
        self.shift = shift if callable(shift) else as_positive("shift", shift, finite=True)
        self.weighting = weighting
        self.noise_at = noise_at
        self.target = target
        self.sigma_min = sigma_min
        self.num_train_timesteps = scale
        self.spacing = spacing
        sign = 1.0 if target == "noise_minus_data" else -1.0
        self._convention = Convention(noise_at, sign, sigma_min, scale)
        self._law = Law(timestep_density, self.density_parameters, self.stratified)
        made_plainly(self._law.check)

    # ---- presets -------------------------------------------------------------------------------

    @classmethod
    def sd3(cls, **changes: Any) -> FlowMatching:
        """Stable Diffusion 3: logit-normal times, shift 3, and the levels of its own samplers.

        Args:
            **changes: Arguments of the constructor that replace those of the preset.

        Returns:
            A ``FlowMatching``; its ``levels`` are those of diffusers'
            ``FlowMatchEulerDiscreteScheduler(shift=3)`` after ``set_timesteps(n)``.

        Source:
            Esser et al. 2024 (arXiv 2403.03206); diffusers' ``train_dreambooth_sd3.py``.
        """
        preset: dict[str, Any] = {
            "timestep_density": "logit_normal",
            "shift": 3.0,
            "spacing": shifts.of_sd3,
        }
        return cls(**preset | changes)

    @classmethod
    def flux(cls, image_seq_len: int | None = None, **changes: Any) -> FlowMatching:
        """Flux: logit-normal times, and the shift exp(mu) of an image of ``image_seq_len`` tokens.

        Its transformer gets t in [0, 1].

        Args:
            image_seq_len: Number of tokens, the latents' rows times columns divided by 4: 4096 for
                1024 x 1024 pixels. For samples of several sizes pass ``shift=
                flows.ResolutionShift()`` to the constructor instead.
            **changes: Arguments of the constructor that replace those of the preset.

        Returns:
            A ``FlowMatching``.

        Raises:
            ValueError: No ``image_seq_len``.

        Source:
            Black Forest Labs' ``get_schedule``; diffusers' Flux pipeline (``calculate_shift``); the
            density of kohya's ``flux_shift``.
        """
        if image_seq_len is None:
            raise ValueError(
                "image_seq_len must be given for Flux, whose shift depends on it, got None; pass "
                "the number of tokens, 4096 for 1024 x 1024 pixels"
            )
        preset: dict[str, Any] = {
            "timestep_density": "logit_normal",
            "shift": math.exp(dynamic_shift_mu(image_seq_len)),
            "num_train_timesteps": 1.0,
        }
        return cls(**preset | changes)

    @classmethod
    def wan(cls, shift: float = 5.0, **changes: Any) -> FlowMatching:
        """Wan: uniform times, a shift of 5, and the levels of its UniPC.

        Its own loops round the timestep input down to an integer: ``levels.with_timesteps(
        levels.timesteps.long())`` does so.

        Args:
            shift: 5 for 720p, 3 for 480p.
            **changes: Arguments of the constructor that replace those of the preset.

        Returns:
            A ``FlowMatching``; its ``levels`` are those of diffusers'
            ``UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift)``.

        Source:
            Wan 2.1 (arXiv 2503.20314); diffusers' Wan pipelines.
        """
        shift = as_positive("shift", shift, finite=True)
        spacing = functools.partial(shifts.of_wan, shift=shift)
        preset: dict[str, Any] = {"shift": shift, "spacing": spacing}
        return cls(**preset | changes)

    @classmethod
    def openpi(cls, **changes: Any) -> FlowMatching:
        """The convention of openpi (pi0): times 0.999 Beta(1.5, 1) + 0.001, and t in [0, 1].

        Args:
            **changes: Arguments of the constructor that replace those of the preset.

        Returns:
            A ``FlowMatching``; openpi samples with 10 steps.

        Source:
            Black et al. 2024 (arXiv 2410.24164) appendix B, in the direction of openpi's code.
        """
        preset: dict[str, Any] = {
            "timestep_density": "beta",
            "num_train_timesteps": 1.0,
        }
        return cls(**preset | changes)

    @classmethod
    def ot_cfm(cls, sigma_min: float = 1e-4, **changes: Any) -> FlowMatching:
        """OT-CFM: uniform t, noise at 0, target x_0 - (1 - sigma_min) noise, and t in [0, 1].

        Args:
            sigma_min: The noise that is left at t = 1; 1e-4 in Matcha-TTS.
            **changes: Arguments of the constructor that replace those of the preset.

        Returns:
            A ``FlowMatching``.

        Source:
            Lipman et al. 2022 (arXiv 2210.02747) eq. 22 and 23; Matcha-TTS (arXiv 2309.03199).
        """
        preset: dict[str, Any] = {
            "sigma_min": sigma_min,
            "noise_at": 0,
            "target": "data_minus_noise",
            "num_train_timesteps": 1.0,
        }
        return cls(**preset | changes)

    # ---- training ------------------------------------------------------------------------------

    def sample_timesteps(
        self,
        batch: int | tuple[int, ...] | list[int],
        noise: PhiloxNoise | None = None,
        *,
        group_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The time t of each sample of a training step, by the density and the shift.

        From a noise key it is a function of (seed, sample id, stream), independent of the noise of
        the same key, so one key replays the times and the noise of a step.

        Args:
            batch: B, or the shape ``[B, ...]`` of the samples, which a function ``shift`` and
                groups need.
            noise: A noise key; ``None`` for one seeded by torch's generator.
            group_dim: A dimension of the samples whose entries get a time each.
            dtype: Of the result.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            ``[B]``, or ``[B, G]``, in the direction of ``noise_at``.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A shape that is needed is missing, or a density function returned another
                shape or values outside [0, 1].
        """
        if isinstance(batch, (tuple, list)):
            shape: tuple[int, ...] | None = as_shape("batch", batch)
            count = shape[0] if shape else 0
        else:
            shape, count = None, batch
        groups = None if group_dim is None else shifts.groups_of(shape, group_dim)
        shift = shifts.resolved(self.shift, shape)
        sigma, at = self._law.sigmas(count, groups, noise, shift, device)
        if self.noise_at == 1:
            return to_device(sigma.to(dtype), at)
        # 1 - sigma may round to 1, where sigma is no level of a training step.
        return to_device((1 - sigma).to(dtype), at).clamp_max(1 - torch.finfo(dtype).eps / 2)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor | float,
        noise: Noise | None = None,
        *,
        group_dim: int | None = None,
    ) -> Tensor:
        """A sample at time t: x_t = (1 - sigma) x_0 + sigma noise, in one launch.

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Times in [0, 1], in the direction of ``noise_at``: ``[B]``, or one number.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator.
            group_dim: A dimension whose entries have a time each, such as 2 for the frames of
                ``[B, C, F, H, W]``: t may then be ``[B, G]``.

        Returns:
            x_t, like ``x_start``.

        Raises:
            TypeError: An argument of the wrong type, such as integer times.
            ValueError: Times outside [0, 1] (checked on the CPU), or of another shape.
        """
        training.check_samples("x_start", x_start)
        t = training.times(t, x_start, "x_start", group_dim, self.num_train_timesteps)
        if noise is None:
            noise = default_key(x_start)
        return training.noised(self._convention, x_start, t, noise, group_dim)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor | float | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
        *,
        group_dim: int | None = None,
        reduction: str = "sample",
        mask: Tensor | None = None,
        mask_reduction: str = "mask",
        loss: str = "mse",
        delta: Coef | Callable[[Tensor], Tensor] | None = None,
        input_perturbation: float = 0.0,
    ) -> dict[str, Tensor]:
        """The loss of each sample, w(sigma) mean (m - target)^2: two launches around the model.

        The target is not written to memory, and neither is the noise of a key.

        Args:
            model: ``model(x_t, num_train_timesteps * t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            t: Times in [0, 1], in the direction of ``noise_at``: ``[B]``, or one number; ``None``
                for ``sample_timesteps`` of the noise key, or of torch's generator if the noise is a
                tensor.
            model_kwargs: More arguments for the model.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator. The noise of a key is generated twice and never stored.
            group_dim: A dimension of the samples whose entries have a time each, such as 2 for the
                frames of ``[B, C, F, H, W]``: t is then ``[B, G]``, also for the model.
            reduction: "sample", or, with ``group_dim``, "group" for the loss of each group.
            mask: What of each sample counts, with values in [0, 1]; broadcast to the shape of
                ``x_start``, as in ``ops.denoising_loss``. The model gets all of x_t.
            mask_reduction: What a sum over a sample is divided by: "mask" (the sum of its mask, 0
                counting as loss 0) or "all" (its number of elements).
            loss: Of an error, "mse", "pseudo_huber" or "smooth_l1", see ``ops.denoising_loss``.
            delta: Error at which that loss becomes linear: a number, ``[B]``, with groups ``[B,
                G]``, or a function of sigma.
            input_perturbation: gamma: the model's input has the noise z + gamma z' with a second
                normal z' (``noise.perturbation_key``), its target z alone. At least 0; needs the
                noise of a key.

        Returns:
            ``loss`` and ``mse``, the same here as in ``GaussianDiffusion``, each ``[B]``, or ``[B,
            G]`` by group; average them over the batch.

        Raises:
            TypeError: An argument, or the model's output, of the wrong type.
            ValueError: An argument, or the model's output, of the wrong shape or value.
        """
        training.check_samples("x_start", x_start)
        check_reduction(reduction, group_dim)
        check_mask(mask, mask_reduction, x_start)
        if noise is None:
            noise = default_key(x_start)
        if t is None:
            t = self.sample_timesteps(
                x_start.shape,
                noise if isinstance(noise, PhiloxNoise) else None,
                group_dim=group_dim,
                dtype=torch.float64 if x_start.dtype == torch.float64 else torch.float32,
                device=x_start.device,
            )
        else:
            t = training.times(t, x_start, "x_start", group_dim, self.num_train_timesteps)
        if input_perturbation:
            input_perturbation = check_perturbation(input_perturbation, noise)
        return training.losses(
            self._convention,
            self.weighting,
            model,
            x_start,
            t,
            model_kwargs,
            noise,
            group_dim,
            perturbation=input_perturbation,
            error=(loss, delta),
            mask=mask,
            mask_reduction=mask_reduction,
            reduction=reduction,
        )

    # ---- conversions ---------------------------------------------------------------------------

    def velocity(self, x_start: Tensor, noise: Noise) -> Tensor:
        """The target of the model: noise - x_0 or x_0 - noise, by ``target``.

        Args:
            x_start: x_0, ``[B, ...]``.
            noise: The noise, like ``x_start``, or its noise key.

        Returns:
            Like ``x_start``.
        """
        training.check_samples("x_start", x_start)
        return ops.add_noise(x_start, noise, *self._convention.target())

    def predict_x0(self, model_output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_0 from the model's output at time t.

        Args:
            model_output: Like ``x_t``.
            x_t: ``[B, ...]``.
            t: As for ``q_sample``.

        Returns:
            Like ``x_t``.
        """
        sigma = self._sigma(x_t, t)
        return ops.linear_combination(x_t, model_output, self._convention.x0(sigma))

    def predict_noise(self, model_output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The noise from the model's output at time t.

        Args:
            model_output: Like ``x_t``.
            x_t: ``[B, ...]``.
            t: As for ``q_sample``.

        Returns:
            Like ``x_t``.
        """
        sigma = self._sigma(x_t, t)
        return ops.linear_combination(x_t, model_output, self._convention.epsilon(sigma))

    # ---- sampling ------------------------------------------------------------------------------

    def levels(
        self,
        num_steps: int | None = None,
        *,
        sigmas: Tensor | Sequence[float] | None = None,
        timesteps: Tensor | Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
    ) -> FlowLevels:
        """The noise levels of sampling, for every table of ``diffcore.solvers``.

        They hold direction, sign and timestep inputs of this model: pass ``prediction_type=
        "flow_prediction"`` to the table, whatever ``target`` is; ``table`` does so. With sigma_min
        above 0 they are those of x divided by the sum of its coefficients, which ``table`` undoes.

        Args:
            num_steps: Number of steps, spaced by ``spacing`` and shifted by ``shift``.
            sigmas: Instead of it values of sigma ``[N + 1]`` in [0, 1], already shifted, falling or
                rising (for inversion).
            timesteps: Other timestep inputs of the model ``[N]``; see
                ``NoiseLevels.with_timesteps``.
            shape: Of the samples ``[B, ...]``, for a function ``shift``.

        Returns:
            A ``NoiseLevels``.

        Raises:
            ValueError: Neither or both of ``num_steps`` and ``sigmas``, sigmas outside [0, 1], or
                as ``NoiseLevels``.
        """
        return made_plainly(lambda: self._levels(num_steps, sigmas, timesteps, shape))

    def table(
        self,
        num_steps: int | None = None,
        *,
        solver: Callable[..., SolverTable] = flow_euler_table,
        solver_options: Mapping[str, Any] | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        timesteps: Tensor | Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
    ) -> SolverTable:
        """The table of a solver for this model, for ``diffcore.sample`` and ``capture``.

        Its steps are those of x itself, with sigma_min too: Euler's are x + (t' - t) u, and the
        last x has the noise sigma_min.

        Args:
            num_steps: As for ``levels``.
            solver: A function of ``diffcore.solvers`` that takes levels and ``prediction_type``.
            solver_options: More arguments of it, such as ``{"clip_range": 1.0}``.
            sigmas: As for ``levels``.
            timesteps: As for ``levels``.
            shape: As for ``levels``.

        Returns:
            The table.

        Raises:
            ValueError: As ``levels``, or as the solver.
        """
        of_shape = tuple(shape) if callable(self.shift) and shape is not None else None
        options = tuple((solver_options or {}).items())
        kept = sigmas is None and timesteps is None
        if kept and all(isinstance(x, (int, float, str, type(None))) for _, x in options):
            found: SolverTable = self._kept("_table", num_steps, solver, options, of_shape)
            return found
        levels = self.levels(num_steps, sigmas=sigmas, timesteps=timesteps, shape=of_shape)
        return made_plainly(lambda: self._table_of(levels, solver, options))

    def _table(
        self,
        num_steps: int,
        solver: Callable[..., SolverTable],
        options: tuple[tuple[str, Any], ...],
        shape: tuple[int, ...] | None,
    ) -> SolverTable:
        return self._table_of(self.levels(num_steps, shape=shape), solver, options)

    def _table_of(
        self,
        levels: FlowLevels,
        solver: Callable[..., SolverTable],
        options: tuple[tuple[str, Any], ...],
    ) -> SolverTable:
        found = solver(levels, prediction_type="flow_prediction", **dict(options))
        return in_own_units(found, levels) if self.sigma_min else found

    def sample(
        self,
        model: Model,
        shape: Sequence[int] | Tensor,
        num_steps: int | None = None,
        noise: Noise | None = None,
        *,
        solver: Callable[..., SolverTable] = flow_euler_table,
        solver_options: Mapping[str, Any] | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        timesteps: Tensor | Sequence[float] | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance: Guidance | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        step_noise: StepNoise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Samples from noise, with any solver: Euler's method by default.

        Args:
            model: ``model(x, num_train_timesteps * t, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``; or a tensor to start from.
            num_steps: As for ``levels``.
            noise: The noise to start from, or a noise key for it; ``None`` for a key seeded by
                torch's generator.
            solver: As for ``table``.
            solver_options: As for ``table``.
            sigmas: As for ``levels``; rising ones go from samples to noise.
            timesteps: As for ``levels``.
            guidance_scale: As for ``diffcore.sample``.
            guidance: As for ``diffcore.sample``.
            model_kwargs: More arguments for the model.
            uncond_kwargs: The same for a second, unconditional call of the model.
            step_noise: The noise of a solver that adds some, ``noise`` of ``diffcore.sample``;
                ``None`` for further streams of the key ``noise``.
            device: Where to sample; ``None`` for that of a ``noise`` tensor, else of the model's
                parameters, else of the tensors in a key.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            **options: More arguments of ``diffcore.sample``, such as ``mask``, ``callback`` and
                ``progress``.

        Returns:
            Samples, of the given shape; with ``return_trajectory`` a ``Trajectory``.

        Raises:
            ValueError: As ``levels``, the solver, and ``diffcore.sample``.
        """
        if isinstance(shape, Tensor):
            if noise is not None:
                raise ValueError("noise must be None where shape is the tensor to start from")
            noise, shape = shape, tuple(shape.shape)
        table = self.table(
            num_steps,
            solver=solver,
            solver_options=solver_options,
            sigmas=sigmas,
            timesteps=timesteps,
            shape=shape,
        )
        x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
        samples: Tensor = sample(
            model,
            x,
            table,
            guidance_scale=guidance_scale,
            guidance=guidance,
            model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs,
            noise=step_noise,
            **options,
        )
        return samples

    def __repr__(self) -> str:
        """One line: what the model means, and how its times are made."""
        return (
            f"FlowMatching(noise_at={self.noise_at}, target={self.target!r}, "
            f"sigma_min={self.sigma_min}, num_train_timesteps={self.num_train_timesteps:g}, "
            f"timestep_density={self.timestep_density!r}, shift={self.shift!r}, "
            f"weighting={self.weighting!r})"
        )

    def _levels(
        self,
        num_steps: int | None,
        sigmas: Tensor | Sequence[float] | None,
        timesteps: Tensor | Sequence[float] | None,
        shape: Sequence[int] | None,
    ) -> FlowLevels:
        if (num_steps is None) == (sigmas is None):
            came = "neither" if sigmas is None else "both"
            raise ValueError(f"num_steps or sigmas must be given, got {came}")
        if sigmas is None:
            count = as_int("num_steps", num_steps, 1)
            spaced = level_vector("spacing", (self.spacing or shifts.evenly)(count))
            if len(spaced) != count + 1:
                raise ValueError(
                    f"spacing must return num_steps + 1 = {count + 1} levels, got {len(spaced)}"
                )
            sigmas = shift_sigmas(spaced, shifts.resolved(self.shift, shape))
        vector = level_vector("sigmas", sigmas)
        refuse_first("sigmas must lie in [0, 1]", vector, (vector < 0) | (vector > 1))
        return FlowLevels.of(self._convention, vector, timesteps)

    def _sigma(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        training.check_samples("x_t", x_t)
        t = training.times(t, x_t, "x_t", None, self.num_train_timesteps)
        return self._convention.turned(t)


def _direction_and_sign(noise_at: Any, target: Any) -> tuple[int, str]:
    """Direction and sign, both checked; neither is guessed from the other."""
    if noise_at is not None and (isinstance(noise_at, bool) or noise_at not in (0, 1)):
        raise ValueError(f"noise_at must be 1 or 0, the t of pure noise, got {noise_at!r}")
    if target is not None:
        check_choice("target", target, TARGETS)
    if target is None and noise_at == 0:
        raise ValueError(
            "target must be given with noise_at=0, got None; pass 'data_minus_noise', as "
            "flow_matching and lucidrains train, or 'noise_minus_data'"
        )
    if noise_at is None and target == "data_minus_noise":
        raise ValueError(
            "noise_at must be given with target='data_minus_noise', got None; pass 0 where the "
            "model is told t = 0 for noise, as flow_matching and lucidrains train, or 1"
        )
    return (1 if noise_at is None else int(noise_at)), target or "noise_minus_data"
