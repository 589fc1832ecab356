"""The threshold of dynamic thresholding, compared with numpy's quantiles.

Values have few bits where x0 is computed from several tensors: x0 is then exact on any instruction
set, and only the selection is tested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine import native
from diffcore._kernels.step import UNGUIDED
from support.bounds import DTYPES, assert_same_bits, each_dtype
from support.cases import without_kernels
from support.subprocess import OTHER_ISAS, run_python
from support.thresholds import SCALE, check, in_double, of_numbers, row
from support.waiting import no_waiting

RATIOS = (0.0, 0.001, 0.5, 0.9, 0.995, 1.0)
SIZES = (1, 2, 3, 511, 512, 513, 8191, 65537)
each_wide_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# ---- against numpy ------------------------------------------------------------------------------


def numbers(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, n, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", SIZES)
@each_dtype
def test_every_size_and_ratio(n: int, dtype: torch.dtype, device: str) -> None:
    x = numbers(3, n, dtype).to(device)
    for ratio in RATIOS:
        found = of_numbers(x, ratio)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(found, in_double(x) * SCALE, ratio)


@pytest.mark.parametrize("n", [16_383, 16_384, 16_385, 16_392, 49_999])
def test_around_the_sizes_at_which_the_way_changes(n: int, device: str) -> None:
    for dtype, ratio in itertools.product(DTYPES, RATIOS):
        x = numbers(2, n, dtype).to(device)
        check(of_numbers(x, ratio), in_double(x) * SCALE, ratio)


@pytest.mark.parametrize("bits", [0, 1, 4, 9, 13, 20, 23])
@each_wide_dtype
def test_many_numbers_in_one_bucket(bits: int, dtype: torch.dtype, device: str) -> None:
    # They differ in the lowest bits only, so every way of counting them has to be gone.
    steps = torch.randint(2**bits, (2, 50_000), dtype=torch.float64)
    x = (1 + steps * torch.finfo(dtype).eps).to(dtype).to(device)
    for ratio in RATIOS:
        check(of_numbers(x, ratio), in_double(x) * SCALE, ratio)


def test_every_rank_of_a_few_numbers(device: str) -> None:
    for n in (2, 5, 33):
        x = numbers(4, n).to(device)
        for rank in range(2 * n - 1):
            check(of_numbers(x, rank / (2 * n - 2)), in_double(x) * SCALE, rank / (2 * n - 2))


@pytest.mark.parametrize("n", [7, 40_000])
def test_equal_elements_around_the_quantile(n: int, device: str) -> None:
    x = torch.randint(-2, 3, (4, n)).float().to(device)
    x[2] = -3.0
    for ratio in RATIOS:
        check(of_numbers(x, ratio, 2.0), 2 * in_double(x), ratio)


@pytest.mark.parametrize("n", [7, 40_000])
def test_zeros_of_either_sign(n: int, device: str) -> None:
    x = torch.zeros(2, n, device=device)
    x[1] = -0.0
    for ratio in RATIOS:
        assert of_numbers(x, ratio).tolist() == [1, 1]
    x[:, 0] = 5.0  # behind zeros of either sign
    assert of_numbers(x, 1.0, 1.0).tolist() == [5, 5]
    assert of_numbers(x, (n - 1.5) / (n - 1), 1.0).tolist() == pytest.approx([2.5, 2.5])


@each_wide_dtype
def test_subnormal_numbers_have_an_order(dtype: torch.dtype, device: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([[3 * tiny, -tiny, 6.0, 2 * tiny, 4.0]], dtype=dtype, device=device)
    assert of_numbers(x, 0.625, 1.0).item() == 2  # halfway from 3 tiny to 4
    assert of_numbers(x, 0.5, 1.0).item() == 1
    assert of_numbers(x, 0.75, 1.0).item() == 4


# ---- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 600, 40_003])
@each_dtype
def test_nan_anywhere_makes_its_sample_nan(n: int, dtype: torch.dtype, device: str) -> None:
    for place, ratio in itertools.product({0, n // 2, n - 1}, (0.0, 0.5, 1.0)):
        for sign in (1.0, -1.0):
            x = numbers(3, n, dtype).to(device)
            x[1, place] = math.copysign(math.nan, sign)
            found = of_numbers(x, ratio, sample_max_value=8.0)
            assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("n", [5, 40_001])
@each_wide_dtype
def test_infinity_is_the_last_number(n: int, dtype: torch.dtype, device: str) -> None:
    x = numbers(1, n, dtype).to(device)
    x[0, :2] = torch.tensor([math.inf, -math.inf])
    for rank in (n - 1, n - 2, n - 2.5):
        assert of_numbers(x, rank / (n - 1)).item() == math.inf
    largest = x[0, 2:].abs().max().item() * SCALE
    assert of_numbers(x, (n - 3) / (n - 1)).item() == pytest.approx(largest)
    assert of_numbers(x, 1.0, sample_max_value=7.0).item() == 7
    x[0, 2] = math.nan
    assert of_numbers(x, 0.0).isnan().all()


# ---- the formula --------------------------------------------------------------------------------


def coarse(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with few bits."""
    return (torch.randn(shape) * 16).round().div(16).to(dtype)


