"""The law that the times of a training step are drawn from."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore import timesteps
from diffcore._checks import check_choice
from diffcore.noise import PhiloxNoise
from diffcore.timesteps import Density


class Law(NamedTuple):
    """A density of sigma.

    Args:
        density: Its name, or a function of u.
        parameters: Of a named density.
        stratified: Whether u is stratified over the batch.
    """

    density: Density
    parameters: dict[str, Any]
    stratified: bool

    def check(self) -> None:
        """Refuses a density that does not exist, and parameters that it does not have.

        Raises:
            TypeError: A density that is neither a string nor a function.
            ValueError: An unknown density, or a parameter that it does not have.
        """
        if callable(self.density):
            if self.parameters:
                raise ValueError(
                    "density_parameters must be None where timestep_density is a function, got "
                    f"{', '.join(self.parameters)}"
                )
            return
        names = tuple(timesteps.DENSITIES)
        check_choice("timestep_density", self.density, names, "or pass a function of u")
        function = timesteps.DENSITIES[self.density]
        known = [name for name in inspect.signature(function).parameters if name != "u"]
        unknown = [name for name in self.parameters if name not in known]
        if unknown:
            raise ValueError(
                f"density_parameters must be of {self.density!r}, which has "
                f"{', '.join(known) or 'none'}, got {', '.join(unknown)}"
            )
        function(torch.tensor([0.5], device="cpu"), **self.parameters)

    def sigmas(
        self,
        batch: int,
        groups: int | None,
        noise: PhiloxNoise | None,
        shift: float,
        device: torch.device | str | None,
    ) -> tuple[Tensor, torch.device]:
        """The levels of a training step.

        Args:
            batch: B.
            groups: G, or ``None`` for one level a sample.
            noise: A noise key; ``None`` for one seeded by torch's generator.
            shift: See ``shift_sigmas``.
            device: See ``timesteps.draw``.

        Returns:
            float64 ``[B]``, or ``[B, G]``, and the device that they are for: see
            ``timesteps.drawn``.
        """
        return timesteps.drawn(
            self.density,
            batch,
            noise,
            shift=shift,
            stratified=self.stratified,
            groups=groups,
            device=device,
            **self.parameters,
        )
