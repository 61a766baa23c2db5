"""What is averaged, and under which names."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from ema import ArgumentError, ArgumentTypeError, CheckpointError, EMAWarning, ModelError
from ema.torch_backend import EMAModel
from tests.torch_helpers import step


def names(ema_model):
    return set(ema_model.averaged_parameters())


def test_what_requires_grad_is_averaged(model):
    """Frozen parameters, integers and buffers are not."""
    model.first.weight.requires_grad_(requires_grad=False)
    assert names(EMAModel(model)) == {
        "first.bias",
        "norm.weight",
        "norm.bias",
        "second.weight",
        "second.bias",
    }


def test_include_tracks_only_these_from_the_start_even_if_frozen(model):
    model.first.requires_grad_(requires_grad=False)
    assert names(EMAModel(model, include="first.*")) == {"first.weight", "first.bias"}
    assert names(EMAModel(model, include=["*.weight"], exclude=["norm.*"])) == {
        "first.weight",
        "second.weight",
    }


def test_exclude_leaves_out(model):
    assert "norm.weight" not in names(EMAModel(model, exclude="norm.*"))


@pytest.mark.parametrize(
    "options", [{"include": "frist.*"}, {"exclude": ["typo"]}, {"buffers": {"typo": "average"}}]
)
def test_a_pattern_that_matches_nothing_is_refused(model, options):
    with pytest.raises(ModelError, match=r"must match something, got '(frist|typo)"):
        EMAModel(model, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"include": 3}, ArgumentTypeError),
        ({"exclude": [3]}, ArgumentTypeError),
        ({"buffers": "avg"}, ArgumentError),
        ({"buffers": {"norm.*": "mean"}}, ArgumentError),
        ({"buffers": None}, ArgumentTypeError),
        ({"include": (name for name in ["first.*"])}, ArgumentTypeError),
    ],
)
def test_rules_of_the_wrong_kind_are_refused(model, options, error):
    with pytest.raises(error, match=f"`{next(iter(options))}` must"):
        EMAModel(model, **options)


def test_buffers_are_averaged_on_request(model):
    """The rule "average" takes the float ones, a mapping decides by name, integers never."""
    every = EMAModel(model, 0.5, buffers="average")
    some = EMAModel(model, 0.5, buffers={"*.running_mean": "average"})
    mean = model.norm.running_mean.clone()
    model(torch.randn(16, 4))
    every.update()
    assert names(every) - names(some) == {"norm.running_var"}
    averaged = every.averaged_parameters()["norm.running_mean"].clone()
    torch.testing.assert_close(averaged, 0.5 * (mean + model.norm.running_mean))
    with every.use_ema():
        assert torch.equal(model.norm.running_mean, averaged)


def test_copied_buffers_are_the_models_own(model):
    """With the default rule a swap leaves BatchNorm statistics alone."""
    ema_model = EMAModel(model)
    model(torch.randn(16, 4))
    before = model.norm.running_mean.clone()
    ema_model.update()
    with ema_model.use_ema():
        assert torch.equal(model.norm.running_mean, before)


def test_the_same_parameter_under_two_names_is_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    ema_model = EMAModel(model, 0.5)
    assert names(ema_model) == {"a.weight", "a.bias", "b.bias"}
    step(model)
    ema_model.update()
    live = model["a"].weight.detach().clone()
    with ema_model.use_ema():
        assert model["b"].weight is model["a"].weight
        assert not torch.equal(model["b"].weight, live)
    assert torch.equal(model["b"].weight, live)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_parameters_on_one_storage_are_averaged_once(transposed):
    """Swapped twice they would come back wrong."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    shared = model["a"].weight.data
    model["b"].weight = nn.Parameter(shared.t() if transposed else shared)
    ema_model = EMAModel(model, 0.5)
    before = shared.clone()
    with torch.no_grad():
        shared.add_(1)
    ema_model.update()
    assert names(ema_model) == {"a.weight"}
    live = shared.clone()
    with ema_model.use_ema():
        expected = before.lerp(live, 0.5)
        assert torch.equal(model["a"].weight, expected)
        assert torch.equal(model["b"].weight, expected.t() if transposed else expected)
    assert torch.equal(model["a"].weight, live)


