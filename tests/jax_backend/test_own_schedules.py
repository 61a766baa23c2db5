"""Schedules of the user's own in JAX: traced, in files, and in Flax."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import ema
from ema.checkpoint import read_state
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema
from ema.jax_backend.linen import EMATrainState
from ema.jax_backend.nnx import EMA
from ema.weights import weight_of
from tests.own_schedules import ALL, DESCRIBED, UNDESCRIBED, WRONG, Answers, Attributes, Constant


@dataclasses.dataclass(frozen=True)
class ArrayTable(ema.Schedule):
    """A table of weights that a traced count can look up."""

    decays: Any

    def weight(self, count, span=1, xp=None):
        index = xp.minimum(xp.asarray(count, int), len(self.decays)) - 1
        return 1 - xp.asarray(self.decays)[index]


TRACED = {
    **{
        name: DESCRIBED[name][0]
        for name in ("constant", "warmup", "slots", "nested", "our name", "our name and fields")
    },
    "table": ArrayTable((0.5, 0.75, 0.875)),
    "array": ArrayTable(np.array([0.5, 0.75, 0.875])),
    "JAX array": ArrayTable(jnp.array([0.5, 0.75, 0.875])),
}
EAGER_ONLY = ("tuple", "attributes", "function")


def host_weight(schedule, count, span):
    """JAX has no namespace for Python floats: an ArrayTable is asked with NumPy."""
    if isinstance(schedule, ArrayTable):
        return 1 - float(schedule.decays[min(count, 3) - 1])
    return weight_of(schedule, count, span)


def expected(schedule, history, span):
    """The recursion in float64 over the params of each step."""
    averages = [np.asarray(history[0], np.float64)]
    for number, live in enumerate(history[1:], start=1):
        weight = host_weight(schedule, number // span, span) if number % span == 0 else 0.0
        averages.append(averages[-1] + weight * (np.asarray(live, np.float64) - averages[-1]))
    return averages[-1]


def walk(tx, jit, steps=8):
    """Params of every step, and the state after the last, for gradients of 1."""
    params = {"w": jnp.linspace(0.5, 1.0, 6)}
    state, history = tx.init(params), [params["w"]]
    update = jax.jit(tx.update) if jit else tx.update
    for k in range(1, steps + 1):
        updates, state = update(jax.tree.map(lambda w, k=k: w / k, params), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params["w"])
    return history, state


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", [*TRACED, *EAGER_ONLY])
def test_any_schedule_is_followed(name, jit):
    """What is no expression of ``xp`` works where nothing is traced, and is refused in jit."""
    schedule = TRACED.get(name) or ALL[name]
    tx = optax.chain(optax.sgd(0.1), params_ema(schedule, update_every=1))
    if jit and name in EAGER_ONLY:
        shown = re.escape(f"the weight of `{schedule!r}` must be an expression of `xp`")
        with pytest.raises(ema.ArgumentError, match=shown):
            walk(tx, jit)
        return
    history, state = walk(tx, jit)
    average = get_params_ema(state)["w"]
    np.testing.assert_allclose(average, expected(schedule, history, 1), rtol=1e-6)


@pytest.mark.parametrize("name", TRACED)
def test_any_schedule_is_followed_where_only_some_steps_update(name):
    tx = optax.chain(optax.sgd(0.1), params_ema(TRACED[name], update_every=3))
    history, state = walk(tx, jit=True)
    np.testing.assert_allclose(
        get_params_ema(state)["w"], expected(TRACED[name], history, 3), rtol=1e-6
    )


@pytest.mark.parametrize("name", ALL)
def test_a_file_describes_the_schedule_or_says_null_and_is_loaded_without_it(tmp_path, name):
    tx = params_ema(0.5)
    state = tx.init({"w": jnp.ones(2)})
    file = save_params_ema(tmp_path, state, decay=ALL[name])
    described = DESCRIBED[name][1] if name in DESCRIBED else None
    assert read_state(file).record.schedule == described
    loaded = load_params_ema(file, state)
    np.testing.assert_array_equal(loaded.params_ema["w"], state.params_ema["w"])


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(("answer", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_weight_that_is_known_while_tracing_is_refused(answer, message, jit):
    """A constant also in jit, where the number of the update is not known."""
    schedule = Constant(decay=0)
    object.__setattr__(schedule, "weight", lambda count, span=1, xp=None: answer)
    with pytest.raises((ema.ArgumentError, ema.ArgumentTypeError)) as error:
        walk(params_ema(schedule), jit)
    at = "" if jit else " at update 1"
    assert str(error.value) == f"the weight of `{schedule!r}` {message}{at}"


def test_a_wrong_weight_is_refused_at_its_update_where_nothing_is_traced():
    with pytest.raises(ema.ArgumentError, match="got nan at update 3"):
        walk(params_ema(Answers(float("nan"), at=3)), jit=False)


@pytest.mark.parametrize(
    "weight",
    [
        lambda count, span=1, xp=None: xp.full(1, 0.5) * count,
        lambda count, span=1, xp=None: xp.full(6, 0.5) * count,
        lambda count, span=1, xp=None: jax.lax.complex(count, count),
        lambda count, span=1, xp=None: count > 0,
    ],
)
def test_a_traced_weight_that_is_no_number_is_refused(weight):
    """One of shape (6,) would weigh each element of these params on its own."""
    schedule = Constant(decay=0)
    object.__setattr__(schedule, "weight", weight)
    with pytest.raises(ema.ArgumentTypeError, match="must be a number, got an array of shape"):
        walk(params_ema(schedule), jit=True)


@pytest.mark.parametrize("accumulator_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", TRACED)
def test_nnx_follows_any_schedule_inside_jit(name, accumulator_dtype):
    """Also one with an array or a dict in a field, which nnx can neither hash nor compare."""

    @nnx.jit
    def update(average, model):
        average.update(model)

    def make():
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return model, EMA(model, TRACED[name], accumulator_dtype=accumulator_dtype)

    first = make()[1]
    for average in (first, make()[1], copy.deepcopy(first), nnx.clone(first)):
        model = make()[0]
        history = [average.params.kernel[...]]
        for _ in range(4):
            model.kernel[...] = model.kernel[...] + jnp.float32(1)
            history.append(jnp.copy(model.kernel[...]))
            update(average, model)
        assert type(average.decay) is type(TRACED[name])
        allowed = 1e-6 if accumulator_dtype is None else 0.02
        np.testing.assert_allclose(
            np.asarray(average.params.kernel[...], np.float64),
            expected(TRACED[name], history, 1),
            rtol=allowed,
            atol=allowed,
        )


def test_nnx_compiles_anew_for_another_schedule_and_not_for_an_equal_one():
    """Two objects of a class that compares nothing are two schedules, whatever their hash."""
    traces = []

    @nnx.jit
    def update(average, model):
        traces.append(average.decay)
        average.update(model)

    class Plain(ema.Schedule):
        def __init__(self, decay):
            self.decay = decay

        def weight(self, count, span=1, xp=None):
            return 1 - self.decay

    ends = []
    for schedule in (Plain(0.25), Plain(0.75), Constant(decay=0.5), Constant(decay=0.5), 0.5, 0.5):
        model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        average = EMA(model, schedule)
        start = model.kernel[...]
        model.kernel[...] = start + jnp.float32(1)
        update(average, model)
        ends.append(round(float((average.params.kernel[...] - start)[0, 0]), 4))
    assert ends == [0.75, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert len(traces) == 4


def test_the_schedule_of_an_nnx_average_can_be_exchanged():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    average = EMA(model, Constant(decay=0.5))
    average.decay = 0.25
    assert average.decay == ema.ConstantDecay(decay=0.25)
    start = model.kernel[...]
    model.kernel[...] = start + jnp.float32(1)
    average.update(model)
    np.testing.assert_allclose(average.params.kernel[...] - start, 0.75, rtol=1e-6)


@pytest.mark.parametrize("name", ["warmup", "JAX array"])
def test_linen_follows_any_schedule(name):
    model, x = linen.Dense(2), jnp.ones((1, 3))
    state = EMATrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=optax.chain(optax.sgd(0.1), params_ema(TRACED[name])),
    )
    step = jax.jit(
        lambda state: state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    )
    history = [state.params["kernel"]]
    for _ in range(5):
        state = step(state)
        history.append(state.params["kernel"])
    np.testing.assert_allclose(
        state.ema_params["kernel"], expected(TRACED[name], history, 1), rtol=1e-6, atol=1e-7
    )


def test_several_averages_may_mix_schedules():
    schedules = {"mine": TRACED["warmup"], "ours": ema.HalfLife(steps=3)}
    history, state = walk(optax.chain(optax.sgd(0.1), params_ema(schedules)), jit=True)
    for name, schedule in schedules.items():
        np.testing.assert_allclose(
            get_params_ema(state, name=name)["w"], expected(schedule, history, 1), rtol=1e-6
        )


def test_a_narrow_average_asks_no_schedule_of_floats_for_its_advice(recwarn):
    """The advice about rounding to nearest is given where the schedule can be asked for it."""
    params_ema(
        ArrayTable(jnp.array([0.5])), accumulator_dtype=jnp.bfloat16, stochastic_rounding=False
    )
    params_ema(UNDESCRIBED["function"], accumulator_dtype=jnp.bfloat16, stochastic_rounding=False)
    params_ema(Attributes(0.5, 0.5), accumulator_dtype=jnp.bfloat16, stochastic_rounding=False)
    assert not recwarn.list