TABLE = torch.stack([row(2.0**k, 0.5 - k) for k in range(6)])


@pytest.mark.parametrize("shape", [(4, 37), (3, 5, 67, 71)], ids=str)
@each_dtype
def test_x0_of_a_table(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, m = coarse(shape, dtype).to(device), coarse(shape, dtype).to(device)
    t = (torch.arange(shape[0]) * 5 + 5) % 6
    a_x, a_m = TABLE[t][:, 4:6].numpy().T.reshape(2, -1, *[1] * (len(shape) - 1))
    x0 = a_x * in_double(x) + a_m * in_double(m)
    table = TABLE.to(device)
    for ratio in (0.5, 0.995):
        check(ops.dynamic_threshold(x, m, table, t=t.to(device), ratio=ratio), x0, ratio)
        check(ops.dynamic_threshold(x, m, table[t.to(device)], ratio=ratio), x0, ratio)
    x0 = 8.0 * in_double(x) - 2.5 * in_double(m)
    wide = torch.stack([row(2.0**k, 0.5 - k, 14) for k in range(6)]).to(device)
    counter = torch.tensor([3], dtype=torch.int32, device=device)
    for table, step in ((TABLE.to(device), 3), (wide.float(), counter)):
        check(ops.dynamic_threshold(x, m, table, t=step), x0, 0.995)


@each_dtype
def test_x0_under_guidance(dtype: torch.dtype, device: str) -> None:
    x, m, u = (coarse((3, 2, 90, 101), dtype).to(device) for _ in range(3))
    weights = torch.tensor([1.5, 0.0, 3.0], dtype=torch.float64, device=device)
    for w in (2.5, weights, weights[2]):
        by_sample = in_double(torch.as_tensor(w).expand(3))[:, None, None, None]
        guided = in_double(u) + by_sample * (in_double(m) - in_double(u))
        found = ops.dynamic_threshold(
            x, m, row(2.0, -4.0).to(device), model_output_uncond=u, guidance_scale=w
        )
        check(found, 2 * in_double(x) - 4 * guided, 0.995)


def test_any_layout(device: str) -> None:
    x, m = coarse((2, 6, 30, 34)).to(device), coarse((2, 6, 30, 34)).to(device)
    table = row(4.0, 0.5).to(device)
    wanted = ops.dynamic_threshold(x, m, table)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.contiguous(memory_format=torch.channels_last),
        lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
        lambda y: torch.nn.functional.pad(y, (0, 3))[..., :-3],
        lambda y: torch.cat([y, y])[:2],
        lambda y: torch.cat([y.new_zeros(1), y.flatten()])[1:].view(y.shape),
    ]
    for first, second in itertools.product(changes, changes):
        assert_same_bits(ops.dynamic_threshold(first(x), second(m), table), wanted)
    found = ops.dynamic_threshold(x[:1].expand(2, -1, -1, -1), m, table)
    assert_same_bits(found[:1], wanted[:1])


def test_the_threshold_lies_between_1_and_the_given_maximum(device: str) -> None:
    x = numbers(2, 1000).to(device)
    assert of_numbers(x, 0.995, 0.01).tolist() == [1, 1]
    assert of_numbers(x, 0.995, 100.0, sample_max_value=1.5).tolist() == [1.5, 1.5]
    check(of_numbers(x, 0.9, 1.0, sample_max_value=1.6), in_double(x), 0.9, 1.6)
    assert of_numbers(x, 0.5, sample_max_value=1).tolist() == [1, 1]


