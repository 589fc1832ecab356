"""Guidance that a fused step takes along: what is recognised, and that nothing else changes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse  # noqa: E402
from diffcore.diffusers.guidance import (  # noqa: E402
    Combination,
    Prediction,
    predicted,
    taken_apart,
)
from diffcore.diffusers.registry import FAMILIES  # noqa: E402
from support.pipelines import SD, generator  # noqa: E402
from support.schedulers import configured, make_steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

TOLERANCE = 1e-5
SCALE = 7.5
SIXTEEN = (torch.bfloat16, torch.float16)


def both(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """What a network returns for the unconditional batch and the conditional one."""
    return torch.randn(2 * batch, 4, 8, 8, generator=generator()).to(dtype)


def halves(output: Tensor) -> tuple[Tensor, Tensor]:
    """m_c and m_u, as pipelines take them apart."""
    uncond, cond = output.chunk(2)
    return cond, uncond


Form = Callable[[Tensor, Tensor], Tensor]

# ---- what is recognised -------------------------------------------------------------------------

FORMS: dict[str, tuple[Form, float]] = {
    "as most": (lambda c, u: u + SCALE * (c - u), SCALE),
    "scale last": (lambda c, u: u + (c - u) * SCALE, SCALE),
    "sum turned": (lambda c, u: SCALE * (c - u) + u, SCALE),
    "whole number": (lambda c, u: u + 3 * (c - u), 3),
    "difference only": (lambda c, u: u + (c - u), 1.0),
    "from the conditional": (lambda c, u: c + SCALE * (c - u), 1 + SCALE),
    "functions": (lambda c, u: torch.add(u, torch.mul(torch.sub(c, u), SCALE)), SCALE),
    "methods": (lambda c, u: u.add(c.sub(u).mul(SCALE)), SCALE),
}


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_formula(form: str, dtype: torch.dtype) -> None:
    formula, w = FORMS[form]
    output = both(dtype)
    wanted = formula(*halves(output))
    combined = formula(*halves(predicted(output)))
    assert isinstance(combined, Combination)
    assert (combined.shape, combined.dtype, combined.device) == (
        wanted.shape,
        wanted.dtype,
        wanted.device,
    )
    cond, given = taken_apart(combined)
    parts = [x.to(wanted.dtype) for x in halves(output)]
    for ours, theirs in zip((cond, given["model_output_uncond"]), parts, strict=True):
        assert type(ours) is Tensor
        assert torch.equal(ours, theirs)
    assert given["guidance_scale"] == w
    # And where the tensor is needed, it has the bits of the pipeline.
    assert torch.equal(combined.clone(), wanted)
    assert taken_apart(combined)[1] == {}


def test_predictions_of_two_calls() -> None:
    cond, uncond = (torch.randn(2, 4, generator=generator(seed)) for seed in (1, 2))
    c, u = predicted(cond), predicted(uncond)
    found, given = taken_apart(u + 2.0 * (c - u))
    assert found is cond
    assert given == {"model_output_uncond": uncond, "guidance_scale": 2.0}


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half of the channels": lambda m: m.chunk(2, dim=1)[0],
    "the first rows": lambda m: m[:, :, :5],
    "tokens": lambda m: m.reshape(2, 4, 64).permute(0, 2, 1),
    "one more dimension": lambda m: m.unsqueeze(2),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_before_and_after_the_formula(part: str) -> None:
    take, output = PARTS[part], both()
    cond, uncond = halves(output)
    wanted = take(uncond + SCALE * (cond - uncond))
    c, u = halves(predicted(output))
    after = take(u + SCALE * (c - u))
    c, u = take(c), take(u)
    before = u + SCALE * (c - u)
    for combined in (before, after):
        assert isinstance(combined, Combination)
        assert taken_apart(combined)[1]["guidance_scale"] == SCALE
        assert torch.equal(combined.clone(), wanted)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_prediction_in_another_dtype(dtype: torch.dtype) -> None:
    """Some pipelines widen the output before the formula."""
    output = both(dtype)
    cond, uncond = halves(output.float())
    c, u = halves(predicted(output).float())
    m = u + SCALE * (c - u)
    found, given = taken_apart(m)
    assert torch.equal(found, cond)
    assert torch.equal(given["model_output_uncond"], uncond)
    # Rounded afterwards, it is computed first.
    narrow = m.to(dtype)
    assert type(narrow) is Tensor
    assert torch.equal(narrow, (uncond + SCALE * (cond - uncond)).to(dtype))


# ---- what is not ---------------------------------------------------------------------------------


def rescaled(c: Tensor, u: Tensor) -> Tensor:
    m = u + SCALE * (c - u)
    return diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.rescale_noise_cfg(
        m, c, guidance_rescale=0.7
    )


def in_place(c: Tensor, u: Tensor) -> Tensor:
    m = u + SCALE * (c - u)
    m *= 0.5
    return m + 1


def written_after(c: Tensor, u: Tensor) -> Tensor:
    m = u + SCALE * (c - u)
    u.mul_(3)
    return m


def written_by_a_view(c: Tensor, u: Tensor) -> Tensor:
    view = c.view(-1).detach()
    d = c - u
    view[:5] = 7.0
    return u + SCALE * d + c


def written_between(c: Tensor, u: Tensor) -> Tensor:
    d = c - u
    c[0] = 0.0
    return u + SCALE * d


def written_difference(c: Tensor, u: Tensor) -> Tensor:
    d = c - u
    d.clamp_(-0.5, 0.5)
    return u + SCALE * d


def through_an_alias(c: Tensor, u: Tensor) -> Tensor:
    alias = torch.from_dlpack(c)
    m = u + SCALE * (c - u)
    alias.zero_()
    return m


OTHER: dict[str, Form] = {
    "rescaled": rescaled,
    "in place": in_place,
    "written after": written_after,
    "written by a view": written_by_a_view,
    "written between": written_between,
    "the difference written": written_difference,
    "through an alias": through_an_alias,
    "a tensor for a scale": lambda c, u: u + torch.full((2, 1, 1, 1), SCALE) * (c - u),
    "scaled twice": lambda c, u: u + 0.5 * (3.0 * (c - u)),
    "with alpha": lambda c, u: torch.add(u, c - u, alpha=SCALE),
    "a third prediction": lambda c, u: u + SCALE * (c - u) + 2 * (c - u),
    "another base": lambda c, u: (2 * u) + SCALE * (c - u),
    "a number": lambda c, u: 1.0 + SCALE * (c - u),
    "normalised": lambda c, u: c.norm() / (u + SCALE * (c - u)).norm() * u,
    "concatenated": lambda c, u: torch.cat([u + SCALE * (c - u), c]),
    "where": lambda c, u: torch.where(c > u, u + SCALE * (c - u), c),
    "a dtype": lambda c, u: (u + SCALE * (c - u)).to(torch.float64),
    "numpy": lambda c, u: torch.from_numpy(np.asarray(u + SCALE * (c - u)) * 2),
    "deepcopy": lambda c, u: copy.deepcopy(u + SCALE * (c - u)),
    "pickle": lambda c, u: pickle.loads(pickle.dumps(u + SCALE * (c - u))),
    "dlpack": lambda c, u: torch.from_dlpack(u + SCALE * (c - u)),
    "out": lambda c, u: torch.add(u, SCALE * (c - u), out=torch.empty_like(u)),
    "broadcast": lambda c, u: u[:1] + SCALE * (c - u[:1]),
}


def saved(c: Tensor, u: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(u + SCALE * (c - u), file)
    file.seek(0)
    found: Tensor = torch.load(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("use", [*OTHER, "saved"])
def test_other_uses_have_the_bits_of_plain_tensors(use: str, dtype: torch.dtype) -> None:
    formula = OTHER.get(use, saved)
    with torch.no_grad():
        wanted = formula(*halves(both(dtype)))
        found = formula(*halves(predicted(both(dtype))))
    found, given = taken_apart(found)
    assert given == {}
    assert type(found) is Tensor
    assert torch.equal(found, wanted)


def test_operators_of_torch_library_get_the_value() -> None:
    """Those that do not ask ``__torch_function__``, such as our own."""
    import diffcore

    c, u = halves(predicted(both()))
    m = u + SCALE * (c - u)
    wanted = diffcore.add_noise(m.clone(), c.clone(), 0.5, 0.25)
    c, u = halves(predicted(both()))
    assert torch.equal(diffcore.add_noise(u + SCALE * (c - u), c, 0.5, 0.25), wanted)
    c, u = halves(predicted(both()))
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.neg(u + SCALE * (c - u)), -m)


def test_a_compiled_function_gets_the_value() -> None:
    c, u = halves(predicted(both()))
    double = torch.compile(lambda m: 2 * m, backend="eager")
    m = u + SCALE * (c - u)
    assert torch.equal(double(m), 2 * m.clone())


def test_what_records_a_gradient_stays_a_tensor() -> None:
    output = both().requires_grad_()
    assert predicted(output) is output
    with torch.no_grad():
        assert isinstance(predicted(output), Prediction)
    kinds = []
    torch.func.vmap(lambda x: kinds.append(type(predicted(x))) or x)(output.detach())
    assert kinds == [Tensor]
    integers = torch.ones(2, dtype=torch.int64)
    assert predicted(integers) is integers


def test_nothing_is_kept_alive() -> None:
    output = predicted(both())
    c, u = halves(output)
    for _ in range(3):
        m = u + SCALE * (c - u)
    assert isinstance(m, Combination)
    assert sum(reference() is not None for reference in output._call.open) == 1


# ---- steps -------------------------------------------------------------------------------------


def options() -> list[Any]:
    """Every fused class, and what a step reads of the predictions beside the formula."""
    cases = [pytest.param(stock, {}, id=stock.__name__) for stock in FAMILIES]
    for name in ("DDPMScheduler", "DDIMScheduler"):
        config = {"thresholding": True, "sample_max_value": 1.5}
        cases.append(pytest.param(getattr(diffusers, name), config, id=f"{name}, thresholding"))
    return cases


@pytest.mark.parametrize(("stock", "config"), options())
def test_a_step_takes_the_formula_along(stock: Any, config: dict[str, Any]) -> None:
    def steps(noted: bool) -> tuple[Any, list[Any]]:
        scheduler = fuse(configured(stock, **config))
        timesteps = make_steps(scheduler, 6)
        names = inspect.signature(scheduler.step).parameters.keys() & {"generator"}
        given = {name: generator(1) for name in names}
        x, taken = torch.randn(2, 4, 8, 8, generator=generator(3)), []
        for t in timesteps:
            scale = getattr(scheduler, "scale_model_input", None)
            seen = x if scale is None else scale(x, t)
            output = torch.tanh(torch.cat([seen, 1.1 * seen]))
            c, u = halves(predicted(output) if noted else output)
            result = scheduler.step(u + 3.0 * (c - u), t, x, **given)
            x = result.prev_sample
            taken += [
                y for y in (x, getattr(result, "pred_original_sample", None)) if y is not None
            ]
        return scheduler, taken

    scheduler, ours = steps(noted=True)
    plain, wanted = steps(noted=False)
    timesteps = make_steps(configured(stock), 6)
    # These two combine outputs of several steps, or take no table at all.
    computes = stock.__name__ in ("PNDMScheduler", "FlowMapEulerDiscreteScheduler")
    assert scheduler.guided_steps == (0 if computes else len(timesteps))
    assert plain.guided_steps == 0
    assert not scheduler.fallbacks
    for a, b in zip(ours, wanted, strict=True):
        assert type(a) is Tensor
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * float(b.abs().max()))


@pytest.mark.parametrize(
    ("name", "variance"),
    [("DDPMScheduler", "learned_range"), ("DPMSolverMultistepScheduler", "learned")],
)
def test_a_predicted_variance_is_computed(name: str, variance: str) -> None:
    """It is part of the combined tensor, and a step reads it or leaves it out."""
    found = []
    for noted in (True, False):
        scheduler = fuse(getattr(diffusers, name)(variance_type=variance))
        scheduler.set_timesteps(6)
        output = torch.tanh(torch.randn(4, 6, 8, 8, generator=generator(3)))
        c, u = halves(predicted(output) if noted else output)
        x = torch.randn(2, 3, 8, 8, generator=generator(4))
        m, t = u + 3.0 * (c - u), scheduler.timesteps[2]
        found.append(scheduler.step(m, t, x, generator=generator()).prev_sample)
        assert scheduler.guided_steps == 0
        assert not scheduler.fallbacks
    assert torch.equal(*found)


def test_a_stock_step_gets_the_value() -> None:
    """A fallback too: the stock scheduler sees the tensor that the pipeline would have made."""
    found = []
    for noted in (True, False):
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(6)
        c, u = halves(predicted(both()) if noted else both())
        m, t, x = u + 3.0 * (c - u), scheduler.timesteps[2], both()[:2]
        found.append(scheduler.step(m, t, x).prev_sample)
    assert torch.equal(*found)
    assert type(found[0]) is Tensor


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_guidance_in_16_bits_is_closer_to_float64(dtype: torch.dtype) -> None:
    """The combined prediction is not rounded: the sum of the errors is smaller than without."""

    def step(output: Tensor, x: Tensor) -> Tensor:
        scheduler = fuse(diffusers.DDIMScheduler(**SD))
        scheduler.set_timesteps(10)
        c, u = halves(output)
        found: Tensor = scheduler.step(u + SCALE * (c - u), scheduler.timesteps[0], x).prev_sample
        return found.double()

    output, x = both(dtype, batch=64), both(dtype, batch=64)[:64].flip(0)
    truth = step(output.double(), x.double())
    noted, plain = step(predicted(output), x), step(output, x)
    assert (noted - truth).abs().sum() < (plain - truth).abs().sum()


def test_errors() -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match=r"pipeline with a unet or a transformer .* DDIMScheduler"):
        fuse(scheduler, guidance=True)
    assert type(scheduler) is diffusers.DDIMScheduler
    with pytest.raises(TypeError, match="guidance must be a bool"):
        fuse(scheduler, guidance="yes")
    assert type(scheduler) is diffusers.DDIMScheduler
