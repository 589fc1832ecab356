"""The public functional ops: a call launches one kernel, forward and backward.

Tensors called elementwise (samples, noise, predictions, means, ...) share one shape ``[B, ...]``
and one device. Their dtype is float32, float64, bfloat16 or float16; tensors of several dtypes are
converted to the widest of them, as torch promotes, which costs a copy: a bfloat16 prediction beside
float32 samples gives a float32 result, under autocast and outside. The noise of a key is rounded to
the dtype of the samples. Any dense memory layout that the tensors share is used without a copy.
Values are computed in float32 (float64 for float64) and rounded once, when they are stored.

A coefficient (``alpha``, ``sigma``, ...) is a number, or a float32 or float64 tensor: 0-dim, or
``[B]``, one per sample. With ``t`` it is a table ``[T]``, gathered at ``t`` inside the kernel;
``t`` is an int, an integer tensor ``[B]``, or a one-element integer tensor on the device (a
counter). On the CPU a ``t`` out of range raises; on CUDA it is clamped, because a check would wait
for the device (``DIFFCORE_DEBUG=1`` checks it).

Wherever an op takes noise, it takes a tensor or a ``PhiloxNoise``: a noise key, used like a JAX
key, from which the kernel generates the noise.

Every op raises TypeError or ValueError, before any memory is touched, for an argument of the
wrong type, dtype, shape or device, and names the argument. KL and likelihoods are in nats.
"""

from __future__ import annotations

from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.noise import PhiloxNoise
from diffcore.ops import (
    _noise,
    bound,
    gaussian,
    likelihood,
    linear,
    loss,
    mask,
    named_steps,
    step,
    threshold,
)
from diffcore.ops._noise import *
from diffcore.ops.bound import *
from diffcore.ops.gaussian import *
from diffcore.ops.likelihood import *
from diffcore.ops.linear import *
from diffcore.ops.loss import *
from diffcore.ops.mask import *
from diffcore.ops.named_steps import *
from diffcore.ops.step import *
from diffcore.ops.threshold import *

__all__ = ["PREDICTION_TYPES", "PhiloxNoise"]
__all__ += _noise.__all__
__all__ += bound.__all__
__all__ += gaussian.__all__
__all__ += likelihood.__all__
__all__ += linear.__all__
__all__ += loss.__all__
__all__ += mask.__all__
__all__ += named_steps.__all__
__all__ += step.__all__
__all__ += threshold.__all__
