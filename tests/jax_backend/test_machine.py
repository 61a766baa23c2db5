"""Random sequences of calls keep to the design, see ``machine``.

The suite runs the same few examples each time, so that a failure there is the fault of a change.
``make machine`` runs more, longer and new ones each time, and remembers those that failed.
"""

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.jax_backend.machine import FAMILIES, machine_of

EXAMPLES = os.environ.get("EMA_MACHINE_EXAMPLES")
STEPS = int(os.environ.get("EMA_MACHINE_STEPS", "10"))


def budget() -> settings:
    """The settings of one family; no time limit depends on how busy the machine is."""
    common = settings(
        deadline=None,
        suppress_health_check=list(HealthCheck),
        stateful_step_count=STEPS,
        print_blob=True,
    )
    if EXAMPLES is None:
        return settings(common, max_examples=5, derandomize=True, database=None)
    return settings(common, max_examples=-(-int(EXAMPLES) // len(FAMILIES)))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_sequence_of_calls_gives_what_the_reference_says(family):
    """Params, averages and counters; bit for bit what is copied or left alone."""
    machine = machine_of(family)
    run_state_machine_as_test(machine, settings=budget())
    used = ", ".join(f"{what} {n}" for what, n in sorted(machine.used.items()))
    print(f"{family}: {machine.examples} examples, {machine.steps} steps; {used}")
