"""What people hand to a sampling loop: outputs of other libraries, noise, shapes, callbacks."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import sampling, solvers
from support.toys import BETAS, half

D = diffcore.GaussianDiffusion(BETAS)
X = torch.linspace(-1, 1, 12).view(2, 6)
SIGMAS = [4.0, 2.0, 1.0, 0.0]
PLAIN, NOISY = solvers.euler_table(SIGMAS), solvers.euler_ancestral_table(SIGMAS)
CHURNED = solvers.euler_table(SIGMAS, s_churn=1.0)
KEY = diffcore.PhiloxNoise(2)


@dataclass
class UNetOutput:
    sample: Tensor


@dataclass
class Prediction:
    """An output whose tensor has another name."""

    scale: float
    velocity: Tensor


class ModelOutput(OrderedDict[str, Tensor]):
    """As diffusers' outputs, a dict with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Named = namedtuple("Named", ["sample", "other"])
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dataclass": (UNetOutput, r"got UNetOutput; pass .*model\(x, t, \*\*kwargs\)\.sample$"),
    "other-name": (lambda x: Prediction(1.0, x), r"got Prediction; .*\*\*kwargs\)\.velocity$"),
    "diffusers": (lambda x: ModelOutput(sample=x), r"got ModelOutput; .*\.sample$"),
    "named-tuple": (lambda x: Named(x, 1), r"got Named; .*\.sample$"),
    "tuple": (lambda x: (x, None), r"got tuple; .*\*\*kwargs\)\[0\]$"),
    "list": (lambda x: [x], r"got list; .*\[0\]$"),
    "dict": (lambda x: {"loss": 1.0, "pred": x}, r"got dict; .*\['pred'\]$"),
    "empty-tuple": (lambda x: (), r"got tuple$"),
    "none": (lambda x: None, r"got NoneType$"),
    "array": (lambda x: x.numpy(), r"got ndarray$"),
}
CALLS: dict[str, Callable[..., Any]] = {
    "sample": lambda model: diffcore.sample(model, X, PLAIN),
    "k_diffusion": lambda model: sampling.sample_euler(model, X, SIGMAS),
    "p_sample": lambda model: D.p_sample(model, X, 3),
    "training_losses": lambda model: D.training_losses(model, X, 3),
    "p_sample_loop": lambda model: D.p_sample_loop(model, (2, 6), num_steps=2),
    "vb_terms": lambda model: D.vb_terms_bpd(model, X, X, 3, decoder="gaussian"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_is_no_tensor_says_how_to_get_it(output: str, call: str) -> None:
    wrap, message = OUTPUTS[output]
    with pytest.raises(TypeError, match=f"^model must return a torch.Tensor, {message}"):
        CALLS[call](lambda x, t: wrap(x))


def test_guidance_without_a_second_batch_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\), got \(2, 6\); .* pass uncond_kwargs"):
        diffcore.sample(half, X, PLAIN, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"shape \(4, 6\), got \(3, 6\)$"):
        diffcore.sample(lambda x, t: torch.zeros(3, 6), X, PLAIN, guidance_scale=2.0)


# ---- noise of steps ------------------------------------------------------------------------------


def test_noise_of_the_wrong_length_is_refused_before_the_first_model_call() -> None:
    calls: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return half(x, t)

    for table, good, bad in ((NOISY, (2, 3, 4), (0, 1, 5, 30)), (CHURNED, (4,), (2, 3, 5))):
        for count in bad:
            with pytest.raises(ValueError, match=r"noise must have the shape \[S.* 2, 6\]"):
                diffcore.sample(model, X, table, noise=torch.zeros(count, 2, 6))
        assert not calls
        # Entries that no row reads may be left out: the last row adds no noise.
        noise = torch.randn(4, 2, 6)
        expected = diffcore.sample(half, X, table, noise=noise)
        for count in good:
            assert torch.equal(diffcore.sample(half, X, table, noise=noise[:count]), expected)
    for count in (3, 12):
        with pytest.raises(ValueError, match=r"step_noise must have the shape \[S, 2, 6\].*S = 6"):
            D.p_sample_loop(model, (2, 6), num_steps=6, step_noise=torch.zeros(count, 2, 6))
    assert not calls


@pytest.mark.parametrize(
    "loop", [D.p_sample_loop, D.ddim_sample_loop], ids=["p_sample_loop", "ddim_sample_loop"]
)
def test_shapes(loop: Callable[..., Tensor]) -> None:
    expected = loop(half, (2, 6), noise=KEY)
    for shape in ([2, 6], torch.Size([2, 6]), np.array([2, 6]), (np.int64(2), np.int32(6))):
        assert torch.equal(loop(half, shape, noise=KEY), expected)
    for wrong in (4, 4.0, None, (2.0, 6), ("2", 6), (True, 6)):
        with pytest.raises(TypeError, match="shape must be a tuple of non-negative ints, got "):
            loop(half, wrong)
    with pytest.raises(ValueError, match="shape must be a tuple of non-negative ints, got "):
        loop(half, (-2, 6))


# ---- the callback --------------------------------------------------------------------------------


WRITES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "x": lambda s: s.__setitem__("x", s["x"] + 1),
    "new": lambda s: s.__setitem__("mine", 1),
    "update": lambda s: s.update(x=s["x"] + 1),
    "or": lambda s: s.__ior__({"x": 1}),
    "default": lambda s: s.setdefault("mine", 1),
    "delete": lambda s: s.__delitem__("x"),
    "pop": lambda s: s.pop("x"),
    "clear": lambda s: s.clear(),
}
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "sample": lambda callback: diffcore.sample(half, X, PLAIN, callback=callback),
    "k_diffusion": lambda callback: sampling.sample_euler(half, X, SIGMAS, callback=callback),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("write", WRITES)
