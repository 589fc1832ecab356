"""What a loop keeps of its steps: states and log-probabilities, with the bits of later scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, solvers
from diffcore.guidance import APG, CFG, RescaledCFG
from diffcore.sampling import Trajectory
from support.bounds import assert_same_bits
from support.solver_list import CHURNED, STOCHASTIC

KEY = PhiloxNoise(6)
SIGMAS = torch.tensor([6.0, 3.0, 1.5, 0.7, 0.2, 0.0], dtype=torch.float64)
FLOW = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
KINDS = ("flow_grpo", "dance_grpo", "cps")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(2)).to(dtype)


class Net(torch.nn.Module):
    """A model with a parameter, which may predict its variance too."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        s = (t / 1000).reshape(-1, 1, 1).to(x.dtype)
        m = torch.tanh(self.weight.to(x.dtype) * x + shift) - s
        return torch.cat([m, 0.4 * m], 1) if self.learned else m


def scored_again(net: Net, table: Any, found: Trajectory, given: Any = None) -> Tensor:
    """The log-probabilities of a trajectory as training computes them, with gradients."""
    assert found.states is not None
    scores, history = [], ()
    guided = {} if given is None else {"guidance": given}
    for i, t in enumerate(table.timesteps):
        x, after = found.states[i : i + 2]
        outputs = [net(x, t.expand(len(x)), shift) for shift in ((0.5, 0.0) if guided else (0.0,))]
        if guided:
            guided["model_output_uncond"] = outputs[1]
        variance = {}
        if table.variance is not None:
            outputs[0], v = outputs[0].chunk(2, 1)
            variance = {"variance_output": v}
        m = outputs[0]
        scores.append(table.log_prob(i, x, m, after, history, **guided, **variance))
        noise = KEY.at(1 + i) if table.rows[i].noisy else None
        with torch.no_grad():  # what sampling kept for later rows is a constant
            history = table.step(i, x, m, history, noise=noise, **guided, **variance)[1]
    return torch.stack(scores)


