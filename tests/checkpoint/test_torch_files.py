"""``EMAModel.save`` and ``.load``: the state through the file, bit for bit or not at all."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import ema
from ema import ArgumentError, ArgumentTypeError, CheckpointError, EMAModel, EMAWarning, StateError
from ema.checkpoint import read_state
from ema.torch_backend.saving.ranks import _digest


class Small(nn.Module):
    """Channels last, a buffer, a frozen parameter, a tied one and a complex one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.norm.bias.requires_grad_(requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.tied = self.scale
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = Small()
    return model, EMAModel(model, **{"decay": 0.9, **options})


def train(model, ema_model, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema_model.update()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": ema.DebiasedDecay(decay=0.9), "update_after_step": 5},
        {"decay": ema.PowerFunction(gamma=3), "update_after_step": 2, "update_every": 2},
        {"buffers": "average", "dtype": torch.float64},
    ],
)
@pytest.mark.parametrize("at", [0, 3, 8])
def test_resumed_from_the_file_equals_uninterrupted(tmp_path, options, at):
    model, ema_model = make(**options)
    train(model, ema_model, at, 1)
    ema_model.save(tmp_path)
    resumed_model, resumed = make(seed=7, **options)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load(tmp_path)
    assert_same(resumed.averaged_parameters(), ema_model.averaged_parameters())
    for pair in ((model, ema_model), (resumed_model, resumed)):
        train(*pair, 10, 2)
    assert (resumed.step, resumed.count) == (ema_model.step, ema_model.count)
    assert_same(resumed.averaged_parameters(), ema_model.averaged_parameters())


def test_the_file_says_what_the_state_dict_says(tmp_path):
    model, ema_model = make(decay=0.5, update_every=2)
    train(model, ema_model, 5, 1)
    state, stored = ema_model.state_dict(), read_state(ema_model.save(tmp_path))
    record = stored.record
    assert (record.step, record.count) == (5, 2)
    assert record.schedule == ema.ConstantDecay(decay=0.5)
    assert (record.update_after_step, record.update_every) == (0, 2)
    assert list(record.not_averaged) == state["not_averaged"] == ["norm.bias"]
    assert stored.tensors.keys() == state["averages"].keys()


def test_a_save_during_a_swap_holds_the_averages(tmp_path):
    model, ema_model = make()
    train(model, ema_model, 3, 1)
    outside = ema_model.save(tmp_path / "outside").read_bytes()
    with ema_model.use_ema():
        assert ema_model.save(tmp_path / "inside").read_bytes() == outside
        with pytest.raises(StateError, match="load is not possible while averages are swapped in"):
            ema_model.load(tmp_path / "outside")


def test_another_schedule_is_told_at_the_call(tmp_path):
    make(decay=0.5)[1].save(tmp_path)
    _, other = make(decay=0.9)
    with pytest.warns(EMAWarning, match=r"'decay': 0\.5") as caught:
        other.load(tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(2))), r"`scale` has shape \(2,\)"),
        (lambda m: m.register_parameter("new", nn.Parameter(torch.ones(2))), "missing: `new`"),
        (lambda m: delattr(m, "phase"), "unexpected: `phase`"),
    ],
)
def test_a_file_of_another_model_changes_nothing(tmp_path, change, message):
    file = make()[1].save(tmp_path)
    model = Small()
    del model.tied
    change(model)
    ema_model = EMAModel(model)
    train(model, ema_model, 2, 1)
    before = ema_model.state_dict()
    with pytest.raises(CheckpointError, match=message) as error:
        ema_model.load(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert_same(ema_model.state_dict()["averages"], before["averages"])
    assert ema_model.step == 2


def test_names_and_layouts_of_another_model(tmp_path):
    """The same model with its layer under another name, its weight transposed, one tensor more."""
    source = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(1, 1)})
    EMAModel(source).save(tmp_path)
    target = nn.Module()
    target.kernel = nn.Parameter(torch.zeros(2, 3))
    target.bias = nn.Parameter(torch.zeros(3))
    ema_model = EMAModel(target)
    table = {"a.weight": "kernel", "a.bias": "bias", "b.weight": None, "b.bias": None}
    for rename in (table, table.get):
        for transform in (
            {"kernel": torch.t},
            lambda name, tensor: tensor.T if name == "kernel" else tensor,
        ):
            ema_model.reset()
            ema_model.load(tmp_path, rename=rename, transform=transform)
            averages = ema_model.averaged_parameters()
            assert torch.equal(averages["kernel"], source["a"].weight.T)
            assert torch.equal(averages["bias"], source["a"].bias)


def test_a_rename_that_cannot_be_is_refused(tmp_path):
    _, ema_model = make()
    ema_model.save(tmp_path)
    with pytest.raises(ArgumentError, match="must have names of the file, got `scael`"):
        ema_model.load(tmp_path, rename={"scael": "x"})
    with pytest.raises(
        ArgumentError, match=r"gives `conv\.bias` and `scale` the same name, `scale`"
    ):
        ema_model.load(tmp_path, rename={"conv.bias": "scale"})
    with pytest.raises(CheckpointError, match="missing: `scale`"):
        ema_model.load(tmp_path, rename={"scale": None})


def test_a_transform_that_would_do_nothing_is_refused(tmp_path):
    """Of a square weight nobody would notice: the old name, or one with a slip in it."""
    source, target = (nn.ModuleDict({name: nn.Linear(2, 2)}) for name in "ab")
    EMAModel(source).save(tmp_path)
    ema_model = EMAModel(target)
    before = ema_model.state_dict()["averages"]
    rename = {"a.weight": "b.weight", "a.bias": "b.bias"}
    for name in ("a.weight", "b.wieght"):
        with pytest.raises(ArgumentError, match=f"`transform` must have new .* got `{name}`"):
            ema_model.load(tmp_path, rename=rename, transform={name: torch.t})
    with pytest.raises(ArgumentTypeError, match="`transform` must be a table or a function"):
        ema_model.load(tmp_path, rename=rename, transform=[torch.t])
    assert_same(ema_model.state_dict()["averages"], before)