def test_a_callback_cannot_write_its_state_in_silence(write: str, sampler: str) -> None:
    message = (
        r"state must not be changed.* return another (x instead|one from the callback of diff)"
    )
    with pytest.raises(TypeError, match=message):
        SAMPLERS[sampler](WRITES[write])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_callback_can_read_and_copy_its_state(sampler: str) -> None:
    seen: list[dict[str, Any]] = []

    def callback(state: dict[str, Any]) -> None:
        changed = {**state, "more": 1}
        changed["x"] = None
        assert isinstance(state, dict)
        for again in (copy.copy(state), copy.deepcopy(state), state.copy()):
            assert again.keys() == state.keys()
            again["x"] = None
        assert pickle.loads(pickle.dumps(state)).keys() == state.keys()
        assert state["x"] is not None
        seen.append(state | {"mine": 2})

    out = SAMPLERS[sampler](callback)
    assert torch.equal(out, SAMPLERS[sampler](None))
    assert [s["i"] for s in seen] == [0, 1, 2]
    assert all(s["mine"] == 2 for s in seen)


# ---- gradients -----------------------------------------------------------------------------------


def test_loops_give_no_gradient_and_their_docstrings_name_what_does() -> None:
    x = X.clone().requires_grad_()
    for loop in (
        diffcore.sample(half, x, PLAIN),
        sampling.sample_euler(half, x, SIGMAS),
        D.ddim_sample_loop(half, (2, 6), noise=x, num_steps=3),
        D.p_sample_loop(half, (2, 6), noise=x, num_steps=3),
    ):
        assert not loop.requires_grad
    for f in (diffcore.sample, D.p_sample_loop, D.ddim_sample_loop, sampling.k_diffusion):
        text = " ".join(f.__doc__.split())
        assert "``torch.no_grad()``" in text
        assert "SolverTable.step" in text
    # The alternative: half at every sigma multiplies x by 1 - (s - s') / s / 2.
    y, history = x, ()
    for i in range(len(PLAIN)):
        y, history = PLAIN.step(i, y, 0.5 * y, history)
    assert torch.equal(y, diffcore.sample(half, x, PLAIN))
    (grad,) = torch.autograd.grad(y.sum(), x)
    factor = 1.0
    for here, after in pairwise(SIGMAS):
        factor *= 1 + (after - here) * 0.5
    torch.testing.assert_close(grad, torch.full_like(x, factor))


def test_settings_of_sample_are_named_before_the_first_model_call() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    for options, kind, message in (
        ({"dynamic_thresholding_ratio": 2.0}, ValueError, "dynamic_thresholding_ratio must be in"),
        ({"dynamic_thresholding_ratio": "a"}, TypeError, "dynamic_thresholding_ratio must be a nu"),
        (
            {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5},
            ValueError,
            "sample_max_value must be at least 1, got 0.5",
        ),
        ({"noise": "randn"}, TypeError, "noise must be "),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            diffcore.sample(never, X, NOISY, **options)
    with pytest.raises(TypeError, match=r"table must be a SolverTable, got list; .*dpmpp_table"):
        diffcore.sample(never, X, SIGMAS)
