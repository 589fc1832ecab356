"""The errors of wrong arguments of an op, by name.

The compiled module answers a wrong call with a reason: a code and the argument it is about.
``refuse`` raises the error of a reason. ``explain`` finds what is wrong in Python, for the routes
that do not reach the compiled module; both build the same messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffcore._checks import check_dense, check_memory, no_memory, to_floats
from diffcore._engine import native
from diffcore._engine.kernel import Kernel
from diffcore._engine.strides import shares_elements
from diffcore._types import Coef, Coefs, NoiseParts, Step, Tensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sample", "batchmean", "mean", "sum")


def refuse_non_tensor(names: tuple[str, ...], inputs: tuple[Any, ...]) -> NoReturn:
    """Raises TypeError for the first input that is not a tensor."""
    name, x = next((n, x) for n, x in zip(names, inputs, strict=True) if not isinstance(x, Tensor))
    raise _not_tensor(name, x)


def refuse_other(name: str, x: Any, first: Tensor) -> NoReturn:
    """Raises for an argument that no kernel reads, but that has to have the shape of the others."""
    if not isinstance(x, Tensor):
        raise _not_tensor(name, x)
    raise ValueError(
        f"{name} must have the shape of model_output, {tuple(first.shape)}, got {tuple(x.shape)}"
    )


class Arguments(NamedTuple):
    """The arguments of one call of a kernel."""

    kernel: Kernel
    inputs: Tensors
    coefs: Coefs
    step: Step
    out: Tensor | None = None
    noise: NoiseParts | None = None


# ---- what is wrong with one argument: a name, and the error -------------------------------------


def _not_tensor(name: str, x: Any, wanted: str = "a torch.Tensor") -> Exception:
    return TypeError(f"{name} must be {wanted}, got {type(x).__name__}")


def _bad_dtype(name: str, x: Tensor, wanted: str) -> Exception:
    return TypeError(f"{name} must have dtype {wanted}, got {x.dtype}{to_floats(name, x)}")


def _elsewhere(name: str, x: Tensor, first: Tensor) -> Exception:
    return ValueError(f"{name} must be on {first.device}, as the samples, got {x.device}")


def _unlike(name: str, x: Tensor, what: str, args: Arguments) -> Exception:
    theirs, ours = (getattr(t, what) for t in (x, args.inputs[0]))
    if what == "shape":
        theirs, ours = tuple(theirs), tuple(ours)
    kind = TypeError if what == "dtype" else ValueError
    return kind(f"{name} must have the {what} of {args.kernel.inputs[0]}, {ours}, got {theirs}")


def _coef_dimensions(name: str, c: Tensor) -> Exception:
    return ValueError(
        f"{name} must be a number, 0-dim, [B], or a table, got shape {tuple(c.shape)}"
    )


def _table_length(name: str, c: Tensor, steps: int) -> Exception:
    return ValueError(f"{name} must have {steps or 'at least 1'} rows, got {c.shape[0]}")


def _length(name: str, x: Tensor, wanted: str, fix: str = "") -> Exception:
    return ValueError(f"{name} must have {wanted} entries, one per sample, got {len(x)}{fix}")


def _coef_count(count: int, kernel: Kernel) -> Exception:
    names = ", ".join(kernel.coefs)
    return ValueError(
        f"{kernel.table} must hold {len(kernel.coefs)} numbers ({names}), got {count}"
    )


def _step_shape(name: str, step: Tensor, rows: int) -> Exception:
    fix = "; for a step of each frame pass [B, F] with group_dim" if step.ndim > 1 else ""
    return ValueError(
        f"{name} must be one step, or [{rows}], one per sample, got shape {tuple(step.shape)}{fix}"
    )


def _step_range(name: str, step: int | Tensor, wrong: int, steps: int) -> Exception:
    what = "hold steps" if isinstance(step, Tensor) else "be"
    return ValueError(f"{name} must {what} in 0 .. {steps - 1}, got {wrong}")


def _step_type(name: str, step: Any) -> Exception:
    return _not_tensor(name, step, "an int or an int64 or int32 tensor")


def _step_not_used(name: str) -> Exception:
    return ValueError(
        f"{name} must be None, got a step; no coefficient is a table that it could index"
    )


def _noise_range(end: int) -> Exception:
    return ValueError(f"noise must end by element 2^34 = {2**34} of a sample, got {end}")


_FLOATS = "float32, float64, bfloat16 or float16"
_COEF_FLOATS = "float32 or float64"
_STEP_INTS = "int64 or int32"


# ---- from a reason of the compiled module -------------------------------------------------------

_CODES: tuple[str, ...] = () if native._C is None else native._C.CODES
_ARGUMENTS: tuple[str, ...] = () if native._C is None else native._C.ARGUMENTS


class _Named(NamedTuple):
    """A reason by the names of its code and its argument."""

    code: str
    argument: str
    position: int
    detail: int


def code_of(reason: native.Reason) -> str:
    """The name of a reason's code."""
    return _CODES[reason[0]]


