"""Benchmarks: each op against eager PyTorch, ``torch.compile`` and a copy; and end to end."""

import os

# Read when torch is imported. Its profiler, which measures peak memory on the CPU, prints a lot.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
