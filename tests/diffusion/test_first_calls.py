"""First calls under modes, transforms and compilers: the right values, and nothing kept of them.

Tables are made at their first use. Each case is called on a new object under each route, then in
plain eager, where a fake, batched or inference tensor that was kept would raise or be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, sample, sampling, solvers
from diffcore._engine import native
from diffcore.likelihood import vdm_bound
from diffcore.sampling import k_diffusion
from support.bounds import assert_same_bits

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

BETAS = make_betas("linear", 50, scale_to_1000=True)
KEY = PhiloxNoise(3)
T, TIMES, ROW = torch.tensor([3, 5]), torch.tensor([0.3, 0.6]).double(), torch.tensor([1])
X, Y, Z = (torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]
GAMMA = {"gamma_min": -5.0, "gamma_max": 5.0, "decoder": "gaussian"}


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x) + 1e-3 * t.to(x).reshape(-1, 1, 1)


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), 0.1 * x], dim=1)


def diffusion(timesteps: int = 50, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(BETAS[:timesteps], **options)


def without_tables() -> None:
    k_diffusion._table.cache_clear()


def multistep() -> Any:
    return solvers.dpmpp_2m_table(solvers.NoiseLevels.from_edm(SIGMAS))


def ancestral() -> Any:
    return solvers.euler_ancestral_table(solvers.NoiseLevels.from_edm(SIGMAS))


Case = tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]

CASES: dict[str, Case] = {
    "q_sample": (diffusion, lambda d, x: d.q_sample(x, T, Z)),
    "q_mean_variance": (diffusion, lambda d, x: d.q_mean_variance(x, T)[0]),
    "q_posterior": (diffusion, lambda d, x: sum(d.q_posterior_mean_variance(x, Z, T))),
    "training_losses": (
        diffusion,
        lambda d, x: d.training_losses(model, x, T, noise=KEY)["loss"],
    ),
    "training_losses_kl": (
        lambda: diffusion(loss_type="kl", prediction_type="v_prediction"),
        lambda d, x: d.training_losses(model, x, T, noise=KEY)["loss"],
    ),
    "training_losses_learned": (
        lambda: diffusion(variance_type="learned_range"),
        lambda d, x: d.training_losses(learned, x, T, noise=KEY)["loss"],
    ),
    "respaced": (
        lambda: diffusion().respace(8),
        lambda d, x: d.training_losses(model, x, T, noise=KEY)["loss"],
    ),
    "p_mean_variance": (diffusion, lambda d, x: sum(d.p_mean_variance(model, x, T).values())),
    "p_sample": (diffusion, lambda d, x: sum(d.p_sample(model, x, T, noise=KEY).values())),
    "p_sample_learned": (
        lambda: diffusion(variance_type="learned"),
        lambda d, x: d.p_sample(learned, x, T, noise=KEY)["sample"],
    ),
    "ddim_sample": (
        diffusion,
        lambda d, x: d.ddim_sample(model, x, T, eta=0.5, noise=KEY)["sample"],
    ),
    "p_sample_loop": (
        diffusion,
        lambda d, x: d.p_sample_loop(model, x.shape, noise=x, step_noise=KEY, num_steps=3),
    ),
    "ddim_sample_loop": (
        diffusion,
        lambda d, x: d.ddim_sample_loop(
            model, x.shape, noise=x, step_noise=KEY, num_steps=3, eta=0.3
        ),
    ),
    "prior_bpd": (diffusion, lambda d, x: d.prior_bpd(x)),
    "vb_terms_bpd": (
        diffusion,
        lambda d, x: d.vb_terms_bpd(model, x, Z, T, decoder="gaussian")["output"],
    ),
    "calc_bpd_loop": (
        lambda: diffusion(3),
        lambda d, x: d.calc_bpd_loop(model, x, noise=KEY, decoder="gaussian")["mse"],
    ),
    "vdm_bound": (
        lambda: None,
        lambda _, x: vdm_bound(model, x, **GAMMA, t=TIMES, noise=KEY).total_nats,
    ),
    "vdm_bound_in_steps": (
        lambda: None,
        lambda _, x: vdm_bound(model, x, **GAMMA, t=TIMES, noise=KEY, num_timesteps=9).total_nats,
    ),
    "sample": (multistep, lambda table, x: sample(model, x, table, noise=KEY)),
    "sample_ancestral": (ancestral, lambda table, x: sample(model, x, table, noise=KEY)),
    "step_at_a_counter": (multistep, lambda table, x: table.step(ROW, x, Z, (Z,))[0]),
    "sample_dpmpp_2m": (
        without_tables,
        lambda _, x: sampling.sample_dpmpp_2m(model, x, SIGMAS, disable=True),
    ),
}


class Passes(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_mode(mode: Callable[[], Any]) -> Callable[..., Tensor]:
    def run(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with mode():
            return f(x)

    return run


def of_fakes(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = f(mode.from_tensor(x))
    assert (found.shape, found.dtype) == (f(x).shape, f(x).dtype)
    return f(x)


ROUTES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.vjp(f, x)[0],
    "vmap": lambda f, x: torch.vmap(f, randomness="same")(x[None])[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "inference": in_mode(torch.inference_mode),
    "meta": in_mode(lambda: torch.device("meta")),
    "function mode": in_mode(Passes),
    "fakes": of_fakes,
    "make_fx": lambda f, x: make_fx(f)(x)(x),
    "make_fx of symbols": lambda f, x: make_fx(
        f, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x)(x),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_call_under_any_route(name: str) -> None:
    make, call = CASES[name]
    wanted = call(make(), X)
    for route, run in ROUTES.items():
        thing = make()
        try:
            found = run(partial(call, thing), X)
            torch.testing.assert_close(found, wanted)
            assert_same_bits(call(thing, X), wanted)
        except Exception as error:
            raise AssertionError(f"{name} under {route}") from error


class Calls(torch.nn.Module):
    """Every case that can be traced, on objects of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.things = {n: make() for n, (make, _) in CASES.items() if not n.startswith("sample_d")}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: CASES[name][1](thing, x) for name, thing in self.things.items()}


def test_the_first_call_is_compiled_once() -> None:
    torch._dynamo.reset()
    counter, calls = CompileCounterWithBackend("aot_eager"), Calls()
    compiled = torch.compile(calls, fullgraph=True, backend=counter)
    for run, x in ((compiled, X), (compiled, Y), (calls, X), (compiled, X)):
        for name, found in run(x).items():
            assert_same_bits(found, CASES[name][1](CASES[name][0](), x), name)
    assert counter.frame_count == 1


def test_tables_of_another_diffusion_are_compiled_for_again() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def step(diffusion: GaussianDiffusion, x: Tensor) -> Tensor:
        return diffusion.ddim_sample(model, x, T, eta=0.5, noise=KEY)["sample"]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    one, other = (GaussianDiffusion(betas) for betas in (BETAS[10:], BETAS[:-10]))
    for d in (one, other, one, other):
        assert_same_bits(compiled(d, X), step(d, X))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_the_first_call_is_exported(strict: bool) -> None:
    calls = Calls()
    program = torch.export.export(calls, (X,), strict=strict)
    for found in (program.module()(Y), calls(Y)):
        for name, y in found.items():
            assert_same_bits(y, CASES[name][1](CASES[name][0](), Y))
