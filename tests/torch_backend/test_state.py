"""The state: whole, plain, validated before anything is assigned."""

import copy
import importlib
import io
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import ema
from ema import CheckpointError, EMAWarning
from ema.torch_backend import EMAModel
from tests.torch_helpers import another, assert_same, step


def run(model, ema_model, step, steps):
    for _ in range(steps):
        step(model)
        ema_model.update()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only=True is its default


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": 0.9, "update_every": 3},
        {"decay": ema.DebiasedDecay(decay=0.9), "update_after_step": 5},
        {"decay": ema.PowerFunction(gamma=3), "update_after_step": 2, "update_every": 2},
        {"decay": 0.5, "buffers": "average", "dtype": torch.float64},
    ],
)
@pytest.mark.parametrize("at", [1, 4, 7])
def test_resumed_equals_uninterrupted(model, options, at):
    """Saved and loaded at any step, the run ends with the same bits."""
    ema_model = EMAModel(model, **options)
    run(model, ema_model, step, at)
    state = through_a_file(ema_model.state_dict())
    resumed_model = another()
    resumed_model.load_state_dict(model.state_dict())
    resumed = EMAModel(resumed_model, **options)
    resumed.load_state_dict(state)
    assert_same(resumed.averaged_parameters(), ema_model.averaged_parameters())
    for which, average in ((model, ema_model), (resumed_model, resumed)):
        torch.manual_seed(1)
        run(which, average, step, 10)
    assert (resumed.step, resumed.count) == (ema_model.step, ema_model.count)
    assert_same(resumed.averaged_parameters(), ema_model.averaged_parameters())


def test_a_state_is_plain_and_its_tensors_are_copies(model):
    ema_model = EMAModel(model, ema.HalfLife(steps=10))
    run(model, ema_model, step, 2)
    state = ema_model.state_dict()
    before = copy.deepcopy(state["averages"])
    run(model, ema_model, step, 2)
    with ema_model.use_ema():
        assert all(torch.equal(state["averages"][name], before[name]) for name in before)
    assert state["schedule"] == {"schedule": "HalfLife", "steps": 10.0}
    assert (state["format_version"], state["step"], state["count"]) == (1, 2, 2)


def test_a_state_taken_during_a_swap_holds_the_averages(model):
    ema_model = EMAModel(model, 0.9)
    run(model, ema_model, step, 3)
    before = ema_model.state_dict()["averages"]
    with ema_model.use_ema():
        inside = ema_model.state_dict()["averages"]
    assert_same(inside, before)


def test_a_resumed_average_is_read_as_the_uninterrupted_one_would_be(model, load):
    """Before, at and after ``update_after_step``: after the optimizer's step and after the update."""
    options = {"decay": 0.5, "update_after_step": 4}
    uninterrupted = EMAModel(model, **options)
    for at in range(8):
        resumed_model = another()
        resumed_model.load_state_dict(model.state_dict())
        resumed = EMAModel(resumed_model, **options)
        load(uninterrupted, resumed)
        pairs = [(model, copy.deepcopy(uninterrupted)), (resumed_model, resumed)]
        pairs[0] = (pairs[0][1].model, pairs[0][1])
        for later in range(3):
            averages = []
            for moved, average in pairs:
                torch.manual_seed(later)
                averages.append(average.averaged_parameters())
                step(moved)  # the optimizer's
                averages.append(average.averaged_parameters())
                with average.use_ema():
                    averages.append(dict(moved.named_parameters()))
                if average.step < 4:
                    assert_same(average.averaged_parameters(), dict(moved.named_parameters()))
                average.update()
                averages.append(average.averaged_parameters())
                assert (average.step, average.count) == (at + later + 1, max(0, at + later - 3))
            for ours, theirs in zip(averages[:4], averages[4:], strict=True):
                assert_same(ours, theirs)
        step(model)
        uninterrupted.update()


@pytest.fixture(params=["state", "file"])
def load(request, tmp_path):
    """From one average into another one, which is what is fixed here: a folder."""

    def through_a_state(source, target):
        target.load_state_dict(through_a_file(source.state_dict()))

    def through_the_file(source, target):
        target.load(source.save(tmp_path))

    return through_a_state if request.param == "state" else through_the_file


@pytest.mark.parametrize(
    ("saved_with", "at", "after", "is_live", "count"),
    [
        (0, 3, 9, True, 0),  # the constructor has not begun at step 3
        (0, 5, 5, True, 0),  # it begins at step 5: with the weights of that step
        (9, 5, 5, True, 0),  # which is also what the state holds
        (9, 3, 0, False, 0),  # it has begun, and the state holds the weights of its step
        (9, 3, 2, False, 0),
        (0, 5, 4, False, 5),
    ],
)
def test_the_update_after_step_of_the_constructor_counts(
    model, load, saved_with, at, after, is_live, count
):
    ema_model = EMAModel(model, 0.5, update_after_step=saved_with)
    run(model, ema_model, step, at)
    resumed_model = another()
    resumed_model.load_state_dict(model.state_dict())
    resumed = EMAModel(resumed_model, 0.5, update_after_step=after)
    with pytest.warns(EMAWarning, match="update_after_step"):
        load(ema_model, resumed)
    assert (resumed.step, resumed.count) == (at, count)
    live = dict(resumed_model.named_parameters())
    assert_same(resumed.averaged_parameters(), live if is_live else ema_model.averaged_parameters())
    step(resumed_model)
    moved = torch.equal(resumed.averaged_parameters()["first.bias"], resumed_model.first.bias)
    assert moved is (at < after)
    run(resumed_model, resumed, step, 3)
    assert resumed.count == count + min(3, max(0, at + 3 - after))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "while another model is swapped"])