def test_notes_are_kept_from_load_to_save(tmp_path):
    _, ema_model = make()
    ema_model.save(tmp_path, metadata={"run": "17"})
    _, other = make()
    other.load(tmp_path)
    assert read_state(other.save(tmp_path / "b")).record.extra == {"run": "17"}
    assert read_state(other.save(tmp_path / "c", metadata={})).record.extra == {}


def test_a_loaded_average_has_memory_of_its_own(tmp_path):
    """The file may go, or be written over, as soon as it is loaded."""
    model, ema_model = make()
    train(model, ema_model, 2, 1)
    file = ema_model.save(tmp_path)
    before = ema_model.state_dict()["averages"]
    _, other = make(seed=5)
    other.load(file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(other.averaged_parameters(), before)


def test_no_warning_where_the_schedule_is_the_same(tmp_path):
    _, ema_model = make()
    ema_model.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()[1].load(tmp_path)


@pytest.mark.parametrize("shift", range(1, 16))
def test_tensors_may_stand_anywhere(tmp_path, edit, shift):
    """Another writer need not align them; torch crashes on complex numbers that are not."""
    model = nn.ParameterList([nn.Parameter(torch.randn(5, dtype=torch.complex128))])
    ema_model = EMAModel(model)
    file = ema_model.save(tmp_path)
    edit(file, lambda header: json.dumps(header).encode() + b" " * shift)
    other = EMAModel(model)
    other.load(file)
    assert_same(other.averaged_parameters(), ema_model.averaged_parameters())


def test_complex128_goes_as_pairs_of_reals(tmp_path):
    model = nn.ParameterList([nn.Parameter(torch.randn(2, dtype=torch.complex128))])
    ema_model = EMAModel(model)
    file = ema_model.save(tmp_path)
    with torch.no_grad():
        model[0].zero_()
    other = EMAModel(model)
    other.load(file)
    assert_same(other.averaged_parameters(), ema_model.averaged_parameters())


def test_a_remainder_whose_name_is_taken_is_refused(tmp_path):
    """Nothing is written; without remainders both names are fine."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.ones(2)))
    model.register_parameter("remainder/w", nn.Parameter(torch.ones(2)))
    with pytest.raises(
        CheckpointError, match="`remainder/w` is also the name of the remainder of `w`"
    ):
        EMAModel(model, 0.9, compensated=True).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    EMAModel(model, 0.9).save(tmp_path)


ODD = {
    "row of a column": lambda: torch.randn(3, 5)[:1, 0],
    "three strides": lambda: torch.empty_strided((1, 1, 1), (100, 7, 3)).normal_(),
    "stride zero": lambda: torch.tensor(2.0).expand(1, 1),
    "scalar inside": lambda: torch.randn(3)[1],
    "column": lambda: torch.randn(3, 5)[:, 1:2],
    "bfloat16": lambda: torch.randn(3, 5).bfloat16()[:1, 0],
    "float64": lambda: torch.randn(3, 5).double()[:1, 0],
    "complex": lambda: torch.randn(3, 5, dtype=torch.complex64)[:1, 0],
    "nothing": lambda: torch.empty_strided((0,), (7,)),
    "nothing in rows": lambda: torch.empty_strided((0, 5), (1, 7)),
    "nothing expanded": lambda: torch.zeros(1, 0).expand(5, 0),
    "complex nothing": lambda: torch.empty_strided((0,), (7,), dtype=torch.complex64),
}
"""Tensors of one element, of none, or of one column, which PyTorch calls contiguous or nearly so."""


@pytest.mark.parametrize("update_after_step", [0, 5])
@pytest.mark.parametrize("kind", ODD)
def test_strides_of_one_element_or_of_none_do_not_matter(tmp_path, kind, update_after_step):
    """The files, exports, conversions and digests are those of the same values without strides."""
    odd = ODD[kind]()
    models = [nn.ParameterList([odd]), nn.ParameterList([torch.empty(odd.shape, dtype=odd.dtype)])]
    with torch.no_grad():
        models[1][0].copy_(odd)
    options = {"decay": 0.9, "update_after_step": update_after_step}
    averages = [EMAModel(model, **options) for model in models]
    for _ in range(3):
        step = torch.randn(odd.shape, dtype=odd.dtype)
        for model, average in zip(models, averages, strict=True):
            with torch.no_grad():
                model[0].add_(step)
            average.update()
    for number, average in enumerate(averages):
        folder = tmp_path / str(number)
        average.save(folder / "saved")
        average.export(folder / "export.safetensors")
        torch.save(average.state_dict(), folder / "state.pt")
        ema.convert(folder / "state.pt", folder / "converted")
        torch.save({"0": models[number][0].detach()}, folder / "live.pt")
        ema.convert(folder / "live.pt", folder / "live", averaged=True, step=1)
        average.load(folder / "saved")
        ema.convert({"0": models[number][0].detach()}, folder / "memory", averaged=True, step=1)
    names = ("saved/ema", "export", "converted/ema", "live/ema", "memory/ema")
    for file in (f"{name}.safetensors" for name in names):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file
    assert _digest(averages[0].averaged_parameters()["0"]) == _digest(
        averages[1].averaged_parameters()["0"]
    )
    assert _digest(models[0][0]) == _digest(models[1][0])
