"""Rules beside a step: calls that only look, rules of users, gradients at the edges, compilers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import ops, solvers
from diffcore.guidance import (
    APG,
    CFG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    Guidance,
    NormPreservingCFG,
    RescaledCFG,
    Weighted,
)

SIGMAS = torch.tensor([6.0, 3.0, 1.5, 0.6, 0.2, 0.0], dtype=torch.float64)
ROW = (0.3, 0.2, 0.5, 0.1, 1.2, -0.3, -0.8, 0.9)
CONDITIONS: dict[str, Any] = {"model_kwargs": {"mean": 1.0}, "uncond_kwargs": {}}


def model(x: Tensor, t: Tensor, mean: float = -0.2) -> Tensor:
    return torch.tanh(x) + mean / (1 + t.reshape(-1, 1))


def start() -> Tensor:
    return 6 * torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", ["cfg_pp_table", "dpmpp_2m_cfg_pp_table"])
def test_cfg_pp_with_callbacks_and_thresholds(name: str) -> None:
    table = getattr(solvers, name)(SIGMAS, prediction_type="sample")
    seen: dict[str, list[Tensor]] = {}
    found = {}
    for kind, options in (("rule", {"guidance": CFGPlusPlus(0.8)}), ("w", {"guidance_scale": 0.8})):
        states: list[Tensor] = []
        found[kind] = diffcore.sample(
            model,
            start(),
            table,
            dynamic_thresholding_ratio=0.9,
            callback=lambda s, states=states: states.append(s["denoised"]),
            **options,
            **CONDITIONS,
        )
        seen[kind] = states
    assert torch.equal(found["rule"], found["w"])
    assert all(map(torch.equal, seen["rule"], seen["w"]))
    x, m, u = torch.randn(3, 2, 4, dtype=torch.float64)
    by_rule = table.denoised(1, x, m, model_output_uncond=u, guidance=CFGPlusPlus(0.8))
    assert torch.equal(by_rule, table.denoised(1, x, m, model_output_uncond=u, guidance_scale=0.8))


def test_only_a_step_moves_momentum_on() -> None:
    table = solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample")
    rule = APG(3.0, momentum=-0.5)
    expected = diffcore.sample(model, start(), table, guidance=rule, **CONDITIONS)
    begun, x, history = rule.begin(), start(), ()
    for i, row in enumerate(table.rows):
        t = table.timesteps[i].expand(3)
        m, u = model(x, t, 1.0), model(x, t)
        given: dict[str, Any] = {"model_output_uncond": u, "guidance": begun}
        denoised = table.denoised(i, x, m, **given)
        ops.dynamic_threshold(x, m, row.coefficients, **given)
        guided = begun.combine(m, u)
        torch.testing.assert_close(denoised, table.denoised(i, x, guided))
        x, history = table.step(i, x, m, history, **given)
    assert torch.equal(x, expected)
    with pytest.raises(ValueError, match="guidance must not remember earlier rows here, got APG"):
        ops.step_log_prob(x, m, x, ROW, model_output_uncond=u, guidance=begun)
    with pytest.raises(ValueError, match=r"guidance must be begun"):
        rule.combine(m, u)


def test_combine_needs_one_rule_for_all_rows() -> None:
    x = start()
    for rule in (CFG(2.0, interval=(0, 0.5)), CFGZeroStar(2.0)):
        with pytest.raises(ValueError, match=r"call combine of guidance.at\(i, rows\)"):
            rule.combine(x, x)
    assert torch.equal(Weighted(2, 0).combine(x, 0 * x), 2 * x)


class Louder(Guidance):
    """A rule with an ``__init__`` of its own."""

    def __init__(self, scale: float, **options: Any) -> None:
        super().__init__(**options)
        object.__setattr__(self, "scale", scale)

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> Any:
        return self.scale, 0.0  # type: ignore[attr-defined]


def test_a_rule_with_its_own_constructor_may_have_an_interval() -> None:
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    of_users = diffcore.sample(
        model, start(), table, guidance=Louder(2.0, interval=(0.2, 0.7)), **CONDITIONS
    )
    ours = diffcore.sample(
        model, start(), table, guidance=CFG(2.0, interval=(0.2, 0.7)), **CONDITIONS
    )
    assert torch.equal(of_users, ours)


class Remembering(Guidance):
    """A user's rule that remembers."""

    def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> Any:
        return 2.0, 0.0

    def remember(self, model_output: Tensor, model_output_uncond: Tensor) -> None:
        pass


def test_a_rule_that_remembers_is_not_checkpointed() -> None:
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    options: dict[str, Any] = {"differentiable": True, "checkpoint": True, **CONDITIONS}
    with pytest.raises(ValueError, match="checkpoint must be False under guidance with momentum"):
        diffcore.sample(model, start(), table, guidance=Remembering(), **options)