def test_before_the_start_weights_other_than_those_of_the_state_are_told(model, elsewhere):
    """The average is the live weights, which the user may have forgotten to load."""
    with EMAModel(another()).use_ema() if elsewhere else nullcontext():
        _check_that_other_weights_are_told(model, another, step)


def _check_that_other_weights_are_told(model, another, step):
    ema_model = EMAModel(model, update_after_step=5)
    run(model, ema_model, step, 2)
    fresh = another()
    fresh.second.load_state_dict(model.second.state_dict())
    loaded = EMAModel(fresh, update_after_step=5)
    message = (
        "state is of step 2, and through step 5 .* differ .*: `first.weight`, `first.bias`, `n"
    )
    with pytest.warns(EMAWarning, match=message) as caught:
        loaded.load_state_dict(ema_model.state_dict())
    assert caught[0].filename == __file__
    assert torch.equal(loaded.averaged_parameters()["first.weight"], fresh.first.weight)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(loaded.averaged_parameters()["first.weight"], model.first.weight)
    loaded.load_state_dict(ema_model.state_dict())


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
def test_before_the_start_other_dtypes_are_no_other_weights(model, options, live):
    model.to(live)
    ema_model = EMAModel(model, update_after_step=5, **options)
    run(model, ema_model, step, 2)
    for resumed in (EMAModel(model, update_after_step=5), EMAModel(model, update_after_step=5)):
        resumed.load_state_dict(ema_model.state_dict())
        assert all(
            map(
                torch.equal,
                resumed.averaged_parameters().values(),
                [parameter.float() for parameter in model.parameters()],
            )
        )


def test_several_averages_before_the_start(model, tmp_path):
    """One file after the other: each average equals the live weights, whatever was loaded first."""
    options = {"decay": {"a": 0.5, "b": 0.9}, "update_after_step": 3}
    ema_model = EMAModel(model, **options)
    run(model, ema_model, step, 2)
    resumed = EMAModel(model, **options)
    for name in ("a", "b"):
        resumed.load(ema_model.save(tmp_path / name, name=name), name=name)
    step(model)
    for name in ("a", "b"):
        assert torch.equal(resumed.averaged_parameters(name)["first.bias"], model.first.bias)


def test_a_state_of_another_model_is_refused_with_all_differences(model):
    """Missing, unexpected and misshapen tensors stand in one message, and nothing has changed."""
    other = nn.ModuleDict(
        {
            "first": nn.Linear(4, 9),
            "norm": nn.BatchNorm1d(8),
            "extra": nn.Linear(2, 2, dtype=torch.complex64),
        }
    )
    state = EMAModel(other, 0.9).state_dict()
    ema_model = EMAModel(model, 0.9)
    run(model, ema_model, step, 2)
    before = ema_model.state_dict()
    with pytest.raises(CheckpointError) as error:
        ema_model.load_state_dict(state)
    for part in (
        "missing: `second.weight`, `second.bias`",
        "unexpected: `extra.weight`, `extra.bias`",
        "`first.weight` has shape (8, 4), the state has (9, 4)",
    ):
        assert part in str(error.value)
    after = ema_model.state_dict()
    assert (after["step"], after["count"]) == (2, 2)
    assert all(torch.equal(after["averages"][n], before["averages"][n]) for n in after["averages"])


