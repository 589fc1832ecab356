"""Odd shapes, flags, devices, dtypes and tensors: refused by the name of the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, likelihood, losses, ops, sampling, solvers, vae
from support.toys import half

X = torch.linspace(-1, 1, 24).view(2, 3, 4)
V = torch.tensor([0.3, 0.7])
T = torch.tensor([0, 1])
D = diffcore.GaussianDiffusion([0.1, 0.2, 0.3])
KEY = PhiloxNoise(3)
SIGMAS = [3.0, 1.0, 0.5, 0.0]
TABLE = solvers.euler_ancestral_table(SIGMAS)
POSTERIOR = diffcore.DiagonalGaussianDistribution(torch.ones(2, 4, 3))


def freed() -> Tensor:
    x = torch.ones(X.shape)
    x.untyped_storage().resize_(0)
    return x


def freed_number() -> Tensor:
    x = torch.ones(())
    x.untyped_storage().resize_(0)
    return x


Odd = dict[str, Callable[[], Any]]
Call = tuple[Callable[..., Any], dict[str, Any]]
TENSORS: Odd = {
    "sparse": lambda: X.to_sparse(),
    "mkldnn": lambda: X.to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "freed": freed,
    "float8": lambda: X.to(torch.float8_e4m3fn),
}
DENSE: Odd = {name: make for name, make in TENSORS.items() if name != "float8"}
NUMBERS: Odd = {
    "none": lambda: None,
    "string": lambda: "1",
    "list": list,
    "two": lambda: V,
    "array": lambda: np.ones(3),
    "huge": lambda: 10**400,
    "freed": freed_number,
    **{name: TENSORS[name] for name in ("sparse", "mkldnn", "nested", "quantized")},
}
FLAGS: Odd = {
    "string": lambda: "False",
    "two": lambda: 2,
    "float": lambda: 1.0,
    "list": list,
    "dict": dict,
    "array": lambda: np.ones(3),
    "bools": lambda: torch.ones(2, dtype=torch.bool),
    "meta": lambda: torch.ones((), dtype=torch.bool, device="meta"),
    **TENSORS,
}
SHAPES: Odd = {
    "none": lambda: None,
    "float": lambda: 2.5,
    "int": lambda: 3,
    "true": lambda: True,
    "string": lambda: "23",
    "bytes": lambda: b"23",
    "floats": lambda: (2.0, 3),
    "negative": lambda: (2, -1),
    "strings": lambda: ("2", 3),
    "nested": lambda: ((2, 3), 4),
    "bools": lambda: (True, 3),
    "set": lambda: {2, 3},
    "generator": lambda: (n for n in (2, 3)),
    "0-dim": lambda: torch.tensor(3),
    "tensor": lambda: torch.tensor([2, 3]),
    "meta": lambda: (torch.ones((), dtype=torch.long, device="meta"), 3),
    "beyond int64": lambda: (2, 2**70),
    "too many": lambda: (2**40, 2**40),
    "array of floats": lambda: np.ones(2),
    "matrix": lambda: np.ones((2, 2), dtype=np.int64),
}
DEVICES: Odd = {
    "word": lambda: "gpu",
    "negative": lambda: -1,
    "huge": lambda: 10**400,
    "float": lambda: 1.5,
    "true": lambda: True,
    "list": list,
    "tensor": lambda: X,
    "dtype": lambda: torch.float32,
}
SEQUENCES: Odd = {
    "none": lambda: None, "int": lambda: 1, "0-dim": lambda: torch.ones(()),
    "mkldnn": TENSORS["mkldnn"], "nested": TENSORS["nested"], "freed": freed,
}  # fmt: skip

ARRAY: Odd = {"array": lambda: np.ones(3)}
WORD: Odd = {"word": lambda: "a"}
BOUND = {"model": half, "decoder": "gaussian"}
DTYPES = {**ARRAY, **WORD, "int64": lambda: torch.int64, "freed": freed}
MAPPINGS = {**ARRAY, **WORD, "list": lambda: [1], "tensor": lambda: X}
TERM = {**BOUND, "t": T}
ROW = {"x": X, "model_output": X, "coefficients": TABLE.coefficients, "t": 0}
ROW_0 = {"x": X, "coefficients": TABLE.rows[0].coefficients}
STRANGE: Odd = {name: make for name, make in DENSE.items() if name != "freed"}
UINT16: Odd = {"uint16": lambda: torch.ones((), dtype=torch.uint16)}
PAIR = {"model_output": X, "x_t": X}
LEVELS = {"alpha_prev": 0.8, "sigma_prev": 0.6}
SAMPLE = {"model": half, "x": X, "table": TABLE}
LOOP = {"model": half, "shape": X.shape}
RECORD = {**LOOP, "table": TABLE}
CAPTURED = sampling.capture(half, TABLE, X.shape)
STEP = {"model": half, "x": X, "t": T}
CASES: list[tuple[str, Odd, Callable[..., Any], dict[str, Any]]] = [
    ("shape", SHAPES, KEY.tensor, {}),
    ("shape", SHAPES, KEY.uniform, {}),
    ("shape", SHAPES, KEY.for_shard, {"local_shape": (1, 4), "offset": (1, 4)}),
    ("local_shape", SHAPES, KEY.for_shard, {"shape": (2, 8), "offset": (1, 4)}),
    ("offset", SHAPES, KEY.for_shard, {"shape": (2, 8), "local_shape": (1, 4)}),
    ("shape", SHAPES, ops.randn, {"noise": KEY}),
    ("shape", SHAPES, ops.randn, {"noise": KEY, "out": X.clone()}),
    ("shape", SHAPES, D.p_sample_loop, {"model": half, "noise": X}),
    ("shape", SHAPES, D.ddim_sample_loop, {"model": half}),
    ("shape", SHAPES, sampling.capture, {"model": half, "table": TABLE}),
    ("batch", NUMBERS, KEY.timesteps, {"num_timesteps": 5}),
    ("low", NUMBERS, KEY.uniform, {"shape": (2,)}),
    ("high", NUMBERS, KEY.uniform, {"shape": (2,)}),
    ("gamma_min", NUMBERS, likelihood.vdm_bound, {**BOUND, "x": X, "gamma_max": 5.0}),
    ("gamma_max", ARRAY | WORD, likelihood.vdm_bound, {**BOUND, "x": X, "gamma_min": -5.0}),
    ("eta", NUMBERS, D.ddim_sample, STEP),
    ("stream", ARRAY | WORD, KEY.at, {}),
    ("clip_denoised", FLAGS, D.p_sample, STEP),
    ("clip_denoised", FLAGS, D.calc_bpd_loop, {**BOUND, "x_start": X}),
    ("rederive_epsilon", FLAGS, D.ddim_sample, STEP),
    ("rederive_epsilon", FLAGS, D.ddim_sample_loop, LOOP),
    ("rederive_epsilon", FLAGS, solvers.ddim_table, {"levels": SIGMAS}),
    ("rederive_epsilon", FLAGS, ops.ddim_step, {**PAIR, **LEVELS, "alpha": 0.6, "sigma": 0.8}),
    ("progress", FLAGS, D.p_sample_loop, LOOP),
    ("return_history", FLAGS, ops.reverse_step, ROW),
    ("return_log_prob", FLAGS, ops.reverse_step, ROW),
    ("deterministic", FLAGS, type(POSTERIOR), {"parameters": torch.ones(2, 4)}),
    ("clip_sample", FLAGS, diffcore.GaussianDiffusion, {"betas": [0.1]}),
    ("non_blocking", FLAGS, KEY.to, {"device": "cpu"}),
    ("device", DEVICES, KEY.tensor, {"shape": (2,)}),
    ("device", DEVICES, KEY.timesteps, {"num_timesteps": 5, "batch": 2}),
    ("device", DEVICES, KEY.to, {}),
    ("device", DEVICES, PhiloxNoise.from_generator, {}),
    ("device", DEVICES, TABLE.to, {}),
    ("device", DEVICES, ops.randn, {"shape": X.shape, "noise": KEY, "out": X.clone()}),
    ("device", DEVICES, D.p_sample_loop, LOOP),
    ("device", DEVICES, sampling.capture, RECORD),
    ("dtype", DTYPES, KEY.tensor, {"shape": (2,)}),
    ("dtype", DTYPES, KEY.uniform, {"shape": (2,)}),
    ("dtype", DTYPES, D.p_sample_loop, {**LOOP, "noise": X}),
    ("dtype", DTYPES, sampling.capture, RECORD),
    ("model_kwargs", MAPPINGS, D.p_sample_loop, LOOP),
    ("model_kwargs", MAPPINGS, diffcore.sample, SAMPLE),
    ("uncond_kwargs", MAPPINGS, diffcore.sample, {**SAMPLE, "guidance_scale": 2.0}),
    ("model_kwargs", MAPPINGS, sampling.capture, RECORD),
    ("history", SEQUENCES, TABLE.step, {"i": 0, "x": X, "model_output": X, "noise": X}),
    ("history", SEQUENCES, ops.reverse_step, ROW),
    ("coefficients", SEQUENCES, ops.linear_combination, {"x": X, "y": X}),
    ("reduction", ARRAY, ops.standard_normal_kl, {"mean": X, "logvar": X}),
    ("return_target", ARRAY, ops.add_noise, {"x0": X, "noise": X, "alpha": V, "sigma": V}),
    ("x_start", TENSORS, D.q_mean_variance, {"t": T}),
    ("x_start", TENSORS, D.q_posterior_mean_variance, {"x_t": X, "t": T}),
    ("x_t", TENSORS, D.q_posterior_mean_variance, {"x_start": X, "t": T}),
    ("x_start", TENSORS, D.q_sample, {"t": T, "noise": KEY}),
    ("x", TENSORS, D.p_mean_variance, {"model": half, "t": T}),
    ("x", TENSORS, D.p_sample, {"model": half, "t": T}),
    ("x", TENSORS, D.ddim_sample, {"model": half, "t": T}),
    ("x", TENSORS, D.ddim_reverse_sample, {"model": half, "t": T}),
    ("x", TENSORS, D.ddim_reverse_sample_loop, {"model": half}),
    ("x_start", TENSORS, D.prior_bpd, {}),
    ("x_start", TENSORS, D.vb_terms_bpd, {**TERM, "x_t": X}),
    ("x_t", {**TENSORS, **WORD, "row": lambda: X[:, 0]}, D.vb_terms_bpd, {**TERM, "x_start": X}),
    ("x_start", TENSORS, D.calc_bpd_loop, BOUND),
    ("noise", TENSORS, D.calc_bpd_loop, {**BOUND, "x_start": X}),
    ("noise", TENSORS, D.p_sample_loop, LOOP),
    ("step_noise", {"nested": TENSORS["nested"]}, D.p_sample_loop, LOOP),
    ("noise", {"meta": lambda: X.to("meta")}, D.p_sample_loop, {**LOOP, "device": "cpu"}),
    ("x", TENSORS, diffcore.sample, {"model": half, "table": TABLE}),
    ("x", TENSORS, sampling.sample_euler, {"model": half, "sigmas": SIGMAS}),
    ("guidance_scale", {**WORD, "list": list}, diffcore.sample, SAMPLE),
    ("guidance_scale", {**WORD, "freed": freed_number}, sampling.capture, RECORD),
    ("x", {**DENSE, **WORD, "huge": lambda: 10**400}, CAPTURED, {}),
    ("x", TENSORS, vae.vae_loss, {"x_recon": X, "kl": V}),
    ("x_recon", TENSORS, vae.vae_loss, {"x": X, "kl": V}),
    ("sample", {**TENSORS, **WORD, "row": lambda: X[:, 0]}, POSTERIOR.nll, {}),
    ("snr", DENSE, losses.min_snr_weights, {}),
    ("mean", TENSORS, ops.standard_normal_kl, {"logvar": X, "reduction": "batchmean"}),
    ("logvar", DENSE, ops.standard_normal_kl, {"mean": X.double()}),
    ("mean", DENSE, ops.reparameterize, {"logvar": X.double()}),
    ("noise", DENSE, ops.add_noise, {"x0": X.double(), "alpha": 0.6, "sigma": 0.8}),
    ("model_output", STRANGE, ops.dynamic_threshold, {**ROW_0, "guidance_scale": 2.0}),
    ("sigma", {"meta": lambda: V.to("meta")}, ops.ddim_step, {**PAIR, **LEVELS, "alpha": V}),
    ("mean1", UINT16, ops.normal_kl, {"logvar1": math.inf, "mean2": X, "logvar2": X}),
    ("model_output", TENSORS, ops.denoising_loss, {"x0": X, "noise": X}),
    ("timesteps", {"mkldnn": TENSORS["mkldnn"], "freed": freed}, D.respace, {}),
]  # fmt: skip
IDS = [f"{getattr(f, '__qualname__', 'captured')}-{name}" for name, _, f, _ in CASES]


@pytest.mark.filterwarnings("ignore")  # of torch, about the kinds of tensors made here
@pytest.mark.parametrize(("argument", "odd", "call", "others"), CASES, ids=IDS)
def test_what_is_odd_is_refused_by_name(
    argument: str, odd: Odd, call: Callable[..., Any], others: dict[str, Any]
) -> None:
    for kind, make in odd.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**others, **{argument: make()})
        assert re.match(rf"{argument}(?!\w)", str(caught.value)), f"{kind}: {caught.value}"


@pytest.mark.parametrize(
    "shape",
    [[2, 3], torch.Size([2, 3]), np.array([2, 3]), (np.int64(2), 3), (torch.tensor(2), 3)],
    ids=["list", "size", "array", "numpy", "0-dim"],
)
def test_shapes_of_integers_are_taken(shape: Any) -> None:
    assert torch.equal(KEY.tensor(shape), KEY.tensor((2, 3)))
    assert torch.equal(KEY.uniform(shape), KEY.uniform((2, 3)))
    assert torch.equal(ops.randn(shape, KEY), KEY.tensor((2, 3)))
    found = D.p_sample_loop(half, shape, noise=KEY)
    assert torch.equal(found, D.p_sample_loop(half, (2, 3), noise=KEY))


@pytest.mark.parametrize("true", [True, 1, np.True_, np.array(True), torch.tensor(True)])
def test_flags_are_bools_of_any_library(true: Any) -> None:
    expected = D.p_sample(half, 4 * X, T, True, noise=KEY)["sample"]
    assert torch.equal(D.p_sample(half, 4 * X, T, true, noise=KEY)["sample"], expected)
    assert not torch.equal(D.p_sample(half, 4 * X, T, False, noise=KEY)["sample"], expected)
