"""Do the tests notice wrong signs? Each mutant is one edit; its tests must fail with it.

Python mutants are tried one by one in a copy of the package. Those of csrc/ go into one build
(they are in different kernels) and are tried one by one with it:

    python tools/mutants.py              # Python only, no build
    python tools/mutants.py --native     # csrc/ too: builds a copy for the CPU with CMake
    python tools/mutants.py kl strata    # those whose name holds one of the words
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One edit: ``old``, found once in all the sources of its language, becomes ``new``."""

    name: str
    old: str
    new: str
    tests: str  # arguments of pytest

    @property
    def native(self) -> bool:
        """Whether the edit is one of C++."""
        return self.old.endswith(";")


MUTANTS = [
    # ---- Python: reference formulas, coefficients, tables, weights -------------------------------
    Mutant(
        "reference: x_0 from epsilon",
        '"epsilon": lambda m, x, a, s: (x - s * m) / a',
        '"epsilon": lambda m, x, a, s: (x + s * m) / a',
        "tests/ops/test_reference.py",
    ),
    Mutant(
        "reference: normal_kl",
        "expm1_minus(logvar1 - logvar2)",
        "expm1_minus(logvar1 + logvar2)",
        "tests/ops/test_forward.py::test_reference_is_within_the_bound[float32-normal_kl]",
    ),
    Mutant(
        "reference: KL of a step",
        "apart = m - other",
        "apart = m + other",
        "tests/ops/test_forward.py::test_reference_is_within_the_bound[float32-step_kl]",
    ),
    Mutant(
        "density: learned variance",
        "parts, one = (2.0 * (log_c_z + s_0), 2.0 * s_v)",
        "parts, one = (2.0 * (log_c_z - s_0), 2.0 * s_v)",
        "tests/ops/test_density.py::test_a_learned_variance",
    ),
    Mutant(
        "density: under CFG++",
        "coefs = (*leading[:2], *of_uncond, leading[4], *columns)",
        "coefs = (*leading, *columns)",
        "tests/ops/test_density.py::test_the_density_under_cfg_plus_plus",
    ),
    Mutant(
        "density: the value of a policy's ratio",
        "found = _Valued.apply(value, found)",
        "found = _Valued.apply(found, found)",
        "tests/sampling/test_trajectory.py::test_the_ratio_of_a_policy_to_itself_is_1",
    ),
    Mutant(
        "reference: bound, learned variance",
        "d = k.d_0 - k.d_v * in_float64(variance_output) + k.d_low",
        "d = k.d_0 + k.d_v * in_float64(variance_output) + k.d_low",
        "tests/ops/test_forward.py::test_reference_is_within_the_bound[float32-vlb_term_learned]",
    ),
    Mutant(
        "coefficients: direction of a DDIM step",
        "kept = (alpha / alpha_prev * sigma_prev / sigma) ** 2",
        "kept = -((alpha / alpha_prev * sigma_prev / sigma) ** 2)",
        "tests/coefficients",
    ),
    Mutant(
        "schedules: betas of alphas_cumprod",
        "return (previous - bar) / previous",
        "return (previous + bar) / previous",
        "tests/schedules/test_schedule.py",
    ),
    Mutant(
        "solvers: UniPC's predictor",
        "return [first_order_weight(self._sign * h) - slope, slope]",
        "return [first_order_weight(self._sign * h) + slope, slope]",
        "tests/solvers/test_parts.py",
    ),
    Mutant(
        "losses: min-SNR for v",
        "return capped / (snr + 1)",
        "return capped / (snr - 1)",
        "tests/schedules/test_schedule.py -k min_snr",
    ),
    # ---- Python: mutants that once lived ---------------------------------------------------------
    Mutant(
        "solvers: end of a noise interval",
        "return float(levels.sigma[i + 1] / levels.alpha[i + 1])",
        "return float(levels.sigma[i + 1] * levels.alpha[i + 1])",
        "tests/solvers/test_rows.py",
    ),
    Mutant(
        "solvers: a last step in place",
        "lambdas[i] == lambdas[i + 1] or (euler",
        "lambdas[i] == lambdas[i - 1] or (euler",
        "tests/solvers/test_rows.py",
    ),
    Mutant(
        "solvers: lambda without signal",
        "            return -math.inf\n        return math.log(self.alpha)",
        "            return math.inf\n        return math.log(self.alpha)",
        "tests/solvers/test_rows.py",
    ),
    Mutant(
        "solvers: the first row of a step",
        "next_sigma, step, step != before),",
        "next_sigma, step, step == before),",
        "tests/solvers/test_rows.py",
    ),
    Mutant(
        "diffusion: clamp of unread timesteps",
        "[t.clamp(0, len(self) - 1)]",
        "[t.clamp(0, len(self) + 1)]",
        "tests/diffusion/test_gaussian.py -k unchecked",
    ),
    Mutant(
        "likelihood: timesteps left for other strata",
        "if last - t <= k - 1 or",
        "if last - t <= k + 1 or",
        "tests/likelihood/test_strata.py",
    ),
    Mutant(
        "likelihood: where a stratum ends",
        "taken + 0.5 * weights[t - 1].item() > share",
        "taken - 0.5 * weights[t - 1].item() > share",
        "tests/likelihood/test_strata.py",
    ),
    Mutant(
        "solvers: drift of a step with a density",
        "c_x, c_0 = c_x + drift, c_0 - drift * here.alpha",
        "c_x, c_0 = c_x - drift, c_0 - drift * here.alpha",
        "tests/solvers/test_flow_sde.py",
    ),
    Mutant(
        "solvers: CFG++ (2M)",
        "c_u=-keep * here.alpha * a_m,",
        "c_u=keep * here.alpha * a_m,",
        "tests/guidance/test_loops.py -k cfg_pp",
    ),
    # ---- C++: one functor of each family ---------------------------------------------------------
    Mutant(
        "csrc: linear_combination",
        "    y[0] = mul_add(c[0], x[0], c[1] * x[1]);",
        "    y[0] = mul_add(c[0], x[0], -c[1] * x[1]);",
        "tests/ops/test_forward.py::test_values_are_within_the_bound[cpu-float32-add_noise]",
    ),
    Mutant(
        "csrc: normal_kl",
        "exp_times(-x[3], square), HalfExpm1<R>(x[1] - x[3]).minus_d);",
        "exp_times(-x[3], square), HalfExpm1<R>(x[1] + x[3]).minus_d);",
        "tests/ops/test_forward.py::test_values_are_within_the_bound[cpu-float32-normal_kl]",
    ),
    Mutant(
        "csrc: error of a denoising loss",
        "    return x[0] - Target::target(c, x);",
        "    return x[0] + Target::target(c, x);",
        "tests/ops/test_forward.py::test_values_are_within_the_bound[cpu-float32-denoising_loss_epsilon]",
    ),
    Mutant(
        "csrc: discretized likelihood, narrow bins",
        "mul_add(b - e, R(1.0 / 6.0), mul_add(third, R(1.0 / 5040.0), second * R(1.0 / 120.0)));",
        "mul_add(b - e, R(1.0 / 6.0), mul_add(third, R(1.0 / 5040.0), second * -R(1.0 / 120.0)));",
        "tests/ops/test_likelihood.py -k test_values_and_gradients",
    ),
    Mutant(
        "csrc: guidance of a reverse step",
        "x[1] - m_u, mul_add(StepRow(c).gain(), m_u, m_u));",
        "x[1] + m_u, mul_add(StepRow(c).gain(), m_u, m_u));",
        "tests/ops/test_forward.py::test_values_are_within_the_bound[cpu-float32-ddpm_step_guided]",
    ),
    Mutant(
        "csrc: rescaled guidance",
        "    return n > 1 ? square(s) - sum * sum / n : 0;",
        "    return n > 1 ? square(s) + sum * sum / n : 0;",
        "tests/guidance/test_rules.py -k authors_formula",
    ),
    Mutant(
        "csrc: projected guidance",
        "        gain = -beyond * (1 - double(c[2])) * along;",
        "        gain = beyond * (1 - double(c[2])) * along;",
        "tests/guidance/test_rules.py -k authors_formula",
    ),
    Mutant(
        "csrc: gradient of guidance",
        "    if constexpr (kGuided) y[1] = mul_add(StepRow(c).gain(), dm, dm) - w * dm;",
        "    if constexpr (kGuided) y[1] = mul_add(StepRow(c).gain(), dm, dm) + w * dm;",
        "tests/guidance/test_rules.py -k gradients",
    ),
    Mutant(
        "csrc: gradient of a factor of m_u",
        "    P::add_uncond(StepRow(c).c_u(), x[0], y + 1);",
        "    P::add_uncond(-StepRow(c).c_u(), x[0], y + 1);",
        "tests/guidance/test_loops.py -k by_tensors_and_their_gradients",
    ),
    Mutant(
        "csrc: bound, learned variance",
        "      return mul_add(-row.d_v(), x[2], row.d_0()) + row.d_low();",
        "      return mul_add(row.d_v(), x[2], row.d_0()) + row.d_low();",
        "tests/ops/test_forward.py::test_values_are_within_the_bound[cpu-float32-vlb_term_learned]",
    ),
]


