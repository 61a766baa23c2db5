"""Which tensors are averaged, and where they are."""
