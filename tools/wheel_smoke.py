"""What a freshly installed diffcore must do, run by `tools/check_wheel.py` and by cibuildwheel.

Run it with `python -I`, so that nothing but the installed package can be found.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import torch

THREADS, ROUNDS = 8, 20
GIL_BEFORE = getattr(sys, "_is_gil_enabled", lambda: True)()

import diffcore  # noqa: E402

# Of PhiloxNoise(2026, sample_ids=11, stream=3, first_element=16): the same in every version, on
# every machine.
PINNED = """
    0x1.7785520000000p-1 -0x1.fa355c0000000p+0 -0x1.e9b2f20000000p-3 -0x1.533a0e0000000p+0
    0x1.45368e0000000p+1 0x1.f77ab40000000p+0 -0x1.0990b60000000p-1 0x1.06badc0000000p-3
"""


def check_files() -> None:
    """The package is the installed one, with its types and its binary."""
    folder = Path(diffcore.__file__).parent
    assert "site-packages" in folder.parts, f"imported from {folder}, not from the wheel"
    for name in ("py.typed", "_C.pyi"):
        assert (folder / name).is_file(), f"{name} is not in the wheel"
    assert list(folder.glob("_C.*.so")), "the compiled module is not in the wheel"


def check_ops() -> None:
    """An op forward and backward, and a reduction."""
    torch.manual_seed(0)
    x0 = torch.randn(4, 3, 8, 8, requires_grad=True)
    noise = torch.randn(4, 3, 8, 8)
    alpha = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()

    noised = diffcore.add_noise(x0, noise, alpha, sigma)
    a, s = (c.view(4, 1, 1, 1) for c in (alpha, sigma))
    truth = a * x0.detach().double() + s * noise.double()
    error = (noised.detach().double() - truth).abs().max().item()
    assert error <= 2 * torch.finfo(torch.float32).eps * truth.abs().max().item(), error

    noised.sum().backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, a.float().expand_as(x0))

    kl = diffcore.normal_kl(x0.detach(), noise, x0.detach(), noise, reduction="sample")
    assert kl.shape == (4,)
    assert torch.all(kl == 0)


def check_noise() -> None:
    """The noise of a key has the bits of every other version and machine."""
    key = diffcore.PhiloxNoise(2026, sample_ids=11, stream=3, first_element=16)
    found = [value.hex() for value in key.tensor((2, 4)).flatten().tolist()]
    assert found == PINNED.split(), found


def calls(number: int) -> tuple[torch.Tensor, ...]:
    """Results of ops on tensors of one thread, with gradients and generated noise."""
    noise = diffcore.PhiloxNoise(number)
    mean = noise.tensor((3, 2, 17 + number, 19)).requires_grad_()
    noised = diffcore.add_noise(mean, noise.for_samples(5), 0.75, 0.25)
    z, kl = diffcore.reparameterize_kl(mean, 0.5 * mean, noise=noise.for_samples(9))
    (noised.square().mean() + z.square().mean() + kl.sum()).backward()
    assert mean.grad is not None
    with torch.no_grad():
        step = diffcore.ddim_step(noised, mean, 0.6, 0.8, 0.8, 0.6, clip_range=1.0)
    return noised.detach(), z.detach(), kl.detach(), mean.grad, step


def check_threads() -> None:
    """Threads that call ops at the same time get what each gets alone."""
    together = threading.Barrier(THREADS)
    found: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def work(number: int) -> None:
        together.wait()
        found[number] = [calls(number) for _ in range(ROUNDS)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(THREADS)), "a thread failed"
    for number, results in found.items():
        alone = calls(number)
        for result in results:
            assert all(map(torch.equal, alone, result)), f"other results in thread {number}"


def check_gil() -> None:
    """On a free-threaded Python, importing the compiled module does not bring the lock back."""
    if sysconfig.get_config_var("Py_GIL_DISABLED") and not GIL_BEFORE:
        assert not getattr(sys, "_is_gil_enabled")(), "diffcore enabled the GIL"  # noqa: B009


def check_command_line() -> None:
    """`diffcore info` runs."""
    info = subprocess.run(
        [sys.executable, "-I", "-m", "diffcore", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert diffcore.__version__ in info, info
    print(info)


def main() -> None:
    """Use the package. The threads come first: their first calls are the process's first."""
    check_files()
    check_threads()
    check_gil()
    check_ops()
    check_noise()
    check_command_line()
    print(f"diffcore {diffcore.__version__} works on torch {torch.__version__}")


if __name__ == "__main__":
    main()
