"""The two backends give the same bits, and the right ones."""

import numpy as np
import pytest

from tests.conformance.runs import oracle, run_jax, run_torch

DTYPES = ["float32", "bfloat16"]
PRECISIONS = {
    "compensated": {"compensated": True},
    "by chance": {"accumulator_dtype": "bfloat16", "seed": 7},
    "to nearest": {"accumulator_dtype": "bfloat16", "stochastic_rounding": False},
    "guarded": {"on_nonfinite": "skip"},
}
OPTIMIZERS = ["adamw", "sgd"]


def differing(ours, theirs):
    """Elements whose bits differ, by schedule; and how many were compared."""
    compared = 0
    different = {}
    for name, leaves in ours.items():
        for leaf, values in leaves.items():
            other = theirs[name][leaf]
            assert values.shape == other.shape
            assert np.isfinite(values).all()
            compared += values.size
            if count := int((values.view(np.int32) != other.view(np.int32)).sum()):
                different[name] = different.get(name, 0) + count
    return different, compared


@pytest.mark.slow
@pytest.mark.parametrize("update_after_step", [0, 5])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_of_a_scan_has_the_same_bits(
    schedules, dtype, optimizer, update_every, update_after_step
):
    """1 000 steps in lax.scan, all schedules: 0 differing elements after any step."""
    options = {"update_every": update_every, "update_after_step": update_after_step}
    run = run_jax(schedules, dtype=dtype, optimizer=optimizer, steps=1000, **options)
    averages = run_torch(schedules, run.params, dtype=dtype, **options)
    different, compared = differing(run.averages, averages)
    assert compared == 1000 * 731 * len(schedules)
    assert different == {}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_jitted_steps_have_the_same_bits(schedule, dtype, optimizer):
    """One average in the chain, one jitted call a step: 0 differing elements."""
    run = run_jax(schedule, dtype=dtype, optimizer=optimizer, steps=40, scan=False)
    averages = run_torch(schedule, run.params, dtype=dtype)
    assert differing(run.averages, averages)[0] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a bfloat16 average does not move")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_precision_has_the_same_bits(schedules, dtype, optimizer, update_every, precision):
    """300 steps in lax.scan, all schedules: 0 differing elements after any step."""
    options = {"update_every": update_every, "update_after_step": 2, **PRECISIONS[precision]}
    run = run_jax(schedules, dtype=dtype, optimizer=optimizer, steps=300, **options)
    averages = run_torch(schedules, run.params, dtype=dtype, **options)
    assert differing(run.averages, averages)[0] == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_follow_the_float64_recursion(schedules, dtype):
    """After every step the average is within 1e-5 of float64, relative to its largest element."""
    run = run_jax(schedules, dtype=dtype, optimizer="adamw", steps=300, update_after_step=5)
    for name, schedule in schedules.items():
        exact = oracle(schedule, run.params["kernel"], update_after_step=5)
        for average, reference in zip(run.averages[name]["kernel"], exact, strict=True):
            assert np.abs(average - reference).max() <= 1e-5 * np.abs(reference).max()
