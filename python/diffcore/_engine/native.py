"""Loads the compiled module and reports what it can run on.

Everything works without it, on :mod:`diffcore.reference`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch  # before _C: the module shares the OpenMP runtime that torch has loaded

from diffcore._engine.kept import constant_in_traces
from diffcore._types import StepColumns, VlbColumns

BACKEND = os.environ.get("DIFFCORE_BACKEND", "native")
"""``native`` (default) or ``reference``, from the environment variable ``DIFFCORE_BACKEND``."""

DEBUG = os.environ.get("DIFFCORE_DEBUG", "") not in ("", "0")
"""With ``DIFFCORE_DEBUG=1`` timesteps on a CUDA device are checked too, which synchronizes."""

MIN_CUDA_DRIVER = 13000
"""The static CUDA 13 runtime in the module needs a driver of at least this version (R580)."""

Reason = tuple[int, int, int, int]
"""Why the compiled module did not run a call: code, argument, index of the argument, detail."""

if BACKEND not in ("native", "reference"):
    raise ValueError(f"DIFFCORE_BACKEND must be one of 'native', 'reference', got {BACKEND!r}")


def _unknown() -> bool:
    return True


# Private queries of torch: how many modes are active; None where no functorch transform is. Should
# a torch lack one, the answer is "active": the slow, right route. One function mode does not count:
# that of a default device, which changes only the constructors of tensors. torch keeps one of these
# at most, and CURRENT_DEVICE in step with it.
dispatch_modes: Callable[[], Any] = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)
_DEVICE: dict[str, Any] = vars(importlib.import_module("torch.utils._device"))
_function_modes: Callable[[], Any] = getattr(torch._C, "_len_torch_function_stack", _unknown)
transforms: Callable[[], Any] = getattr(
    getattr(torch._C, "_functorch", None), "peek_interpreter_stack", _unknown
)


@constant_in_traces
def transform_traced() -> bool:
    """Whether Dynamo traces inside a transform: it calls this while it traces."""
    depth = getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)
    return bool(depth() > 0)


def function_modes() -> int:
    """How many function modes are active, without that of a default device."""
    count: int = _function_modes()
    return count - 1 if count and _DEVICE.get("CURRENT_DEVICE") is not None else count


def check_columns(module: Any) -> None:
    """Raises ImportError for a module that reads the columns of tables in another order.

    A module built from another version of the sources would compute wrong numbers in silence.
    """
    for name, leading, columns in (
        ("STEP_COLUMNS", 5, StepColumns._fields),
        ("VLB_COLUMNS", 1, VlbColumns._fields),
    ):
        found = getattr(module, name)
        if tuple(found[leading:]) != columns:
            raise ImportError(f"_C.{name} must be {columns}, got {found[leading:]}; build it again")


_load_error: str | None = None
_C: Any = None
if BACKEND == "native":
    try:
        from diffcore import _C  # type: ignore[no-redef,attr-defined,unused-ignore]

        check_columns(_C)
        _C.connect(
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch.nn.Parameter,
            torch.empty_like,
            dispatch_modes,
            _function_modes,
            _DEVICE,
            torch._C.DisableTorchFunction,
            transforms,
            torch.is_grad_enabled,
        )
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        _C = None
        _load_error = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"diffcore's compiled module could not be used ({_load_error}); running on the slower "
            "plain-torch "
            "reference. Set DIFFCORE_BACKEND=reference to choose that without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )

_ISA = os.environ.get("DIFFCORE_ISA", "")
if _C is not None and _ISA and _C.build_info()["instruction_set"] != _ISA:
    best = _C.build_info()["best_instruction_set"]
    wanted = (
        "'neon' or not set"
        if best == "neon"
        else f"one of 'v2', 'v3', 'v4', and at most {best!r} here"
    )
    raise ValueError(f"DIFFCORE_ISA must be {wanted}, got {_ISA!r}")


def cuda_version(number: int) -> str:
    """The name of a version of CUDA: 12.4 for 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"


_cuda_usable: bool | None = None


def cuda_usable() -> bool:
    """Whether the CUDA kernels can run here; warns, once, when the driver is too old.

    ROCm calls its devices "cuda" too; no kernel of ours is for them.
    """
    global _cuda_usable
    if _cuda_usable is None:
        usable = False
        if _C is not None and torch.version.hip is None and _C.build_info()["cuda"]:
            driver = _C.build_info()["cuda_driver"]
            usable = driver >= MIN_CUDA_DRIVER
            if 0 < driver < MIN_CUDA_DRIVER:
                warnings.warn(
                    "diffcore's CUDA kernels need driver R580, for CUDA "
                    f"{cuda_version(MIN_CUDA_DRIVER)}; this one is for CUDA "
                    f"{cuda_version(driver)}. CUDA tensors run in plain torch.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        _cuda_usable = usable
    return _cuda_usable


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors of this device."""
    if _C is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and cuda_usable())


def warm_up(device: torch.device | str = "cuda") -> None:
    """Loads every CUDA kernel now, so that no graph capture or timed region loads one."""
    device = torch.device(device)
    if device.type == "cuda" and has_kernels(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        _C.load_cuda_kernels(index)


def info() -> dict[str, object]:
    """What is installed and in use: for bug reports, and printed by ``diffcore info``."""
    found: dict[str, object] = {"backend": "reference" if _C is None else "native"}
    if _load_error:
        found["load_error"] = _load_error
    if _C is not None:
        found |= _C.build_info()
    found["torch"] = str(torch.__version__)
    found["torch_cuda"] = torch.version.cuda or "none"
    found["torch_rocm"] = torch.version.hip or "none"
    found["devices"] = ["cpu", *_accelerators()]
    return found


def _accelerators() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        names += [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    return [*names, "mps"] if torch.backends.mps.is_available() else names
