"""A device without float64 (no_float64.cc), and calls on it beside the same ones on the CPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

NAME = "without_double"  # letters only
SOURCE = Path(__file__).with_suffix(".cc")
COMPILER = shutil.which("c++")


def build() -> Path:
    """The library with the device, compiled for this torch once."""
    said = f"{torch.__version__} {sys.executable} {SOURCE.read_text(encoding='utf-8')}"
    folder = Path(tempfile.gettempdir()) / "diffcore-no-float64"
    library = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        assert COMPILER is not None
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"  # other processes may be at it
        lib = Path(torch.__file__).parent / "lib"
        command = [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", "-w", str(SOURCE)]
        command += [f"-I{path}" for path in include_paths()]
        command += ["-o", str(made), f"-L{lib}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, timeout=600)
        made.replace(library)
    return library


def install() -> None:
    """Gives this process the device; call it before the first backward pass."""
    module: Any = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    torch.ops.load_library(build())


def rounded(x: Any) -> Any:
    """A float64 tensor in float32; anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


def there(x: Tensor) -> Tensor:
    """A tensor on the device."""
    return rounded(x).to(NAME)


@contextlib.contextmanager
def reference_on_the_cpu() -> Iterator[None]:
    """Calls on CPU tensors take the route of a device without kernels."""
    from diffcore._engine import dispatch, execute, native

    module, launch = native._C, dispatch._launch
    native._C = execute._C = None
    if launch is not None:  # asked only what it finds
        dispatch._launch = lambda *arguments: launch(*arguments[:-1], True)
    try:
        yield
    finally:
        native._C, execute._C, dispatch._launch = module, module, launch


# ---- what is compared ---------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def problems() -> dict[str, str]:
    """What is wrong with each call on the device, by name and dtype; nothing for a right one."""
    from support.device_calls import CALLS, SHAPE
    from support.routes.matrix import CASES

    found = {}
    for name, dtype in DTYPES.items():
        for case in CASES:
            found[f"{case.name}, {name}"] = _problem(_of_case, case, dtype)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
        for what, call in CALLS.items():
            found[f"{what}, {name}"] = _problem(_of_call, call, x)
    return {key: text for key, text in found.items() if text}


def _of_case(case: Any, dtype: torch.dtype) -> None:
    """Values and gradients of a public function or method."""
    from support.routes.case import Call
    from support.routes.route import WIDE, gradients, values

    call = case.make(WIDE, dtype)
    here = Call(case, call.tensors, {k: rounded(x) for k, x in call.others.items()})
    away = Call(
        case,
        {k: there(x) for k, x in call.tensors.items()},
        {k: there(x) for k, x in call.others.items()},
    )
    for measure in (values, gradients) if case.differentiable else (values,):
        with reference_on_the_cpu():
            wanted = measure(here.of_tensors(case.subject()), here)
        _compare(measure(away.of_tensors(case.subject()), away), wanted, case.name)


def _of_call(call: Any, x: Tensor) -> None:
    from support.routes.case import flat

    with reference_on_the_cpu():
        wanted = flat(call(x))
    away = there(x)
    _compare(flat(call(away)), wanted)


ON_THE_CPU = ("bits_per_dim, key",)  # a report of numbers


def _compare(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], name: str = "") -> None:
    """On the device, and equal to rounding: torch's own tolerance for the dtype."""
    for x, y in zip(found, wanted, strict=True):
        assert x.device.type == ("cpu" if name in ON_THE_CPU else NAME)
        torch.testing.assert_close(rounded(x).cpu(), rounded(y).detach(), equal_nan=True)


def _problem(check: Any, *arguments: Any) -> str:
    try:
        check(*arguments)
    except Exception:
        return traceback.format_exc(limit=-5)
    return ""


if __name__ == "__main__":
    install()
    torch.set_num_threads(1)
    print(json.dumps(problems()))
