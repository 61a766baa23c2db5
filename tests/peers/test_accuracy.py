"""How far each peer and ours are from the recursion in float64, at the same constant decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ema.torch_backend import EMAModel

DECAY = 0.9999
UPDATES = 10_000
STALLED_UPDATES = 200
BY_CHANCE = 1.1  # the largest of 1 024 rounding errors is that uncertain

# settings under which the decay is constant, and whether the first update copies
TORCH_PEERS = {
    "AveragedModel": ({"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}, 1),
    "diffusers": ({"decay": DECAY, "min_decay": DECAY}, 1),
    "ema-pytorch": (
        {"beta": DECAY, "min_value": DECAY, "update_after_step": 0, "update_every": 1},
        1,
    ),
    "torch-ema": ({"decay": DECAY, "use_num_updates": False}, 0),
    "timm": ({"decay": DECAY}, 0),
}


@pytest.fixture(scope="module")
def sequence():
    """Parameters of 10 000 steps, noise of the size of the weights: (steps + 1, 1024)."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=1024) + rng.normal(size=(UPDATES + 1, 1024))).astype(np.float32)


def oracle(sequence, update_after_step=0):
    """The recursion in float64."""
    average = sequence[update_after_step].astype(np.float64)
    for params in sequence[1 + update_after_step :]:
        average = DECAY * average + (1 - DECAY) * params
    return average


def run_torch(sequence, make):
    """Averages after all steps; ``make(model)`` gives an object with ``update``."""
    model = nn.ParameterList([nn.Parameter(torch.from_numpy(sequence[0].copy()))])
    average = make(model)
    for params in torch.from_numpy(sequence[1:]):
        model[0].data.copy_(params)
        average.update()
    return average


@pytest.fixture(scope="module")
def error_of_ours(sequence):
    """``error_of_ours(update_after_step)``."""
    errors = {}

    def error(update_after_step):
        if update_after_step not in errors:
            ours = run_torch(
                sequence, lambda m: EMAModel(m, DECAY, update_after_step=update_after_step)
            )
            (average,) = ours.averaged_parameters().values()
            errors[update_after_step] = distance(average, oracle(sequence, update_after_step))
        return errors[update_after_step]

    return error


