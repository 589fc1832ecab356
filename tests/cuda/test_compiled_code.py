"""The code that nvcc makes of the CUDA kernels: no spills, 16-byte accesses, occupancy as recorded.

The rules and the reading are tested everywhere, on a few lines that ptxas and nvdisasm printed. The
kernels are compiled where nvcc is (slow: minutes for each architecture).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import compiled_code
from tools.compiled_code import Resources, blocks_per_sm, read_facts, read_kernels, short
from tools.compiled_table import (
    Allowance,
    Facts,
    Kernel,
    Table,
    broken,
    changes,
    read_table,
    table_text,
)

# Two packs, each behind a branch; the second kernel uses the first before it loads the second, and
# writes half a pack at a time.
SASS = """\
	.target	sm_90
//--------------------- .text._ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE --------------------------
	.section	.text._ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE,"ax",@progbits
_ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE:
.text._ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P1, PT, R0, UR5, PT ;
        /*0020*/              @!P1 LDG.E.128 R12, desc[UR4][R14.64] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.128 R16, desc[UR4][R2.64+0x10] ;
.L_x_1:
        /*0050*/                   ULDC.64 UR6, c[0x0][0x218] ;
        /*0060*/                   CALL.REL.NOINC `($__internal_3_$sqrt_rn_f32_slowpath) ;
        /*0070*/              @!P1 FMUL R13, R13.reuse, R21 ;
        /*0080*/                   FMUL R16, R16, R21 ;
        /*0090*/              @!P1 STG.E.128 desc[UR4][R22.64], R12 ;
        /*00a0*/                   STG.E.128 desc[UR4][R22.64+0x10], R16 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
        /*00e0*/                   NOP;
.L_x_9:

//--------------------- .text._ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE ------------------
	.section	.text._ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE,"ax",@progbits
.text._ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE:
        /*0000*/               @P0 BRA `(.L_x_3) ;
        /*0010*/                   LDG.E.128 R12, desc[UR4][R14.64] ;
        /*0020*/                   PRMT R49, R12.reuse, 0x7732, RZ ;
