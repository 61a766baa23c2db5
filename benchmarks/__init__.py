"""Ours, the peers and the limit of the machine, in turn in one process."""
