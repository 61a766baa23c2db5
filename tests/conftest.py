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
settings.register_profile("fast", settings.get_profile("steady"), max_examples=10)

# files whose tests take seconds each; `--fast` has smaller tests of the same modules
LARGE = (
    "benchmarks/",
    "checkpoint/test_both_backends",
    "checkpoint/test_killed",
    "checkpoint/test_limits",
    "checkpoint/test_memory",
    "checkpoint/test_worked_example",
    "gpu/test_default_device",
    "gpu/test_offload",
    "jax_backend/test_contract",
    "jax_backend/test_devices",
    "jax_backend/test_docs",
    "jax_backend/test_examples",
    "jax_backend/test_machine",
    "jax_backend/test_optax_places",
    "jax_backend/test_processes",
    "jax_backend/test_rounding",
    "jax_backend/test_several",
    "jax_backend/test_wrapper",
    "neutral/test_layout",
    "peers/",
    "sharding/",
    "torch_backend/test_compiled",
    "torch_backend/test_machine",
    "trainer/test_bad_input",
    "trainer/test_evaluate.py",
    "trainer/test_killed",
    "trainer/test_live_weights",
    "trainer/test_modes",
    "trainer/test_optimizer_modes",
    "trainer/test_own_schedules",
    "trainer/test_page",
    "trainer/test_peft",
    "trainer/test_preempted",
    "trainer/test_resume",
    "trainer/test_trl",
    "trainer/test_unannounced",
)
LONG = (
    "test_a_checkpoint_without_an_average",
    "test_a_new_process_without_a_trainer",
    "test_a_small_archive_of_large_arrays_is_bounded",
    "test_every_train_starts_anew_unless_a_state_was_loaded",
    "test_only_the_average_is_read_from_disk",
    "test_resumed_from_the_file_equals_uninterrupted",
    "test_ten_thousand_damaged_files_are_refused",
    "test_very_many_tensors_go_into_several_files",
)
"""The tests that take seconds in files that do not."""


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="one case of each test that is not slow")


def pytest_configure(config):
    if config.getoption("--fast"):
        settings.load_profile("fast")


def pytest_collection_modifyitems(config, items):
    """With ``--fast``, keep the first case of each test function that takes a moment."""
    if not config.getoption("--fast"):
        return
    kept, left, seen = [], [], set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        large = any(part in item.nodeid for part in (*LARGE, *LONG))
        large = large or item.get_closest_marker("slow")
        (left if large or function in seen else kept).append(item)
        seen.add(function)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
