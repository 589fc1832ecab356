"""The content of a checkpoint of ``bits_per_dim``: JSON, and what each entry of it must be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffcore.likelihood.tally import Tally

FORMAT = 2
_ENTRIES = (
    *("format", "settings", "seed", "kind", "batches"),
    *("calls", "seen", "samples", "sums"),
)
_SHOWN = 60


def state_of(tally: Tally, settings: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """The entries of a checkpoint. As JSON they keep float64 to the bit.

    Args:
        tally: The sums so far.
        settings: What a run must share with this one to resume it.
        seed: The seed of the noise if the caller gave no noise.

    Returns:
        Values that JSON can hold.
    """
    return {
        "format": FORMAT,
        "settings": settings,
        "seed": seed,
        "kind": tally.kind,
        "batches": tally.batches,
        "calls": tally.calls,
        "seen": tally.digest,
        "samples": tally.samples,
        "sums": {name: tensor.tolist() for name, tensor in tally.tensors().items()},
    }


def parse(content: bytes) -> dict[str, Any]:
    """Read the content of a file.

    Args:
        content: All of it.

    Returns:
        The entries, of which only their names, the format and the type of ``settings`` are checked.

    Raises:
        ValueError: Something else. The message says what is wrong, but not in which file.
    """
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = f"{len(content)} bytes" if content else "an empty file"
        raise ValueError(f"content must be JSON, got {what}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"content must be a JSON object, got {type(state).__name__}")
    if not _is_count(state.get("format"), FORMAT) or state["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {shown(state.get('format'))}")
    if set(state) != set(_ENTRIES):
        raise ValueError(
            f"entries must be {', '.join(_ENTRIES)}, got {_difference(set(state), set(_ENTRIES))}"
        )
    if not isinstance(state["settings"], dict):
        raise ValueError(f"settings must be an object, got {type(state['settings']).__name__}")
    return state


def check(state: Mapping[str, Any], tally: Tally, *, seeded: bool) -> None:
    """Check every entry that ``parse`` has not checked, and that they agree with each other.

    Args:
        state: Result of ``parse``.
        tally: An empty tally of the same run, for the lengths of its sums.
        seeded: Whether the run has a seed, because the caller gave no noise.

    Raises:
        ValueError: For the first entry that is wrong.
    """
    for problem in _problems(state, tally, seeded):
        raise ValueError(problem)


def shown(value: object) -> str:
    """A value for a message: short ones as they are, others by type."""
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text if 0 < len(text) <= _SHOWN else type(value).__name__


def _problems(state: Mapping[str, Any], tally: Tally, seeded: bool) -> Iterator[str]:
    """What is wrong. Each check relies on those before it."""
    seed = state["seed"]
    if seeded and not (_is_int(seed) and -(2**63) <= seed < 2**63):
        yield f"seed must be an int of 64 bits, got {shown(seed)}"
    if not seeded and seed is not None:
        yield f"seed must be null for a run with noise=, got {shown(seed)}"
    if not _is_kind(state["kind"]):
        yield f"kind must be the shape and the dtype of a sample, got {shown(state['kind'])}"
    for name in ("batches", "calls"):
        if not _is_count(state[name], 1):
            yield f"{name} must be an int of at least 1, got {shown(state[name])}"
    if not _is_count(state["samples"], 0):  # of a batch of repeated samples none counts
        yield f"samples must be an int of at least 0, got {shown(state['samples'])}"
    per_batch = state["batches"] * len(tally.strata.starts)
    if state["calls"] % per_batch:
        yield f"calls must be a multiple of {per_batch}, got {state['calls']}"
    if not _is_digest(state["seen"]):
        yield f"seen must be 64 hexadecimal digits, got {shown(state['seen'])}"
    yield from _sum_problems(state["sums"], tally)
    visits = state["samples"] * state["calls"] // state["batches"]
    if sum(state["sums"]["visits"]) != visits:
        yield f"sums.visits must sum to {visits}, got {sum(state['sums']['visits'])}"


def _sum_problems(sums: object, tally: Tally) -> Iterator[str]:
    tensors = tally.tensors()
    if not isinstance(sums, dict):
        yield f"sums must be an object, got {type(sums).__name__}"
    assert isinstance(sums, dict)
    if set(sums) != set(tensors):
        yield f"sums must be {', '.join(tensors)}, got {_difference(set(sums), set(tensors))}"
    for name, tensor in tensors.items():
        values = sums[name]
        if not isinstance(values, list):
            yield f"sums.{name} must be a list, got {type(values).__name__}"
        if len(values) != len(tensor):
            yield f"sums.{name} must have {len(tensor)} numbers, got {len(values)}"
        for value in values:
            if not isinstance(value, float):
                yield f"sums.{name} must be a list of floats, got {shown(value)} in it"
            if name == "visits" and not (value.is_integer() and value >= 0):
                yield f"sums.visits must be counts, got {value}"
            if math.isfinite(value) and not value.is_integer():
                yield f"sums.{name} must be the digits of exact sums, got {value}"


def _difference(got: set[str], expected: set[str]) -> str:
    missing, other = sorted(expected - got), sorted(got - expected)
    parts = [f"no {name}" for name in missing] + [shown(name) for name in other]
    return ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return _is_int(value) and least <= value < 2**53  # exact in the float64 sums


def _is_kind(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    return all(_is_count(n, 0) for n in value[0]) and isinstance(value[1], str)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
