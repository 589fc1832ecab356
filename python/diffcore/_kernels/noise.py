"""Noise that a kernel reads or generates: the choice between the two kernels of a pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from diffcore._engine import native
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.dtensor import is_dtensor
from diffcore._engine.kernel import Call, Kernel, NoisyKernel
from diffcore._engine.library import LIBRARY, define, pack_noise, unpack_noise
from diffcore._types import Coefs, NoiseParts, Step, Tensors
from diffcore.reference import philox

# The one tracer that activates no mode.
_compiling = torch.compiler.is_dynamo_compiling

Needs = Any
Device = torch.device | str | None


def run_noisy(
    kernel: NoisyKernel,
    inputs: Tensors,
    noise: Tensor | NoiseParts,
    coefs: Coefs = (),
    step: Step = None,
    out: Tensor | None = None,
) -> Any:
    """Runs the kernel that reads ``noise``, or the one that generates it."""
    if isinstance(noise, Tensor):
        return run(kernel.reading, (*inputs, noise), coefs, step, False, out)
    return run(kernel.generating, inputs, coefs, step, False, out, noise)


def with_noise(inputs: Tensors, call: Call) -> tuple[Tensors, Tensor | NoiseParts]:
    """The inputs without the noise, and the noise: a tensor, or the parts of its key."""
    parts = call[-1]
    return (inputs[:-1], inputs[-1]) if parts is None else (inputs, parts)


RANDN = define(
    Kernel(
        "randn",
        ("out",),
        reference=lambda like, noise: noise,
        reads_inputs=False,
        generates_noise=True,
    )
)


def pairs(
    noise: NoiseParts, first: int, count: int, batch: int, salt: int, device: Device
) -> philox.Pair:
    """Two words for each of successive elements, ``[B, count]``: ``philox.pairs``.

    The compiled module computes them for a CPU in plain eager, where the formula costs some two
    hundred operations on tensors.

    Args:
        noise: The parts of a key; its first element does not count.
        first: The first element, an even number.
        count: How many.
        batch: B.
        salt: 64 bits that change those of the seed.
        device: Of the result; ``None`` for torch's default.
    """
    if native._C is not None and plain_eager() and not any(map(_is_subclass, noise)):
        blocks = (count + 1) // 2  # of two elements, four words
        words = torch.empty(batch, 4 * blocks, dtype=torch.int64, device=device)
        device = words.device
        # Declined where the tensors of the key are elsewhere, for example.
        key = (*noise[:3], 2 * first)
        if device.type == "cpu" and native._C.fill_words(words, key, salt) is None:
            return words[:, : 2 * count : 2], words[:, 1 : 2 * count : 2]
    if _compiling() and _traces_operator(noise):
        device = torch.empty(0, device=device).device
        packed = pack_noise((*noise[:3], 0))[:-1]
        signed = salt - 2**64 if salt >= 2**63 else salt
        words = torch.ops.diffcore.words(*packed, first, count, batch, signed, device=device)
        return words[..., 0], words[..., 1]
    return philox.pairs(noise, torch.arange(count, device=device) + first, batch, salt)


def _traces_operator(noise: NoiseParts) -> bool:
    """Whether a compiler gets the words as one operator.

    Of the formula, ten rounds of which each reads the one before twice, Inductor makes expressions
    that take it seconds, and minutes where something is fused to them.
    """
    transformed = forward_ad._current_level >= 0 or native.transform_traced()
    return not transformed and not any(map(is_dtensor, noise))


def _words(*args: Any, device: torch.device) -> Tensor:
    """``pairs`` as one new tensor, ``[B, count, 2]``; a key, then its other arguments."""
    *packed, first, count, batch, salt = args
    noise = unpack_noise((*packed, 0))
    assert noise is not None
    return torch.stack(pairs(noise, first, count, batch, salt % 2**64, device), -1)


def _fake_words(*args: Any, device: torch.device) -> Tensor:
    count, batch = args[7:9]
    return torch.empty(batch, count, 2, dtype=torch.int64, device=device)


LIBRARY.define(
    "words(Tensor? seed, SymInt seed_number, Tensor? sample_ids, SymInt first_id, Tensor? stream, "
    "SymInt stream_number, SymInt first, SymInt count, SymInt batch, int salt, *, Device device)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("words", _words, "CompositeExplicitAutograd")
torch.library.register_fake("diffcore::words", _fake_words, lib=LIBRARY)


def _is_subclass(part: int | Tensor) -> bool:
    return isinstance(part, Tensor) and type(part) is not Tensor


def _draw_seed(device: torch.device) -> Tensor:
    """64 bits from torch's generator, int64 ``[1]``; a compiler keeps them for the backward pass.

    A partitioner that saves memory would generate them again there, and the noise of the gradient
    would be another than that of the result. The mark reaches the traced node through the metadata
    that tracers copy; outside of them it changes nothing.
    """
    from torch._functorch import config as partitioner  # not loaded with torch

    if partitioner.activation_memory_budget == 0 and torch.is_grad_enabled():
        raise RuntimeError(
            "noise must be given where activation_memory_budget is 0, which keeps no value of the "
            "forward pass, so the backward pass would use other noise; pass a PhiloxNoise, or set "
            "a small budget above 0"
        )
    before = traceback.current_meta
    traceback.current_meta = {**before, "recompute": CheckpointPolicy.MUST_SAVE}
    try:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    finally:
        traceback.current_meta = before


LIBRARY.define("draw_seed(*, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
LIBRARY.impl("draw_seed", _draw_seed, "CompositeImplicitAutograd")
