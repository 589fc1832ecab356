"""Noise keys as values, where they come from, and the errors of wrong ones."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops
from diffcore.noise import parts
from support.bounds import assert_same_bits
from support.cases import NOISE_TABLE, NOISED, OpCase
from support.refusals import no_kernel_runs, pair, read_by, refused  # noqa: F401

SHAPE = (3, 10)

KEYS: dict[str, Callable[[], PhiloxNoise]] = {
    "seed": lambda: PhiloxNoise(5),
    "ints": lambda: PhiloxNoise(-5, sample_ids=2**40, stream=7, first_element=8),
    "tensors": lambda: PhiloxNoise(
        torch.tensor([5, 2]), sample_ids=torch.tensor([4, -1, 9]), stream=torch.tensor(3)
    ),
}
each_key = pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes `no_kernel_runs`, for the tests that draw."""
    monkeypatch.undo()


# ---- a value ------------------------------------------------------------------------------------


def test_it_is_where_users_look_for_it() -> None:
    assert diffcore.PhiloxNoise is PhiloxNoise
    assert diffcore.randn is ops.randn
    assert "randn" in ops.__all__


@each_key
def test_equal_keys(make: Callable[[], PhiloxNoise]) -> None:
    key = make()
    for twin in (make(), copy.copy(key), copy.deepcopy(key)):
        assert twin == key
        assert not twin != key  # noqa: SIM202 - __ne__ is under test
        assert hash(twin) == hash(key)
        assert len({twin, key}) == 1


def test_different_keys() -> None:
    key = KEYS["ints"]()
    others: list[Any] = [
        PhiloxNoise(5, sample_ids=2**40, stream=7, first_element=8),
        key.for_samples(2**40 + 1),
        key.at(8),
        PhiloxNoise(-5, sample_ids=2**40, stream=7, first_element=12),
        PhiloxNoise(torch.tensor(-5), sample_ids=2**40, stream=7, first_element=8),
        key.for_samples(torch.tensor([2**40, 0])),
        None,
        -5,
        (-5, 2**40, 7, 8),
    ]
    for other in others:
        assert key != other
        assert other != key
    tensors = KEYS["tensors"]()
    assert tensors != tensors.for_samples(torch.tensor([4, -1, 8]))
    assert tensors != tensors.for_samples(torch.tensor([4, -1]))
    assert tensors != tensors.at(torch.tensor(4))


def test_one_key_by_several_names() -> None:
    assert PhiloxNoise(2**64 - 1) == PhiloxNoise(-1)
    assert PhiloxNoise(2**63) == PhiloxNoise(-(2**63))
    assert PhiloxNoise(np.int64(3)) == PhiloxNoise(np.uint64(3)) == PhiloxNoise(3)
    assert PhiloxNoise(3, sample_ids=None) == PhiloxNoise(3, sample_ids=0)
    key = torch.tensor([2**63 + 5, 9], dtype=torch.uint64)
    assert PhiloxNoise(key) == PhiloxNoise(torch.tensor([5 - 2**63, 9]))
    assert PhiloxNoise(np.int64(3)).seed.__class__ is int


def test_ids_of_every_kind() -> None:
    wanted = PhiloxNoise(3, sample_ids=torch.tensor([7, 0, 5]))
    for ids in (
        [7, 0, 5],
        (7, np.int64(0), np.uint8(5)),
        np.array([7, 0, 5]),
        np.array([7, 0, 5], np.uint8)[::1],
        np.array([5, 0, 7], np.int32)[::-1],
        *(torch.tensor([7, 0, 5], dtype=d) for d in (torch.int32, torch.int16, torch.uint8)),
    ):
        key = PhiloxNoise(3, sample_ids=ids)
        assert key == PhiloxNoise(3).for_samples(ids) == wanted
        assert key.sample_ids.dtype == torch.int64
    assert PhiloxNoise(3, sample_ids=np.array(7)) == PhiloxNoise(3, sample_ids=7)
    assert PhiloxNoise(3, sample_ids=[]).sample_ids.shape == (0,)
    array = np.array([1, 2])
    key = PhiloxNoise(3, sample_ids=array)
    array[0] = 9
    assert key == PhiloxNoise(3, sample_ids=[1, 2])


