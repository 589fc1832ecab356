"""Random arguments for ``tools/fuzz_calls.py``: mostly right ones, in every layout, some odd."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from tools.fuzz_choices import CHOICES, COEFFICIENTS, FLOATS, ODD_CHOICES, SAMPLES, WIDTHS
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore.coefficients.bound import VLB_COLUMNS
from diffcore.guidance import (
    APG,
    CFG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    NormPreservingCFG,
    RescaledCFG,
)

COEF_FLOATS = (torch.float32, torch.float64)
OTHER_DTYPES = (
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.int8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 13)
LONG = (63, 64, 65, 255, 512, 513, 1023, 1025, 2049)
LAYOUTS = (
    *("contiguous",) * 4,
    *("permuted", "channels_last", "expanded", "strided", "part", "offset", "any", "huge_strides"),
)
STEPS = (1, 3, 8)
INTS = (0, 1, 5, 2**32 - 1, 2**63 - 1, -1, -(2**63))


def freed() -> Tensor:
    """A tensor whose storage was freed, somewhere inside it."""
    x = torch.ones(40)[3:9].view(2, 3)
    x.untyped_storage().resize_(0)
    return x


ODD: tuple[Callable[[], Any], ...] = (
    *(lambda: None, lambda: "1", lambda: b"1", lambda: 1j, list, dict, object, lambda: True),
    *(lambda: 3, lambda: 10**400, lambda: -0.0, lambda: math.inf, lambda: math.nan),
    *(lambda: 1e308, lambda: 5e-324, lambda: np.float32(1.5), lambda: np.ones(3)),
    *(lambda: np.ones(()), lambda: np.int64(3), lambda: np.complex64(1j)),
    *(lambda: torch.ones(2, 3).to_sparse(), lambda: torch.ones(2, 3).to_mkldnn()),
    *(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), freed),
    *(lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),),
    *(lambda: torch.ones(2, 3, device="meta"), lambda: torch.nn.Parameter(torch.ones(2, 3))),
    *(lambda: torch._to_functional_tensor(torch.ones(2, 3)),),
    *(lambda: torch._efficientzerotensor(2, 3),),
    *(lambda: torch.ones(2, 3, dtype=torch.complex64).conj().imag,),
    *(lambda: PhiloxNoise(1), lambda: torch.ones(2, 3).to_sparse_csr()),
)


class Maker:
    """The arguments of one call, all for the same samples."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.shape = self._shape()
        self.dtype = random.choice(FLOATS)
        self.rows = self.shape[0] if self.shape else 1
        self.steps = random.choice(STEPS)
        # A table or coefficient may be the beginning of memory that `out` fits into.
        self.roomy = random.random() < 0.2
        self.layout = random.choice([None, None, "contiguous", "channels_last", "part", "permuted"])

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.random.random() < p

    def _shape(self) -> tuple[int, ...]:
        r = self.random
        if r.random() < 0.004:
            return (r.choice([1, 2, 3]), r.choice([8192, 8193, 16384, 33000]))
        if r.random() < 0.01:
            return tuple(r.choice([1, 2]) for _ in range(r.choice([12, 16, 17, 20])))[:14]
        sizes = SIZES[1:] if r.random() < 0.85 else SIZES
        shape = [r.choice(sizes) for _ in range(r.choice([0, 1, 1, 2, 2, 3, 4, 4, 5]))]
        if shape and r.random() < 0.1:
            shape[0] = r.choice([1, 2, 3, 17, 64])
        if shape and r.random() < 0.05:
            shape[-1] = r.choice(LONG)
        while math.prod(shape) > 5_000:
            shape.pop()
        return tuple(shape)

    # ---- memory --------------------------------------------------------------------------------

    def memory(self, dtype: torch.dtype, n: int) -> Tensor:
        """N random elements, maybe in the middle of more."""
        before = self.random.choice([0, 0, 1, 3])
        after = math.prod(self.shape) + 8 if self.roomy else 0
        memory = torch.empty(before + n + after, dtype=dtype)
        if dtype.is_floating_point and memory.element_size() > 1:
            memory.normal_()
            if n and self.chance(0.03):
                odd = [math.nan, math.inf, -math.inf, 0.0, 1e30, -200.0]
                memory[before + self.random.randrange(n)] = self.random.choice(odd)
        elif dtype in (torch.int64, torch.int32):
            memory.random_(0, self.steps)
        else:
            memory.zero_()
        return memory[before : before + n]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, layout: str | None = None) -> Tensor:
        """A random tensor in a layout of some kind."""
        shape = tuple(shape)
        layout = layout or self.random.choice(LAYOUTS)
        build = getattr(self, f"_{layout}", None) if math.prod(shape) and shape else None
        if build is None:
            return self.memory(dtype, math.prod(shape)).view(shape)
        made: Tensor = build(shape, dtype)
        return made

    def _ordered(self, shape: tuple[int, ...], dtype: torch.dtype, order: list[int]) -> Tensor:
        memory = self.memory(dtype, math.prod(shape)).view([shape[i] for i in order])
        return memory.permute([order.index(i) for i in range(len(shape))])

    def _permuted(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        order = list(range(len(shape)))
        self.random.shuffle(order)
        return self._ordered(shape, dtype, order)

    def _channels_last(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        order = [0, *range(2, len(shape)), 1] if len(shape) > 2 else list(range(len(shape)))
        return self._ordered(shape, dtype, order)

    def _expanded(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        kept = [s if self.chance(0.6) else 1 for s in shape]
        return self.memory(dtype, math.prod(kept)).view(kept).expand(shape)

    def _strided(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        d = self.random.randrange(len(shape))
        wide = [s * 2 if i == d else s for i, s in enumerate(shape)]
        every_other = slice(self.random.randrange(2), None, 2)
        return self.memory(dtype, math.prod(wide)).view(wide)[(slice(None),) * d + (every_other,)]

    def _part(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        d = self.random.randrange(len(shape))
        more = self.random.randrange(1, 5)
        wide = [s + more if i == d else s for i, s in enumerate(shape)]
        memory = self.memory(dtype, math.prod(wide)).view(wide)
        return memory.narrow(d, self.random.randrange(more + 1), shape[d])

    def _any(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rows that overlap or lie apart, repeated elements."""
        strides = [self.random.choice([0, 1, 2, 3, s, 5]) for s in shape]
        reach = 1 + sum((s - 1) * t for s, t in zip(shape, strides, strict=True))
        if reach > 100_000:
            return self._permuted(shape, dtype)
        return self.memory(dtype, reach).as_strided(shape, strides)

    def _huge_strides(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = self.memory(dtype, math.prod(shape)).view(shape)
        huge = [2**62, 2**40, 0, 1]
        strides = [
            self.random.choice(huge) if s == 1 else t
            for s, t in zip(shape, x.stride(), strict=True)
        ]
        return x.as_strided(shape, strides, x.storage_offset())

    # ---- kinds of arguments ----------------------------------------------------------------------

    def odd(self) -> Any:
        """What no argument should be, or seldom is."""
        if self.chance(0.2):
            return torch.zeros(self.shape, dtype=self.random.choice(OTHER_DTYPES))
        return self.random.choice(ODD)()

    def samples(self) -> Any:
        """An elementwise input."""
        kind = self.random.random()
        if kind < 0.005:
            return self.odd()
        if kind < 0.01:
            return self.tensor(self.shape, self.random.choice(FLOATS))
        if kind < 0.015:
            return self.tensor(self._shape(), self.dtype)
        return self.tensor(self.shape, self.dtype, self.layout)

    def coefficient(self, steps: int | None) -> Any:
        """A number, a tensor of one or one per sample; with steps, a table."""
        kind = self.random.random()
        if kind < 0.02:
            return self.odd()
        if kind < 0.4:
            return self.random.choice([self.random.uniform(0.05, 0.95), 0.5, 1, np.float64(0.3)])
        dtype = self.random.choice(COEF_FLOATS * 4 + (torch.float16, torch.bfloat16))
        n = self.random.choice([0, 2, 5]) if kind > 0.98 else 1 if kind < 0.5 else steps
        x = self.tensor((self.rows if n is None else n,), dtype)
        x = x.sigmoid() if self.chance(0.5) and x.numel() else x
        if steps is None and self.chance(0.1):
            x = x.unsqueeze(-1)
        return x.reshape(()) if x.numel() == 1 and self.chance(0.1) else x

    def table(self, columns: int, rows: int | None = None) -> Tensor:
        """A table of coefficients, seldom of another width."""
        n = self.steps if rows is None else rows
        return self.tensor((n, columns + self.chance(0.03)), self.random.choice(COEF_FLOATS))

    def step(self) -> Any:
        """t: an int, a counter, or one per sample; sometimes out of range."""
        kind = self.random.random()
        if kind < 0.25:
            inside = [0, self.steps - 1, self.random.randrange(self.steps)]
            return self.random.choice(inside * 4 + [-1, self.steps, 2**70, -(2**70), True])
        dtype = self.random.choice([torch.int64] * 6 + [torch.int32] * 3)
        if kind > 0.98:
            dtype = self.random.choice(OTHER_DTYPES)
        n = 1 if kind < 0.35 else self.rows + (kind > 0.96)
        t = self.tensor((n,), dtype)
        if kind < 0.37 and t.numel() and t.is_contiguous():
            t[0] = self.random.choice([-1, self.steps, 2**31 - 1])
        return t

    def key(self) -> PhiloxNoise:
        """A noise key of numbers and tensors, at the limits of their range."""
        r = self.random
        seed: Any = r.choice(INTS)
        if self.chance(0.3):
            seed = self.tensor(r.choice([(), (1,), (2,)]), torch.int64)
        ids: Any = r.choice([None, *INTS])
        if self.chance(0.4):
            ids = self.tensor((self.rows + self.chance(0.05),), torch.int64)
        stream: Any = r.choice(INTS[:4])
        if self.chance(0.2):
            stream = self.tensor(r.choice([(), (1,)]), torch.int64)
        first = r.choice([0, 0, 0, 4, 400, 2**34 - 4])
        return PhiloxNoise(seed, sample_ids=ids, stream=stream, first_element=first)

    def noise(self) -> Any:
        """Noise as a tensor or a key."""
        return self.key() if self.chance(0.5) else self.samples()

    def mask(self) -> Any:
        """A mask that most often can be expanded to the samples, and has values in [0, 1]."""
        kind = self.random.random()
        if kind < 0.02:
            return self.odd()
        sizes = [1 if self.chance(0.3) else size for size in self.shape]
        sizes = sizes[self.random.choice([0, 0, 1, 2]) :] if kind < 0.97 else list(self._shape())
        if kind < 0.2:
            return self.tensor(sizes, torch.bool)
        x = self.tensor(sizes, self.random.choice(FLOATS))
        return x if kind < 0.22 else x > 0 if kind < 0.6 else x.sigmoid()

    def guidance(self) -> Any:
        """A rule of guidance, seldom one that needs the row."""
        scale = self.random.choice([2.5, 0, 1, -3.0, self.coefficient(None)])
        try:
            return self.random.choice(
                [
                    CFG(scale),
                    RescaledCFG(scale, 0.4),
                    NormPreservingCFG(scale),
                    APG(scale, 0.5, 1.5),
                    TCFG(scale),
                    CFGZeroStar(scale, zero_init_steps=0),
                    CFGPlusPlus(scale, interval=(0.1, 0.9)),
                    scale,
                ]
            )
        except (TypeError, ValueError):  # of the scale
            return CFG(2.0)

    def out(self, others: Sequence[Any]) -> Any:
        """Memory of some layout, of an input, or over any other argument."""
        kind = self.random.random()
        if kind < 0.3:
            return self.tensor(self.shape, self.dtype)
        plain = [x for x in others if type(x) is Tensor and x.layout == torch.strided]
        plain = [x for x in plain if x.device.type == "cpu" and not x.is_quantized]
        if kind < 0.5 and plain:
            return self.random.choice(plain)
        if kind < 0.97 and plain:
            return self._over(self.random.choice(plain))
        return self.odd()

    def _over(self, x: Tensor) -> Any:
        """A tensor for the samples, in the storage of another one."""
        storage, item = x.untyped_storage(), self.dtype.itemsize
        room = storage.nbytes() // item - math.prod(self.shape)
        if room < 0 or storage.nbytes() == 0 or x.is_nested:
            return None
        at = self.random.choice([0, room, self.random.randint(0, room)])
        strides = torch.empty(self.shape, device="meta").stride()
        return torch.empty(0, dtype=self.dtype).set_(storage, at, self.shape, strides)


def arguments_of(name: str, maker: Maker) -> dict[str, Any]:
    """Random arguments of a public op, by the names of its parameters."""
    parameters = inspect.signature(getattr(ops, name)).parameters
    by_step = "t" in parameters and maker.chance(0.5)
    found: dict[str, Any] = {}
    for parameter in parameters.values():
        optional = parameter.default is not parameter.empty
        if parameter.name in ("t", "out") or (optional and maker.chance(0.5)):
            continue
        found[parameter.name] = _argument(name, parameter.name, maker, by_step)
    if by_step or (name == "q_sample"):
        found["t"] = maker.step()
    if found.get("group_dim") is not None:
        _give_groups_levels(found, maker)
    if "guidance" in found and maker.chance(0.9):
        found.pop("guidance_scale", None)
    if "target" in found and maker.chance(0.9):
        found.pop("prediction_type", None)
    if name == "vlb_term" and ("x_t" in found) == ("noise" in found):
        found.pop("x_t", None)
        found["noise"] = maker.noise()
    if "out" in parameters and maker.chance(0.4):
        found["out"] = maker.out(list(found.values()))
    if maker.chance(0.02):
        name = maker.random.choice(list(found))
        of_kind = name in ODD_CHOICES and maker.chance(0.5)
        found[name] = maker.random.choice(ODD_CHOICES[name]) if of_kind else maker.odd()
    return found


def _give_groups_levels(found: dict[str, Any], maker: Maker) -> None:
    """Some of what is one number for each sample becomes one for each group."""
    dim = found["group_dim"]
    if not -len(maker.shape) <= dim < len(maker.shape):
        return
    for name in (*COEFFICIENTS, "t"):
        x = found.get(name)
        if type(x) is Tensor and not x.is_nested and x.shape == (maker.rows,) and maker.chance(0.7):
            found[name] = x.unsqueeze(1).repeat(1, maker.shape[dim])


def _bound_table(table: Tensor, maker: Maker) -> Tensor:
    """A table of bound terms: a row of the decoder has the factor 1 and the offset 0."""
    decoder, table = maker.chance(0.3), table.clone()
    for column, value in (("decoder", decoder), ("factor", 1.0), ("offset", 0.0)):
        at = VLB_COLUMNS.index(column)
        if column == "decoder" or decoder:
            table[:, at : at + 1] = float(value)
    return table


def _argument(op: str, name: str, maker: Maker, by_step: bool) -> Any:
    if name in CHOICES:
        return maker.random.choice(CHOICES.get(f"{name} of {op}", CHOICES[name]))
    if name in SAMPLES:
        return maker.samples()
    if name in COEFFICIENTS:
        if op == "prior_kl":
            return maker.random.choice([0.5, 1e-3, 1, 0.0, -1.0, 1e200])
        whole = op in ("predict_x0", "predict_epsilon", "ddpm_step", "ddim_step")
        whole |= op == "classifier_guidance"
        leading = name in ("guidance_scale", "threshold", "scale")
        return maker.coefficient(maker.steps if by_step and not whole and not leading else None)
    if name in ("noise", "known_noise"):
        return maker.key() if op == "randn" else maker.noise()
    if name == "dof":
        return maker.random.choice([None, 1, 0.5, 0.0, maker.coefficient(None)])
    if name in ("mask", "guidance"):
        return getattr(maker, name)()
    if name == "target":
        return tuple([maker.coefficient(maker.steps if by_step else None) for _ in range(2)])
    if name == "history":
        return tuple(maker.samples() for _ in range(maker.random.choice([0, 1, 2, 3, 4])))
    if name == "shape":
        return maker.shape
    return _coefficients(op, name, maker, by_step)


def _coefficients(op: str, name: str, maker: Maker, by_step: bool) -> Any:
    assert name in ("coefficients", "variance_coefficients", "table"), f"{op} has a new {name}"
    width = WIDTHS.get(name) or WIDTHS.get(op) or maker.random.choice([8, 14])
    if op == "vlb_term" and maker.chance(0.3):
        width = 15
    if op == "vlb_term":
        return _bound_table(maker.table(width, None if by_step else maker.rows), maker)
    if maker.chance(0.3) and name != "table":
        return tuple(maker.coefficient(None) if width == 2 else 0.3 for _ in range(width))
    return maker.table(width, None if by_step or name == "table" else maker.rows)
