"""One file for two frameworks: the same bytes, and the same bits from there on."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import ema
from ema import ArgumentError, ArgumentTypeError, EMAModel
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema

SCHEDULES = [
    ema.ConstantDecay(decay=0.99),
    ema.PowerFunction(gamma=6.94),
    ema.InverseGammaWarmup(decay=0.999),
]
PRECISIONS = {
    "plain": {},
    "compensated": {"compensated": True},
    "bfloat16": {"dtype": torch.bfloat16, "seed": 5},
    "guarded": {"on_nonfinite": "skip"},
}
NAN_AT = (7, 600, 1200)
"""Steps after which a parameter is NaN, for guarded averages."""
SHAPES = {"a.weight": (37, 20), "a.bias": (37,), "b.weight": (5, 37), "b.bias": ()}


def values_of(step, dtype, precision=None):
    """The parameters after a step, the same for both."""
    rng = np.random.default_rng(step)
    values = {
        name: torch.tensor(rng.normal(size=shape), dtype=torch.float32).to(dtype)
        for name, shape in SHAPES.items()
    }
    if step in NAN_AT and precision == PRECISIONS["guarded"]:
        values["b.bias"].fill_(float("nan"))
    return values


def to_jax(values):
    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}
    nested = {"a": {}, "b": {}}
    for name, value in values.items():
        module, key = name.split(".")
        nested[module][key] = jnp.asarray(value.float().numpy(), dtype[value.dtype])
    return nested


class TorchSide:
    def __init__(self, schedule, dtype, start, precision):
        self.precision = precision
        self.params = {n.replace(".", "_"): nn.Parameter(v) for n, v in start.items()}
        model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
        for name, value in start.items():
            module, key = name.split(".")
            model[module].register_parameter(key, nn.Parameter(value.clone()))
        self.model, self.dtype = model, dtype
        self.average = EMAModel(model, schedule, **precision)

    def run(self, first, last):
        for step in range(first, last):
            self.model.load_state_dict(values_of(step, self.dtype, self.precision))
            self.average.update()

    def save(self, path):
        return self.average.save(path)

    def load(self, path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.average.load(path)

    def averages(self):
        return {name: v.float().numpy() for name, v in self.average.averaged_parameters().items()}


class JaxSide:
    def __init__(self, schedule, dtype, start, precision):
        self.schedule, self.dtype, self.precision = schedule, dtype, precision
        options = dict(precision)
        if "dtype" in options:
            options["accumulator_dtype"] = jnp.bfloat16
            del options["dtype"]
        tx = params_ema(schedule, **options)
        self.params = to_jax(start)
        self.state = tx.init(self.params)

        @jax.jit
        def step(state, params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zeros, state, params)
            return state, optax.apply_updates(params, updates)

        self.step = step

    def run(self, first, last):
        for step in range(first, last):
            values = to_jax(values_of(step, self.dtype, self.precision))
            self.state, self.params = self.step(self.state, values)

    def save(self, path):
        return save_params_ema(
            path,
            self.state,
            decay=self.schedule,
            update_after_step=0,
            update_every=1,
            seed=self.precision.get("seed"),
        )

    def load(self, path):
        self.state = load_params_ema(path, self.state)

    def averages(self):
        tree = get_params_ema(self.state)
        return {name: np.asarray(tree[name[0]][name[2:]], np.float32) for name in SHAPES}


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return sum(
        int((a.view(np.uint32) != b.view(np.uint32)).sum())
        for a, b in ((np.atleast_1d(ours[n]), np.atleast_1d(theirs[n])) for n in ours)
    )


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [(s, "plain") for s in SCHEDULES] + [(SCHEDULES[0], p) for p in PRECISIONS if p != "plain"],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_jax_and_back_500_updates_on_each_side_and_no_element_differs(
    tmp_path, schedule, precision, dtype
):
    start, options = values_of(0, dtype), PRECISIONS[precision]
    first, second, third = (
        side(schedule, dtype, start, options) for side in (TorchSide, JaxSide, TorchSide)
    )
    first.run(1, 501)
    first.save(tmp_path / "1")
    second.load(tmp_path / "1")
    second.run(501, 1001)
    second.save(tmp_path / "2")
    third.load(tmp_path / "2")
    third.run(1001, 1501)
    for side in (TorchSide, JaxSide):
        alone = side(schedule, dtype, start, options)
        alone.run(1, 1501)
        assert differing(third.averages(), alone.averages()) == 0
        if precision == "guarded":
            assert third.average.skipped == len(NAN_AT)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_write_the_same_bytes(tmp_path, precision):
    files = []
    for side in (TorchSide, JaxSide):
        start = values_of(0, torch.float32)
        one = side(SCHEDULES[0], torch.float32, start, PRECISIONS[precision])
        one.run(1, 6)
        files.append(one.save(tmp_path / side.__name__))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (
            {"weight": np.transpose},
            ArgumentError,
            "must have new names of tensors, got `weight`",
        ),
        (
            {"kernel": "transpose"},
            ArgumentTypeError,
            "must hold functions, but does not for `kernel`",
        ),
        ("transpose", ArgumentTypeError, "must be a table or a function, got 'transpose'"),
    ],
)
def test_a_transform_that_would_not_be_made_is_refused(tmp_path, transform, error, message):
    """A square kernel would come in as it is, and nobody would notice."""
    EMAModel(nn.Linear(3, 3)).save(tmp_path)
    state = params_ema(0.9).init({"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)})
    with pytest.raises(error, match=message):
        load_params_ema(tmp_path, state, rename={"weight": "kernel"}, transform=transform)
    model = nn.Module()
    model.kernel, model.bias = (nn.Parameter(torch.zeros(size)) for size in ((3, 3), (3,)))
    ema_model = EMAModel(model)
    with pytest.raises(error, match=message):
        ema_model.load(tmp_path, rename={"weight": "kernel"}, transform=transform)


def test_a_linear_layer_and_a_kernel_are_transposes_of_each_other(tmp_path):
    linear = nn.Linear(2, 3)
    file = EMAModel(linear).save(tmp_path)
    state = params_ema(0.9).init({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    for transform in (
        {"kernel": np.transpose},
        lambda name, array: array.T if name == "kernel" else array,
    ):
        loaded = load_params_ema(file, state, rename={"weight": "kernel"}, transform=transform)
        expected = linear.weight.detach().numpy().T
        np.testing.assert_array_equal(loaded.params_ema["kernel"], expected)
    with pytest.raises(ema.ArgumentError, match=r"`transform` must have new .* got `weight`"):
        load_params_ema(
            file, state, rename={"weight": "kernel"}, transform={"weight": np.transpose}
        )
