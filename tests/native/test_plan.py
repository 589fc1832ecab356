"""The part of the binding that checks a call, and the checks of an op's traits, without Python.

Both are compiled here with the compiler that is found: `plan_test.cc` and the random calls of
`plan_fuzz.cc`, under the address and undefined-behavior sanitizers where the compiler has them; and
ops that are wrong, each of which must not compile.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not (ROOT / "csrc").is_dir(), reason="needs a C++ compiler and the sources"
)


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPILER), "-std=c++17", "-I", str(ROOT / "csrc"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sanitizers(folder: Path) -> tuple[str, ...]:
    """The flags, or none where a program built with them does not run."""
    source, program = folder / "empty.cc", folder / "empty"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    built = compiled(*SANITIZERS, str(source), "-o", str(program))
    works = built.returncode == 0 and subprocess.run([program], check=False).returncode == 0
    return SANITIZERS if works else ()


def test_plan_call(tmp_path: Path) -> None:
    program = tmp_path / "plan_test"
    tests = ("tests/native/plan_test.cc", "tests/native/plan_fuzz.cc")
    sources = (*tests, "csrc/binding/plan.cc", "csrc/binding/op_table.cc")
    flags = ("-O1", "-g", *sanitizers(tmp_path))
    built = compiled(*flags, *(str(ROOT / s) for s in sources), "-o", str(program))
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, "30000"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    counts = {code: int(n) for code, n in map(str.split, ran.stdout.splitlines())}
    # Neither is plan_call's to find: the tensors were views already.
    never = {code for code, n in counts.items() if n == 0}
    assert never == {"type", "unreadable"}
    assert counts["done"] > 3000


# ---- an op that is wrong does not compile --------------------------------------------------------

OP = """
#include "core/op_checks.h"
using namespace diffcore;
struct Term : OpBase {
  static constexpr const char* name = "term";
  static constexpr int n_in = 1, n_out = 1, n_coef = 2;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) { y[0] = c[0] * x[0]; }
};
struct Toy : Term { %s };
static_assert(check_op<Toy>());
"""
IDLE = "template <class R> DC_HD static bool %s(const R* c) { return c[0] == R(0); }"
SELECTED = "DC_HD static double selected(const double*, double q) { return q; }"


def compile_op(folder: Path, members: str) -> subprocess.CompletedProcess[str]:
    source = folder / "op.cc"
    source.write_text(OP % members, encoding="utf-8")
    return compiled("-fsyntax-only", str(source))


@pytest.mark.parametrize(
    "members",
    [
        "",
        "static constexpr unsigned hooks = kIdle;" + IDLE % "idle",
        "static constexpr int n_out = 0, n_sum = 1, ratio = 1;"
        "static constexpr unsigned hooks = kSelect;" + SELECTED,
        "static constexpr unsigned hooks = kOther; using Other = Term;" + IDLE % "other",
    ],
    ids=["no hook", "idle", "select", "other"],
)
def test_an_op_that_is_right_compiles(tmp_path: Path, members: str) -> None:
    result = compile_op(tmp_path, members)
    assert result.returncode == 0, result.stderr


WRONG = {
    "misspelled": ("static constexpr unsigned hooks = kIdle;" + IDLE % "idel", "misspelled"),
    "not listed": (IDLE % "idle", "misspelled"),
    "not defined": ("static constexpr unsigned hooks = kPrepare;", "misspelled"),
    "not a template": ("DC_HD static bool idle(const float*) { return true; }", "error"),
    "signature": (
        "static constexpr unsigned hooks = kIdle;"
        "template <class R> DC_HD static int idle(const R*) { return 1; }",
        "idle must be static bool",
    ),
    "coefficients by value": (
        "template <class R> DC_HD static double finalize_sum(R, double t, double) { return t; }"
        "static constexpr unsigned hooks = kFinalizeSum;"
        "static constexpr int n_sum = 1;",
        "finalize_sum must be static double",
    ),
    "inputs": ("static constexpr int n_in = kMaxIn + 1;", "n_in"),
    "no input": ("static constexpr int n_in = 0;", "n_in"),
    "outputs": ("static constexpr int n_out = kMaxOut + 1;", "n_out"),
    "sums": ("static constexpr int n_sum = kMaxSum + 1;", "n_sum"),
    "coefficients": ("static constexpr int n_coef = kMaxCoef + 1;", "n_coef"),
    "no result": ("static constexpr int n_out = 0;", "an output or a sum"),
    "idle sum": (
        "static constexpr int n_sum = 1; static constexpr unsigned hooks = kIdle;" + IDLE % "idle",
        "one output and no sum",
    ),
    "ratio alone": ("static constexpr int ratio = 1;", "ratio"),
    "ratio beyond": (
        "static constexpr int n_out = 0, n_sum = 1, ratio = 2;"
        "static constexpr unsigned hooks = kSelect;" + SELECTED,
        "ratio",
    ),
    "selects and writes": (
        "static constexpr int n_sum = 1, ratio = 1;"
        "static constexpr unsigned hooks = kSelect;" + SELECTED,
        "must read all its inputs",
    ),
    "Other alone": ("using Other = Term;", "Other"),
    "other alone": (
        "static constexpr unsigned hooks = kOther;" + IDLE % "other",
        "Other",
    ),
    "Other of another size": (
        "struct Wide : Term { static constexpr int n_coef = 1; }; using Other = Wide;"
        "static constexpr unsigned hooks = kOther;" + IDLE % "other",
        "sums and coefficients of its op",
    ),
}


@pytest.mark.parametrize(("members", "message"), WRONG.values(), ids=WRONG.keys())
def test_an_op_that_is_wrong_does_not_compile(tmp_path: Path, members: str, message: str) -> None:
    result = compile_op(tmp_path, members)
    assert result.returncode != 0
    assert message in result.stderr
