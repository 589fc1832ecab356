"""Random calls of every public op and of both entries of the compiled module.

    python tools/fuzz_calls.py --seconds 60          # or --calls 100000
    python tools/fuzz_calls.py --seed 3 --at 1234    # one call again, with its arguments

Calls are made in child processes, so that a crash costs one of them and is reported with its
number. A call has to end in a result, a TypeError or a ValueError; leave all memory but ``out`` as
it was; give the bits of the same call on contiguous copies; and agree with ``diffcore.reference``,
coarsely: the tests check the right values, this looks for those that are far off.

Memory is not measured here: the resident size of a process moved by 1.1 MiB in 200,000 rounds of an
empty loop, and by as much where each round refused a freed tensor, while what malloc had in use
grew by less than 5 KiB in both. ``tests/native/test_memory.py`` counts the latter for each kind of
call.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tools.fuzz_arguments import Maker, arguments_of
from tools.fuzz_choices import FLOATS

from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from support.op_case import without_kernels

OPS = [name for name in ops.__all__ if callable(getattr(ops, name)) and name != "PhiloxNoise"]
RAW = 0.3  # share of the calls that go to the compiled module itself
MOST_FAILURES = 20
# Words of Python, pybind11 and torch about arguments that diffcore should have named.
UNCLEAR = (
    "incompatible function arguments",
    "must be real number",
    "unsupported operand",
    "object is not",
    "has no attribute",
    "Please file",
)


class Failure(NamedTuple):
    """A call that did not do what it should."""

    at: int
    what: str


# ---- what a call holds ---------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All plain tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, PhiloxNoise):
        yield from tensors_in(value._parts)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with other tensors."""
    if type(value) is Tensor and value.layout == torch.strided and not value.is_nested:
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, PhiloxNoise):
        seed, ids, stream, first = changed(value._parts, change)
        return PhiloxNoise(seed, sample_ids=ids, stream=stream, first_element=first)
    return value


def copied(x: Tensor) -> Tensor:
    """A contiguous copy; what has no memory stays what it is."""
    if x.numel() and x.device.type == "cpu" and not x.is_quantized:
        with contextlib.suppress(RuntimeError):
            if x.untyped_storage().nbytes() == 0:
                return x
    return x.detach().clone(memory_format=torch.contiguous_format)


class Memory:
    """The bytes of every storage that a call could reach."""

    def __init__(self, arguments: Any) -> None:
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}
        for x in tensors_in(arguments):
            if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided:
                continue
            with contextlib.suppress(RuntimeError):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.storages and 0 < storage.nbytes() < 2**22:
                    n = storage.nbytes()
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (n,), (1,))
                    self.storages[storage.data_ptr()] = whole, whole.clone()

    def touched(self, out: Any) -> bool:
        """Whether a byte outside of ``out`` differs from what it was."""
        for address, (whole, before) in self.storages.items():
            if torch.equal(whole, before):
                continue
            if type(out) is not Tensor or out.untyped_storage().data_ptr() != address:
                return True
            where = out.storage_offset(), out.shape, out.stride()
            torch.empty(0, dtype=out.dtype).set_(before.untyped_storage(), *where).copy_(out)
            if not torch.equal(whole, before):
                return True
        return False


# ---- one call ------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The tensors of a result, or the error."""

    tensors: list[Tensor]
    error: Exception | None = None


def answer(call: Callable[[], Any]) -> Answer:
    """What a call returns or raises."""
    try:
        return Answer(list(tensors_in(call())))
    except Exception as error:
        return Answer([], error)


