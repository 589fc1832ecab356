"""What holds for any step and any noise key, by examples that hypothesis makes up."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise, ops
from support.bounds import assert_same_bits
from support.solver_list import ALL, PATHS, geometric, levels_on

examples = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(-(2**63), 2**64 - 1)
IDS = st.integers(-(2**63), 2**63 - 1)


# ---- keys ----------------------------------------------------------------------------------------


@examples
@given(
    seed=SEEDS,
    first=IDS,
    stream=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 9),
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_slice_of_a_key_is_the_slice_of_its_noise(
    seed: int, first: int, stream: int, batch: int, size: list[int], data: st.DataObject
) -> None:
    key = PhiloxNoise(seed, sample_ids=first, stream=stream)
    z = key.tensor((batch, *size))
    chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=9))
    wrapped = [(first + i + 2**63) % 2**64 - 2**63 for i in chosen]  # ids count modulo 2^64
    part = key.for_samples(torch.tensor(wrapped))
    assert_same_bits(part.tensor((len(chosen), *size)), z[chosen])
    begin = data.draw(st.integers(0, batch - 1))
    rest = key.for_samples((first + begin + 2**63) % 2**64 - 2**63)
    assert_same_bits(rest.tensor((batch - begin, *size)), z[begin:])
    x = torch.randn(batch, *size)
    whole = ops.add_noise(x, key, 0.6, 0.8)
    assert_same_bits(ops.add_noise(x[chosen], part, 0.6, 0.8), whole[chosen])


@examples
@given(seed=SEEDS, blocks=st.integers(0, 8), shift=st.integers(0, 8), batch=st.integers(1, 3))
def test_a_later_part_of_a_sample_is_the_noise_from_its_first_element(
    seed: int, blocks: int, shift: int, batch: int
) -> None:
    n = 4 * (blocks + shift) + 3
    z = PhiloxNoise(seed).tensor((batch, n))
    part = PhiloxNoise(seed, first_element=4 * shift).tensor((batch, n - 4 * shift))
    assert_same_bits(part, z[:, 4 * shift :])


# ---- tables --------------------------------------------------------------------------------------


@examples
@given(
    name=st.sampled_from(sorted(ALL)),
    path=st.sampled_from(PATHS),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_tables_step_alike_by_int_counter_and_rows_and_after_a_pickle(
    name: str, path: str, steps: int, seed: int
) -> None:
    table = ALL[name](levels_on(path, geometric(steps, 0.1, 8.0, to_zero=True)))
    again = pickle.loads(pickle.dumps(table))
    torch.manual_seed(seed)
    x = torch.randn(2, 5, dtype=torch.float64)
    history: tuple[Tensor, ...] = ()
    for i in range(len(table)):
        m, z = torch.randn(2, *x.shape, dtype=torch.float64)
        after, left = table.step(i, x, m, history, noise=z)
        pickled = again.step(i, x, m, history, noise=z)
        assert_same_bits((after, *left), (pickled[0], *pickled[1]))
        for t in (torch.tensor(i), torch.tensor([i]), torch.full((2,), i, dtype=torch.int32)):
            # What a first row does not have is not read: x stands for it.
            given = (*history, *(x,) * (3 - len(history)))
            found, _ = table.step(t, x, m, given, noise=z)
            torch.testing.assert_close(found, after, rtol=1e-11, atol=1e-11)
        x, history = after, left


@examples
@given(
    betas=st.lists(st.floats(1e-4, 0.5), min_size=2, max_size=30),
    data=st.data(),
    kind=st.sampled_from(["epsilon", "v_prediction"]),
)
def test_respacing_composes(betas: list[float], data: st.DataObject, kind: str) -> None:
    diffusion = GaussianDiffusion(torch.tensor(betas, dtype=torch.float64), kind)
    rows = st.integers(0, len(betas) - 1)
    first = sorted(data.draw(st.sets(rows, min_size=1)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    twice = diffusion.respace(first).respace(second)
    once = diffusion.respace([first[i] for i in second])
    assert twice.tables.timestep_map == once.tables.timestep_map
    torch.testing.assert_close(twice.betas, once.betas, rtol=1e-10, atol=0)
    bars = diffusion.alphas_cumprod[[first[i] for i in second]]
    torch.testing.assert_close(once.alphas_cumprod, bars, rtol=1e-10, atol=0)


# ---- steps are affine ----------------------------------------------------------------------------


def combined(a: float, u: Any, v: Any) -> Any:
    return tuple(a * x + (1 - a) * y for x, y in zip(u, v, strict=True))


@examples
@given(
    row=st.lists(st.floats(-2, 2), min_size=14, max_size=14),
    a=st.floats(-3, 3),
    scale=st.floats(-2, 4),
    history=st.integers(0, 3),
    guided=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_step_without_a_clip_is_affine_in_its_tensors(
    row: list[float], a: float, scale: float, history: int, guided: bool, seed: int
) -> None:
    row[6], row[7] = -torch.inf, torch.inf

    def step(x: Tensor, m: Tensor, u: Tensor, z: Tensor, *h: Tensor) -> Tensor:
        given = {"model_output_uncond": u, "guidance_scale": scale} if guided else {}
        return ops.reverse_step(x, m, tuple(row), noise=z, history=h[:history], **given)

    torch.manual_seed(seed)
    first, second = torch.randn(2, 7, 2, 9, dtype=torch.float64)
    found = step(*combined(a, first, second))
    (wanted,) = combined(a, (step(*first),), (step(*second),))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-10)


@examples
@given(
    levels=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1), st.floats(0.05, 1)),
    a=st.floats(-3, 3),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(ops.PREDICTION_TYPES),
    seed=st.integers(0, 2**32),
)
def test_ddim_steps_and_conversions_are_affine(
    levels: tuple[float, float, float], a: float, eta: float, kind: str, seed: int
) -> None:
    alpha, sigma, share = levels
    cleaner = (min(1.0, alpha / 0.9), sigma * share)  # less noise than (alpha, sigma)
    torch.manual_seed(seed)
    first, second = torch.randn(2, 3, 2, 9, dtype=torch.float64)
    for f in (
        lambda x, m, z: ops.ddim_step(
            m, x, alpha, sigma, *cleaner, eta=eta, noise=z, prediction_type=kind
        ),
        lambda x, m, z: ops.predict_x0(m, x, alpha, sigma, prediction_type=kind),
        lambda x, m, z: ops.predict_epsilon(m, x, alpha, sigma, prediction_type=kind),
        lambda x, m, z: diffcore.add_noise(x, z, alpha, sigma),
    ):
        found = f(*combined(a, first, second))
        (wanted,) = combined(a, (f(*first),), (f(*second),))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)