def test_memory_that_overlaps_in_part_is_refused():
    base = torch.randn(10)
    model = nn.ParameterDict({"head": nn.Parameter(base[:6]), "tail": nn.Parameter(base[4:])})
    with pytest.raises(ModelError, match="`head` and `tail` share a part of their memory"):
        EMAModel(model)


def test_neighbors_in_one_storage_are_fine():
    """Views that do not overlap, as flattened RNN weights are, are averaged and swapped."""
    base = torch.randn(10)
    model = nn.ParameterDict({"head": nn.Parameter(base[:6]), "tail": nn.Parameter(base[6:])})
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    live = base.clone()
    with ema_model.use_ema():
        assert not torch.equal(base, live)
    assert torch.equal(base, live)


def test_expanded_and_sparse_parameters_are_refused():
    expanded = nn.ParameterList([nn.Parameter(torch.randn(1).expand(4))])
    with pytest.raises(ModelError, match="expanded"):
        EMAModel(expanded)
    sparse = nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())])
    with pytest.raises(ModelError, match="layout"):
        EMAModel(sparse)


def test_nothing_to_average_is_refused(model):
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ModelError, match="nothing to average"):
        EMAModel(model)
    with pytest.raises(ModelError, match="nothing to average"):
        EMAModel(nn.Identity())


def test_no_module_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"`model` must be a torch.nn.Module, got dict"):
        EMAModel({})


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.ModuleDict({"first": m})["first"],
    ],
    ids=["compile", "DataParallel", "both", "bare"],
)
def test_wrapping_does_not_change_the_names(model, wrap):
    """A state of the bare model fits the wrapped one and the other way round."""
    bare = EMAModel(model, 0.5)
    wrapped = EMAModel(wrap(model), 0.5)
    assert names(wrapped) == names(bare)
    step(model)
    bare.update()
    wrapped.load_state_dict(bare.state_dict())
    bare.load_state_dict(wrapped.state_dict())


def test_checkpoint_wrappers_inside_do_not_change_the_names(model):
    plain = names(EMAModel(model))
    model.first = checkpoint_wrapper(model.first)
    assert names(EMAModel(model)) == plain


def test_a_submodule_called_module_keeps_its_name():
    """Wrappers are known by type, not by the name of their child."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})})
    assert names(EMAModel(model)) == {"module._orig_mod.weight", "module._orig_mod.bias"}


def test_names_that_collide_without_prefixes_are_refused(model):
    wrapped = nn.DataParallel(model)
    wrapped.register_parameter("first", None)
    wrapped.add_module("norm", nn.BatchNorm1d(8))
    with pytest.raises(ModelError, match=r"`norm.weight`"):
        EMAModel(wrapped)


def test_models_that_cannot_be_copied_are_averaged():
    """weight_norm and a module that refuses deepcopy: nothing of the model is copied."""

    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    model = nn.Sequential(Stubborn(3, 3), weight_norm(nn.Linear(3, 3)))
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    with ema_model.use_ema():
        model(torch.randn(2, 3))


@pytest.mark.parametrize("after", [0, 2])
def test_lazy_modules_join_when_they_are_built(after):
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    ema_model = EMAModel(model, 0.5, update_after_step=after)
    ema_model.update()
    assert names(ema_model) == {"1.weight", "1.bias"}
    model(torch.randn(2, 5))
    ema_model.update()
    assert names(ema_model) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    before = ema_model.averaged_parameters()["0.weight"].clone()
    assert torch.equal(before, model[0].weight)
    step(model)
    ema_model.update()
    expected = before.lerp(model[0].weight.detach(), 0.5)
    assert torch.equal(ema_model.averaged_parameters()["0.weight"], expected)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_lazy_buffers_join_when_they_are_built(buffers):
    """Also those of a layer without parameters, of which nothing else tells."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False))
    ema_model = EMAModel(model, 0.5, buffers=buffers)
    ema_model.update()
    with ema_model.use_ema():
        assert names(ema_model) == {"0.weight", "0.bias"}
    model(torch.randn(4, 3))
    ema_model.update()
    statistics = {"1.running_mean", "1.running_var"} if buffers == "average" else set()
    assert names(ema_model) == {"0.weight", "0.bias"} | statistics


