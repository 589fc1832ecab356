"""Benchmarks: each op against eager PyTorch, ``torch.compile`` and a copy; and end to end."""

import os

# Read when torch is imported: its profiler, which tells peak memory on the CPU, is talkative.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
