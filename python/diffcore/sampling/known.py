"""A known part of the samples in a sampling loop: inpainting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._engine.dispatch import plain_eager
from diffcore.noise import Noise, PhiloxNoise, StepNoise
from diffcore.ops._masks import blended, check_dtype_of, expanded_mask, noise_like
from diffcore.ops._noise import default_key

BlendAt: TypeAlias = Literal["after_step", "before_model"]
"""Where a loop puts the known part in."""

_WHERE = ("after_step", "before_model")


@dataclass(frozen=True, slots=True)
class Known:
    """The known part of samples: its mask, the clean samples and their noise, like the samples.

    Attributes:
        mask: 1 where it is not known.
        known: x_0.
        noise: The noise that it gets at every level.
        before_model: Whether it is put in before each model call, at the level of the call, instead
            of after each row, at the level reached.
        in_place: Whether x' of a row may be overwritten.
    """

    mask: Tensor
    known: Tensor
    noise: Tensor
    before_model: bool
    in_place: bool

    def before(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The x of a model call at this level."""
        return self._put_in(x, alpha, sigma, None) if self.before_model else x

    def after(self, x: Tensor, alpha: float, sigma: float, last: bool) -> Tensor:
        """What a row returns, at this level."""
        if self.before_model and not last:
            return x
        return self._put_in(x, alpha, sigma, x if self.in_place else None)

    def _put_in(self, x: Tensor, alpha: float, sigma: float, out: Tensor | None) -> Tensor:
        return blended(x, self.mask, self.known, self.noise, (alpha, sigma), None, out)


@dataclass(frozen=True, slots=True)
class KnownPart:
    """The arguments ``mask``, ``known``, ``known_noise`` and ``blend_at`` of a loop."""

    mask: Tensor
    known: Tensor
    known_noise: Noise | None
    where: BlendAt

    def beside(self, x: Tensor, step_noise: StepNoise) -> Known:
        """The tensors that every row of a loop reads, made once.

        Args:
            x: The samples to start from.
            step_noise: The noise of the steps. If it is a key, it is that of the known part too, of
                its own stream: where x was generated from it, the known part gets the same noise.

        Raises:
            TypeError: Another type or dtype.
            ValueError: Another shape or device, or a mask that ``ops.blend_known`` refuses.
        """
        mask = expanded_mask(self.mask, x, "x")
        if not isinstance(self.known, Tensor):
            raise TypeError(f"known must be a torch.Tensor, got {type(self.known).__name__}")
        check_dtype_of("known", self.known, x)
        noise = self.known_noise
        if noise is None:
            noise = step_noise if isinstance(step_noise, PhiloxNoise) else default_key(x)
        z = noise_like("known_noise", noise, "x", x)
        check_dtype_of("known_noise", z, x)
        for name, y in (("known", self.known), ("known_noise", z)):
            if y.shape != x.shape:
                raise ValueError(
                    f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}"
                )
        in_place = type(x) is Tensor and plain_eager() and not torch.is_grad_enabled()
        return Known(mask, self.known, z, self.where == "before_model", in_place)


def known_part(mask: Any, known: Any, known_noise: Any, blend_at: str) -> KnownPart | None:
    """The known part of a call, ``None`` without one.

    Args:
        mask: See ``diffcore.sample``.
        known: See there.
        known_noise: See there.
        blend_at: See there.

    Raises:
        TypeError: ``known_noise`` is neither a tensor nor a noise key.
        ValueError: ``mask`` or ``known`` is missing, or an unknown ``blend_at``.
    """
    check_choice("blend_at", blend_at, _WHERE)
    given = {"mask": mask, "known": known, "known_noise": known_noise}
    there = [name for name, value in given.items() if value is not None]
    if not there:
        return None
    for name in ("mask", "known"):
        if given[name] is None:
            raise ValueError(f"{name} must be given with {there[0]}, got None")
    if known_noise is not None and not isinstance(known_noise, (Tensor, PhiloxNoise)):
        kind = type(known_noise).__name__
        raise TypeError(f"known_noise must be a torch.Tensor or a PhiloxNoise, got {kind}")
    where: Any = blend_at
    return KnownPart(mask, known, known_noise, where)
