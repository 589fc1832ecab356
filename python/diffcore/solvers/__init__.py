"""Solvers as tables of coefficients: DDPM to UniPC, for every noise schedule.

A solver is a ``SolverTable``, computed in float64 from the noise levels (alpha, sigma) that it
visits. The functions take ``NoiseLevels``, or k-diffusion's sigmas, which are variance exploding.
"""

from diffcore.solvers.ancestral import ddim_table, ddpm_table, euler_ancestral_table
from diffcore.solvers.cfg_pp import cfg_pp_table, dpmpp_2m_cfg_pp_table
from diffcore.solvers.derivative import (
    dpm2_ancestral_table,
    dpm2_table,
    euler_table,
    heun_table,
    lms_table,
)
from diffcore.solvers.dpmpp import dpmpp_2s_table, dpmpp_sde_table, dpmpp_table
from diffcore.solvers.flow_sde import flow_sde_table
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
from diffcore.solvers.singlestep import dpmpp_singlestep_table
from diffcore.solvers.table import COLUMNS, SolverTable
from diffcore.solvers.unipc import unipc_table

__all__ = [
    "COLUMNS",
    "NoiseLevels",
    "SolverTable",
    "cfg_pp_table",
    "ddim_table",
    "ddpm_table",
    "dpm2_ancestral_table",
    "dpm2_table",
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
    "euler_ancestral_table",
    "euler_table",
    "flow_euler_table",
    "flow_heun_table",
    "flow_sde_table",
    "heun_table",
    "lms_table",
    "repaint_table",
    "unipc_table",
]