def damage(**changes):
    return lambda state: {**state, **changes}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: [state], "a state is a dict, got list"),
        (lambda state: state["averages"], "not a state of an EMAModel: missing: `format_version`"),
        (lambda state: {k: v for k, v in state.items() if k != "count"}, "missing: `count`"),
        (damage(format_version=2), "`format_version` must be 1, got 2"),
        (damage(step=-1), r"`step` must be an integer in \[0, 2\*\*63\), got -1"),
        (damage(step=True), r"`step` must be an integer in \[0, 2\*\*63\), got True"),
        (damage(count=99), "`count` must not exceed `step`"),
        (damage(update_every=0), r"`update_every` must be an integer in \[1, 2\*\*63\), got 0"),
        (damage(averages=[1]), "`averages` must be a mapping"),
        (damage(not_averaged="all"), "`not_averaged` must be a list"),
        (damage(schedule="HalfLife"), "`schedule` must be a mapping"),
        (
            lambda s: {**s, "averages": {**s["averages"], "first.bias": 3.0}},
            r"`averages\['first.bias'\]` must be a tensor",
        ),
        (
            lambda s: {**s, "averages": {n: a.to("meta") for n, a in s["averages"].items()}},
            r"`averages\['first.weight'\]` must be a dense tensor with values, .* on meta",
        ),
        (
            lambda s: {**s, "averages": {n: a.to_sparse() for n, a in s["averages"].items()}},
            r"`averages\['first.weight'\]` must be a dense tensor with values, got torch.sparse",
        ),
        (
            lambda s: {**s, "averages": {**s["averages"], "first.bias": torch.ones(8).int()}},
            "`first.bias` has dtype torch.float32, the state has torch.int32",
        ),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(model, spoil, message):
    ema_model = EMAModel(model, 0.9)
    run(model, ema_model, step, 2)
    before = {name: a.clone() for name, a in ema_model.averaged_parameters().items()}
    with pytest.raises(CheckpointError, match=message):
        ema_model.load_state_dict(spoil(ema_model.state_dict()))
    assert ema_model.step == 2
    after = ema_model.averaged_parameters()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_settings_warn_and_the_constructor_wins(model):
    ema_model = EMAModel(model, 0.9, update_every=2)
    run(model, ema_model, step, 4)
    other = EMAModel(another(), 0.99, update_every=2)
    with pytest.warns(EMAWarning, match=r"0\.9.*0\.99"):
        other.load_state_dict(ema_model.state_dict())
    assert other.schedule == ema.ConstantDecay(decay=0.99)
    same = EMAModel(another(), 0.9, update_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(ema_model.state_dict())


def test_what_was_frozen_when_it_was_saved_is_not_missing(model):
    """A new process does not know what was frozen: the state does."""
    model.first.requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5)
    run(model, ema_model, step, 2)
    fresh = another()
    fresh.load_state_dict(model.state_dict())
    loaded = EMAModel(fresh, 0.5)
    loaded.load_state_dict(ema_model.state_dict())
    assert loaded.averaged_parameters().keys() == ema_model.averaged_parameters().keys()
    with loaded.use_ema():
        assert torch.equal(fresh.first.weight, model.first.weight)
    live = fresh.first.weight.detach().clone()
    loaded.update()  # it requires grad here, so it joins
    assert torch.equal(loaded.averaged_parameters()["first.weight"], live)


def test_what_was_averaged_stays_averaged_in_a_frozen_model(model):
    """A model that is loaded for inference, all frozen but one, takes the whole average."""
    ema_model = EMAModel(model, 0.5)
    run(model, ema_model, step, 2)
    frozen = another()
    frozen.first.requires_grad_(requires_grad=False)
    loaded = EMAModel(frozen, 0.5)
    loaded.load_state_dict(ema_model.state_dict())
    assert_same(loaded.averaged_parameters(), ema_model.averaged_parameters())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("after", [0, 9])
def test_copies_and_pickles_go_on_alone(model, duplicate, after):
    """Model and average are copied together, and the copy updates its own."""
    ema_model = EMAModel(model, 0.5, update_after_step=after)
    run(model, ema_model, step, 3)
    other = duplicate(ema_model)
    assert_same(other.averaged_parameters(), ema_model.averaged_parameters())
    before = {name: a.clone() for name, a in ema_model.averaged_parameters().items()}
    for average in (ema_model, other):
        torch.manual_seed(1)
        run(average.model, average, step, 8)
    assert_same(other.averaged_parameters(), ema_model.averaged_parameters())
    assert other.model is not model
    run(other.model, other, step, 1)
    with other.use_ema():
        pass
    assert not torch.equal(other.averaged_parameters()["first.bias"], before["first.bias"])


def test_a_model_that_holds_its_own_average_can_be_copied(model):
    model.__dict__["average"] = EMAModel(model, 0.5)
    run(model, model.average, step, 2)
    other = copy.deepcopy(model)
    assert other.average.model is other
    step(other)
    other.average.update()
    assert other.average.step == 3


def test_pickle_size_is_that_of_the_tensors():
    """Small averages share an allocation; each is saved as what it is."""
    model = nn.ParameterList([nn.Parameter(torch.randn(256)) for _ in range(100)])
    assert len(pickle.dumps(EMAModel(model))) < 3 * 100 * 256 * 4


def _in_a_process(ema_model, results):
    ema_model.update()
    with ema_model.use_ema():
        results.send({n: a.numpy().copy() for n, a in ema_model.averaged_parameters().items()})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_is_started_gets_a_copy(method, monkeypatch):
    """With the model, as ``torch.multiprocessing`` sends it; our averages stay ours."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    target = importlib.import_module(Path(__file__).stem)._in_a_process
    model = nn.Linear(80, 80)
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    before = {n: a.clone() for n, a in ema_model.averaged_parameters().items()}
    context = torch.multiprocessing.get_context(method)
    results, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(ema_model, theirs))
    process.start()
    theirs.close()  # a process that fails ends the pipe
    try:
        theirs = results.recv()
    finally:
        process.join()
    assert all(torch.equal(a, before[n]) for n, a in ema_model.averaged_parameters().items())
    ema_model.update()
    ours = ema_model.averaged_parameters()
    assert all(torch.equal(ours[name], torch.from_numpy(theirs[name])) for name in ours)
