"""An op with its gradients, run once or captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.cases import OpCase, as_tuple


def run_with_gradients(case: OpCase, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
    leaves = {n: x.detach().requires_grad_(n in case.differentiable) for n, x in tensors.items()}
    outputs = as_tuple(case.op(**leaves, **options))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return (*outputs, *(x.grad for x in leaves.values() if x.grad is not None))


def captured(f: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = f()
    return graph, result
