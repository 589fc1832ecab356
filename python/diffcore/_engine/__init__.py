"""How a call reaches a kernel: compiled module, dispatch, execution, autograd, torch.library."""