def unclear(error: Exception | None) -> str | None:
    """What is wrong with an error, if it is not one that names the argument."""
    if error is None:
        return None
    words = f"{type(error).__name__}: {str(error)[:200]}"
    if not isinstance(error, (TypeError, ValueError)):
        return words
    return words if any(part in str(error) for part in UNCLEAR) else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN where NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def far_apart(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by more than rounding could explain."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return True
    a, b = found.detach().double(), wanted.detach().double()
    eps = torch.finfo(found.dtype).eps
    limit = torch.finfo(found.dtype).max / 1e4  # overflow sooner or later is rounding too
    ordinary = a.isfinite() & b.isfinite() & (a.abs() < limit) & (b.abs() < limit)
    a, b = a[ordinary], b[ordinary]
    scale = max(1e3, float(b.abs().max())) if b.numel() else 1.0
    return bool(((a - b).abs() > 1e3 * eps * scale).any())


def public_call(random: Random, show: Callable[..., None]) -> str | None:
    """Makes one public call; what is wrong with it, or None."""
    maker, name = Maker(random), random.choice(OPS)
    try:
        arguments = arguments_of(name, maker)
    except (TypeError, ValueError):  # a noise key that cannot be
        return None
    if maker.chance(0.005):
        arguments = changed(arguments, lambda x: x.to("meta") if not x.is_quantized else x)
    show(name, arguments)
    op, out = getattr(ops, name), arguments.get("out")
    seed = random.randrange(2**60)

    def call(given: dict[str, Any]) -> Any:
        torch.default_generator.manual_seed(seed)
        return op(**given)

    # The dtype of randn's result is that of its `out`.
    plain = {k: v for k, v in arguments.items() if k != "out" or name == "randn"}
    plain = changed(plain, copied)
    expected = answer(lambda: call(plain))
    with without_kernels():
        reference = answer(lambda: call(changed(plain, copied)))
    memory = Memory(arguments)
    if maker.chance(0.2) and out is None:
        arguments = changed(arguments, lambda x: leaf(maker, x))
    found = answer(lambda: with_gradients(call(arguments)))
    if wrong := unclear(found.error) or unclear(expected.error):
        return f"{name}: {wrong}"
    if memory.touched(out if found.error is None else None):
        return f"{name}: wrote outside of out"
    if found.error is not None:
        same = out is None and not_needed(arguments) and "memory" not in str(found.error)
        refused_alone = same and expected.error is None
        return f"{name}: refused in this layout: {found.error}" if refused_alone else None
    if expected.error is not None or type(reference.error) is not type(expected.error):
        return f"{name}: {expected.error!r} of copies, {reference.error!r} of the reference"
    # A coefficient that requires grad takes the reference, whose last bits may differ.
    # A rule of guidance may sum in the order of memory.
    by_sums = getattr(arguments.get("guidance"), "reads_predictions", False)
    exact = not_needed(arguments) and not summed(found, maker) and not by_sums
    return compared(name, found, expected, reference, exact)


def compared(
    name: str, found: Answer, expected: Answer, reference: Answer, exact: bool
) -> str | None:
    """What is wrong with results, or None."""
    if any(x.device.type == "meta" for x in found.tensors):
        return None
    for x, copies, plain in zip(*(a.tensors for a in (found, expected, reference)), strict=True):
        if exact and not same_bits(x.detach(), copies.detach()):
            return f"{name}: other values than on contiguous copies"
        for ours, other in ((x, copies), (copies, plain)):
            if far_apart(ours, other):
                worst = float((ours.double() - other.double()).abs().nan_to_num().max())
                return f"{name}: {worst:g} from {'copies' if other is copies else 'the reference'}"
    return None


def summed(found: Answer, maker: Maker) -> bool:
    """Whether a result is a sum, whose order depends on the layout."""
    return any(x.shape != maker.shape or len(maker.shape) < 2 for x in found.tensors)


def not_needed(arguments: Any) -> bool:
    """Whether no argument requires a gradient."""
    return not any(x.requires_grad for x in tensors_in(arguments))


def leaf(maker: Maker, x: Tensor) -> Tensor:
    """The same tensor, which may require a gradient now."""
    trainable = x.is_floating_point() and x.shape == maker.shape and x.element_size() > 1
    return x.detach().requires_grad_() if trainable and maker.chance(0.5) else x


def with_gradients(result: Any) -> Any:
    """The same result, after a backward pass of its sum."""
    parts = [x.double().sum() for x in tensors_in(result) if x.requires_grad]
    if parts:
        torch.stack(parts).sum().backward()
    return result


def raw_call(random: Random, show: Callable[..., None]) -> str | None:
    """Calls the compiled module as no public op does; what is wrong, or None."""
    maker, table = Maker(random), native._C.op_table()
    index = random.randrange(-1, len(table) + 1)
    _, n_in, n_out, n_sum, n_coef, generates = table[index % len(table)]
    more = random.choice([0] * 20 + [-1, 1, 9])
    ins = tuple(maker.samples() for _ in range(max(0, n_in + more)))
    outs: list[Any] = [maker.samples() for _ in range(n_out)]
    for _ in range(n_sum):
        shape = () if maker.chance(0.2) else (maker.rows,)
        outs.append(torch.zeros(shape, dtype=torch.float64 if maker.dtype == FLOATS[2] else None))
    if outs and ins and maker.chance(0.3):
        outs[0] = maker.out([*ins, *outs]) if maker.chance(0.5) else random.choice(ins)
    coefs: list[Any] = []
    step = maker.step() if maker.chance(0.4) else None
    while len(coefs) < n_coef + (more == 9) * 20:
        width = random.randrange(1, n_coef + 2)
        rows = maker.steps if step is not None else maker.rows
        number = maker.coefficient(None)
        coefs.append(maker.table(width, rows) if maker.chance(0.3) else number)
        n_coef -= (width - 1) * (isinstance(coefs[-1], Tensor) and coefs[-1].ndim == 2)
    coefs = [float(c) if type(c) is int and c < 2**60 else c for c in coefs]
    noise = maker.key()._parts if generates != maker.chance(0.02) else None
    if maker.chance(0.01):
        noise = (maker.odd(), 0, 0, 0)
    if maker.chance(0.5):
        arguments: tuple[Any, ...] = (index, ins, tuple(coefs), step, noise, maker.chance(0.1))
        entry = "launch"
    else:
        entry = "call"
        arguments = (index, tuple(outs), ins, tuple(coefs), step, maker.chance(0.2), noise)
    show(entry, {"arguments": arguments})
    found = answer(lambda: getattr(native._C, entry)(*arguments))
    # Nothing but Python's own refusals: the entries are not public.
    if found.error is None or isinstance(found.error, (TypeError, IndexError, ValueError)):
        return None
    foreign = isinstance(found.error, RuntimeError)  # torch's, about a tensor that it cannot read
    return None if foreign else f"_C.{entry}: {found.error!r}"


def one(seed: int, index: int, show: Callable[..., None] = lambda *_: None) -> Failure | None:
    """Makes the call of this number."""
    random = Random(f"{seed}/{index}")
    torch.default_generator.manual_seed(random.randrange(2**60))
    raw = native._C is not None and random.random() < RAW
    try:
        wrong = (raw_call if raw else public_call)(random, show)
    except Exception:
        wrong = "the fuzzer: " + traceback.format_exc(limit=-3)
    return None if wrong is None else Failure(index, wrong)


# ---- many calls ----------------------------------------------------------------------------------


def child(seed: int, start: int, count: int, at: Path) -> None:
    """Makes calls, each number written to ``at`` before; prints the failures as JSON."""
    faulthandler.enable()
    with at.open("r+b", buffering=0) as marker:
        for index in range(start, start + count):
            marker.seek(0)
            marker.write(b"%12d" % index)
            if failure := one(seed, index):
                print(json.dumps(failure), flush=True)


class Driver:
    """Runs children, one after the other, until the calls are made or the time is up."""

    def __init__(self, seed: int, chunk: int, at: Path) -> None:
        self.seed, self.chunk, self.at = seed, chunk, at
        self.failures: list[Failure] = []

    def command(self, start: int, count: int) -> list[str]:
        """How a child is started."""
        numbers = map(str, (self.seed, start, count))
        return [sys.executable, *startup_flags(), __file__, "--child", *numbers, str(self.at)]

    def run(self, calls: int, until: float) -> int:
        """Makes at most that many calls; how many were made."""
        made = 0
        while made < calls and time.monotonic() < until and len(self.failures) < MOST_FAILURES:
            count = min(self.chunk, calls - made)
            self.at.write_text(f"{made:12d}", encoding="utf-8")
            done = subprocess.run(
                self.command(made, count), capture_output=True, text=True, check=False
            )
            found = [Failure(*json.loads(line)) for line in done.stdout.splitlines()]
            self.failures += found
            if done.returncode == 0:
                made += count
                continue
            crashed = int(self.at.read_text(encoding="utf-8"))
            self.failures.append(Failure(crashed, f"the process ended:\n{done.stderr[-4000:]}"))
            made = crashed + 1
        return made


def startup_flags() -> list[str]:
    """``-S`` where this process was started with it, as `make sanitize` does."""
    return ["-S"] if sys.flags.no_site else []


def describe(value: Any) -> str:
    """An argument in a line: of a tensor, everything but its values."""
    if not isinstance(value, Tensor):
        return repr(value)
    try:
        where = f"offset {value.storage_offset()}" if value.layout == torch.strided else ""
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {where} {value.device}"
    except RuntimeError as error:
        return f"{type(value).__name__}: {error}"


def show_call(name: str, arguments: dict[str, Any]) -> None:
    """Prints a call before it is made."""
    print(name, flush=True)
    for key, value in arguments.items():
        items = value if isinstance(value, (tuple, list)) else [value]
        print(f"  {key}:", *map(describe, items), sep="\n    ", flush=True)


def main() -> int:
    """Returns 1 if a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--chunk", type=int, default=5000, help="calls of a process")
    parser.add_argument("--at", type=int, help="make this call only, and print its arguments")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        seed, start, count = map(int, options.child[:3])
        child(seed, start, count, Path(options.child[3]))
        return 0
    if options.at is not None:
        faulthandler.enable()
        failure = one(options.seed, options.at, show_call)
        print("fine" if failure is None else failure.what)
        return failure is not None
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver(options.seed, options.chunk, Path(folder) / "at")
        made = driver.run(options.calls, time.monotonic() + options.seconds)
    for at, what in driver.failures:
        print(f"--seed {options.seed} --at {at}: {what}")
    kinds = collections.Counter(what.split("\n")[0] for _, what in driver.failures)
    print(f"{made} calls with seed {options.seed}, {sum(kinds.values())} failures")
    return bool(driver.failures)


if __name__ == "__main__":
    sys.exit(main())
