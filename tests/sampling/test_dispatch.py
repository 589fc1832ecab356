"""What a step costs beside its arithmetic: one launch, its outputs' memory, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore import PhiloxNoise, sampling, solvers
from diffcore.sampling import sample
from support.toys import half
from support.waiting import NoReadback, no_waiting

SIGMAS = [9.0, 5.0, 3.0, 1.0, 0.5, 0.0]
SHAPE = (2, 3, 8, 8)
DDPM = solvers.ddpm_table(SIGMAS)
DPMPP = solvers.dpmpp_2m_table(SIGMAS)
EULER = solvers.euler_table(SIGMAS)
CHURNED = solvers.heun_table(SIGMAS, s_churn=2.0)
UNIPC = solvers.unipc_table(SIGMAS, order=3)
ROW = {"int": 2, "counter": torch.tensor([2]), "each": torch.tensor([2, 1])}

# Python's bookkeeping on tensors: another view of the same memory.
VIEWS = {"chunk", "split", "narrow", "slice", "as_strided", "alias"}
NEW = {"empty_like", "empty_strided"}


def ops_and_bytes(call: Callable[[], Any]) -> tuple[set[str], list[int]]:
    """Every operator that torch runs in a call, and every allocation it makes, in bytes."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    asked = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    names = {e.name for e in seen.events()} - {"[memory]"}
    return {n.removeprefix("aten::") for n in names}, [n for n in asked if n > 0]


class Watching(TorchDispatchMode):
    """Collects the names of the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def tensors() -> list[torch.Tensor]:
    return list(torch.randn(5, *SHAPE))


GUIDED = {"guidance_scale": torch.tensor([2.0, 3.0])}
STEPS = {
    # name: (table, guided, noise, tensors of history, kernel, outputs)
    "ddpm-guided": (DDPM, True, "tensor", 0, "reverse_step_guided_noise", 1),
    "ddpm-guided-drawn": (DDPM, True, "key", 0, "reverse_step_guided_noise*", 1),
    "ddpm-drawn": (DDPM, False, "key", 0, "reverse_step_noise*", 1),
    "dpmpp-2m": (DPMPP, False, None, 1, "reverse_step_h1_keep", 2),
    "dpmpp-2m-guided": (DPMPP, True, None, 1, "reverse_step_guided_h1_keep", 2),
    "unipc": (UNIPC, False, None, 3, "reverse_step_h3_keep", 2),
    "euler": (EULER, False, None, 0, "reverse_step", 1),
}


@pytest.mark.parametrize("kind", ROW)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_one_launch_and_allocates_its_outputs(launched: list[str], name, kind) -> None:
    table, guided, noise, history, kernel, outputs = STEPS[name]
    x, m, m_u, z, h = tensors()
    z = {"tensor": z, "key": PhiloxNoise(1), None: None}[noise]
    options = {"model_output_uncond": m_u, **GUIDED} if guided else {}

    def step() -> Any:
        return table.step(ROW[kind], x, m, (h,) * history, noise=z, **options)

    step()
    assert launched == [kernel]
    ops, asked = ops_and_bytes(step)
    assert ops <= NEW | VIEWS
    assert asked == [x.nbytes] * outputs
    with Watching() as seen:  # to a mode it is one operator
        step()
    *views, op = seen.ops
    assert set(views) <= VIEWS
    assert op == kernel.replace("*", "_generated")


@pytest.mark.parametrize("noise", [None, "key"])
def test_a_guided_step_of_one_stacked_output_allocates_no_halves(launched, noise) -> None:
    x, *_ = tensors()
    both = torch.randn(2 * SHAPE[0], *SHAPE[1:])
    z = PhiloxNoise(2) if noise else torch.randn(SHAPE)
    ops, asked = ops_and_bytes(lambda: DDPM.step(0, x, both, noise=z, guidance_scale=2.0))
    assert set(launched) == {"reverse_step_guided_noise" + "*" * bool(noise)}
    assert ops <= NEW | VIEWS
    assert asked == [x.nbytes]


def test_a_step_that_nothing_reads_leaves_nothing(launched: list[str]) -> None:
    x, m, h, *_ = tensors()
    _, asked = ops_and_bytes(lambda: DPMPP.step(len(DPMPP) - 1, x, m, (h,)))
    assert set(launched) == {"reverse_step"}
    assert asked == [x.nbytes]


def test_a_loop_is_a_launch_a_call_of_the_model(launched: list[str]) -> None:
    x, *_ = tensors()
    sample(half, x, CHURNED)
    assert len(launched) == len(CHURNED) + 1  # and one for the start, which churn raises
    launched.clear()
    sample(half, x, DDPM)
    assert launched == ["reverse_step_noise*"] * 4 + ["reverse_step"]
    launched.clear()
    sample(half, x, DPMPP)
    assert launched == ["reverse_step_h1_keep"] * 3 + ["reverse_step_h1", "reverse_step"]


# ---- no waiting for the device ------------------------------------------------------------------


def everything(device: str) -> None:
    """Loops and steps of each kind, with all that may go with them."""
    x = torch.randn(SHAPE, device=device)
    w = torch.full((2,), 2.0, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    for table in (DDPM, DPMPP, UNIPC, CHURNED):
        for noise in (None, PhiloxNoise(1), torch.randn(len(table) + 1, *SHAPE, device=device)):
            sample(half, x, table, noise=noise, callback=lambda state: None)
        sample(half, x, table, guidance_scale=w, uncond_kwargs={})
        table.step(counter, x, x, (x,) * table.history, noise=PhiloxNoise(1, stream=counter))


def test_nothing_is_read_back() -> None:
    everything("cpu")  # makes the tables, once
    with NoReadback():
        everything("cpu")


@pytest.mark.cuda
def test_the_gpu_is_never_waited_for() -> None:
    def k_diffusions() -> None:  # with sigmas on the host
        x = torch.randn(SHAPE, device="cuda")
        options = {"callback": lambda state: None, "noise_sampler": lambda *ends: x * ends[0]}
        sampling.sample_dpmpp_sde(half, x, SIGMAS, disable=True, **options)

    everything("cuda")  # moves the tables, once
    k_diffusions()
    with no_waiting():
        everything("cuda")
        k_diffusions()
