"""What a freshly installed diffcore must do, run by `tools/check_wheel.py`.

Run it with `python -I`, so that nothing but the installed package can be found.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import diffcore


def main() -> None:
    """Use the package: an op forward and backward, a reduction, the command line."""
    folder = Path(diffcore.__file__).parent
    assert "site-packages" in folder.parts, f"imported from {folder}, not from the wheel"
    for name in ("py.typed", "_C.pyi"):
        assert (folder / name).is_file(), f"{name} is not in the wheel"
    assert list(folder.glob("_C.*.so")), "the compiled module is not in the wheel"

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

    info = subprocess.run(
        [sys.executable, "-I", "-m", "diffcore", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert diffcore.__version__ in info, info
    print(info)
    print(f"diffcore {diffcore.__version__} works on torch {torch.__version__}")


if __name__ == "__main__":
    main()
