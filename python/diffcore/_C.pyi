from collections.abc import Sequence
from typing import Any

from torch import Tensor

def connect(exchange_api: Any) -> None: ...
def call(
    op: int,
    outs: tuple[Tensor, ...],
    ins: tuple[Tensor, ...],
    coefs: tuple[float | Tensor, ...],
    step: int | Tensor | None,
    whole: bool,
) -> int: ...
def op_table() -> Sequence[tuple[str, int, int, int, int]]: ...
def build_info() -> dict[str, Any]: ...
def load_cuda_kernels(device: int) -> None: ...