def test_a_model_that_is_not_built_yet_takes_no_average():
    ema_model = EMAModel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)), 0.5)
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ModelError, match=r"missing: `0.weight`, `0.bias`$"):
        ema_model.apply_ema(lazy)
    with pytest.raises(ModelError, match=r"missing: `0.weight`, `0.bias`, `1.running_mean`, "):
        ema_model.copy_to(lazy)


def test_a_conjugated_view_is_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64).conj())
    with pytest.raises(ModelError, match=r"`weight` .* conjugates .* resolve_conj"):
        EMAModel(model)


class SharedModule(nn.Module):
    """A module under two names, or two modules that share their parameter."""

    def __init__(self, *, shared=True):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        encoder = {"linear": nn.Linear(4, 4), "embed": self.embedding}
        if not shared:
            encoder["embed"] = nn.Embedding(5, 4)
            encoder["embed"].weight = self.embedding.weight
        self.encoder = nn.ModuleDict(encoder)


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_module_is_known_under_all_of_its_names(shared):
    """As a tied parameter is, in patterns that include and patterns that exclude."""
    rest = {"encoder.linear.weight", "encoder.linear.bias"}
    model = SharedModule(shared=shared)
    assert names(EMAModel(model, include="encoder.*")) == {"embedding.weight", *rest}
    assert names(EMAModel(model, include="encoder.embed.*")) == {"embedding.weight"}
    assert names(EMAModel(model, exclude="encoder.embed.weight")) == rest
    assert names(EMAModel(model, exclude="embedding.*")) == rest


def test_buffers_of_a_shared_module_are_known_under_all_of_their_names():
    norm = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    average = EMAModel(model, buffers={"b.*.running_mean": "average"})
    assert "a.running_mean" in names(average)


def test_a_module_that_holds_itself_is_walked_once():
    model = nn.Module()
    model.child = nn.Linear(2, 2)
    model.child.parent = model
    assert names(EMAModel(model)) == {"child.weight", "child.bias"}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_a_shared_module_and_a_tied_parameter_take_each_others_average(ours, theirs):
    """In another model, in a state and in a file."""
    model, other = SharedModule(shared=ours), SharedModule(shared=theirs)
    average = EMAModel(model, 0.5)
    step(model)
    average.update()
    average.copy_to(other)
    expected = average.averaged_parameters()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name])
    restored = EMAModel(other, 0.5)
    restored.load_state_dict(average.state_dict())
    for name, value in restored.averaged_parameters().items():
        assert torch.equal(value, expected[name])


class Renamed(nn.Module):
    """The modules of :class:`SharedModule` in another order, so that another name comes first."""

    def __init__(self):
        super().__init__()
        inner = SharedModule()
        self.encoder, self.embedding = inner.encoder, inner.embedding


def test_another_of_the_names_may_come_first_elsewhere(tmp_path):
    """A state, a file and another model know a shared tensor by whichever name they have."""
    model, other = SharedModule(), Renamed()
    average = EMAModel(model, 0.5, compensated=True)
    step(model)
    average.update()
    assert "embedding.weight" in names(average)
    again = EMAModel(other, 0.5, compensated=True)
    assert "encoder.embed.weight" in names(again)
    again.load_state_dict(average.state_dict())
    loaded = EMAModel(Renamed(), 0.5, compensated=True)
    loaded.load(average.save(tmp_path / "average"))
    average.copy_to(other)
    expected = average.averaged_parameters()["embedding.weight"]
    for found in (
        again.averaged_parameters()["encoder.embed.weight"],
        loaded.averaged_parameters()["encoder.embed.weight"],
        other.embedding.weight,
    ):
        assert torch.equal(found, expected)


