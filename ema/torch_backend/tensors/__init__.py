"""The tensors that are averaged, and where they are."""
