"""Which family takes the steps of which stock class, and the class that ``fuse`` gives it."""

from __future__ import annotations

import functools
from typing import Any

from diffcore.diffusers.families.cogvideox import FusedCogVideoXDDIM
from diffcore.diffusers.families.consistency import FusedConsistency
from diffcore.diffusers.families.ddim import FusedDDIM, FusedDDIMParallel
from diffcore.diffusers.families.ddim_inverse import FusedDDIMInverse
from diffcore.diffusers.families.ddpm import FusedDDPM, FusedDDPMParallel
from diffcore.diffusers.families.deis import FusedDEIS
from diffcore.diffusers.families.dpm import FusedDPMSolverMultistep
from diffcore.diffusers.families.dpm_inverse import FusedDPMSolverMultistepInverse
from diffcore.diffusers.families.edm import FusedEDMEuler
from diffcore.diffusers.families.edm_dpm import FusedEDMDPMSolverMultistep
from diffcore.diffusers.families.euler import FusedEuler
from diffcore.diffusers.families.euler_ancestral import FusedEulerAncestral
from diffcore.diffusers.families.flow import FusedFlowMatchEuler
from diffcore.diffusers.families.flow_heun import FusedFlowMatchHeun
from diffcore.diffusers.families.flow_lcm import FusedFlowMatchLCM
from diffcore.diffusers.families.flow_map import FusedFlowMapEuler
from diffcore.diffusers.families.heun import FusedHeun
from diffcore.diffusers.families.ipndm import FusedIPNDM
from diffcore.diffusers.families.kdpm2 import FusedKDPM2, FusedKDPM2Ancestral
from diffcore.diffusers.families.lcm import FusedLCM
from diffcore.diffusers.families.lms import FusedLMS
from diffcore.diffusers.families.ltx import FusedLTXEulerAncestralRF
from diffcore.diffusers.families.pndm import FusedPNDM
from diffcore.diffusers.families.sa_solver import FusedSASolver
from diffcore.diffusers.families.scm import FusedSCM
from diffcore.diffusers.families.singlestep import FusedDPMSolverSinglestep
from diffcore.diffusers.families.tcd import FusedTCD
from diffcore.diffusers.families.unipc import FusedUniPC
from diffcore.diffusers.scheduler import FusedScheduler, Fusion, Manner, renewing, stepping

_FAMILIES: tuple[type[FusedScheduler], ...] = (
    FusedCogVideoXDDIM,
    FusedConsistency,
    FusedDDIM,
    FusedDDIMInverse,
    FusedDDIMParallel,
    FusedDDPM,
    FusedDDPMParallel,
    FusedDEIS,
    FusedDPMSolverMultistep,
    FusedDPMSolverMultistepInverse,
    FusedDPMSolverSinglestep,
    FusedEDMDPMSolverMultistep,
    FusedEDMEuler,
    FusedEuler,
    FusedEulerAncestral,
    FusedFlowMapEuler,
    FusedFlowMatchEuler,
    FusedFlowMatchHeun,
    FusedFlowMatchLCM,
    FusedHeun,
    FusedIPNDM,
    FusedKDPM2,
    FusedKDPM2Ancestral,
    FusedLCM,
    FusedLMS,
    FusedLTXEulerAncestralRF,
    FusedPNDM,
    FusedSASolver,
    FusedSCM,
    FusedTCD,
    FusedUniPC,
)
FAMILIES: dict[type, type[FusedScheduler]] = {family.stock: family for family in _FAMILIES}


def family_of(scheduler: Any) -> type[FusedScheduler]:
    """The family of a scheduler.

    Args:
        scheduler: A stock or fused scheduler.

    Returns:
        The family.

    Raises:
        TypeError: None has its class. A subclass may step by rules of its own, so it has none.
    """
    kind = type(scheduler)
    if issubclass(kind, FusedScheduler):
        kind = kind.stock
    family = FAMILIES.get(kind)
    if family is None:
        names = ", ".join(sorted(stock.__name__ for stock in FAMILIES))
        raise TypeError(f"scheduler must be one of {names}, got {kind.__name__}")
    return family


@functools.cache
def fused_class(stock: Any, manner: Manner) -> Any:
    """A subclass of a stock class, with its name and module, whose steps are a family's.

    Args:
        stock: One of ``FAMILIES``.
        manner: How it takes its steps.

    Returns:
        The class: what is saved under its name is the stock scheduler, and what its constructor
        and ``from_config`` make is fused in the same way.
    """
    family = FAMILIES[stock]
    body = {
        "__module__": stock.__module__,
        "__doc__": family.__doc__,
        "__init__": _starting(stock, manner),
        "__reduce__": _reduced,
        "set_timesteps": renewing(stock.set_timesteps),
        "step": stepping(stock.step),
    }
    return type(stock.__name__, (family, stock), body)


def _starting(stock: Any, manner: Manner) -> Any:
    """The constructor of a stock class; ``from_config`` of a fused one gives a fused one."""

    @functools.wraps(stock.__init__)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        self._fusion = Fusion(manner)
        stock.__init__(self, *args, **kwargs)

    return start


def _reduced(self: Any) -> tuple[Any, ...]:
    """By the stock class, which pickle finds under this one's name; a walk goes on in the copy."""
    fusion = self._fusion
    state = {name: value for name, value in vars(self).items() if name != "_fusion"}
    walk = None if fusion.walk is None else fusion.walk.progress
    return _restored, (type(self).stock, state, fusion.manner, walk)


def _restored(stock: type, state: dict[str, Any], manner: Manner, walk: Any) -> Any:
    kind: Any = fused_class(stock, manner)
    scheduler = kind.__new__(kind)
    vars(scheduler).update(state, _fusion=Fusion(manner))
    if walk is not None:
        scheduler._walk().progress = walk
    return scheduler
