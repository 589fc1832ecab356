"""What each kernel means in plain torch, and its gradient as calls of other kernels."""