@each_key
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(make: Callable[[], PhiloxNoise], protocol: int, drawing: None) -> None:
    key = make()
    twin = pickle.loads(pickle.dumps(key, protocol))
    assert twin == key
    assert_same_bits(twin.tensor(SHAPE), key.tensor(SHAPE))


def test_a_deep_copy_shares_nothing() -> None:
    key = KEYS["tensors"]()
    twin, shallow = copy.deepcopy(key), copy.copy(key)
    assert isinstance(key.stream, Tensor)
    key.stream.add_(1)
    assert twin != key
    assert shallow == key


@each_key
def test_nothing_in_it_can_be_changed(make: Callable[[], PhiloxNoise]) -> None:
    key = make()
    for name in ("seed", "sample_ids", "stream", "first_element", "_parts", "other"):
        with pytest.raises(AttributeError):
            setattr(key, name, 1)
        with pytest.raises(AttributeError):
            delattr(key, name)
    assert key == make()


def test_what_it_says_of_itself() -> None:
    assert repr(PhiloxNoise(5)) == "PhiloxNoise(5, sample_ids=0, stream=0)"
    key = KEYS["ints"]()
    assert eval(repr(key)) == key
    assert (key.seed, key.sample_ids, key.stream, key.first_element) == (
        -5,
        2**40,
        7,
        8,
    )
    assert "tensor([ 4, -1,  9])" in repr(KEYS["tensors"]())


@each_key
def test_at_and_for_samples_replace_one_part(make: Callable[[], PhiloxNoise]) -> None:
    key = make()
    elsewhere = key.at(11)
    assert elsewhere.stream == 11
    assert elsewhere.at(key.stream) == key
    others = key.for_samples(20)
    assert others.sample_ids == 20
    assert others.for_samples(key.sample_ids) == key
    assert key.for_samples(None).sample_ids == 0
    assert key == make()


# ---- from torch's generator ---------------------------------------------------------------------


def test_manual_seed_governs() -> None:
    torch.manual_seed(3)
    first, second = PhiloxNoise.from_generator(), PhiloxNoise.from_generator()
    assert first != second
    torch.manual_seed(3)
    assert PhiloxNoise.from_generator() == first
    state = torch.get_rng_state()
    torch.manual_seed(4)
    assert PhiloxNoise.from_generator() != first
    torch.set_rng_state(state)
    assert PhiloxNoise.from_generator(device="cpu") == second


def test_seeds_have_64_bits() -> None:
    seeds = [PhiloxNoise.from_generator().seed for _ in range(200)]
    for shift in (0, 32):
        halves = [int(s) >> shift & 0xFFFFFFFF for s in seeds]
        assert len(set(halves)) == 200
        for bit in range(32):
            assert 50 < sum(h >> bit & 1 for h in halves) < 150, bit  # seven sigma


def test_a_generator_of_ones_own_governs_alone() -> None:
    state = torch.get_rng_state()
    key = PhiloxNoise.from_generator(torch.Generator().manual_seed(3))
    assert PhiloxNoise.from_generator(torch.Generator().manual_seed(3)) == key
    assert PhiloxNoise.from_generator(torch.Generator().manual_seed(4)) != key
    assert torch.equal(torch.get_rng_state(), state)


def test_fork_rng() -> None:
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        inside = PhiloxNoise.from_generator()
    assert PhiloxNoise.from_generator() == inside


def test_from_a_generator_where_it_is_wanted() -> None:
    key = PhiloxNoise.from_generator(device="meta")
    assert isinstance(key.seed, Tensor)
    assert key.seed.device.type == "meta"
    on_cpu = PhiloxNoise.from_generator(torch.Generator().manual_seed(3), device="cpu")
    assert isinstance(on_cpu.seed, int)
    assert (on_cpu.sample_ids, on_cpu.stream, on_cpu.first_element) == (0, 0, 0)
    refused(
        TypeError, "^generator must be a torch.Generator, got int", PhiloxNoise.from_generator, 3
    )


# ---- from torch's keys --------------------------------------------------------------------------


