"""Compensated and bfloat16 averages, and the guard against NaN and Inf."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import ema
from ema import EMAModel
from ema.rounding import key_of, mix, stream_of


def bag(**tensors: torch.Tensor) -> nn.Module:
    """A module with these parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
    return module


def same(ours, theirs) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours == theirs


def shapes() -> dict[str, torch.Tensor]:
    """Small and large, odd, of several dimensions, and not in row-major order."""
    return {
        "scalar": torch.randn(()),
        "odd": torch.randn(17),
        "matrix": torch.randn(37, 41),
        "large": torch.randn(3, 50_021),
        "channels_last": torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
        "transposed": torch.randn(130, 70).t(),
        "strided": torch.randn(6, 10)[:, ::2],
    }


def rounded(exact: float, name: str, index: int, count: int, seed: int) -> float:
    """The rule of ``ema.rounding``, with Python's own numbers."""
    bits = int(np.float32(exact).view(np.uint32))
    r = mix(index ^ key_of(stream_of(name, seed), count)) >> 16
    return float(np.uint32((bits + r) & 0xFFFF0000).view(np.float32))


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
def test_random_bits_depend_on_seed_count_name_and_row_major_index_alone(live):
    model = bag(**{name: tensor.to(live) for name, tensor in shapes().items()})
    ours = EMAModel(model, decay=0.9, dtype=torch.bfloat16, seed=5)
    exact = EMAModel(model, decay=0.9)
    for count in (1, 2):
        before = {n: a.float() for n, a in ours.averaged_parameters().items()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape).to(p))
        ours.update()
        for name, average in ours.averaged_parameters().items():
            assert average.dtype == torch.bfloat16
            p = dict(model.named_parameters())[name].detach().float()
            t = before[name].contiguous().lerp(p.contiguous(), float(np.float32(1 - 0.9)))
            where = torch.randint(0, t.numel(), (200,)).tolist() if t.numel() > 2_000 else None
            flat, result = t.reshape(-1), average.float().reshape(-1)
            for index in where or range(t.numel()):
                expected = rounded(flat[index].item(), name, index, count, seed=5)
                assert result[index].item() == expected
    assert exact.averaged_parameters()["odd"].dtype == torch.float32


@pytest.mark.parametrize("number", [1, 2])
def test_rounding_is_unbiased(number):
    """The mean over many elements is the exact value, up to four standard errors."""
    n, start, target, decay = 300_000, 1.0, 1.3, 0.95
    model = bag(w=torch.full((n,), start))
    average = EMAModel(model, decay=decay, dtype=torch.bfloat16)
    with torch.no_grad():
        model.w.fill_(target)
    expected = start
    for _ in range(number):
        average.update()
        expected += (1 - decay) * (target - expected)
    values = average.averaged_parameters()["w"].double()
    assert values.unique().numel() > 1
    error = values.std().item() / math.sqrt(n)
    assert abs(values.mean().item() - expected) < 4 * error


def test_a_bfloat16_average_arrives_where_one_rounded_to_nearest_never_moves():
    def run(**options):
        model = bag(w=torch.ones(1_000))
        average = EMAModel(model, decay=0.999, dtype=torch.bfloat16, **options)
        with torch.no_grad():
            model.w.fill_(1.1)
        for _ in range(10_000):
            average.update()
        return average.averaged_parameters()["w"].double().mean().item()

    assert run() == pytest.approx(1.1, abs=1e-3)
    with pytest.warns(ema.EMAWarning, match="does not move at decay 0.999"):
        assert run(stochastic_rounding=False) == 1.0


def test_what_is_not_finite_stays_so():
    """NaN, also one whose bits are all set, and Inf of either sign."""
    all_set = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32)
    specials = torch.cat([torch.tensor([math.nan, math.inf, -math.inf]), all_set])
    model = bag(w=torch.zeros(5_000))
    average = EMAModel(model, decay=0.9, dtype=torch.bfloat16)
    with torch.no_grad():
        model.w.copy_(specials.repeat(1_000))
    average.update()
    values = average.averaged_parameters()["w"].float().reshape(1_000, 5)
    assert values[:, [0, 3, 4]].isnan().all()
    assert (values[:, 1] == math.inf).all()
    assert (values[:, 2] == -math.inf).all()