def test_a_model_with_the_two_names_untied_is_refused():
    untied = SharedModule(shared=False)
    untied.encoder["embed"].weight = nn.Parameter(torch.randn(5, 4))
    tied = SharedModule()
    with pytest.raises(ModelError, match=r"unexpected: `encoder.embed.weight`$"):
        EMAModel(tied).copy_to(untied)
    with pytest.raises(ModelError, match=r"missing: `encoder.embed.weight`$"):
        EMAModel(untied).copy_to(tied)
    with pytest.raises(CheckpointError, match=r"missing: `encoder.embed.weight`$"):
        EMAModel(untied).load_state_dict(EMAModel(tied).state_dict())
    with pytest.raises(CheckpointError, match=r"unexpected: `encoder.embed.weight`$"):
        EMAModel(tied).load_state_dict(EMAModel(untied).state_dict())


def meta(model):
    """What offload hooks leave between two forward passes."""
    return model.to("meta")


def test_an_update_of_parameters_on_the_meta_device_is_refused():
    """At the first one that is due, and with nothing counted."""
    average = EMAModel(meta(nn.Linear(2, 2)), 0.5, update_after_step=1, update_every=2)
    average.update()
    average.update()
    with pytest.raises(ModelError, match=r"`weight`, `bias` have no values, .* on the meta device"):
        average.update()
    assert (average.step, average.count) == (2, 0)


def test_parameters_that_go_to_the_meta_device_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = EMAModel(model, 0.5)
    average.update()
    meta(model[1])
    with pytest.raises(ModelError, match=r"`1.weight` is on the meta device"):
        average.update()
    assert (average.step, average.count) == (1, 1)


def test_some_parameters_on_the_meta_device_are_warned_of_once():
    model = nn.Sequential(nn.Linear(2, 2), meta(nn.Linear(2, 2)))
    average = EMAModel(model, 0.5)
    with pytest.warns(EMAWarning, match=r"`1.weight`, `1.bias` are on the meta device") as seen:
        average.update()
    average.update()
    assert [warning.filename for warning in seen] == [__file__]
    assert average.count == 2


def autoencoder(order="ed"):
    """A decoder that is tied to the transposed encoder, by its memory."""
    model = nn.Module()
    for name in order:
        setattr(model, name, nn.Linear(4, 4, bias=False))
    model.d.weight = nn.Parameter(model.e.weight.detach().t())
    return model


@pytest.mark.parametrize("order", ["ed", "de"])
def test_a_weight_that_is_tied_to_a_view_keeps_its_form_everywhere(order, tmp_path):
    """In files, state dicts and other models, whichever of the two comes first there."""
    model = autoencoder()
    average = EMAModel(model, 0.5)
    with torch.no_grad():
        model.e.weight.mul_(2)
    average.update()
    right = average.averaged_parameters()["e.weight"].t().clone()
    copied, lent, loaded = (autoencoder(order) for _ in range(3))
    average.copy_to(copied)
    resumed = EMAModel(loaded, 0.5)
    resumed.load(average.save(tmp_path / "average"))
    with average.use_ema(lent), resumed.use_ema():
        assert torch.equal(lent.d.weight, right)
        assert torch.equal(loaded.d.weight, right)
    assert torch.equal(copied.d.weight, right)
    assert torch.equal(average.averaged_state_dict()["d.weight"], right)
    exported = load_file(average.export(tmp_path / "model.safetensors"))
    assert torch.equal(exported["d.weight"], right)
    assert torch.equal(exported["e.weight"], right.t())