@pytest.mark.usefixtures("drawing")
def test_from_a_key_of_torch() -> None:
    keys = pytest.importorskip("torch.func._random", reason="this torch has no keys")
    noise = PhiloxNoise.from_key(keys.key(2**63 + 11), sample_ids=5)
    plain = PhiloxNoise(2**63 + 11, sample_ids=5)
    assert torch.equal(noise.tensor((3, 9)), plain.tensor((3, 9)))
    assert torch.equal(noise.uniform((3, 9)), plain.uniform((3, 9)))
    assert torch.equal(noise.timesteps(1000, 3), plain.timesteps(1000, 3))
    # split and fold_in run on CUDA only: what they return is a seed and an offset.
    derived = PhiloxNoise.from_key(torch.tensor([7, 2], dtype=torch.uint64))
    assert torch.equal(derived.tensor((3, 9)), PhiloxNoise(7, stream=2).tensor((3, 9)))
    assert torch.equal(derived.timesteps(9, 3), PhiloxNoise(7, stream=2).timesteps(9, 3))


def test_from_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_torch_has_keys", lambda: True)  # what is refused does not need it
    refused(TypeError, "^key must be a key of torch.func._random, got int", PhiloxNoise.from_key, 3)
    signed = torch.tensor([3, 0])
    refused(TypeError, "^key must be .*, uint64, got torch.int64", PhiloxNoise.from_key, signed)
    batch = torch.zeros(4, 2, dtype=torch.uint64)
    refused(
        ValueError, r"^key must have shape \(2,\), got \(4, 2\); one", PhiloxNoise.from_key, batch
    )
    monkeypatch.setattr(parts, "_torch_has_keys", lambda: False)
    refused(RuntimeError, "^from_key needs torch.func._random", PhiloxNoise.from_key, batch[0])


# ---- wrong keys ------------------------------------------------------------------------------

INT64 = torch.int64
WRONG: dict[str, list[Any]] = {
    "seed": [None, "3", 1.5, True, [1], 1j, 2**64, -(2**63) - 1, np.float32(1), np.bool_(True)],
    "sample_ids": ["3", 1.5, True, 2**63, -(2**63) - 1, [0.5], ["3"], [True], [[0], [1]], {0: 1}],
    "stream": [None, "3", 1.5, True, -1, 2**32],
    "first_element": [None, "4", 4.0, True, -4, 2, 2**34, torch.tensor(4)],
}
WRONG["seed"] += [torch.zeros(3, dtype=INT64), torch.zeros(0, dtype=INT64)]
WRONG["seed"] += [torch.zeros(1, 1, dtype=INT64)]
WRONG["sample_ids"] += [torch.zeros(2, 3, dtype=INT64), torch.zeros(3, dtype=torch.uint64)]
WRONG["stream"] += [torch.zeros(n, dtype=INT64) for n in (0, 2, (1, 1))]
WRONG["sample_ids"] += [np.zeros(2), np.zeros(2, bool), np.zeros(2, np.uint64)]
WRONG["sample_ids"] += [np.zeros((2, 2), int)]
for bad_dtype in (torch.float32, torch.int32, torch.bool):
    for name in ("seed", "sample_ids", "stream"):
        if (name, bad_dtype) != ("sample_ids", torch.int32):
            WRONG[name].append(torch.zeros((), dtype=bad_dtype))


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in WRONG.items() for v in values],
    ids=lambda v: f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else repr(v),
)
def test_wrong_parts(name: str, value: Any) -> None:
    number = isinstance(value, int) and not isinstance(value, bool)
    shape = getattr(value, "dtype", None) in (INT64, np.int64) and name != "first_element"
    kind = ValueError if number or shape else TypeError
    came = f"({re.escape(str(value))}|(a tensor of |an array of )?\\S+|shape .*)$"
    make: Any = {
        "seed": lambda: PhiloxNoise(value),
        "stream": lambda: PhiloxNoise(0).at(value),
        "sample_ids": lambda: PhiloxNoise(0).for_samples(value),
        "first_element": lambda: PhiloxNoise(0, first_element=value),
    }[name]
    refused(kind, f"^{name} must be .*, got {came}", make)


def keys_elsewhere() -> dict[str, PhiloxNoise]:
    nowhere = torch.zeros(4, dtype=INT64, device="meta")
    return {
        "seed": PhiloxNoise(nowhere[0]),
        "sample_ids": PhiloxNoise(0, sample_ids=nowhere),
        "stream": PhiloxNoise(0, stream=nowhere[:1]),
    }


READ = [case for case in NOISED if "noise" in read_by(case)]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_keys_that_do_not_fit(case: OpCase) -> None:
    args = case.make((4, 3), torch.float32)
    for name, key in keys_elsewhere().items():
        args.tensors["noise"] = key
        refused(ValueError, f"^{name} must be on cpu, .* got meta", case.native, args)
    for entries in (0, 1, 3, 5):
        ids = torch.arange(entries)
        args.tensors["noise"] = PhiloxNoise(0, sample_ids=ids)
        refused(ValueError, f"^sample_ids must have 4 entries, .* got {entries}", case.native, args)