def test_samples_of_one_number_and_no_samples(device: str) -> None:
    x = torch.tensor([-3.0, 0.5, 7.0], device=device)
    assert of_numbers(x, 0.3, 1.0).tolist() == [3, 1, 7]
    assert of_numbers(x[2], 0.3, 1.0).tolist() == 7
    assert of_numbers(x.new_empty(0, 5), 0.3).shape == (0,)


def test_many_rows(device: str) -> None:
    x = numbers(4096 * 256 + 5, 3).to(device)  # CUDA: several rows to a thread
    check(of_numbers(x, 0.9), in_double(x) * SCALE, 0.9)


def test_more_elements_than_float32_can_count(device: str) -> None:
    n = 2**24 + 7
    x = torch.arange(n - 1, -1, -1, device=device).div_(2, rounding_mode="floor").float()[None]
    for ratio in (0.995, 1 - 2**-20):
        at = ratio * (n - 1)  # between at // 2 and (at + 1) // 2
        lower, upper = int(at) // 2, (int(at) + 1) // 2
        wanted = lower + (at - int(at)) * (upper - lower)
        found = ops.dynamic_threshold(x, x, row(1.0, 0.0).to(device), ratio=ratio)
        assert found.item() == np.float32(wanted)


# ---- threads, instruction sets, routes ----------------------------------------------------------


