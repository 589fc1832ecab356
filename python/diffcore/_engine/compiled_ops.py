"""What torch.compile and torch.export make of an op: a choice that is read while they trace."""

from __future__ import annotations

import os

from diffcore._checks import check_choice

KINDS = ("kernel", "formula")

kind = os.environ.get("DIFFCORE_COMPILED_OPS", "kernel")
check_choice("DIFFCORE_COMPILED_OPS", kind, KINDS)


def set_compiled_ops(ops: str) -> None:
    """Choose what ``torch.compile`` and ``torch.export`` make of the ops that they trace next.

    "kernel", the default, is one opaque operator per op: the bits of the eager call, in the
    backward pass too. "formula" is the op in plain torch, which a compiler fuses with what
    surrounds it, to within rounding of the eager call, and which an exported program needs no
    diffcore for. An op with a noise key is the operator either way, so that the noise keeps its
    bits; so is an op on a device with neither. Functions that are compiled already are compiled
    again at their next call.

    The environment variable ``DIFFCORE_COMPILED_OPS`` sets the choice that a process starts with.

    Args:
        ops: "kernel" or "formula".

    Raises:
        TypeError: ``ops`` is no string.
        ValueError: ``ops`` is neither.
    """
    global kind
    check_choice("ops", ops, KINDS)
    kind = ops