@pytest.mark.parametrize("case", NOISED, ids=lambda case: case.name)
def test_a_key_is_no_other_tensor(case: OpCase) -> None:
    for name in case.tensors:
        for noise in (torch.randn(4, 3), PhiloxNoise(0)):
            args = case.make((4, 3), torch.float32)
            args.tensors["noise"] = noise
            if name != "noise":
                args.tensors[name] = PhiloxNoise(1)
                refused(TypeError, f"^{name} must be .*, got PhiloxNoise", case.native, args)
    for bad in (3.0, "x", [1.0], (0, 0, 0, 0), np.zeros((4, 3))):
        args.tensors["noise"] = bad
        refused(TypeError, f"^noise must be .*, got {type(bad).__name__}", case.native, args)


def test_a_key_is_no_coefficient_step_or_output() -> None:
    x, _ = pair()
    key = PhiloxNoise(0)
    refused(TypeError, "^alpha must be .* got PhiloxNoise", ops.add_noise, x, key, key, 0.6)
    refused(TypeError, "^t must be .* got PhiloxNoise", ops.q_sample, x, key, key, NOISE_TABLE)
    refused(TypeError, "^out must be .* got PhiloxNoise", ops.add_noise, x, key, 0.8, 0.6, out=key)
    refused(TypeError, "^y must be .* got PhiloxNoise", ops.linear_combination, x, key, (0.8, 0.6))
    refused(TypeError, "^x_t must be .* got PhiloxNoise", ops.predict_x0, x, key, 0.8, 0.6)


def test_freed_parts() -> None:
    def freed(x: Tensor) -> Tensor:
        x.untyped_storage().resize_(0)
        return x

    x, _ = pair()
    for name, value in (("seed", [3]), ("sample_ids", [0, 1, 2, 3]), ("stream", [1])):
        key = PhiloxNoise(**{"seed": 0, name: torch.tensor(value)})
        freed(getattr(key, name))
        refused(ValueError, f"^{name} must have memory", ops.add_noise, x, key, 0.8, 0.6)


# ---- wrong calls of randn -----------------------------------------------------------------------


def test_wrong_shapes_and_dtypes() -> None:
    key = PhiloxNoise(0)
    for f in (key.tensor, lambda shape, **kwargs: ops.randn(shape, key, **kwargs)):
        for shape in (5, None, "ab", (2.0, 3), (2, "3")):
            refused(TypeError, "^shape must be ", f, shape)
        refused(ValueError, "^shape must be ", f, (2, -1))
        for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool, "float32"):
            refused(TypeError, "^dtype must be ", f, SHAPE, dtype=dtype)
    refused(
        ValueError,
        "^sample_ids must have 3 entries",
        key.for_samples(torch.arange(2)).tensor,
        SHAPE,
    )
    for bad in (None, 3, torch.randn(SHAPE), (0, 0, 0, 0)):
        refused(TypeError, f"^noise must be .*, got {type(bad).__name__}", ops.randn, SHAPE, bad)


def test_wrong_outputs() -> None:
    key, out = PhiloxNoise(0), torch.empty(SHAPE)
    refused(ValueError, "^shape must be ", ops.randn, (3, 9), key, out=out)
    refused(ValueError, "^dtype must be ", ops.randn, SHAPE, key, dtype=torch.float64, out=out)
    refused(ValueError, "^device must be ", ops.randn, SHAPE, key, device="meta", out=out)
    refused(ValueError, "^out must have memory", ops.randn, SHAPE, key, out=out[:1].expand(SHAPE))
    refused(
        ValueError, "^out must not require grad", ops.randn, SHAPE, key, out=out.requires_grad_()
    )
    refused(TypeError, "^out must be a torch.Tensor, got int", ops.randn, SHAPE, key, out=3)
    refused(TypeError, "^out must have dtype", ops.randn, SHAPE, key, out=torch.empty(SHAPE).int())
    refused(
        TypeError,
        "^out must be a dense",
        ops.randn,
        SHAPE,
        key,
        out=torch.ones(SHAPE).to_sparse(),
    )
