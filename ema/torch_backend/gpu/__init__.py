"""What exists for accelerators alone: kernels, a stream beside training, averages on the host."""
