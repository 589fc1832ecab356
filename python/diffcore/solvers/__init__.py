"""Solvers as tables of coefficients: DDPM to UniPC, for every noise schedule.

A solver is a ``SolverTable``, computed in float64 from the noise levels (alpha, sigma) that it
visits. The functions take ``NoiseLevels``, or k-diffusion's sigmas, which are variance exploding.
"""

from diffcore.solvers.adams import ipndm_table, lms_table, pndm_table
from diffcore.solvers.ancestral import ddim_table, ddpm_table, euler_ancestral_table
from diffcore.solvers.cfg_pp import cfg_pp_table, dpmpp_2m_cfg_pp_table
from diffcore.solvers.deis import deis_table, vp_time
from diffcore.solvers.derivative import (
    dpm2_ancestral_table,
    dpm2_table,
    euler_table,
    heun_table,
    heunpp2_table,
)
from diffcore.solvers.dpm_fast import dpm_fast_table
from diffcore.solvers.dpmpp import dpmpp_2s_table, dpmpp_sde_table, dpmpp_table
from diffcore.solvers.er_sde import er_sde_table
from diffcore.solvers.fewstep import (
    consistency_table,
    flow_map_table,
    lcm_table,
    renoise_table,
    tcd_table,
    trigflow_table,
)
from diffcore.solvers.flow_ancestral import (
    flow_dpmpp_2s_ancestral_table,
    flow_euler_ancestral_table,
)
from diffcore.solvers.flow_sde import flow_sde_table
from diffcore.solvers.gradient_estimation import gradient_estimation_table
from diffcore.solvers.levels import NoiseLevels
from diffcore.solvers.named import (
    dpmpp_2m_sde_table,
    dpmpp_2m_table,
    dpmpp_3m_sde_table,
    edm_euler_table,
    edm_heun_table,
    flow_euler_table,
    flow_heun_table,
)
from diffcore.solvers.repaint import repaint_table
from diffcore.solvers.res import res_multistep_table
from diffcore.solvers.restart import restart_table
from diffcore.solvers.sa_solver import sa_solver_table
from diffcore.solvers.seeds import seeds_2_table, seeds_3_table
from diffcore.solvers.singlestep import dpmpp_singlestep_table
from diffcore.solvers.table import COLUMNS, SolverTable
from diffcore.solvers.unipc import unipc_table

__all__ = [
    "COLUMNS",
    "NoiseLevels",
    "SolverTable",
    "cfg_pp_table",
    "consistency_table",
    "ddim_table",
    "ddpm_table",
    "deis_table",
    "dpm2_ancestral_table",
    "dpm2_table",
    "dpm_fast_table",
    "dpmpp_2m_cfg_pp_table",
    "dpmpp_2m_sde_table",
    "dpmpp_2m_table",
    "dpmpp_2s_table",
    "dpmpp_3m_sde_table",
    "dpmpp_sde_table",
    "dpmpp_singlestep_table",
    "dpmpp_table",
    "edm_euler_table",
    "edm_heun_table",
    "er_sde_table",
    "euler_ancestral_table",
    "euler_table",
    "flow_dpmpp_2s_ancestral_table",
    "flow_euler_ancestral_table",
    "flow_euler_table",
    "flow_heun_table",
    "flow_map_table",
    "flow_sde_table",
    "gradient_estimation_table",
    "heun_table",
    "heunpp2_table",
    "ipndm_table",
    "lcm_table",
    "lms_table",
    "pndm_table",
    "renoise_table",
    "repaint_table",
    "res_multistep_table",
    "restart_table",
    "sa_solver_table",
    "seeds_2_table",
    "seeds_3_table",
    "tcd_table",
    "trigflow_table",
    "unipc_table",
    "vp_time",
]