def refuse(reason: native.Reason, args: Arguments) -> NoReturn:
    """Raises the error of a reason that the compiled module gave."""
    named = _Named(_CODES[reason[0]], _ARGUMENTS[reason[1]], *reason[2:])
    build = _BY_ARGUMENT.get(named.argument)
    error = None if build is None else build(args, named)
    if error is None and named.code == "noise_range":
        error = _noise_range(named.detail)
    if error is None:
        error = RuntimeError(
            f"{args.kernel.name}: the kernel refused its arguments ({', '.join(map(str, named))}); "
            "please report"
        )
    raise error


def _of_tensor(name: str, x: Tensor, code: str, args: Arguments) -> Exception | None:
    if code == "type":
        return _not_tensor(name, x)
    if code == "dtype":
        return _bad_dtype(name, x, _FLOATS)
    if code == "memory":
        return no_memory(name)
    what = {"shape": "shape", "other_dtype": "dtype", "other_device": "device"}.get(code)
    return None if what is None else _unlike(name, x, what, args)


def _of_input(args: Arguments, why: _Named) -> Exception | None:
    return _of_tensor(args.kernel.inputs[why.position], args.inputs[why.position], why.code, args)


def _of_output(args: Arguments, why: _Named) -> Exception | None:
    return None if args.out is None else _of_tensor("out", args.out, why.code, args)


def _of_coef(args: Arguments, why: _Named) -> Exception | None:
    if why.code == "coefficients":
        return _coef_count(sum(map(_columns, args.coefs)), args.kernel)
    c: Any = args.coefs[why.position]
    name = _coef_name(args.kernel, c, sum(map(_columns, args.coefs[: why.position])))
    return {
        "type": lambda: _not_tensor(name, c, "a number or a torch.Tensor"),
        "dtype": lambda: _bad_dtype(name, c, _COEF_FLOATS),
        "other_device": lambda: _elsewhere(name, c, args.inputs[0]),
        "memory": lambda: no_memory(name),
        "dimensions": lambda: _coef_dimensions(name, c),
        "table_length": lambda: _table_length(name, c, why.detail),
        "length": lambda: _length(name, c, *_coef_length(name, args.inputs[0])),
    }.get(why.code, _nothing)()


def _of_step(args: Arguments, why: _Named) -> Exception | None:
    step: Any = args.step
    name = args.kernel.step
    return {
        "type": lambda: _step_type(name, step),
        "dtype": lambda: _bad_dtype(name, step, _STEP_INTS),
        "other_device": lambda: _elsewhere(name, step, args.inputs[0]),
        "memory": lambda: no_memory(name),
        "dimensions": lambda: _step_shape(name, step, _rows(args.inputs[0])),
        "length": lambda: _step_shape(name, step, _rows(args.inputs[0])),
        "step_not_used": lambda: _step_not_used(name),
        "step_range": lambda: _step_range(
            name, step, why.detail if isinstance(step, Tensor) else step, _table_rows(args.coefs)
        ),
    }.get(why.code, _nothing)()


def _of_noise(part: int, name: str) -> Callable[..., Exception | None]:
    def build(args: Arguments, why: _Named) -> Exception | None:
        x: Any = None if args.noise is None else args.noise[part]
        # A tensor without elements has no memory either.
        code = "length" if why.code == "memory" and not x.numel() else why.code
        return {
            "other_device": lambda: _elsewhere(name, x, args.inputs[0]),
            "memory": lambda: no_memory(name),
            "length": lambda: _length(name, x, str(_rows(args.inputs[0]))),
        }.get(code, _nothing)()

    return build


def _nothing() -> None:
    return None


_BY_ARGUMENT: dict[str, Callable[[Arguments, _Named], Exception | None]] = {
    "input": _of_input,
    "output": _of_output,
    "coef": _of_coef,
    "step": _of_step,
    "seed": _of_noise(0, "seed"),
    "sample_ids": _of_noise(1, "sample_ids"),
    "stream": _of_noise(2, "stream"),
}


def _rows(first: Tensor) -> int:
    return first.shape[0] if first.ndim else 1


def _coef_length(name: str, first: Tensor) -> tuple[str, str]:
    """How many entries a coefficient may have, and what to pass of a table."""
    return f"1 or {_rows(first)}", f"; of a table pass the entries of the samples, {name}[t]"


def _columns(c: Coef) -> int:
    return c.shape[1] if isinstance(c, Tensor) and c.ndim == 2 else 1


def _coef_name(kernel: Kernel, c: Coef, k: int) -> str:
    """What the caller calls the coefficient whose first column is the ``k``-th."""
    return kernel.coefs[k] if k < len(kernel.coefs) and _columns(c) == 1 else kernel.table


def _table_rows(coefs: Coefs) -> int:
    return next((c.shape[0] for c in coefs if isinstance(c, Tensor) and c.ndim == 2), 0)


# ---- without the compiled module ----------------------------------------------------------------


