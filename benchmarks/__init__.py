"""Benchmarks: each op against eager PyTorch, ``torch.compile`` and a copy; and end to end."""
