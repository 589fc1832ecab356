"""Steps of a rectified flow with a density, as policy gradients need them."""

from __future__ import annotations

import math
from itertools import pairwise

from diffcore._checks import check_choice
from diffcore._types import ClipRange
from diffcore.solvers.levels import Levels
from diffcore.solvers.named import flow_levels
from diffcore.solvers.rows import Rows, at_least_zero, move, toward
from diffcore.solvers.table import SolverTable

KINDS = ("flow_grpo", "dance_grpo", "cps")


def flow_sde_table(
    sigmas: Levels,
    *,
    kind: str = "flow_grpo",
    eta: float = 0.7,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Steps of a rectified flow with noise, each a Gaussian. Order 1; eta = 0 is Euler's method.

    With dt = sigma' - sigma < 0 and epsilon the predicted noise:

    - "flow_grpo": Euler's step + s² dt epsilon / (2 sigma) + s sqrt(-dt) z, with s² = eta² sigma /
      (1 - sigma). At sigma = 1 the second level takes the place of sigma in 1 - sigma.
    - "dance_grpo": the same with s = eta.
    - "cps": (1 - sigma') x0 + sqrt(sigma'² - c_z²) epsilon + c_z z with c_z = sigma' sin(eta pi/2):
      its noise level is sigma' exactly, and the last step to 0 adds none.

    The first two keep the marginals of the flow to first order in dt, and add noise in the last
    step too. "cps" replaces the same part of the noise in every step, so with many steps it is
    further from the flow. With eta = 0 the steps are those of ``flow_euler_table``. The
    log-probability of a step is ``SolverTable.log_prob``, the KL of two models' ``step_kl``.

    Args:
        sigmas: As for ``flow_euler_table``.
        kind: "flow_grpo", "dance_grpo" or "cps".
        eta: Strength of the noise, at least 0; at most 1 for "cps". Flow-GRPO's is 0.7, and
            DanceGRPO's 0.3.
        num_train_timesteps: As for ``flow_euler_table``.
        prediction_type: As for ``flow_euler_table``.
        clip_range: As for ``flow_euler_table``.

    Returns:
        N rows.

    Raises:
        ValueError: Unknown kind, eta out of range, eta above 0 with sigmas that rise, or as
            ``flow_euler_table``.

    Source:
        Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470); Xue et al. 2025 (DanceGRPO, arXiv
        2505.07818); Wang and Yu 2025 (coefficients-preserving sampling, arXiv 2509.05952).
    """
    check_choice("kind", kind, KINDS)
    eta = at_least_zero("eta", eta)
    if kind == "cps" and eta > 1:
        raise ValueError(f"eta must be in [0, 1] for kind='cps', got {eta}")
    levels = flow_levels(sigmas, num_train_timesteps)
    if eta > 0:
        levels.check_falls("flow_sde_table with eta > 0", "sigmas")
    rows = Rows(f"flow_sde_{kind}", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, (here, after) in enumerate(pairwise(points)):
        if eta == 0:
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        if kind == "cps":
            c_z = after.sigma * math.sin(eta * math.pi / 2)
            c_x, c_0 = toward(here, after.alpha, after.sigma * math.cos(eta * math.pi / 2))
        else:
            s = eta
            if kind == "flow_grpo":
                s *= math.sqrt(here.sigma / ((here if here.alpha else points[1]).alpha))
            dt = after.sigma - here.sigma
            c_x, c_0 = toward(here, after.alpha, after.sigma)
            drift = s * s * dt / (2 * here.sigma**2)  # epsilon is (x - alpha x0) / sigma
            c_x, c_0 = c_x + drift, c_0 - drift * here.alpha
            c_z = s * math.sqrt(-dt)
        rows.add(i, here, c_x=c_x, c_0=c_0, c_z=c_z)
    return rows.table(1)
