"""Code for accelerators only: kernels, a stream beside training, averages on the host."""
