from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# Columns of tables, names of the codes and arguments of a reason, and the bits of `launch`.
STEP_COLUMNS: tuple[str, ...]
VLB_COLUMNS: tuple[str, ...]
GUIDANCE_KINDS: tuple[str, ...]
CODES: tuple[str, ...]
ARGUMENTS: tuple[str, ...]
FOUND: dict[str, int]

def connect(
    exchange_api: Any,
    tensor: type,
    parameter: type,
    empty_like: Callable[[Tensor], Tensor],
    dispatch_modes: Callable[[], object],
    function_modes: Callable[[], object],
    device_module: dict[str, object],
    without_functions: type,
    transforms: Callable[[], object],
    grad_enabled: Callable[[], bool],
) -> None: ...
def launch(
    op: int,
    ins: tuple[Any, ...],
    coefs: tuple[float | Tensor, ...],
    step: int | Tensor | None,
    noise: tuple[int | Tensor, int | Tensor, int | Tensor, int] | None,
    inspect_only: bool,
) -> Tensor | tuple[Tensor, ...] | int: ...
def call(
    op: int,
    outs: tuple[Tensor, ...],
    ins: tuple[Tensor, ...],
    coefs: tuple[float | Tensor, ...],
    step: int | Tensor | None,
    reduce_all: bool,
    noise: tuple[int | Tensor, int | Tensor, int | Tensor, int] | None,
) -> tuple[int, int, int, int] | None: ...
def fill_words(
    out: Tensor, noise: tuple[int | Tensor, int | Tensor, int | Tensor, int], salt: int
) -> tuple[int, int, int, int] | None: ...
def op_table() -> Sequence[tuple[str, int, int, int, int, bool]]: ...
def build_info() -> dict[str, Any]: ...
def load_cuda_kernels(device: int) -> None: ...
