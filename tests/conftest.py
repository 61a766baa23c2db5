"""Shared by all tests: one thread a process, and no deadlines for examples."""

import os

from hypothesis import HealthCheck, settings

# before any framework is imported: two test processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# how long an example takes says how busy the machine is
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
