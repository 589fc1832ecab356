"""diffcore's solvers as a sampler node of ComfyUI.

Copy this file into ComfyUI's folder custom_nodes, install diffcore into its environment, and
connect the node "diffcore sampler" to the input "sampler" of SamplerCustom or
SamplerCustomAdvanced.

The noise of the steps is a function of the seed and of the place in the batch: image 3 of a batch
of 8 gets what it gets in a batch of 4. The start is ComfyUI's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
from comfy.model_sampling import CONST
from torch import Tensor

import diffcore
from diffcore import solvers
from diffcore.solvers import NoiseLevels, SolverTable

# For a diffusion model (x = x_0 + sigma noise), and for a flow (x = (1 - sigma) x_0 + sigma noise).
SOLVERS: dict[str, tuple[Callable[..., SolverTable], Callable[..., SolverTable]]] = {
    "dpmpp_2m": (solvers.dpmpp_2m_table, solvers.dpmpp_2m_table),
    "dpmpp_2m_sde": (solvers.dpmpp_2m_sde_table, solvers.dpmpp_2m_sde_table),
    "unipc": (solvers.unipc_table, solvers.unipc_table),
    "sa_solver": (solvers.sa_solver_table, solvers.sa_solver_table),
    "deis": (solvers.deis_table, solvers.deis_table),
    "res_multistep": (solvers.res_multistep_table, solvers.res_multistep_table),
    "er_sde": (solvers.er_sde_table, solvers.er_sde_table),
    "euler": (solvers.euler_table, solvers.euler_table),
    "euler_ancestral": (solvers.euler_ancestral_table, solvers.flow_euler_ancestral_table),
    "heun": (solvers.heun_table, solvers.heun_table),
}


def sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    solver: str,
    **strength: float,
) -> Tensor:
    """What ComfyUI's KSAMPLER calls, with eta and s_noise; the model returns the clean sample."""
    extra_args = extra_args or {}
    if len(sigmas) < 2:
        return x
    flow = isinstance(model.inner_model.inner_model.model_sampling, CONST)
    make = SOLVERS[solver][flow]
    known = inspect.signature(make).parameters
    options = {name: value for name, value in strength.items() if name in known}
    levels = NoiseLevels.from_flow(sigmas, timesteps=sigmas[:-1]) if flow else sigmas
    table = make(levels, prediction_type="sample", **options)

    def report(state: Mapping[str, Any]) -> None:
        callback({name: state[name] for name in ("x", "i", "sigma", "denoised")})

    return diffcore.sample(
        model,
        x,
        table,
        noise=diffcore.PhiloxNoise(extra_args.get("seed") or 0),
        model_kwargs=extra_args,
        callback=None if callback is None else report,
        progress=not disable,
    )


class DiffcoreSampler:
    """The node."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Its inputs, as ComfyUI asks for them."""
        strength = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01, "round": False}
        return {
            "required": {
                "solver": (list(SOLVERS),),
                "eta": ("FLOAT", strength),
                "s_noise": ("FLOAT", strength),
            }
        }

    def get_sampler(self, solver: str, eta: float, s_noise: float) -> tuple[Any]:
        """The sampler; eta is read by the solvers that add noise."""
        options = {"solver": solver, "eta": eta, "s_noise": s_noise}
        return (comfy.samplers.KSAMPLER(sample, options),)


NODE_CLASS_MAPPINGS = {"DiffcoreSampler": DiffcoreSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffcoreSampler": "diffcore sampler"}
