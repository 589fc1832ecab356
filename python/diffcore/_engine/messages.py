"""Explains what is wrong with the arguments of an op, by name.

Called only after a kernel has refused them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from diffcore._engine import native

if TYPE_CHECKING:
    from diffcore._engine.execute import Noise
    from diffcore._engine.kernel import Kernel
    from diffcore._types import Coef, Step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sample", "batchmean", "mean", "sum")


def choice(name: str, value: object, wanted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the `wanted` strings."""
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, wanted))}")


def refuse_non_tensor(names: tuple[str, ...], inputs: tuple[Any, ...]) -> NoReturn:
    """Raises TypeError for the first input that is no tensor."""
    name, x = next((n, x) for n, x in zip(names, inputs, strict=True) if not isinstance(x, Tensor))
    raise TypeError(f"{name} is a {type(x).__name__}; wanted a torch.Tensor")


def refuse_other(name: str, x: Any, first: Tensor) -> NoReturn:
    """Raises for an argument that no kernel reads, but that has to fit the ones that it does."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; wanted a torch.Tensor")
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}; wanted {tuple(first.shape)}, that of model_output"
    )


def explain(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    out: Tensor | None = None,
    noise: Noise = None,
) -> None:
    """Raises the error that names the wrong argument; returns when nothing is wrong."""
    first, first_name = inputs[0], kernel.inputs[0]
    for name, x in zip(kernel.inputs, inputs, strict=True):
        _check_tensor(name, x)
        _check_like(name, x, first_name, first)
    if out is not None:
        check_out(kernel, inputs, out)
    rows = first.shape[0] if first.ndim else 1
    steps = _check_coefs(kernel, coefs, step, rows, first)
    if step is not None:
        _check_step(step, steps, rows, first)
    if noise is not None:
        check_noise(noise, rows, first)


def check_out(kernel: Kernel, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """Raises unless an output given by the user can be written."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; wanted a torch.Tensor")
    if out.requires_grad:
        raise ValueError("out requires grad; wanted a tensor that does not")
    _check_tensor("out", out)
    _check_like("out", out, kernel.inputs[0], inputs[0])
    if any(s == 0 and n > 1 for s, n in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out has strides {out.stride()}: elements that share memory")


def _check_like(name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    for what, theirs, ours in (
        ("shape", tuple(x.shape), tuple(first.shape)),
        ("dtype", x.dtype, first.dtype),
        ("device", x.device, first.device),
    ):
        if theirs != ours:
            kind = TypeError if what == "dtype" else ValueError
            raise kind(f"{name} has {what} {theirs}; wanted {ours}, that of {first_name}")


def _check_tensor(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError(f"{name} has layout {x.layout}; wanted a dense, strided tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; wanted float32, float64, bfloat16 or float16")
    _check_memory(name, x)


def _check_memory(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return
    try:
        hollow = native.has_kernels(x.device) and x.numel() > 0 and x.data_ptr() == 0
    except RuntimeError:  # the tensor of a functorch transform has no pointer, and needs none
        return
    if hollow:
        raise ValueError(f"{name} has no memory behind it (a fake, functional or freed tensor)")


def _check_coefs(
    kernel: Kernel, coefs: tuple[Coef, ...], step: Step, rows: int, first: Tensor
) -> int:
    steps, k = 0, 0
    for c in coefs:
        columns = c.shape[1] if isinstance(c, Tensor) and c.ndim == 2 else 1
        name = kernel.coefs[k] if k < len(kernel.coefs) and columns == 1 else kernel.table
        k += columns
        if not isinstance(c, Tensor):
            if type(c) is not float and not isinstance(c, (torch.SymFloat, torch.SymInt)):
                raise TypeError(f"{name} is a {type(c).__name__}; wanted a number or a tensor")
            continue
        if c.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {c.dtype}; wanted float32 or float64")
        if c.device != first.device:
            raise ValueError(f"{name} is on {c.device}; wanted {first.device}, as the tensors")
        _check_memory(name, c)
        if c.ndim > 2:
            raise ValueError(
                f"{name} has shape {tuple(c.shape)}; wanted a number per sample, or a table [T, k]"
            )
        if c.ndim == 2 and step is not None:
            if not len(c) or (steps and len(c) != steps):
                raise ValueError(
                    f"{name} is a table of {len(c)} rows; wanted {steps or 'at least 1'}"
                )
            steps = len(c)
        elif c.ndim and len(c) not in (1, rows):
            raise ValueError(f"{name} has {len(c)} entries; wanted 1 or {rows}, one per sample")
    if k != len(kernel.coefs):
        raise ValueError(
            f"{k} coefficients came; wanted {len(kernel.coefs)}: {', '.join(kernel.coefs)}"
        )
    if step is not None and not steps:
        raise ValueError("t is given, but no coefficient is a table indexed by it")
    return steps


def _check_step(step: Step, steps: int, rows: int, first: Tensor) -> None:
    if not isinstance(step, Tensor):
        if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
            raise TypeError(
                f"t is a {type(step).__name__}; wanted an int or an int64 or int32 tensor"
            )
        if not isinstance(step, torch.SymInt) and not 0 <= step < steps:
            raise ValueError(f"t is {step}; wanted 0 <= t < {steps}")
        return
    if step.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t has dtype {step.dtype}; wanted int64 or int32")
    if step.device != first.device:
        raise ValueError(f"t is on {step.device}; wanted {first.device}, as the tensors")
    if step.ndim > 1 or (step.ndim == 1 and len(step) not in (1, rows)):
        raise ValueError(
            f"t has shape {tuple(step.shape)}; wanted [{rows}], one step per sample, "
            "or a single step"
        )
    _check_memory("t", step)
    # A dispatch mode may have no values, or may record that they are read.
    readable = (step.device.type == "cpu" or native.DEBUG) and not native.dispatch_modes()
    if readable and type(step) is Tensor and not _is_traced(step) and step.numel():
        low, high = int(step.min()), int(step.max())
        if low < 0 or high >= steps:
            wrong = low if low < 0 else high
            raise ValueError(f"t holds {wrong}; wanted 0 <= t < {steps}")


def check_noise(noise: tuple[Any, ...], rows: int, first: Tensor) -> None:
    """Raises unless the recipe fits the samples of `first`."""
    for name, part in zip(("seed", "sample_ids", "stream"), noise, strict=False):
        if not isinstance(part, Tensor):
            continue
        if part.device != first.device:
            raise ValueError(f"{name} is on {part.device}; wanted {first.device}, as the tensors")
        if name == "sample_ids" and part.ndim and len(part) != rows:
            raise ValueError(f"sample_ids has {len(part)} entries; wanted {rows}, one per sample")
        _check_memory(name, part)
    end = noise[3] + first.numel() // max(rows, 1)
    if end > 2**34:
        raise ValueError(f"noise reaches element {end} of a sample; wanted at most 2^34 = {2**34}")


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
