"""``buffers="average"`` averages statistics, and leaves alone what an average would break."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from ema import EMAWarning
from ema.torch_backend import EMAModel


class Masked(nn.Module):
    """A layer with a mask of infinities and a statistic that may become infinite later."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("seen", torch.ones(3))


def buffers_of(average):
    live = dict(average.model.named_buffers())
    return {name for name in average.averaged_parameters() if name in live}


def grow(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1)


@pytest.mark.parametrize("spectral_norm", [parametrizations.spectral_norm, old_spectral_norm])
def test_the_vectors_of_a_spectral_norm_keep_their_length(spectral_norm):
    model = nn.Sequential(spectral_norm(nn.Conv1d(3, 5, 2)), nn.BatchNorm1d(5))
    average = EMAModel(model, 0.9, buffers="average")
    for _ in range(20):
        model(torch.randn(2, 3, 8)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(torch.randn_like(parameter))
        average.update()
    assert buffers_of(average) == {"1.running_mean", "1.running_var"}
    assert len(average.left_alone) == 2
    assert all("spectral norm" in reason for reason in average.left_alone.values())
    with average.use_ema():
        for name in average.left_alone:
            length = dict(model.named_buffers())[name].norm()
            assert length == pytest.approx(1.0, abs=1e-5)


def test_ranges_and_scales_of_quantizers_are_left_alone():
    """They are known by their class, wherever they are in the model and whatever they hold."""
    model = nn.Sequential(nn.Linear(2, 2), FakeQuantize(observer=MinMaxObserver), MinMaxObserver())
    model(torch.randn(4, 2))
    average = EMAModel(model, 0.9, buffers="average")
    average.update()
    assert buffers_of(average) == set()
    floating = {n for n, b in model.named_buffers() if b.is_floating_point()}
    assert average.left_alone.keys() == floating
    assert "1.scale" in floating


def test_a_mask_is_left_alone_and_the_output_is_finite():
    model = Masked()
    average = EMAModel(model, 0.5, buffers="average", on_nonfinite="skip")
    with torch.no_grad():
        model.seen.add_(1)
    average.update()
    assert (average.count, average.skipped) == (1, 0)
    assert buffers_of(average) == {"seen"}
    assert "infinities" in average.left_alone["mask"]
    with average.use_ema():
        assert torch.equal(model.mask, torch.full((3, 3), -torch.inf).triu(1))
        assert torch.equal(model.seen, torch.full((3,), 1.5))


def test_what_was_decided_at_first_sight_holds_for_good():
    """Also after a reset and in copies: neither the mask nor the statistic changes sides."""
    model = Masked()
    average = EMAModel(model, 0.5, buffers="average")
    with torch.no_grad():
        model.mask.fill_(0)
        model.seen.fill_(torch.inf)
    average.reset()
    for one in (average, copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        one.update()
        assert buffers_of(one) == {"seen"}
        assert one.left_alone.keys() == {"mask"}


@pytest.mark.parametrize("pattern", ["mask", "*mask", "*.mask", "m?sk"])
def test_a_rule_that_names_the_buffer_averages_it(pattern):
    model = nn.Sequential(Masked()) if "." in pattern else Masked()
    average = EMAModel(model, 0.5, buffers={pattern: "average"})
    average.update()
    assert any(name.endswith("mask") for name in buffers_of(average))
    assert average.left_alone == {}


@pytest.mark.parametrize("pattern", ["*", "0.*", "**"])
def test_a_rule_for_all_buffers_of_a_module_does_not_name_one(pattern):
    average = EMAModel(nn.Sequential(Masked()), 0.5, buffers={pattern: "average"})
    assert buffers_of(average) == {"0.seen"}


def test_buffers_that_nobody_asked_for_are_not_listed():
    assert EMAModel(Masked(), 0.5).left_alone == {}


def test_a_state_that_has_an_average_of_a_mask_goes_on_with_it():
    """What a state holds is averaged, see ``load_state_dict``."""
    model = Masked()
    with torch.no_grad():
        model.mask.fill_(0)
    state = EMAModel(model, 0.5, buffers="average").state_dict()
    average = EMAModel(Masked(), 0.5, buffers="average")
    average.load_state_dict(state)
    average.update()
    assert buffers_of(average) == {"mask", "seen"}


def test_the_first_refused_update_names_the_tensor_once():
    """Where every update is refused a whole run would pass without an average."""
    model = Masked()
    average = EMAModel(model, 0.5, buffers="average", on_nonfinite="skip")
    with torch.no_grad():
        model.seen[1] = torch.nan
    with pytest.warns(
        EMAWarning, match="every update so far: `seen` holds NaN or infinity"
    ) as seen:
        average.update()
    average.update()
    assert [warning.filename for warning in seen] == [__file__]
    with torch.no_grad():
        model.seen[1] = 0
    average.update()
    with torch.no_grad():
        model.seen[1] = torch.nan
    average.update()
    assert (average.count, average.skipped) == (1, 3)
