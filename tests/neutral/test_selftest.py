"""``ema selftest``: both backends on this machine."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest

import ema
import ema.jax_backend
import ema.torch_backend
from ema import agreement, selftest
from ema.schedules import SCHEDULES
from tests import processes

PRECISIONS = {"compensated", "in bfloat16", "skipping NaN"}


def test_every_schedule_is_in_the_self_test():
    assert {kind.name for kind in agreement.KINDS} == {*SCHEDULES, *PRECISIONS}


def test_every_precision_is_in_the_self_test():
    options = [
        (k.compensated, k.narrow, k.guarded) for k in agreement.KINDS if k.name in PRECISIONS
    ]
    assert options == [(True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.slow
def test_the_backends_agree_in_every_bit_on_this_machine_also_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        result = selftest.run()
    names = {*SCHEDULES, *PRECISIONS}
    assert len(result.checks) == 2 * len(names)
    assert {check.name: check.differing for check in result.checks} == dict.fromkeys(names, 0)
    assert sum(check.differing for check in result.checks) == 0
    assert all(check.error < 1e-5 for check in result.checks if check.name != "in bfloat16")
    assert all(check.error < 1e-7 for check in result.checks if check.name == "compensated")
    assert all(1e-3 < check.error < 0.02 for check in result.checks if check.name == "in bfloat16")
    assert result.passed
    assert result.missing == ()
    assert result.versions["torch"]


def test_a_single_flipped_bit_is_counted():
    params = np.random.default_rng(0).normal(size=(agreement.STEPS + 1, agreement.SIZE))
    params = params.astype(np.float32)
    right = {key: agreement.reference(params, *key).astype(np.float32) for key in agreement._keys()}
    wrong = {key: averages.copy() for key, averages in right.items()}
    first = next(iter(wrong))
    wrong[first].view(np.int32)[7, 3] ^= 1
    checks = list(selftest._compare(params, "float32", [right, wrong]))
    assert [check.differing for check in checks] == [1] + [0] * 12
    assert [check.passed for check in checks] == [False] + [True] * 12
    alone = list(selftest._compare(params, "float32", [right]))
    assert all(check.differing is None and check.passed for check in alone)


@pytest.mark.slow
def test_a_bfloat16_average_that_is_not_rounded_by_chance_fails(monkeypatch):
    backends = (ema.torch_backend, "EMAModel"), (ema.jax_backend, "params_ema")
    for module, name in backends:
        to_nearest = functools.partial(getattr(module, name), stochastic_rounding=False)
        monkeypatch.setattr(module, name, to_nearest)
    monkeypatch.setattr(agreement, "KINDS", [k for k in agreement.KINDS if k.name in PRECISIONS])
    with pytest.warns(ema.EMAWarning, match="does not move"):
        result = selftest.run()
    assert {check.name for check in result.checks if not check.passed} == {"in bfloat16"}
    assert result.verdict.startswith("an average is wrong: it is off by 2.7e-02")


@pytest.mark.slow
def test_what_is_not_skipped_fails(monkeypatch):
    monkeypatch.setattr(agreement, "_NAN_EVERY", 5)
    monkeypatch.setattr(agreement, "reference", never_skipped(agreement.reference))
    monkeypatch.setattr(agreement, "KINDS", [k for k in agreement.KINDS if k.name in PRECISIONS])
    result = selftest.run()
    assert {check.name for check in result.checks if not check.passed} == {"skipping NaN"}


def never_skipped(reference):
    def unguarded(params, kind, after, every):
        return reference(params, dataclasses.replace(kind, guarded=False), after, every)

    return unguarded


@pytest.mark.parametrize("value", [1.5, np.nan, np.inf])
def test_an_average_that_is_wrong_in_both_backends_fails(value):
    params = np.ones((agreement.STEPS + 1, agreement.SIZE), np.float32)
    both = {key: agreement.reference(params, *key).astype(np.float32) for key in agreement._keys()}
    for averages in both.values():
        averages[-1, -1] = value
    checks = list(selftest._compare(params, "float32", [both, both]))
    assert not any(check.passed for check in checks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("jax", "`jax` is not installed: pip install 'ema[jax]'"),
        ("optax", "`optax` is not installed: pip install 'ema[jax]'"),
        ("torch", "`torch` is not installed: pip install 'ema[torch]'"),
    ],
)
def test_with_one_backend_missing_the_other_is_checked_against_float64(missing, named):
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from ema.selftest import run\n"
        "result = run()\n"
        "print(result.passed, {check.differing for check in result.checks}, *result.missing)\n"
    )
    result = processes.run([sys.executable, "-c", code])
    assert result.stdout == f"True {{None}} {named}\n", result.stderr


def test_a_result_is_frozen():
    for cls in (selftest.Check, selftest.SelfTest):
        assert cls.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(cls))