def shifted(rule: Any) -> dict[str, Any]:
    return {"guidance": rule, "model_kwargs": {"shift": 0.5}, "uncond_kwargs": {}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ratio_of_a_policy_to_itself_is_1(dtype: torch.dtype) -> None:
    """Scored again from what was stored, in training, every step has the bits of sampling."""
    net, x = Net(), start(dtype)
    flows = [solvers.flow_sde_table(FLOW, kind=kind) for kind in KINDS]
    histories = [STOCHASTIC[name](SIGMAS) for name in ("dpmpp-2m-sde", "dpmpp-3m-sde", "ddpm")]
    learned = solvers.ddpm_table(
        solvers.NoiseLevels.from_sigmas(SIGMAS), variance_type="learned_range"
    )
    options = {"noise": KEY, "return_trajectory": True, "return_log_prob": True}
    cases: list[tuple[Net, Any, Any]] = [(net, table, None) for table in (*flows, *histories)]
    cases.append((Net(learned=True), learned, None))
    rules = (CFG(2.0), RescaledCFG(3.0, 0.7), RescaledCFG(3.0, 0.7, interval=(0.2, 0.8)))
    cases += [(net, table, rule) for table in (flows[0], histories[1]) for rule in rules]
    for model, table, rule in cases:
        given = {} if rule is None else shifted(rule)
        found = diffcore.sample(model, x, table, **options, **given)
        new = scored_again(model, table, found, rule)
        assert new.requires_grad
        ratio = (new - found.log_probs).exp()
        assert torch.equal(ratio, torch.ones(5, 3)), (table.name, rule)


@pytest.mark.parametrize("name", [*STOCHASTIC, *CHURNED])
def test_the_states_are_those_of_a_loop_of_ones_own(name: str) -> None:
    table = {**STOCHASTIC, **CHURNED}[name](SIGMAS)
    net, x = Net(), start()
    with torch.no_grad():
        plain = diffcore.sample(net, x, table, noise=KEY)
        found = diffcore.sample(net, x, table, noise=KEY, return_trajectory=True)
        scored = diffcore.sample(net, x, table, noise=KEY, return_log_prob=True, reduction="mean")
        y = x
        if table.start_noise:
            churn = KEY.at(1 + len(table)).tensor(x.shape, dtype=x.dtype)
            y = diffcore.add_noise(x, churn, table.start_scale, table.start_noise)
        states, scores, history = [y], [], ()
        for i, row in enumerate(table.rows):
            m = net(row.input_scale * y, table.timesteps[i].expand(3))
            noise = KEY.at(1 + i) if row.noisy else None
            y, history, score = table.step(
                i, y, m, history, noise=noise, return_log_prob=True, reduction="mean"
            )
            states.append(y)
            scores.append(score)
    assert_same_bits((found.samples, *found.states), (plain, *states))
    assert found.states[-1] is found.samples
    assert found.log_probs is None
    assert scored.states is None
    assert_same_bits((scored.samples, scored.log_probs), (plain, torch.stack(scores)))
    assert scored.log_probs.shape == (len(table), 3)


def test_a_loop_with_everything_beside() -> None:
    """Guidance with momentum, before_model, a callback, a threshold; and what is kept of it."""
    net, x = Net(), start()
    table = solvers.flow_sde_table(FLOW)
    seen: list[Tensor] = []
    options: dict[str, Any] = {
        **shifted(APG(2.0, momentum=-0.5)),
        "noise": KEY,
        "before_model": lambda state: 0.5 * state["x"],
        "callback": lambda state: seen.append(state["x"]),
        "dynamic_thresholding_ratio": 0.9,
    }
    plain = diffcore.sample(net, x, table, **options)
    del seen[:]
    found = diffcore.sample(net, x, table, **options, return_trajectory=True, return_log_prob=True)
    assert_same_bits(found.samples, plain)
    assert found.states[0] is x
    assert_same_bits(tuple(seen), found.states[1:])  # the callback gets what a row returned
    assert found.log_probs.isfinite().all()
    assert found.log_probs.all()


@pytest.mark.parametrize("name", ["dpmpp-2m-sde", "ddpm"])
def test_a_loop_that_autograd_records(name: str) -> None:
    table = STOCHASTIC[name](SIGMAS)
    net = Net().double()
    results = []
    for checkpoint in (False, True):
        x = start().requires_grad_()
        found = diffcore.sample(
            net, x, table, noise=KEY, differentiable=True, checkpoint=checkpoint,
            return_trajectory=True, return_log_prob=True,
        )  # fmt: skip
        loss = found.samples.sum() + found.log_probs.sum() + found.states[2].square().sum()
        results.append((found.log_probs, *torch.autograd.grad(loss, (x, net.weight))))
    assert_same_bits(*results)

    def total(x: Tensor, weight: Tensor) -> Tensor:
        """The same, by rows, of which only the last is scored: its x' is a constant."""
        history, y = (), x
        for i, row in enumerate(table.rows):
            m = torch.tanh(weight * row.input_scale * y) - table.timesteps[i] / 1000
            noise = KEY.at(1 + i) if row.noisy else None
            y, history, score = table.step(i, y, m, history, noise=noise, return_log_prob=True)
            if i == 2:
                return score.sum()
        raise AssertionError

    x = start().requires_grad_()
    found = diffcore.sample(
        net, x, table, noise=KEY, differentiable=True, checkpoint=True, return_log_prob=True
    )
    gradients = torch.autograd.grad(found.log_probs[2].sum(), (x, net.weight))
    leaves = [x.detach().requires_grad_(), net.weight.detach().requires_grad_()]
    wanted = torch.autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-14)


def test_a_deterministic_loop_has_no_density() -> None:
    found = diffcore.sample(
        Net(), start(), solvers.euler_table(SIGMAS), return_log_prob=True, return_trajectory=True
    )
    assert torch.equal(found.log_probs, torch.zeros(5, 3, dtype=torch.float64))
    assert len(found.states) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_log_probability_is_minus_the_entropy(kind: str) -> None:
    """E log p = -(1 + log(2 pi c_z²)) / 2 for each element, whatever the model predicts."""
    table = solvers.flow_sde_table(FLOW, kind=kind, eta=0.5)
    n = 20_000
    found = diffcore.sample(
        lambda x, t: -0.3 * x, KEY.tensor((4, n), dtype=torch.float64), table, noise=KEY,
        return_log_prob=True, reduction="mean",
    )  # fmt: skip
    for row, scores in zip(table.rows, found.log_probs, strict=True):
        if row.noisy:
            wanted = -0.5 * (1 + math.log(2 * math.pi * row.coefficients[3] ** 2))
            # z² / 2 has the variance 1/2: five standard errors of 4 n elements.
            assert abs(scores.mean().item() - wanted) < 5 * math.sqrt(0.5 / (4 * n))
        else:
            assert not scores.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"return_trajectory": 1.0}, TypeError, r"^return_trajectory must be"),
        ({"return_log_prob": "no"}, TypeError, r"^return_log_prob must be"),
        ({"reduction": "batchmean"}, ValueError, r"^reduction must be one of 'sum', 'mean'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diffcore.sample(Net(), start(), solvers.euler_table(SIGMAS), **options)


def test_capture_keeps_none() -> None:
    with pytest.raises(TypeError, match="return_trajectory"):
        diffcore.sampling.capture(  # type: ignore[call-arg]
            Net(), solvers.euler_table(SIGMAS), (2, 3), return_trajectory=True
        )
