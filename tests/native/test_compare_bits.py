"""`make arm`: the comparison of what `kernel_bits` prints on two processors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.compare_bits import compare

V3 = """# v3
randn (generated noise) f32 5x3 output 0: 00
normal_kl f32 5x3 output 0: 01
guidance_weights f64 5x3 sum 0: 02
"""


def test_equal_results() -> None:
    found = compare(V3, V3.replace("v3", "neon"))
    assert found == (("v3", "neon"), 3, [], [])


def test_another_bit_differs() -> None:
    found = compare(V3, V3.replace(": 01", ": 03"))
    assert found.different == ["normal_kl f32 5x3 output 0"]


def test_a_result_that_is_missing_differs() -> None:
    found = compare(V3, V3.replace("normal_kl f32 5x3 output 0: 01\n", ""))
    assert found.different == ["normal_kl f32 5x3 output 0"]
    assert found.total == 3


def test_what_the_c_library_computes_may_differ() -> None:
    found = compare(V3, V3.replace(": 02", ": 03"))
    assert found.different == []
    assert found.excused == ["guidance_weights f64 5x3 sum 0"]


def test_without_fused_multiply_add_noise_is_compared() -> None:
    v2 = V3.replace("v3", "v2").replace(": 01", ": 03")
    assert compare(V3, v2) == (("v3", "v2"), 1, [], [])
    assert len(compare(V3, v2.replace(": 00", ": 03")).different) == 1


@pytest.mark.parametrize("text", ["", "# neon\n", "Illegal instruction\n"])
def test_an_output_without_results_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must begin with"):
        compare(V3, text)
