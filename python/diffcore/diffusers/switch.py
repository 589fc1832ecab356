"""``fuse`` and ``unfuse``: schedulers with steps by a table, autoencoders with our posterior."""

from __future__ import annotations

from typing import Any, TypeVar

from diffusers import SchedulerMixin

from diffcore._checks import as_flag, check_choice
from diffcore.diffusers import guidance as predictions
from diffcore.diffusers import guiders
from diffcore.diffusers.registry import FAMILIES, family_of, fused_class
from diffcore.diffusers.scheduler import (
    COEFFICIENTS,
    NOISES,
    RULES,
    Choice,
    FusedScheduler,
    Fusion,
    Manner,
)
from diffcore.diffusers.vae import fuse_vae, is_kl_autoencoder, unfuse_vae
from diffcore.solvers import SolverTable

T = TypeVar("T")


def table_of(
    scheduler: Any, *, rules: str = "diffusers", coefficients: str = "float64", **options: Any
) -> SolverTable:
    """The solver table of a configured scheduler of diffusers, with its timesteps and sigmas set.

    Args:
        scheduler: A stock or fused scheduler, after ``set_timesteps``.
        rules: "diffusers" for its own rules, "exact" for the solver's where the two differ.
        coefficients: See ``fuse``.
        **options: The options of its ``step`` that the coefficients depend on, such as ``eta``.

    Returns:
        The table. ``diffcore.sample(model, x, table)`` runs it without a scheduler.

    Raises:
        TypeError: Not a scheduler of diffusers with a table.
        ValueError: An option without a table, by name; or coefficients that the scheduler does not
            have.
    """
    check_choice("rules", rules, RULES)
    family = family_of(scheduler)
    _check_coefficients(coefficients, rules, [family])
    return family.make_table(scheduler, Choice(rules, 0, options, coefficients))


def fuse(
    target: T,
    *,
    rules: str = "diffusers",
    noise: str = "generator",
    coefficients: str = "float64",
    guidance: bool = False,
) -> T:
    """Let a scheduler, or every scheduler of a pipeline, take its steps in one launch each.

    Or let a KL autoencoder give ``diffcore.vae.DiagonalGaussianDistribution`` for its posterior:
    ``fuse(pipe.vae)``.

    The class of the scheduler becomes a subclass of its own with the same name: ``isinstance``,
    ``from_config`` and ``save_pretrained`` do what they did, and a saved pipeline loads as a stock
    one. The object stays the same, with the timesteps it holds; a copy of it is fused, too.

    What the class of a fused scheduler makes is fused: ``type(scheduler).from_config(config)``.
    What a class of diffusers makes is stock, also from the configuration of a fused scheduler,
    which says nothing of it. So fuse a pipeline after ``pipe.scheduler = ....from_config(...)``,
    and one that converts its scheduler by itself, as ``DDIMPipeline`` does, once it is made.

    Args:
        target: A scheduler, or a pipeline with one or several; or an autoencoder such as
            ``AutoencoderKL`` or ``AutoencoderKLWan``, to which the other arguments say nothing.
        rules: "diffusers" for the results of diffusers, "exact" for the solvers' own rules where
            diffusers departs from them.
        noise: "generator" for diffusers' own draws, "philox" for noise drawn within the launch.
        coefficients: "float64", or "diffusers" for DDPM's as diffusers computes them in float32,
            where 1 - a_t / a_s of neighbouring timesteps keeps few digits; of the other schedulers
            the coefficients are equal to rounding, and they have "float64" only.
        guidance: Combine the two predictions of classifier-free guidance within the step, too, in a
            pipeline that writes ``m_u + w (m_c - m_u)`` of what its ``unet`` or ``transformer``
            returns, with w a number, or whose guider has a rule of ``diffcore.guidance``;
            ``scheduler.guided_steps`` counts the steps. It spares passes over memory, and costs
            time in Python. All else is computed as before: ``guidance_rescale`` of a pipeline, a w
            for each frame, a third prediction, a guider with momentum, and everything where a
            gradient is recorded or the network is compiled in place (``network.compile()``).

    Returns:
        ``target``, changed in place.

    Raises:
        TypeError: Neither a scheduler with a table, nor a pipeline that has one, nor such an
            autoencoder; or guidance for what has no network.
        ValueError: Another word for ``rules``, ``noise`` or ``coefficients``; or coefficients that
            a scheduler does not have.
    """
    check_choice("rules", rules, RULES)
    check_choice("noise", noise, NOISES)
    guided = as_flag("guidance", guidance)
    if is_kl_autoencoder(target) and not guided:
        fuse_vae(target)
        return target
    found = _schedulers("target", target)
    _check_coefficients(coefficients, rules, [family_of(scheduler) for scheduler in found])
    _unwatch(target)
    if guided:
        predictions.watch(target)
        guiders.watch(target)
    manner = Manner(rules, noise, coefficients)
    for scheduler in found:
        kind: Any = type(scheduler)
        stock = kind.stock if isinstance(scheduler, FusedScheduler) else kind
        scheduler.__class__ = fused_class(stock, manner)
        scheduler._fusion = Fusion(manner)
    return target


def unfuse(target: T) -> T:
    """Give a scheduler, every scheduler of a pipeline, or an autoencoder its stock class back.

    Args:
        target: What ``fuse`` was given.

    Returns:
        ``target``, changed in place. The walk of a scheduler ends: call ``set_timesteps`` before
        the next step.

    Raises:
        TypeError: None of the three.
    """
    if is_kl_autoencoder(target):
        unfuse_vae(target)
        return target
    for scheduler in _schedulers("target", target):
        if isinstance(scheduler, FusedScheduler):
            del scheduler._fusion
            scheduler.__class__ = type(scheduler).stock
    _unwatch(target)
    return target


def _check_coefficients(name: str, rules: str, families: list[type[FusedScheduler]]) -> None:
    check_choice("coefficients", name, COEFFICIENTS)
    if name != "float64" and rules == "exact":
        raise ValueError(f"coefficients must be 'float64' with rules='exact', got {name!r}")
    for family in families:
        if name not in family.coefficients:
            raise ValueError(
                f"coefficients must be 'float64' for {family.stock.__name__}, got {name!r}: its "
                "coefficients in float32 are equal to rounding"
            )


def _unwatch(target: Any) -> None:
    predictions.unwatch(target)
    guiders.unwatch(target)


def _schedulers(name: str, target: Any) -> list[Any]:
    if isinstance(target, SchedulerMixin):
        family_of(target)
        return [target]
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"{name} must be a scheduler, a pipeline or a KL autoencoder of diffusers, got "
            f"{type(target).__name__}"
        )
    found = [c for c in components.values() if isinstance(c, SchedulerMixin)]
    known = [c for c in found if isinstance(c, (FusedScheduler, *FAMILIES))]
    if not known:
        kinds = ", ".join(type(c).__name__ for c in found) or "none"
        raise TypeError(f"{name} must have a scheduler with a table, got {kinds}")
    return known
