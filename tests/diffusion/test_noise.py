"""GaussianDiffusion with noise keys: the same samples in any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.losses import edm_weights, min_snr_weights
from support.bounds import assert_same_bits
from support.toys import BETAS, half

SHAPE = (5, 3, 7)
T = torch.tensor([0, 19, 4, 9, 1])
IDS = torch.tensor([4, 0, -1, 2**40, 7])
KEY = PhiloxNoise(11, sample_ids=IDS, stream=3)
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

each_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
each_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def fading(x, t):
    """A model whose output has the same bits in any batch: one product per element."""
    return x * (0.9 - 0.03 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


def loops(diffusion):
    return (
        diffusion.p_sample_loop,
        lambda *a, **k: diffusion.ddim_sample_loop(*a, num_steps=6, eta=0.7, **k),
        lambda *a, **k: diffusion.ddim_sample_loop(*a, num_steps=4, **k),
    )


# ---- a noise key gives the same bits as its tensor ----------------------------------------------


@each_dtype
def test_single_calls_take_a_key_for_its_tensor(dtype):
    d = GaussianDiffusion(BETAS)
    x = torch.randn(SHAPE).to(dtype)
    tensor = KEY.tensor(SHAPE, dtype=dtype)
    for call in (
        lambda noise: d.q_sample(x, T, noise),
        lambda noise: d.q_sample(x, 7, noise),
        lambda noise: tuple(d.p_sample(fading, x, T, noise=noise).values()),
        lambda noise: tuple(d.ddim_sample(fading, x, T, eta=0.5, noise=noise).values()),
    ):
        assert_same_bits(call(KEY), call(tensor))
    assert not torch.equal(d.q_sample(x, T, KEY), d.q_sample(x, T, KEY.at(4)))


@each_dtype
@each_prediction
def test_training_takes_a_key_for_its_tensor(prediction_type, dtype):
    d = GaussianDiffusion(BETAS, prediction_type)
    x = torch.randn(SHAPE).to(dtype)
    scale = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    snr = d.schedule.snr
    tables = (
        None,
        torch.rand(len(BETAS)),
        min_snr_weights(snr, prediction_type=prediction_type),
        edm_weights(snr, prediction_type=prediction_type),
    )
    for weights in tables:

        def step(noise, weights=weights):
            loss = d.training_losses(lambda x, t: scale * x, x, T, noise=noise, weights=weights)[
                "loss"
            ]
            mean_slope = torch.autograd.grad(loss.mean(), scale, retain_graph=True)
            other_slope = torch.autograd.grad((loss * torch.arange(5)).sum(), scale)
            with torch.no_grad():
                kept = d.training_losses(lambda x, t: scale * x, x, T, noise=noise, weights=weights)
            assert torch.equal(kept["loss"], loss)
            return loss, *mean_slope, *other_slope

        assert_same_bits(step(KEY), step(KEY.tensor(SHAPE, dtype=dtype)), str(weights))


@each_dtype
def test_loops_take_step_i_from_the_next_stream_but_i(dtype):
    d = GaussianDiffusion(BETAS)
    streams = [KEY.at(3 + i).tensor(SHAPE, dtype=dtype) for i in range(len(BETAS) + 1)]
    x_T, steps = streams[0], torch.stack(streams[1:])
    for loop in loops(d):
        calls = []
        expected = loop(
            lambda x, t, calls=calls: calls.append(t) or fading(x, t),
            SHAPE,
            noise=x_T,
            step_noise=lambda i, x: steps[i],
        )
        each = steps[: len(calls)]
        for noise in (
            {"noise": KEY, "dtype": dtype},
            {"noise": KEY, "step_noise": KEY, "dtype": dtype},
            {"noise": KEY, "step_noise": each, "dtype": dtype},
            {"noise": KEY, "step_noise": lambda i, x: steps[i], "dtype": dtype},
            {"noise": x_T, "step_noise": KEY},
            {"noise": x_T, "step_noise": each},
            {"noise": x_T, "step_noise": lambda i, x: KEY.at(4 + i)},
        ):
            assert_same_bits(loop(fading, SHAPE, **noise), expected, str(noise))
    # Single steps over the same timesteps generate the same noise.
    x = x_T
    for i, t in enumerate(reversed(range(len(BETAS)))):
        x = d.p_sample(fading, x, t, noise=KEY.at(4 + i))["sample"]
    assert_same_bits(d.p_sample_loop(fading, SHAPE, noise=KEY, dtype=dtype), x)


def test_another_stream_of_a_loop_gives_other_samples():
    d = GaussianDiffusion(BETAS)
    noise = PhiloxNoise(0)
    for loop in loops(d):
        drawn = [
            loop(fading, SHAPE, noise=n)
            for n in (noise, noise.at(100), noise.for_samples(5), PhiloxNoise(1))
        ]
        for one, two in pairwise(drawn):
            assert (one != two).any(dim=(1, 2)).all()


def test_streams_and_seeds_may_be_tensors():
    d = GaussianDiffusion(BETAS)
    plain = PhiloxNoise(7, stream=2)
    for noise in (
        PhiloxNoise(torch.tensor(7), stream=torch.tensor([2])),
        PhiloxNoise(torch.tensor([7, 2], dtype=torch.uint64)),  # a key of torch.func._random
    ):
        for loop in loops(d):
            assert_same_bits(loop(fading, SHAPE, noise=noise), loop(fading, SHAPE, noise=plain))


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_the_noises_of_a_loop_are_independent(name):
    # With this model a sampler computes P x_T + R_1 z_1 + R_2 z_2 + ...: each factor is the result
    # for one noise of 1 while the others are 0.
    d = GaussianDiffusion(BETAS, "sample", clip_sample=False)
    count, steps = 400_000, 4

    def loop(shape, **noises):
        eta = {"eta": 1.0} if name == "ddim_sample_loop" else {}
        return getattr(d, name)(lambda x, t: x, shape, num_steps=steps, **eta, **noises)

    hot = torch.eye(steps).view(steps, steps, 1, 1)  # [which noise, 0 and the steps, 1, 1]
    factors = [loop((1, 1), noise=h[0], step_noise=h[1:]).item() for h in hot]
    variance = sum(f * f for f in factors)
    # The standard deviation of the mean square of this many samples.
    spread = variance * (2 / count) ** 0.5
    key = PhiloxNoise(17)

    def off(**noises):
        drawn = loop((count // 100, 100), noise=key, **noises)
        return abs(drawn.square().mean().item() - variance) / spread

    assert off() < 5
    # Fails if two steps share a stream, or one uses that of x_T.
    assert off(step_noise=lambda i, x: key.at(1)) > 20
    assert off(step_noise=lambda i, x: key.at(i)) > 20


# ---- the same samples in any batch --------------------------------------------------------------

# The documented error of a float64 loop, relative to the formulas.
PROMISE = 1e-10

COUNT, IMAGE = 64, (1, 5, 7)
TESTS = str(Path(__file__).parents[1])
STATEMENTS = """
import sys
import torch
sys.path.insert(0, {tests!r})
from diffusion.test_noise import IMAGE, images
torch.set_num_threads({threads})
torch.save(images(range({first}, {last}), {dtype}), {path!r})
"""


def images(ids, dtype=torch.float32):
    """Results of two samplers for the noise of these samples, [samplers, len(ids), *IMAGE]."""
    noise = PhiloxNoise(5).for_samples(torch.tensor(list(ids)))
    shape = (len(ids), *IMAGE)
    drawn = [f(fading, shape, noise=noise, dtype=dtype) for f in loops(GaussianDiffusion(BETAS))]
    return torch.stack(drawn)


@each_dtype
def test_one_batch_of_64_is_64_batches_of_one(dtype):
    whole = images(range(COUNT), dtype)
    assert whole.unique(dim=1).shape[1] == COUNT
    alone = [images([i], dtype) for i in range(COUNT)]
    assert_same_bits(torch.cat(alone, dim=1), whole)
    shuffled = torch.randperm(COUNT).tolist()
    uneven = [images(shuffled[a:b], dtype) for a, b in pairwise((0, 1, 18, 61, COUNT))]
    assert_same_bits(torch.cat(uneven, dim=1), whole[:, shuffled])
    # A range of samples is given by its first id.
    d = GaussianDiffusion(BETAS)
    some = d.p_sample_loop(fading, (9, *IMAGE), noise=PhiloxNoise(5, sample_ids=20), dtype=dtype)
    assert_same_bits(some, whole[0, 20:29])


def test_two_processes_make_the_same_64_images(tmp_path):
    halves = []
    for rank in range(2):
        path = str(tmp_path / f"{rank}.pt")
        code = STATEMENTS.format(
            tests=TESTS,
            threads=rank + 1,
            first=rank * COUNT // 2,
            last=(rank + 1) * COUNT // 2,
            path=path,
            dtype="torch.float32",
        )
        halves.append((path, subprocess.Popen([sys.executable, "-c", code])))
    assert [process.wait() for _, process in halves] == [0, 0]
    together = torch.cat([torch.load(path) for path, _ in halves], dim=1)
    assert_same_bits(together, images(range(COUNT)))


@each_prediction
def test_a_loss_does_not_depend_on_the_batch_around_it(prediction_type):
    d = GaussianDiffusion(BETAS, prediction_type)
    x, t = torch.randn(COUNT, *IMAGE), torch.randint(len(BETAS), (COUNT,))
    noise = PhiloxNoise(3)
    whole = d.training_losses(fading, x, t, noise=noise)["loss"]
    for size in (1, 7, 32):
        parts = [
            d.training_losses(fading, x[i : i + size], t[i : i + size], noise=noise.for_samples(i))
            for i in range(0, COUNT, size)
        ]
        assert_same_bits(torch.cat([part["loss"] for part in parts]), whole)


# ---- which generator seeds the default noise ----------------------------------------------------


def test_a_generator_seeds_a_complete_loop_with_one_number():
    d = GaussianDiffusion(BETAS)
    for loop in loops(d):
        generator, twin = (torch.Generator().manual_seed(4) for _ in range(2))
        drawn = loop(fading, SHAPE, generator=generator)
        assert_same_bits(drawn, loop(fading, SHAPE, noise=PhiloxNoise.from_generator(twin)))
        assert torch.equal(generator.get_state(), twin.get_state())
        assert not torch.equal(drawn, loop(fading, SHAPE, generator=generator))
        torch.manual_seed(4)
        assert_same_bits(loop(fading, SHAPE), drawn)


def test_a_given_x_T_leaves_the_steps_to_the_generator():
    d = GaussianDiffusion(BETAS)
    x_T = torch.randn(SHAPE)
    for loop in loops(d)[:2]:
        torch.manual_seed(4)
        drawn = loop(fading, SHAPE, noise=x_T)
        torch.manual_seed(4)
        steps = PhiloxNoise.from_generator()
        assert_same_bits(drawn, loop(fading, SHAPE, noise=x_T, step_noise=steps))
        assert not torch.equal(drawn, loop(fading, SHAPE, noise=x_T))


def test_torchs_seed_governs_single_steps():
    d = GaussianDiffusion(BETAS)
    x = torch.randn(SHAPE)
    for step in (d.p_sample, lambda *a, **k: d.ddim_sample(*a, eta=1.0, **k)):
        torch.manual_seed(6)
        drawn = step(fading, x, T)["sample"]
        assert not torch.equal(drawn, step(fading, x, T)["sample"])
        torch.manual_seed(6)
        noise = PhiloxNoise.from_generator()
        assert_same_bits(drawn, step(fading, x, T, noise=noise)["sample"])


def test_the_generator_is_not_read_without_need():
    d = GaussianDiffusion(BETAS)
    x = torch.randn(SHAPE)
    before = torch.get_rng_state()
    d.q_sample(x, T, KEY)
    d.training_losses(fading, x, T, noise=KEY)
    d.p_sample(fading, x, T, noise=KEY)
    d.ddim_sample(fading, x, T)
    d.p_sample_loop(fading, SHAPE, noise=KEY)
    d.p_sample_loop(fading, SHAPE, noise=x, step_noise=KEY)
    d.ddim_sample_loop(fading, SHAPE, noise=KEY)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_kernels_a_loop_gives_the_same_samples(tmp_path):
    path = str(tmp_path / "reference.pt")
    code = STATEMENTS.format(
        tests=TESTS, threads=1, first=0, last=3, path=path, dtype="torch.float64"
    )
    environment = {**os.environ, "DIFFCORE_BACKEND": "reference"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    # The noise is float32 with the same bits; an error in a last bit would be 1e-7.
    expected = images(range(3), torch.float64)
    torch.testing.assert_close(torch.load(path), expected, rtol=0, atol=PROMISE)


# ---- refusals -----------------------------------------------------------------------------------

D = GaussianDiffusion(BETAS)
X = torch.zeros(2, 3)
TWO = PhiloxNoise(0, sample_ids=torch.tensor([1, 2]))
THREE = PhiloxNoise(0, sample_ids=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: D.q_sample(X, 0, 3), TypeError, "noise must be .* got int"),
        (lambda: D.q_sample(X, 0, THREE), ValueError, "sample_ids"),
        (
            lambda: D.training_losses(half, X, 0, noise="randn"),
            TypeError,
            "noise must be .* got str",
        ),
        (lambda: D.training_losses(half, X, 0, noise=THREE), ValueError, "sample_ids"),
        (lambda: D.p_sample(half, X, 0, noise=1.0), TypeError, "noise must be .* got float"),
        (lambda: D.p_sample(half, X, 0, noise=THREE), ValueError, "sample_ids"),
        (lambda: D.ddim_sample(half, X, 0, eta=1.0, noise=THREE), ValueError, "sample_ids"),
        (lambda: D.p_sample_loop(half, (2, 3), noise=3), TypeError, "noise must"),
        (lambda: D.p_sample_loop(half, (2, 3), noise=THREE), ValueError, "sample_ids"),
        (lambda: D.p_sample_loop(half, (2, 3), noise=TWO.at(2**32 - 5)), ValueError, "stream"),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=THREE), ValueError, "sample_ids"),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=lambda i, x: THREE), ValueError, "ids"),
        (
            lambda: D.p_sample_loop(half, (2, 3), step_noise="randn"),
            TypeError,
            "step_noise must be",
        ),
        (
            lambda: D.p_sample_loop(half, (2, 3), step_noise=lambda i, x: None),
            TypeError,
            "step_noise must return .* got NoneType",
        ),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=X), ValueError, "step_noise"),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=X[None]), ValueError, "step_noise"),
        (
            lambda: D.p_sample_loop(half, (2, 3), step_noise=torch.zeros(20, 3, 3)),
            ValueError,
            r"step_noise must have the shape \[S, 2, 3\]",
        ),
        (
            lambda: D.p_sample_loop(half, (2, 3), step_noise=torch.zeros(20, 2, 3).int()),
            TypeError,
            "noise.*dtype",
        ),
        (
            lambda: D.ddim_sample_loop(half, (2, 3), eta=1.0, step_noise=torch.zeros(20, 2)),
            ValueError,
            "step_noise",
        ),
    ],
)
def test_noise_that_cannot_be_meant(call, error, message):
    with pytest.raises(error, match=message):
        call()