.L_x_3:
        /*0030*/               @P1 BRA `(.L_x_4) ;
        /*0040*/                   LDG.E.128.CONSTANT R12, desc[UR4][R2.64] ;
        /*0050*/                   IMAD.U32 R24, R12, 0x10000, RZ ;
.L_x_4:
        /*0060*/                   STG.E.64 desc[UR4][R22.64], R24 ;
        /*0070*/                   STG.E.64 desc[UR4][R22.64+0x8], R48 ;
        /*0080*/                   EXIT ;
"""
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE' for 'sm_90'
ptxas info    : Function properties for _ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compile time = 8.811 ms
ptxas info    : Function properties for _ZN8diffcore8log_massIfEET_PKS1_
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE' \
for 'sm_90'
ptxas info    : Function properties for _ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE
    32 bytes stack frame, 56 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers, 32 bytes cumulative stack size
"""
NAMES = {
    "_ZN8diffcore3mapINS_5ScaleEfEEvNS_6LaunchE": (
        "void diffcore::map<diffcore::Scale, float>(diffcore::Launch)"
    ),
    "_ZN8diffcore3mapINS_5ScaleENS_4Bf16EEEvNS_6LaunchE": (
        "void diffcore::map<diffcore::Scale, diffcore::Bf16>(diffcore::Launch)"
    ),
}
GOOD = Kernel(42, 5, 0, 0, 0, 2, 2, 2, 13)
NARROW = Kernel(80, 3, 32, 56, 28, 2, 1, 0, 9)
FACTS = {"Scale,f32": Facts(2, 2, True), "Scale,bf16": Facts(2, 2, True)}
KERNELS = {"map<Scale,f32>": GOOD, "map<Scale,bf16>": GOOD}
TABLE = Table("13.0.88", {}, KERNELS)


def test_the_printed_code_is_read() -> None:
    kernels = read_kernels(90, LOG, SASS.splitlines(), NAMES)
    assert kernels == {"map<Scale,f32>": GOOD, "map<Scale,bf16>": NARROW}


def test_a_kernel_that_was_not_disassembled_is_an_error() -> None:
    first = SASS[: SASS.index("//------", 200)]
    with pytest.raises(ValueError, match="ptxas compiled 2 kernels, nvdisasm printed 1"):
        read_kernels(90, LOG, first.splitlines(), NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "void diffcore::map<diffcore::Generated<diffcore::ReverseStep<true, 3, true, "
            "(diffcore::StepNoise)1> >, diffcore::F16>(diffcore::Launch)",
            "map<Generated<ReverseStep<true,3,true,1>>,f16>",
        ),
        (
            "void diffcore::select_narrow_kernel<diffcore::X0Quantile<false>, double>"
            "(diffcore::LaunchArgs, diffcore::Tally<double, unsigned long long>*, bool)",
            "select_narrow_kernel<X0Quantile<false>,f64>",
        ),
        ("diffcore::Bf16", "bf16"),
    ],
)
def test_names_are_those_of_the_sources(name: str, expected: str) -> None:
    assert short(name) == expected


def test_facts_are_read() -> None:
    text = "diffcore::Scale\tdiffcore::Bf16\t2\t2\t1\ndiffcore::Scale\tdouble\t2\t1\t0\n"
    assert read_facts(text) == {"Scale,bf16": Facts(2, 2, True), "Scale,f64": Facts(2, 1, False)}


# 65,536 registers, given to warps of a quarter in units of 256: with 81 a warp takes 2,816.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "blocks"),
    [
        (80, 32, 0, 8),  # all 64 warps
        (90, 40, 0, 6),
        (90, 42, 32, 5),
        (90, 64, 0, 4),
        (100, 65, 0, 3),
        (100, 80, 0, 3),
        (100, 81, 0, 2),
        (80, 128, 0, 2),
        (120, 32, 0, 6),  # 48 warps
        (120, 24, 32768, 3),  # of 100 KB
        (80, 24, 49152, 3),  # of 164 KB
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(arch, Resources(registers, shared, 0, 0, 0)) == blocks


def faults(kernel: Kernel, table: Table = TABLE, nvcc: str = "13.0.88") -> list[str]:
    """The rules that a compilation breaks in which one kernel is `kernel`."""
    return list(broken({**KERNELS, "map<Scale,bf16>": kernel}, table, FACTS, nvcc))


def test_the_same_code_breaks_no_rule() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"spill_stores": 4}, "0 bytes of stack, 4 spilled and 0 loaded again; allowed: 0"),
        ({"spill_loads": 4}, "0 spilled and 4 loaded again"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"loads": 1, "in_flight": 2}, "1 loads of 16 bytes, 2 by the source"),
        ({"stores": 1}, "1 stores of 16 bytes, 2 by the source"),
        ({"blocks": 4, "registers": 50}, r"4 blocks fit .* \(50 registers\), 5 \(42\) before"),
        ({"in_flight": 1}, "1 packed loads are under way before the first use, 2 before"),
    ],
)
def test_a_planted_fault_is_found(fault: dict[str, int], message: str) -> None:
    (found,) = faults(GOOD._replace(**fault))
    assert found.startswith("map<Scale,bf16>: ")
    assert re.search(message, found)


def test_an_allowed_spill_is_none_up_to_its_size() -> None:
    allowed = TABLE._replace(allowed={"map<Scale,bf16>": Allowance(16, "seven tensors")})
    assert faults(GOOD._replace(spill_stores=16, stack=8), allowed) == []
    assert len(faults(GOOD._replace(spill_stores=20), allowed)) == 1


def test_other_counts_are_changes_and_break_no_rule() -> None:
    other = GOOD._replace(registers=48, instructions=2000)
    assert faults(other) == []
    assert list(changes({"map<Scale,bf16>": other}, TABLE)) == [
        "map<Scale,bf16>: registers 42 -> 48, instructions 13 -> 2000"
    ]


def test_another_nvcc_may_order_loads_as_it_likes() -> None:
    assert faults(GOOD._replace(in_flight=1), nvcc="14.0.1") == []


def test_kernels_and_rows_are_the_same() -> None:
    more = {**KERNELS, "map<Scale,f64>": GOOD}
    facts = {**FACTS, "Scale,f64": Facts(2, 2, True)}
    assert list(broken(more, TABLE, facts, "13.0.88")) == [
        "map<Scale,f64>: compiled, but not in the table; run with --write"
    ]
    assert list(broken(KERNELS, TABLE._replace(kernels=more), facts, "13.0.88")) == [
        "map<Scale,f64>: in the table, but not compiled; run with --write",
        "Scale,f64: the op has no kernel",
    ]
    table = TABLE._replace(kernels=more)
    assert list(broken(more, table, FACTS, "13.0.88")) == ["map<Scale,f64>: no op of AllOps"]


def test_a_kernel_that_nothing_calls_is_found() -> None:
    unused = "Generated<Scale>,f64"
    kernels = {**KERNELS, f"map<{unused}>": GOOD}
    facts = {**FACTS, unused: Facts(0, 2, False)}
    (found,) = broken(kernels, TABLE._replace(kernels=kernels), facts, "13.0.88")
    assert found.startswith(f"map<{unused}>: nothing calls this kernel")


def test_the_flags_are_those_of_the_build() -> None:
    flags = compiled_code.flags()
    assert {"-O3", "-std=c++17", "--expt-relaxed-constexpr"} <= set(flags)
    assert all(flag.startswith("-") and "$" not in flag for flag in flags)  # none of CMake's own


# ---- The committed tables ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", compiled_code.LIMITS)
def test_the_table_is_one_and_keeps_the_rules(arch: int) -> None:
    text = compiled_code.table_path(arch).read_text()
    table = read_table(text)
    assert table_text(arch, table) == text
    assert table.kernels
    assert table.allowed.keys() <= table.kernels.keys()
    twins = [k for k in table.kernels if "Generated<" in k and k.endswith(",f64>")]
    assert twins == ["map<Generated<Randn>,f64>"]  # the others would read inputs
    facts = {name.partition("<")[2][:-1]: Facts(0, 0, True) for name in table.kernels}
    assert list(broken(table.kernels, table, facts, table.nvcc)) == []
    for name in table.allowed:
        kernel = table.kernels[name]
        assert max(kernel.stack, kernel.spill_stores, kernel.spill_loads) > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", compiled_code.LIMITS)
def test_the_kernels_compile_to_code_that_keeps_the_rules(arch: int) -> None:
    if reason := compiled_code.missing():
        pytest.skip(reason)
    table = read_table(compiled_code.table_path(arch).read_text())
    facts = compiled_code.facts_of_source()
    kernels = compiled_code.measure(arch)
    assert list(broken(kernels, table, facts, compiled_code.nvcc_version())) == []
