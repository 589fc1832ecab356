"""Adding an op takes the five edits that docs/add-an-op.md lists, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-an-op.md"

# y = a x^3. Each edit: a file, a text in it, and what is written before that text.
EDITS = {
    "1. the formula": [
        (
            "csrc/ops/linear.h",
            "struct Randn",
            """struct Cube : OpBase {  // y = a x^3
  static constexpr const char* name = "cube";
  static constexpr int n_in = 1, n_out = 1, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = c[0] * x[0] * x[0] * x[0];
  }
};
struct CubeBackward : OpBase {  // inputs: g, x; output: dx
  static constexpr const char* name = "cube_backward";
  static constexpr int n_in = 2, n_out = 1, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = R(3) * c[0] * x[1] * x[1] * x[0];
  }
};

""",
        )
    ],
    "2. the list": [("csrc/ops/all.h", "Scale, ScaleTwice", "Cube, CubeBackward, ")],
    "3. the reference": [
        (
            "python/diffcore/reference/linear.py",
            "def scale(",
            '''def cube(x: Tensor, a: Coef) -> Tensor:
    """``a x^3``."""
    return elementwise(lambda x, a: a * x**3, (x,), (a,))


''',
        )
    ],
    "4. the kernel and the public function": [
        (
            "python/diffcore/_kernels/linear.py",
            "SCALE = define(",
            """def _cube_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    (g,) = grads
    assert g is not None
    return [run(CUBE_BACKWARD, (g, *inputs), call[1], call[2])]


CUBE = define(
    Kernel("cube", ("x",), ("a",), reference=formulas.cube, backward=_cube_backward)
)
CUBE_BACKWARD = define(Kernel("cube_backward", ("grad", "x"), ("a",)))
""",
        ),
        ("python/diffcore/ops/linear.py", '"linear_combination",\n', '"cube",\n    '),
        (
            "python/diffcore/ops/linear.py",
            "def velocity(",
            '''def cube(x: Tensor, a: Coef) -> Tensor:
    """``a x^3``."""
    return run(k.CUBE, (x,), (as_coef("a", a, None),))


''',
        ),
    ],
    "5. the case": [
        (
            "tests/support/cases.py",
            "    *STEP_CASES,\n",
            """    OpCase(
        "cube",
        ops.cube,
        ("x",),
        lambda xp, x, a: a * x**3,
        lambda b: {"a": 0.7},
        ("x",),
        benchmarked=True,
    ),
""",
        )
    ],
}
FILES = sorted({file for edits in EDITS.values() for file, _, _ in edits})


def test_the_page_lists_these_files() -> None:
    stat = re.search(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert stat, "the page shows the files of a commit that adds an op"
    assert sorted(re.findall(r"^ (\S+) +\|", stat.group(1), re.MULTILINE)) == FILES


def copy_of_the_sources(to: Path) -> None:
    skip = shutil.ignore_patterns("_C*.so", "__pycache__", "results", ".*")
    for folder in ("csrc", "python", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, to / folder, ignore=skip)
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, to / file)


def run(command: list[str], folder: Path) -> str:
    # With -S no .pth file runs, so an editable install does not import its own sources instead.
    paths = [*(str(folder / name) for name in ("python", "tests", "")), get_path("purelib")]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DIFFCORE_ISA": "v2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_five_edits_add_an_op(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    copy_of_the_sources(tmp_path)
    for edits in EDITS.values():
        for file, before, text in edits:
            path = tmp_path / file
            source = path.read_text(encoding="utf-8")
            assert source.count(before) == 1, f"{file}: {before!r}"
            path.write_text(source.replace(before, text + before), encoding="utf-8")

    build = tmp_path / "build"
    options = ["-DDIFFCORE_ISAS=v2", "-DDIFFCORE_KERNEL_OPTIMIZATION=-O0", "-DDIFFCORE_CUDA=OFF"]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run(["cmake", "-S", str(tmp_path), "-B", str(build), *options], tmp_path)
    run(["cmake", "--build", str(build), "--parallel"], tmp_path)
    (module,) = build.glob("_C*.so")
    shutil.copy(module, tmp_path / "python" / "diffcore")

    found = run(
        [
            sys.executable,
            "-S",
            "-c",
            "import torch, diffcore\n"
            "from benchmarks.bench_ops import OPS\n"
            "from support.cases import BY_NAME\n"
            "x = torch.tensor([1.0, 2.0], requires_grad=True)\n"
            "y = diffcore.cube(x, 0.5)\n"
            "y.sum().backward()\n"
            "case = BY_NAME['cube']\n"
            "print(y.tolist(), x.grad.tolist(), 'cube' in OPS, case.moves, case.backward_moves)",
        ],
        tmp_path,
    )
    assert found.strip() == "[0.5, 4.0] [1.5, 6.0] True 2 3"

    files = [f"tests/ops/test_{name}.py" for name in ("forward", "backward", "compile", "errors")]
    summary = run([sys.executable, "-S", "-m", "pytest", "-q", "-k", "cube", *files], tmp_path)
    passed = re.search(r"(\d+) passed", summary)
    assert passed, summary
    assert int(passed.group(1)) > 30, summary
    assert "failed" not in summary
