"""Code for accelerators only: kernels, a stream beside training, and averages on the host."""
