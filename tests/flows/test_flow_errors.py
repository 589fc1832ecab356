"""FlowMatching's times as laws, and its errors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import EDM, FlowMatching, PhiloxNoise, flows, losses, solvers, timesteps

KEY = PhiloxNoise(5, sample_ids=2, stream=9)
X = torch.zeros(4, 3)

LAWS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "uniform": ({}, lambda s: s),
    "logit_normal": (
        {"density_parameters": {"mean": 0.4, "std": 1.3}},
        lambda s: torch.special.ndtr((torch.logit(s) - 0.4) / 1.3),
    ),
    "cosmap": ({}, lambda s: 2 / math.pi * torch.atan2(s, 1 - s)),
    "beta": ({"density_parameters": {"a": 1.0, "b": 2.0, "low": 0.0}}, lambda s: 1 - (1 - s) ** 2),
    "function": ({"timestep_density": lambda u: u**2}, torch.sqrt),
}


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("name", LAWS)
def test_times_have_the_law_in_either_direction(name: str, noise_at: int) -> None:
    options, cdf = LAWS[name]
    options = {"timestep_density": name} | options
    flow = FlowMatching(noise_at=noise_at, target="noise_minus_data", shift=3.0, **options)
    n = 20_000
    t = flow.sample_timesteps(n, KEY, dtype=torch.float64)
    sigma = t if noise_at == 1 else 1 - t
    u = cdf(sigma / (3 - 2 * sigma)).sort().values  # the shift undone
    assert math.sqrt(n) * (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95


def test_strata_and_open_ends() -> None:
    flow = FlowMatching(stratified=True, noise_at=0, target="noise_minus_data")
    t = flow.sample_timesteps(64, KEY, dtype=torch.float64)
    assert torch.equal((64 * (1 - t)).floor(), torch.arange(64).double())
    ends = FlowMatching(
        timestep_density=lambda u: 1e-12 * u,
        noise_at=0,
        target="noise_minus_data",
        weighting="sigma_sqrt",
    )
    t = ends.sample_timesteps(4, KEY)
    assert (t < 1).all()
    assert ends.training_losses(lambda x, t: x, X + 1, t, noise=KEY)["loss"].isfinite().all()


def call(**options: Any) -> Callable[[], Any]:
    return lambda: FlowMatching(**options)


def losses_of(flow: FlowMatching, t: Any, **options: Any) -> Callable[[], Any]:
    return lambda: flow.training_losses(lambda x, t: x, X, t, **options)


FLOW = FlowMatching()
HALF = torch.full((4,), 0.5)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # direction and sign
    "direction alone": (call(noise_at=0), ValueError, "^target must be given with noise_at=0, got"),
    "sign alone": (
        call(target="data_minus_noise"),
        ValueError,
        "^noise_at must be given with target='data_minus_noise', got None",
    ),
    "direction": (call(noise_at=2), ValueError, "^noise_at must be 1 or 0, .* got 2"),
    "bool": (call(noise_at=True), ValueError, "^noise_at must be 1 or 0, .* got True"),
    "sign": (call(target="velocity"), ValueError, "^target must be one of 'noise_minus_data', "),
    # numbers
    "sigma_min": (call(sigma_min=1.0), ValueError, r"^sigma_min must be in \[0, 1\), got 1.0"),
    "sigma_min below": (call(sigma_min=-0.1), ValueError, r"^sigma_min must be in \[0, 1\)"),
    "scale": (call(num_train_timesteps=0), ValueError, "^num_train_timesteps must be above 0"),
    "shift": (call(shift=-1.0), ValueError, "^shift must be above 0, got -1.0"),
    "weighting": (
        call(weighting="snr"),
        ValueError,
        "^weighting must be one of .* function of sig",
    ),
    "stratified": (call(stratified="no"), TypeError, "^stratified must be a bool"),
    "spacing": (call(spacing=[1.0, 0.0]), TypeError, "^spacing must be a function of num_steps"),
    # densities
    "density": (call(timestep_density="lognormal"), ValueError, "^timestep_density must be one of"),
    "density type": (call(timestep_density=3), TypeError, "^timestep_density must be a string"),
    "parameter": (
        call(timestep_density="mode", density_parameters={"mean": 1.0}),
        ValueError,
        "^density_parameters must be of 'mode', which has scale, got mean",
    ),
    "no parameter": (
        call(density_parameters={"mean": 1.0}),
        ValueError,
        "^density_parameters must be of 'uniform', which has none, got mean",
    ),
    "its value": (
        call(timestep_density="logit_normal", density_parameters={"std": -1.0}),
        ValueError,
        "^std must be above 0",
    ),
    "function's parameters": (
        call(timestep_density=torch.sqrt, density_parameters={"mean": 1.0}),
        ValueError,
        "^density_parameters must be None where timestep_density is a function",
    ),
    "function's range": (
        lambda: FlowMatching(timestep_density=lambda u: 2 * u + 1).sample_timesteps(4),
        ValueError,
        r"^density must return levels in \[0, 1\], got values from",
    ),
    "function's shape": (
        lambda: FlowMatching(timestep_density=torch.mean).sample_timesteps(4),
        ValueError,
        r"^density must return the shape of u, \(4,\), got \(\)",
    ),
    "function's type": (
        lambda: FlowMatching(timestep_density=lambda u: 0.5).sample_timesteps(4),
        TypeError,
        "^density must return a floating-point tensor, got float",
    ),
    # times
    "timesteps": (
        losses_of(FLOW, 1000 * HALF),
        ValueError,
        r"^t must be in \[0, 1\], got .* divide",
    ),
    "below": (
        losses_of(FLOW, HALF - 1),
        ValueError,
        r"^t must be in \[0, 1\], got -0.5; divide timesteps by num_train_timesteps, 1000",
    ),
    "number": (losses_of(FLOW, 1.5), ValueError, r"^t must be in \[0, 1\], got 1.5; divide"),
    "nan": (losses_of(FLOW, HALF * torch.nan), ValueError, r"^t must be in \[0, 1\]"),
    "integers": (losses_of(FLOW, torch.arange(4)), TypeError, "^t must be a floating.*; divide"),
    "shape": (losses_of(FLOW, HALF[:3]), ValueError, r"^t must have shape \(4,\), got \(3,\)"),
    "frames": (losses_of(FLOW, HALF.view(2, 2)), ValueError, r"pass \[B, F\] with group_dim"),
    "groups": (
        losses_of(FLOW, HALF.view(4, 1).repeat(1, 2), group_dim=1),
        ValueError,
        r"^t must have shape \(4, 3\), one for each group",
    ),
    "group_dim": (losses_of(FLOW, None, group_dim=2), ValueError, "^group_dim must be a dimension"),
    "groups of a number": (
        lambda: FLOW.sample_timesteps(4, group_dim=1),
        ValueError,
        "^batch must be the shape of the samples with group_dim",
    ),
    "reduction": (
        losses_of(FLOW, HALF, reduction="group"),
        ValueError,
        "^group_dim must be given with reduction='group'",
    ),
    "samples": (lambda: FLOW.q_sample(X.long(), 0.5), TypeError, r"^x_start must be a floating"),
    "key": (lambda: FLOW.sample_timesteps(4, X), TypeError, "^noise must be a PhiloxNoise"),  # type: ignore[arg-type]
    "model": (
        lambda: FLOW.training_losses(lambda x, t: x[:2], X, 0.5),
        ValueError,
        r"^model must return the shape \(4, 3\), got \(2, 3\)",
    ),
    "weights": (
        lambda: FlowMatching(weighting=lambda s: s[:1]).training_losses(lambda x, t: x, X, 0.5),
        ValueError,
        r"^weighting must return the shape of sigma, \(4,\), got \(1,\)",
    ),
    "loss": (losses_of(FLOW, HALF, loss="l1"), ValueError, "^loss must be one of 'mse', 'pseudo_h"),
    "no delta": (losses_of(FLOW, HALF, loss="pseudo_huber"), ValueError, "^delta must be given"),
    "delta's shape": (
        losses_of(FLOW, HALF, loss="smooth_l1", delta=lambda s: s[:1]),
        ValueError,
        r"^delta must return the shape of sigma, \(4,\), got \(1,\)",
    ),
    "perturbation": (
        losses_of(FLOW, HALF, noise=X, input_perturbation=0.1),
        ValueError,
        "^noise must be a PhiloxNoise or None with input_perturbation",
    ),
    "shape of a shift": (
        lambda: FlowMatching(shift=lambda shape: 1.0).levels(3),
        ValueError,
        "^shape must be given where shift is a function",
    ),
    "resolution": (
        lambda: flows.ResolutionShift()((4, 3)),
        ValueError,
        r"^shape must be \[B, C, ..., H, W\], got \(4, 3\)",
    ),
    # levels
    "no levels": (lambda: FLOW.levels(), ValueError, "^num_steps or sigmas must be given, got nei"),
    "both": (lambda: FLOW.levels(3, sigmas=[1, 0]), ValueError, "^num_steps or sigmas .* both"),
    "sigmas": (
        lambda: FLOW.levels(sigmas=[2, 0]),
        ValueError,
        r"^sigmas must lie in \[0, 1\], got 2",
    ),
    "spaced": (
        lambda: FlowMatching(spacing=lambda n: torch.tensor([1.0, 0.0])).levels(3),
        ValueError,
        "^spacing must return num_steps [+] 1 = 4 levels, got 2",
    ),
    "prediction": (
        lambda: solvers.euler_table(FLOW.levels(3)),
        ValueError,
        "^prediction_type must be 'flow_prediction' with levels of FlowMatching, .* got 'epsilon'",
    ),
    "noise twice": (
        lambda: FLOW.sample(lambda x, t: x, X, 3, KEY),
        ValueError,
        "^noise must be None where shape is the tensor to start from",
    ),
    # the functions beside the class
    "bare sigmas": (
        lambda: solvers.euler_table([1.0, 0.5, 0.0], prediction_type="flow_prediction"),
        ValueError,
        "^levels must be NoiseLevels with prediction_type='flow_prediction', got list",
    ),
    "flow_weights": (
        lambda: losses.flow_weights(HALF + 1),
        ValueError,
        r"^sigma must be in \(0, 1\)",
    ),
    "flow_weights at 0": (
        lambda: losses.flow_weights(0 * HALF, "sigma_sqrt"),
        ValueError,
        r"^sigma must be in \(0, 1\), got values from 0 to 0",
    ),
    "u": (
        lambda: timesteps.cosmap(HALF - 1),
        ValueError,
        r"^u must be in \(0, 1\), got values from",
    ),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(wrong: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wrong()


def test_settings_are_fixed() -> None:
    flow = FlowMatching(shift=3.0)
    for name, value in (("shift", 5.0), ("noise_at", 0)):
        with pytest.raises(AttributeError, match=f"{name} of this FlowMatching cannot be changed"):
            setattr(flow, name, value)
    with pytest.raises(AttributeError, match="sigma_max of this EDM cannot be changed"):
        EDM().sigma_max = 160.0


def test_a_table_is_made_once_for_its_arguments() -> None:
    flow = FlowMatching(shift=flows.ResolutionShift())
    small, large = ({"shape": (2, 16, side, side)} for side in (32, 128))
    assert flow.table(4, **small) is flow.table(4, **small)
    assert not torch.equal(flow.table(4, **small).timesteps, flow.table(4, **large).timesteps)
    clip = {"solver_options": {"clip_range": 1.0}}
    assert flow.table(4, **small, **clip) is not flow.table(4, **small)
    assert pickle.loads(pickle.dumps(flow)).table(4, **small).timesteps.shape == (4,)