OPTIONS = [
    {"compensated": True},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "seed": 2**64 - 1, "on_nonfinite": "skip"},
    {"compensated": True, "dtype": torch.float64},
    {"dtype": torch.float64, "on_nonfinite": "skip"},
    {"compensated": True, "decay": {"short": 0.9, "long": 0.9999}},
    {"dtype": torch.bfloat16, "decay": {"short": 0.9, "long": 0.9999}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["state", "file", "pickle"])
def test_interrupted_is_uninterrupted(options, way, tmp_path):
    """Through the state, the file and a copy, bit for bit, remainders and skipped updates too."""
    torch.manual_seed(3)
    values = {**shapes(), "complex": torch.randn(5, dtype=torch.complex64)}
    model = bag(**values)
    options = {"decay": 0.999, "update_every": 2, **options}
    whole, first = EMAModel(model, **options), EMAModel(model, **options)

    def train(*averages, steps):
        for step in range(steps):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=1e-3)
                kept = model.odd[3].item()
                if step == 3 and options.get("on_nonfinite") == "skip":
                    model.odd[3] = math.nan
            for average in averages:
                average.update()
            with torch.no_grad():
                model.odd[3] = kept

    train(whole, first, steps=8)
    second = EMAModel(model, **options)
    if way == "state":
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt"))
    elif way == "file":
        for name in options["decay"] if isinstance(options["decay"], dict) else [None]:
            path = tmp_path / f"{name}.safetensors"
            first.save(path, name=name)
            second.load(path, name=name)
    else:
        model, (whole, second) = copy.deepcopy((model, (whole, first)))
    train(whole, second, steps=8)
    if options.get("on_nonfinite") == "skip":
        assert (second.count, second.skipped) == (6, 2)
    for name in whole.schedules:
        ours, theirs = whole.averaged_parameters(name), second.averaged_parameters(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    states = whole.state_dict(), second.state_dict()
    assert ("remainders" in states[0]) == options.get("compensated", False)
    assert same(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_compensated_averages_have_no_dead_zone(dtype):
    """20 000 noisy updates at decay 0.99999 end within 2e-7 of float64, 1.9e-5 without."""
    torch.manual_seed(0)
    n = 1_000
    base = torch.randn(n)
    model = bag(w=base.to(dtype))
    averages = {
        compensated: EMAModel(model, decay=0.99999, compensated=compensated)
        for compensated in (True, False)
    }
    oracle = model.w.detach().double()
    for _ in range(20_000):
        with torch.no_grad():
            model.w.copy_(base + 0.1 * torch.randn(n))
        for average in averages.values():
            average.update()
        oracle += -math.expm1(math.log(0.99999)) * (model.w.detach().double() - oracle)
    error = {
        compensated: (
            (average.averaged_parameters()["w"] - oracle).abs().max() / oracle.abs().max()
        )
        for compensated, average in averages.items()
    }
    assert error[True] <= 2e-7
    assert error[False] > 1e-6


def test_a_remainder_is_0_where_the_params_are_copied():
    model = bag(w=torch.randn(100))
    average = EMAModel(model, decay=ema.UniformAverage(), compensated=True)
    with torch.no_grad():
        model.w.normal_()
    average.update()
    assert torch.equal(average.averaged_parameters()["w"], model.w)
    assert not average.state_dict()["remainders"]["w"].any()
    with torch.no_grad():
        model.w.normal_()
    average.update()
    average.update()
    assert average.state_dict()["remainders"]["w"].any()
    average.reset()
    assert not average.state_dict()["remainders"]["w"].any()


def test_a_swap_leaves_the_remainders_alone():
    model = bag(w=torch.randn(100))
    average = EMAModel(model, decay=0.99, compensated=True)
    for _ in range(5):
        with torch.no_grad():
            model.w.normal_()
        average.update()
    before = average.state_dict()
    with average.use_ema():
        during = average.state_dict()
    assert same(before, during)
    assert same(before, average.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compensated", [True, False])
class TestNonfinite:
    def test_a_skipped_update_changes_nothing_but_what_is_counted(self, value, live, compensated):
        model = bag(v=torch.randn(9).to(live), w=torch.randn(40, 200).to(live))
        average = EMAModel(model, 0.9, on_nonfinite="skip", compensated=compensated)
        average.update()
        before = average.state_dict()
        with torch.no_grad():
            model.w[39, 199] = value
        average.update()
        after = average.state_dict()
        assert (after.pop("step"), before.pop("step")) == (2, 1)
        assert (after.pop("skipped"), before.pop("skipped")) == (1, 0)
        assert same(after, before)
        with torch.no_grad():
            model.w[39, 199] = 1.0
        average.update()
        assert (average.step, average.count, average.skipped) == (3, 2, 1)

    def test_raising_changes_nothing_and_names_the_tensor(self, value, live, compensated):
        model = bag(v=torch.randn(9).to(live), w=torch.randn(40, 200).to(live))
        average = EMAModel(model, 0.9, on_nonfinite="raise", compensated=compensated)
        with torch.no_grad():
            model.v[0] = value
        before = average.state_dict()
        with pytest.raises(ema.errors.StateError, match=r"must be finite to be averaged, got `v`$"):
            average.update()
        assert same(average.state_dict(), before)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_vector_whose_memory_was_replaced_is_looked_at_where_it_is(on_nonfinite):
    model = nn.LayerNorm(8)
    average = EMAModel(model, 0.5, on_nonfinite=on_nonfinite)
    model.weight.data = torch.full((8,), torch.nan)
    if on_nonfinite == "raise":
        with pytest.raises(ema.StateError, match="got `weight`"):
            average.update()
    else:
        with pytest.warns(ema.EMAWarning, match="refused every update so far: `weight` holds NaN"):
            average.update()
        average.update()  # warns once
        assert average.skipped == 2
    assert torch.equal(average.averaged_parameters()["weight"], torch.ones(8))


def test_large_numbers_are_no_infinities():
    """The sum that is looked at first may overflow where the weights do not."""
    model = bag(w=torch.full((1_000,), 3e38), h=torch.full((1_000,), 60_000.0).half())
    average = EMAModel(model, 0.9, on_nonfinite="skip")
    average.update()
    assert (average.count, average.skipped) == (1, 0)


def test_a_state_without_remainders_is_gone_on_from_and_one_with_them_warns_where_they_drop():
    model = bag(w=torch.randn(50))
    plain, compensated = EMAModel(model, 0.9), EMAModel(model, 0.9, compensated=True)
    for _ in range(3):
        with torch.no_grad():
            model.w.normal_()
        plain.update()
        compensated.update()
    with pytest.warns(ema.EMAWarning, match="remainders of compensated averages, which are dropp"):
        plain.load_state_dict(compensated.state_dict())
    compensated.load_state_dict(plain.state_dict())
    assert not compensated.state_dict()["remainders"]["w"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensated": 1}, "`compensated` must be True or False, got 1"),
        ({"stochastic_rounding": None}, "`stochastic_rounding` must be True or False, got None"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"seed": 2**64}, "`seed` must be below 2\\*\\*64"),
        ({"on_nonfinite": "ignore"}, "must be 'propagate', 'skip' or 'raise', got 'ignore'"),
        ({"compensated": True, "dtype": torch.bfloat16}, "`compensated` must be False where"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ema.EMAError, match=message):
        EMAModel(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("v"), "missing: `v`"),
        (lambda r: r.update(u=torch.zeros(2)), "unexpected: `u`"),
        (lambda r: r.update(v=torch.zeros(3)), "`v` has shape"),
        (lambda r: r.update(v=1.0), "must be a tensor"),
    ],
)
def test_remainders_that_are_not_those_of_the_averages_are_refused(change, message):
    model = bag(v=torch.randn(2), w=torch.randn(50))
    average = EMAModel(model, 0.9, compensated=True)
    average.update()
    state = average.state_dict()
    before = average.state_dict()
    change(state["remainders"])
    with pytest.raises(ema.errors.CheckpointError, match=message):
        average.load_state_dict(state)
    assert same(average.state_dict(), before)