def apply(mutants: list[Mutant], folder: Path, suffixes: set[str]) -> None:
    """Edit the sources below ``folder``.

    Raises:
        ValueError: The text of a mutant is not there exactly once: the list is out of date.
    """
    files = [f for f in folder.rglob("*") if f.suffix in suffixes]
    for mutant in mutants:
        where = [f for f in files if mutant.old in f.read_text(encoding="utf-8")]
        times = sum(f.read_text(encoding="utf-8").count(mutant.old) for f in where)
        if times != 1:
            raise ValueError(f"{mutant.name}: its text is there {times} times, not once")
        text = where[0].read_text(encoding="utf-8")
        where[0].write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def copy_of(folder: Path, into: Path) -> Path:
    """``into`` with the contents of ``folder``, replaced."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("__pycache__"))
    return into


def failures(mutant: Mutant, python: Path) -> tuple[str, float]:
    """The first test that failed with the package in ``python``, "" if none; and seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, *mutant.tests.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(python), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if found.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: no test ran\n{found.stdout[-2000:]}{found.stderr}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", found.stdout, re.MULTILINE)
    return (failed or [""])[0], time.monotonic() - started


def build(mutants: list[Mutant], temporary: Path) -> Path:
    """A copy of the package whose kernels have all these edits."""
    source = temporary / "source"
    source.mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    copy_of(ROOT / "csrc", source / "csrc")
    apply(mutants, source / "csrc", {".h", ".cc"})
    python = copy_of(ROOT / "python", temporary / "native")
    for old in (python / "diffcore").glob("_C*.so"):
        old.unlink()
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True)
    configure = ["cmake", f"-S{source}", f"-B{temporary}/build", "-DDIFFCORE_CUDA=OFF"]
    options = [f"-Dpybind11_DIR={pybind11.strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
    # One instruction set without optimization takes a minute to build, not ten.
    options += ["-GNinja", "-DDIFFCORE_ISAS=v2", "-DDIFFCORE_KERNEL_OPTIMIZATION=-O0"]
    subprocess.run([*configure, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", temporary / "build", "-j2"], check=True)
    for module in (temporary / "build").glob("_C*.so"):
        shutil.copy(module, python / "diffcore")
    return python


def main() -> int:
    """Try the chosen mutants; 1 if one lives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names; all mutants if none")
    parser.add_argument("--native", action="store_true", help="build and try those of csrc/ too")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in m.name for w in options.words)]
    native = [m for m in chosen if m.native] if options.native else []
    alive = 0
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        built = build(native, temporary) if native else None
        for mutant in [m for m in chosen if not m.native] + native:
            python = built
            if not mutant.native or python is None:
                python = copy_of(ROOT / "python", temporary / "python")
                apply([mutant], python, {".py"})
            failed, seconds = failures(mutant, python)
            alive += not failed
            print(f"{mutant.name:46}{seconds:5.0f} s  {failed or 'ALIVE'}", flush=True)
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
