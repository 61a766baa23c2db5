"""Benchmarks: ours, the peers and the limit of the machine, in turn."""
