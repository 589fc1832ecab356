"""Any views as inputs and as out=, overlapping ones too: the bits of contiguous tensors."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore import ops
from support.bounds import assert_same_bits

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], *, out: bool) -> tuple[int, tuple[int, ...]]:
    """Offset and strides for a tensor of this shape: permuted, with gaps, and some expanded."""
    strides, reach = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        reach *= draw(st.integers(1, 2))  # a gap after each element so far
        strides[dim] = reach
        reach *= shape[dim]
        if not out and draw(st.integers(0, 7)) == 0:
            strides[dim] = 0
    return draw(st.integers(0, 5)), tuple(strides)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data(), sizes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_views_give_the_bits_of_contiguous_tensors(
    data: st.DataObject, sizes: list[int], dtype: torch.dtype
) -> None:
    shape = tuple(sizes)
    # One memory for all three: out may lie over the inputs in any way.
    apart = data.draw(st.sampled_from([0, 1, 4096]), label="apart")
    memory = torch.randn(3 * 4096 + 8192).to(dtype)
    before = memory.clone()

    def view(i: int, *, out: bool = False) -> Tensor:
        offset, strides = data.draw(layouts(shape, out=out))
        return memory.as_strided(shape, strides, offset + i * apart)

    x, y, out = view(0), view(1), view(2, out=True)
    wanted = ops.add_noise(x.contiguous(), y.contiguous(), 0.8, 0.6)
    assert_same_bits(ops.add_noise(x, y, 0.8, 0.6), wanted)
    assert_same_bits(memory, before)
    found = ops.add_noise(x, y, 0.8, 0.6, out=out)
    assert found is out
    assert_same_bits(out, wanted)
    # Nothing beside it is written.
    out.copy_(before.as_strided(shape, out.stride(), out.storage_offset()))
    assert_same_bits(memory, before)
