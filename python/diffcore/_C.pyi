from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def connect(
    exchange_api: Any,
    tensor: type,
    parameter: type,
    empty_like: Callable[[Tensor], Tensor],
    modes: tuple[Callable[[], object], Callable[[], object]],
    transforms: Callable[[], object],
    grad_enabled: Callable[[], bool],
) -> None: ...
def launch(
    op: int,
    ins: tuple[Any, ...],
    coefs: tuple[float | Tensor, ...],
    step: int | Tensor | None,
    noise: tuple[int | Tensor, int | Tensor, int | Tensor, int] | None,
    look: bool,
) -> Tensor | tuple[Tensor, ...] | int: ...
def call(
    op: int,
    outs: tuple[Tensor, ...],
    ins: tuple[Tensor, ...],
    coefs: tuple[float | Tensor, ...],
    step: int | Tensor | None,
    whole: bool,
    noise: tuple[int | Tensor, int | Tensor, int | Tensor, int] | None,
) -> int: ...
def op_table() -> Sequence[tuple[str, int, int, int, int, bool]]: ...
def build_info() -> dict[str, Any]: ...
def load_cuda_kernels(device: int) -> None: ...