def samples() -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(5, n, generator=generator, dtype=torch.float64).to(dtype), ratio)
        for n, dtype, ratio in itertools.product((33, 40_003), DTYPES, (0.5, 0.995))
    ]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    try:
        for x, ratio in samples():
            found = []
            for n in (1, 2, 7):
                torch.set_num_threads(n)
                found.append(of_numbers(x, ratio))
            assert_same_bits(found[0], found[1])
            assert_same_bits(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_other_instruction_set(isa: str, tmp_path: Path) -> None:
    code = """
import sys, torch
from diffcore import info
from ops.test_threshold import of_numbers, samples
found = [of_numbers(x, ratio) for x, ratio in samples()]
torch.save((info()["instruction_set"], found), sys.argv[1])
"""
    run_python(code, str(tmp_path / "found.pt"), DIFFCORE_ISA=isa)
    used, results = torch.load(tmp_path / "found.pt")
    assert used == isa
    for (x, ratio), found in zip(samples(), results, strict=True):
        check(found, in_double(x) * SCALE, ratio)


def test_the_reference_agrees(device: str) -> None:
    x, m, u = (coarse((3, 5, 17)).to(device) for _ in range(3))
    x[1, 2, 3], u[2, 0, 0] = math.nan, math.inf
    guided = {"model_output_uncond": u, "guidance_scale": 2.0}
    for options, ratio in itertools.product(({}, guided), RATIOS):
        for y in (x, x.double()):
            tensors = (y, m.to(y), TABLE.to(device))
            extra = {k: v.to(y) if isinstance(v, Tensor) else v for k, v in options.items()}
            found = ops.dynamic_threshold(*tensors, t=2, ratio=ratio, **extra)
            with without_kernels():
                wanted = ops.dynamic_threshold(*tensors, t=2, ratio=ratio, **extra)
            torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.skipif(native._C is None, reason="needs the compiled module")
@pytest.mark.parametrize("ratio", [-3.0, 1.5, math.inf])
def test_the_operator_takes_a_wild_ratio_for_the_nearest(ratio: float, device: str) -> None:
    # The public op refuses it, but a value on a device is not checked.
    x = numbers(2, 40_000).to(device)
    columns = [0.0, 0.0, 0.0, 0.0, SCALE, 0.0, -1.0, 1.0]
    numbers_ = [*UNGUIDED, *columns, ratio, math.inf]
    op = torch.ops.diffcore.x0_quantile.default
    found = op(x, x, [None] * len(numbers_), numbers_, None, -1, False)
    assert_same_bits(found, of_numbers(x, min(max(ratio, 0.0), 1.0)))


def test_a_constant_to_autograd(device: str) -> None:
    x, m, table = (y.to(device).requires_grad_() for y in (coarse((2, 9)), coarse((2, 9)), TABLE))
    assert not ops.dynamic_threshold(x, m, table, t=1).requires_grad
    gradient = torch.func.grad(lambda y: (y * of_numbers(y, 0.5)[:, None]).sum())(x.detach())
    assert_same_bits(gradient, of_numbers(x, 0.5)[:, None].expand(2, 9))
    one = torch.ones(2, 9, device=device)
    _, tangent = torch.func.jvp(lambda y: of_numbers(y, 0.5), (x.detach(),), (one,))
    assert not tangent.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compile_full_graph() -> None:
    torch._dynamo.reset()
    x, m, u = (coarse((3, 4, 41)) for _ in range(3))

    def plain(x: Tensor, m: Tensor, t: Tensor | int) -> Tensor:
        return ops.dynamic_threshold(x, m, TABLE, t=t)

    def guided(x: Tensor, m: Tensor, t: Tensor | int) -> Tensor:
        return ops.dynamic_threshold(
            x, m, TABLE, t=t, ratio=0.9, model_output_uncond=u, guidance_scale=3.0
        )

    for f in (plain, guided):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for t in (2, torch.tensor([1, 5, 3])):
            assert_same_bits(compiled(x, m, t), f(x, m, t))


def test_vmap() -> None:
    x, m = coarse((4, 3, 21)), coarse((4, 3, 21))
    found = torch.vmap(lambda x, m: ops.dynamic_threshold(x, m, TABLE, t=4))(x, m)
    for i in range(4):
        assert_same_bits(found[i], ops.dynamic_threshold(x[i], m[i], TABLE, t=4))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message", "wrong"),
    [
        (ValueError, r"^ratio must be in \[0, 1\], got 1.5", {"ratio": 1.5}),
        (ValueError, r"^ratio must be in \[0, 1\], got -0.1", {"ratio": -0.1}),
        (ValueError, "^ratio must be in .* got nan", {"ratio": math.nan}),
        (TypeError, "^ratio must be a number, got str", {"ratio": "0.5"}),
        (TypeError, "^ratio must be a number, got Tensor", {"ratio": torch.tensor(0.5)}),
        (ValueError, "^sample_max_value must be at least 1, got 0.5", {"sample_max_value": 0.5}),
        (
            ValueError,
            "^sample_max_value must be at least 1, got nan",
            {"sample_max_value": math.nan},
        ),
        (ValueError, "^model_output_uncond must be given", {"guidance_scale": 2.0}),
        (ValueError, "^guidance_scale must be given", {"model_output_uncond": torch.ones(2, 5)}),
        (
            ValueError,
            r"^coefficients must have shape .* got \(6, 7\)",
            {"coefficients": torch.ones(6, 7)},
        ),
        (TypeError, "^coefficients must be .* got list", {"coefficients": [1.0] * 8}),
        (ValueError, r"^x must have at least one .* got shape \(2, 0\)", {"x": torch.ones(2, 0)}),
        (TypeError, "^x must be .* got list", {"x": [1.0]}),
        (ValueError, "^model_output must have the shape of x", {"model_output": torch.ones(2, 4)}),
        (
            TypeError,
            "^model_output must have dtype",
            {"model_output": torch.ones(2, 5).int()},
        ),
        (ValueError, "^t must be in 0 .. 5, got 6", {"t": 6}),
    ],
)
def test_errors_name_the_argument(kind: Any, message: str, wrong: dict[str, Any]) -> None:
    right = {"x": torch.ones(2, 5), "model_output": torch.ones(2, 5), "coefficients": TABLE, "t": 1}
    with pytest.raises(kind, match=message):
        ops.dynamic_threshold(**{**right, **wrong})


# ---- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_cuda_nothing_waits_and_a_graph_replays() -> None:
    table = row(SCALE, 0.0).cuda()
    for shape in ((700, 401), (3, 300_007)):
        x = numbers(*shape).cuda()
        ops.dynamic_threshold(x, x, table)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with no_waiting():
            ops.dynamic_threshold(x, x, table)
        with torch.cuda.graph(graph):
            found = ops.dynamic_threshold(x, x, table)
        for _ in range(3):
            x.copy_(numbers(*shape))
            graph.replay()
            check(found, in_double(x) * SCALE, 0.995)
