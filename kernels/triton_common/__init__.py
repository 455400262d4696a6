"""What the Triton kernels share: launch parameters, work lists, device functions."""