def distance(average, reference):
    average = average.detach().numpy() if isinstance(average, torch.Tensor) else average
    return np.abs(np.asarray(average, np.float64) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_torch_peers_are_no_closer_to_float64(sequence, make_peer, error_of_ours, name):
    """Ours is as accurate as each; those that add a correction, as ours does, round alike."""
    settings, update_after_step = TORCH_PEERS[name]
    peer = run_torch(sequence, lambda model: make_peer(name, model, **settings))
    (average,) = peer.averages()
    error = distance(average, oracle(sequence, update_after_step))
    print(f"relative error {error:.2g}, ours {error_of_ours(update_after_step):.2g}")
    assert error_of_ours(update_after_step) <= BY_CHANCE * error


def run_incremental_update(sequence):
    def update(average, params):
        return optax.incremental_update(params, average, 1 - DECAY), None

    return jax.jit(lambda s: jax.lax.scan(update, s[0], s[1:])[0])(jnp.asarray(sequence))


def run_nnx(sequence):
    def variable(value):
        return nnx.List([nnx.Param(value)])

    graph, state = nnx.split(nnx.EMA(variable(jnp.asarray(sequence[0])), decay=DECAY))

    def update(state, params):
        average = nnx.merge(graph, state)
        average.update(variable(params))
        return nnx.state(average), None

    state = jax.jit(lambda state, s: jax.lax.scan(update, state, s)[0])(
        state, jnp.asarray(sequence[1:])
    )
    (average,) = jax.tree.leaves(nnx.as_pure(nnx.merge(graph, state).params))
    return average


@pytest.mark.parametrize("run", [run_incremental_update, run_nnx])
def test_the_form_of_two_products_is_biased(sequence, error_of_ours, run):
    """``decay · average + (1 − decay) · params`` in float32 drifts by more than 5e-5 of itself."""
    error = distance(run(sequence), oracle(sequence))
    print(f"relative error {error:.2g}, ours {error_of_ours(0):.2g}")
    assert error > 5e-5
    assert error_of_ours(0) <= 1e-5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AveragedModel", {"multi_avg_fn": get_ema_multi_avg_fn(0.999)}),
        ("diffusers", {"decay": 0.999, "min_decay": 0.999}),
        (
            "ema-pytorch",
            {"beta": 0.999, "min_value": 0.999, "update_after_step": 0, "update_every": 1},
        ),
        ("torch-ema", {"decay": 0.999, "use_num_updates": False}),
        ("timm", {"decay": 0.999, "stochastic_rounding": False}),
        ("nnx.EMA", {"decay": 0.999}),
        ("incremental_update", {"step_size": 0.001}),
    ],
)
def test_bfloat16_averages_of_the_peers_never_move(make_peer, name, settings):
    """The average of bfloat16 parameters is bfloat16 in every peer, and float32 in ours."""
    model = nn.ParameterList([nn.Parameter(torch.ones(8, dtype=torch.bfloat16))])
    peer, ours = make_peer(name, model, **settings), EMAModel(model, decay=0.999)
    peer.update()  # those that copy do it here
    model[0].data.fill_(1.1)
    for _ in range(STALLED_UPDATES):
        peer.update()
        ours.update()
    assert (np.asarray(as_float(peer.averages()[0])) == 1.0).all()
    (average,) = ours.averaged_parameters().values()
    expected = 1.1015625 - 0.1015625 * 0.999**STALLED_UPDATES  # bfloat16(1.1)
    assert distance(average, np.full(8, expected)) <= 1e-6


def test_bfloat16_averages_of_timm_move_in_the_mean(make_peer):
    """By default it rounds at random: its mean follows, and each element is a bfloat16 away."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))])
    peer = make_peer("timm", model, decay=0.999)
    model[0].data.fill_(1.1)
    for _ in range(STALLED_UPDATES):
        peer.update()
    average = as_float(peer.averages()[0])
    expected = 1.1015625 - 0.1015625 * 0.999**STALLED_UPDATES
    assert abs(average.mean() - expected) <= 1e-3
    assert np.abs(average - expected).max() >= 2**-8


def as_float(array):
    return array.detach().float().numpy() if isinstance(array, torch.Tensor) else array


def test_state_of_torch_ema_holds_the_backup_of_a_swap(make_peer):
    """Saved inside its own context the peer's state has a second model in it; ours has not."""
    model = nn.Linear(4, 4)
    peer = make_peer("torch-ema", model, decay=0.9).peer
    with peer.average_parameters():
        assert len(peer.state_dict()["collected_params"]) == 2
    ours = EMAModel(model, decay=0.9)
    clean = ours.state_dict()
    with ours.use_ema():
        assert ours.state_dict().keys() == clean.keys()
        assert ours.state_dict()["averages"].keys() == clean["averages"].keys()


def test_diffusers_updates_what_it_is_given_of_a_model(make_peer):
    """With fewer parameters than averages the peer stops at the shorter list, without a word."""
    model = nn.Linear(4, 4)
    peer = make_peer("diffusers", model, decay=0.9).peer
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    peer.step([model.weight])
    assert (peer.shadow_params[0] == 7.0).all()
    assert not (peer.shadow_params[1] == 7.0).any()


def test_averaged_model_averages_integers(make_peer):
    """``use_buffers=True`` averages the number of batches that BatchNorm has seen."""
    model = nn.BatchNorm1d(4)
    peer = make_peer(
        "AveragedModel", model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(10):
        model(torch.randn(8, 4))
        peer.update()
    assert model.num_batches_tracked == 10
    assert peer.peer.module.num_batches_tracked < 10
