"""The rules of guidance as their authors wrote them, in float64: the guided prediction."""

from __future__ import annotations

import torch
from torch import Tensor


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _like(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


def cfg(c: Tensor, u: Tensor, scale: float) -> Tensor:
    return u + scale * (c - u)


def rescaled(c: Tensor, u: Tensor, scale: float, rescale: float) -> Tensor:
    m = cfg(c, u, scale)
    wanted, found = _like(_flat(c).std(1), c), _like(_flat(m).std(1), c)
    return rescale * (m * (wanted / found)) + (1 - rescale) * m


def zero_star(c: Tensor, u: Tensor, scale: float) -> Tensor:
    s = (_flat(c) * _flat(u)).sum(1) / _flat(u).square().sum(1)
    return cfg(c, u * _like(s, u), scale)


def projected(
    c: Tensor, u: Tensor, scale: float, eta: float, limit: float, difference: Tensor | None = None
) -> Tensor:
    difference = c - u if difference is None else difference
    length = _like(_flat(difference).norm(dim=1), c)
    difference = difference * torch.minimum(torch.ones_like(length), limit / length)
    unit = c / _like(_flat(c).norm(dim=1), c)
    along = _like((_flat(difference) * _flat(unit)).sum(1), c) * unit
    return c + (scale - 1) * (difference - along + eta * along)


def tangential(c: Tensor, u: Tensor, scale: float) -> Tensor:
    _, _, v = torch.linalg.svd(torch.stack([_flat(c), _flat(u)], 1), full_matrices=False)
    first = v[:, 0]
    u = ((_flat(u) * first).sum(1, keepdim=True) * first).reshape(u.shape)
    return cfg(c, u, scale)


def norm_preserving(c: Tensor, u: Tensor, scale: float) -> Tensor:
    m = cfg(c, u, scale)
    return m * _like(_flat(c).norm(dim=1) / _flat(m).norm(dim=1), c)