@pytest.mark.parametrize(
    ("answer", "came"), [(2.0, "float"), ((1.0, 0.0, 0.0), "3 values"), (None, "NoneType")]
)
def test_wrong_weights(answer: Any, came: str) -> None:
    class Wrong(Guidance):
        def weights(self, model_output: Tensor, model_output_uncond: Tensor) -> Any:
            return answer

    x, table = start(), solvers.euler_table(SIGMAS, prediction_type="sample")
    message = rf"weights of Wrong must return \(w, g\), got {came}"
    with pytest.raises(TypeError, match=message):
        Wrong().combine(x, x)
    with pytest.raises(TypeError, match=message):
        table.step(0, x, x, model_output_uncond=x, guidance=Wrong())
    with pytest.raises(TypeError, match=message):
        diffcore.sample(model, x, table, guidance=Wrong(), **CONDITIONS)
    with pytest.raises(NotImplementedError, match=r"Guidance must define weights\(m_c, m_u\)"):
        Guidance().combine(x, x)


def test_wrong_rules_beside_a_table() -> None:
    x, table = start(), solvers.euler_table(SIGMAS, prediction_type="sample")
    for call in (table.step, table.denoised):
        with pytest.raises(TypeError, match=r"guidance must be a rule of .* got"):
            call(0, x, x, model_output_uncond=x, guidance=2.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="guidance_scale must be None with guidance, got both"):
            call(0, x, x, model_output_uncond=x, guidance=CFG(2.0), guidance_scale=2.0)
    never = CFG(2.0, interval=(0, 0))
    both = torch.cat([0 * x, x])
    assert torch.equal(table.denoised(0, x, both, guidance=never), table.denoised(0, x, x))
    with pytest.raises(ValueError, match="scale must not be nan"):
        CFG(float("nan"))


@pytest.mark.parametrize("rule", [NormPreservingCFG(3.0), RescaledCFG(3.0)], ids=repr)
def test_gradients_are_numbers_at_the_edges(rule: Guidance) -> None:
    c = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    found = rule.combine(c + 0.0, u)
    assert found.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (c, u)))


@pytest.mark.parametrize("rule", [CFGZeroStar(3.0), CFGZeroStar(3.0, 0), CFG(3.0)], ids=repr)
def test_each_row_of_a_rule_compiles(rule: Guidance) -> None:
    if torch.__version__.startswith("2.10.") and rule.by_row:
        pytest.skip("torch 2.10 does not trace copy.copy")
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    x, m, u = torch.randn(3, 2, 4)
    for i in (0, 3):
        torch._dynamo.reset()

        def step(x: Tensor, m: Tensor, u: Tensor, i: int = i) -> Tensor:
            return table.step(i, x, m, model_output_uncond=u, guidance=rule)[0]

        assert torch.equal(torch.compile(step, fullgraph=True)(x, m, u), step(x, m, u))


def test_a_checkpointed_loop_compiles() -> None:
    table = solvers.euler_table(SIGMAS, prediction_type="sample")

    def run_model(x: Tensor) -> Tensor:
        return diffcore.sample(
            lambda x, t: torch.tanh(x), x, table, differentiable=True, checkpoint=True
        )

    torch._dynamo.reset()
    x = start().requires_grad_()
    (plain,) = torch.autograd.grad(run_model(x).sum(), x)
    (compiled,) = torch.autograd.grad(torch.compile(run_model, fullgraph=True)(x).sum(), x)
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("rule", [RescaledCFG(3.0, 0.6), APG(3.0, 0.2, 1.5), TCFG(3.0)], ids=repr)
def test_a_rule_in_other_surroundings(rule: Guidance) -> None:
    x, c, u = torch.randn(3, 4, 5)

    class Subclass(Tensor):
        pass

    def step(x: Tensor, c: Tensor, u: Tensor, rule: Guidance = rule) -> Tensor:
        return ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=rule)

    plain = step(x, c, u)
    assert torch.equal(step(x, c, u, pickle.loads(pickle.dumps(rule))), plain)
    assert torch.equal(step(x, c, u, copy.deepcopy(rule)), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step(x, c, u), plain)
    with torch.inference_mode():
        assert torch.equal(step(x, c, u), plain)
    with torch.device("meta"):
        assert torch.equal(step(x, c, u), plain)
    of_subclass = step(x, c.as_subclass(Subclass), u)
    assert torch.equal(of_subclass.as_subclass(Tensor), plain)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (4, 2, 3):
        assert torch.equal(compiled(x[:batch], c[:batch], u[:batch]), plain[:batch])
    for dtype in (torch.bfloat16, torch.float64):  # the widest, as in every op
        mixed = step(x, c.to(dtype), u.to(dtype))
        wide = torch.promote_types(x.dtype, dtype)
        assert torch.equal(mixed, step(x.to(wide), c.to(dtype).to(wide), u.to(dtype).to(wide)))
