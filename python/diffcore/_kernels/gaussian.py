"""KL divergences and likelihoods of Gaussians, and reparameterization."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._engine.dispatch import run, run_tuple
from diffcore._engine.kernel import Call, Grads, Kernel
from diffcore._engine.library import define_noisy
from diffcore._kernels.noise import Needs, run_noisy, with_noise
from diffcore._kernels.term import Term
from diffcore._types import Tensors
from diffcore.reference import gaussian as formulas

NORMAL_KL = Term(
    "normal_kl",
    ("mean1", "logvar1", "mean2", "logvar2"),
    formulas.normal_kl_term,
    {"": (0, 1, 2, 3), "_first": (0, 1), "_second": (2, 3)},
)
STANDARD_NORMAL_KL = Term(
    "standard_normal_kl", ("mean", "logvar"), formulas.standard_normal_kl_term, {"": (0, 1)}
)
GAUSSIAN_NLL = Term(
    "gaussian_nll",
    ("x", "mean", "logvar"),
    formulas.gaussian_nll_term,
    {"": (0, 1, 2), "_parameters": (1, 2)},
)


def _reparameterize_backward(
    inputs: Tensors, call: Call, grads: Grads, needs: Needs
) -> Grads | None:
    g = grads[0]
    (_, logvar), noise = with_noise(inputs, call)
    if g is None:
        return None
    g_logvar = run_noisy(REPARAMETERIZE_BACKWARD, (g, logvar), noise) if needs[1] else None
    return [g, g_logvar, *_noise_gradient(logvar, g, needs)]


def _noise_gradient(logvar: Tensor, g: Tensor | None, needs: Needs) -> Grads:
    """The gradient g e^{logvar / 2}: g reparameterized around 0. Nothing for noise of a key."""
    if g is None or not any(needs[2:]):
        return [None] * len(needs[2:])
    return [run(REPARAMETERIZE.reading, (torch.zeros_like(logvar), logvar, g))]


def _reparameterize_kl_backward(
    inputs: Tensors, call: Call, grads: Grads, needs: Needs
) -> Grads | None:
    g_z, g_kl = grads
    (mean, logvar), noise = with_noise(inputs, call)
    if g_kl is None:
        return _reparameterize_backward(inputs, call, (g_z,), needs)
    if g_z is None:
        found = run_tuple(STANDARD_NORMAL_KL.of_sum[""], (mean, logvar), (g_kl, 1.0))
    else:
        found = run_noisy(REPARAMETERIZE_KL_BACKWARD, (mean, logvar, g_z), noise, (g_kl,))
    return [*found, *_noise_gradient(logvar, g_z, needs)]


_PARAMETERS = ("mean", "logvar", "noise")
REPARAMETERIZE = define_noisy(
    Kernel(
        "reparameterize",
        _PARAMETERS,
        reference=formulas.reparameterize,
        backward=_reparameterize_backward,
    )
)
REPARAMETERIZE_BACKWARD = define_noisy(
    Kernel("reparameterize_backward", ("grad", "logvar", "noise"))
)
REPARAMETERIZE_KL = define_noisy(
    Kernel(
        "reparameterize_kl",
        _PARAMETERS,
        sums=1,
        reference=formulas.reparameterize_kl,
        backward=_reparameterize_kl_backward,
    )
)
REPARAMETERIZE_KL_BACKWARD = define_noisy(
    Kernel(
        "reparameterize_kl_backward",
        ("mean", "logvar", "grad_z", "noise"),
        ("grad_kl",),
        outputs=2,
    )
)
