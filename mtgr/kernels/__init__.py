"""GPU kernels in Triton's language, each beside the same function in PyTorch, which serves on the CPU."""