def explain(args: Arguments) -> None:
    """Raises the error that names the wrong argument; returns when nothing is wrong."""
    kernel, inputs, _, step, out, noise = args
    for name, x in zip(kernel.inputs, inputs, strict=True):
        check_tensor(name, x)
        _check_like(name, x, args)
    if out is not None:
        check_out(kernel, inputs, out)
    steps = _check_coefs(args)
    if step is not None:
        _check_step(kernel.step, step, steps, inputs[0])
    if noise is not None:
        check_noise(noise, _rows(inputs[0]), inputs[0])


def check_out(kernel: Kernel, inputs: Tensors, out: Tensor) -> None:
    """Raises unless an output given by the user can be written."""
    if not isinstance(out, Tensor):
        raise _not_tensor("out", out)
    if out.requires_grad:
        raise ValueError("out must not require grad, got a tensor that does")
    check_tensor("out", out)
    _check_like("out", out, Arguments(kernel, inputs, (), None))
    if shares_elements(out):
        raise ValueError(
            f"out must have memory for each element, got shape {tuple(out.shape)} with strides "
            f"{out.stride()}"
        )


def _check_like(name: str, x: Tensor, args: Arguments) -> None:
    first = args.inputs[0]
    for what in ("shape", "dtype", "device"):
        if getattr(x, what) != getattr(first, what):
            raise _unlike(name, x, what, args)


def check_dtype(dtype: Any) -> None:
    """Raises TypeError for a ``dtype`` that is neither ``None`` nor one that kernels take."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        came = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"dtype must be {_FLOATS}, got {came}")


def check_tensor(name: str, x: Tensor) -> None:
    """Raises unless a tensor is one that kernels take: dense, of a dtype of theirs, not freed."""
    check_dense(name, x)
    if x.dtype not in DTYPES:
        raise _bad_dtype(name, x, _FLOATS)
    check_memory(name, x)


def _check_coefs(args: Arguments) -> int:
    first, rows, steps, k = args.inputs[0], _rows(args.inputs[0]), 0, 0
    for c in args.coefs:
        name = _coef_name(args.kernel, c, k)
        k += _columns(c)
        if not isinstance(c, Tensor):
            if type(c) is not float and not isinstance(c, (torch.SymFloat, torch.SymInt)):
                raise _not_tensor(name, c, "a number or a torch.Tensor")
            continue
        check_dense(name, c)
        if c.dtype not in (torch.float32, torch.float64):
            raise _bad_dtype(name, c, _COEF_FLOATS)
        if c.device != first.device:
            raise _elsewhere(name, c, first)
        check_memory(name, c)
        if c.ndim > 2:
            raise _coef_dimensions(name, c)
        if c.ndim == 2 and args.step is not None:
            if not c.shape[0] or (steps and c.shape[0] != steps):
                raise _table_length(name, c, steps)
            steps = c.shape[0]
        elif c.ndim and c.shape[0] not in (1, rows):
            raise _length(name, c, *_coef_length(name, first))
    if k != len(args.kernel.coefs):
        raise _coef_count(k, args.kernel)
    if args.step is not None and not steps:
        raise _step_not_used(args.kernel.step)
    return steps


def _check_step(name: str, step: Step, steps: int, first: Tensor) -> None:
    if not isinstance(step, Tensor):
        if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
            raise _step_type(name, step)
        if not isinstance(step, torch.SymInt) and not 0 <= step < steps:
            raise _step_range(name, step, step, steps)
        return
    check_dense(name, step)
    if step.dtype not in (torch.int64, torch.int32):
        raise _bad_dtype(name, step, _STEP_INTS)
    if step.device != first.device:
        raise _elsewhere(name, step, first)
    if step.ndim > 1 or (step.ndim == 1 and step.shape[0] not in (1, _rows(first))):
        raise _step_shape(name, step, _rows(first))
    check_memory(name, step)
    if type(step) is not Tensor or _is_traced(step) or not step.numel():
        return
    # A dispatch mode may have no values, or may record that they are read.
    if (step.device.type == "cpu" or native.DEBUG) and not native.dispatch_modes():
        low, high = int(step.min()), int(step.max())
        if low < 0 or high >= steps:
            raise _step_range(name, step, low if low < 0 else high, steps)


def check_noise(noise: tuple[Any, ...], rows: int, first: Tensor) -> None:
    """Raises unless the noise key fits the samples of ``first``."""
    for name, part in zip(("seed", "sample_ids", "stream"), noise, strict=False):
        if not isinstance(part, Tensor):
            continue
        check_dense(name, part)
        if part.device != first.device:
            raise _elsewhere(name, part, first)
        if name == "sample_ids" and part.ndim and part.shape[0] != rows:
            raise _length(name, part, str(rows))
        check_memory(name, part)
    if isinstance(noise[3], Tensor):  # of rows of groups, which are within their samples
        return
    end = noise[3] + first.numel() // max(rows, 1)
    if end > 2**34:
        raise _noise_range(end)


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
