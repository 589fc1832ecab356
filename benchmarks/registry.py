"""The one list of suites: what ``diffcore bench`` can measure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence

from .suite import Job, Run

Sections = dict[str, Callable[[Run], Iterable[Job]]]

USUAL = {
    "ops": {"ops": "bench_ops.jobs", "sizes": "bench_ops.jobs_by_size"},
    "noise": {"noise": "bench_noise.jobs"},
    "steps": {"steps": "bench_steps.jobs"},
    "sampling": {"sampling": "bench_sampling.jobs"},
    "training": {"training": "bench_training.jobs"},
    "likelihood": {"likelihood": "bench_likelihood.jobs"},
    "memory": {"memory": "bench_memory.jobs"},
    "overhead": {"overhead": "bench_overhead.jobs", "call": "bench_overhead.jobs_of_parts"},
    "accuracy": {"accuracy": "bench_accuracy.jobs"},
}
"""What is run unless suites are named: by suite, what makes the jobs of its sections."""

MORE = {
    "one_core": {"one_core": "bench_noise.jobs_of_one_core"},
    "bound": {"bound": "bench_bound.jobs"},
    "compile": {"compile": "bench_compile.jobs"},
    "density": {"density": "bench_density.jobs"},
    "flow": {"flow": "bench_flow.jobs"},
    "groups": {"groups": "bench_groups.jobs"},
    "guidance": {"guidance": "bench_guidance.jobs"},
    "masks": {"masks": "bench_masks.jobs"},
    "pipelines": {"pipelines": "bench_pipelines.jobs"},
    "schedulers": {"schedulers": "bench_schedulers.jobs"},
    "scheduler_errors": {"scheduler_errors": "bench_schedulers.jobs_of_errors"},
    "threshold": {"threshold": "bench_threshold.jobs"},
}
"""What is measured for one page of the documentation each."""

SUITES = USUAL | MORE


def sections_of(names: Sequence[str]) -> Sections:
    """What makes the jobs of the sections of suites.

    Args:
        names: Of suites; "all" for every one; none for the usual ones.

    Raises:
        ValueError: There is no such suite.
    """
    found: Sections = {}
    for name in SUITES if "all" in names else names or USUAL:
        if name not in SUITES:
            raise ValueError(f"name must be one of {', '.join((*SUITES, 'all'))}, got {name!r}")
        for section, where in SUITES[name].items():
            module, _, function = where.partition(".")
            found[section] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found
