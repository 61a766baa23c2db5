"""Shared by all tests: one thread a process, and the backends that must be there."""

import os

# before any framework is imported: two test processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
