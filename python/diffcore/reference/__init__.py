"""The specification: every op of diffcore in plain PyTorch, under the same name, one file a family.

Tests run these in float64 as the truth; devices without kernels and installs without the compiled
module run on them. Inputs keep their dtype at the boundary and 16-bit inputs are computed in
float32, rounded once at the end. Coefficients are numbers or tensors that broadcast against the
inputs (see :func:`per_sample`).
"""

from diffcore._types import Coef
from diffcore.reference import (
    bound,
    common,
    gaussian,
    guidance,
    likelihood,
    linear,
    loss,
    step,
    threshold,
)
from diffcore.reference.bound import *
from diffcore.reference.common import *
from diffcore.reference.gaussian import *
from diffcore.reference.guidance import *
from diffcore.reference.likelihood import *
from diffcore.reference.linear import *
from diffcore.reference.loss import *
from diffcore.reference.step import *
from diffcore.reference.threshold import *

__all__ = ["Coef"]
__all__ += bound.__all__
__all__ += common.__all__
__all__ += gaussian.__all__
__all__ += guidance.__all__
__all__ += likelihood.__all__
__all__ += linear.__all__
__all__ += loss.__all__
__all__ += step.__all__
__all__ += threshold.__all__
