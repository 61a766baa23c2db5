"""Modules that averaged_module() makes: averaged weights in a module of its own, always up to date."""

import copy
import gc
import io
import pickle
import threading
import weakref

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from ema import ArgumentError, EMAWarning, HalfLife, ModelError, StateError
from ema.torch_backend import EMAModel

SIZE = 70  # 70 × 70 elements have an allocation of their own, a bias of 70 shares one


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)).to(dtype)


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter))


def train(model, ema_model, steps=2):
    for _ in range(steps):
        perturb(model)
        ema_model.update()


def output(model, *inputs):
    """What a model gives in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        result = model.eval()(*inputs)
    for module, mode in modes.items():
        module.training = mode
    return result.logits if hasattr(result, "logits") else result


def addresses(module):
    """Where the tensors of a module lie."""
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def assert_shows(module, ema_model, name=None):
    """A module holds the averages in the dtypes of the live model, and what else that has."""
    live = dict(ema_model.model.state_dict())
    averages = ema_model.averaged_parameters(name)
    for key, tensor in module.state_dict().items():
        expected = averages.get(key, live[key])
        assert torch.equal(tensor, expected.to(tensor.dtype)), key


same_dtype_or_other = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["shared", "copied"]
)


def test_the_parameters_are_the_memory_of_the_averages():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert type(module) is nn.Sequential
    averages = ema_model.averaged_parameters()
    for name, parameter in module.named_parameters():
        assert type(parameter) is nn.Parameter
        assert not parameter.requires_grad
        assert parameter.data_ptr() == averages[name].data_ptr()
    assert not addresses(module) & addresses(model)


def test_no_weight_is_copied_on_the_way():
    """Not even for a moment: a copy of a large model must not need its memory twice."""
    sizes = []

    class Cloned(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in {torch.ops.aten.clone.default, torch.ops.aten.copy_.default}:
                sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    ema_model = EMAModel(network(), 0.5)
    ema_model.model(torch.ones(1, 4)).sum().backward()
    with Cloned():
        module = ema_model.averaged_module()
    assert sizes == []
    assert all(parameter.grad is None for parameter in module.parameters())


@same_dtype_or_other
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every": 2},
        {"update_after_step": 2},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"compensated": True},
        {"buffers": "average"},
        {"exclude": "second.*"},
        {"include": ["first.*", "norm.*"]},
    ],
    ids=str,
)
def test_it_shows_the_average_after_every_event(model, options, dtype, tmp_path):
    """Update, save and load in both ways, reset, a cast, and an update after each."""
    model.to(dtype)
    ema_model = EMAModel(model, 0.5, **options)
    module = ema_model.averaged_module()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert_shows(module, ema_model)
    for _ in range(4):
        model(torch.randn(5, 4, dtype=dtype))  # moves the statistics of the BatchNorm
        train(model, ema_model, 1)
        assert_shows(module, ema_model)
    state, file = ema_model.state_dict(), ema_model.save(tmp_path)
    train(model, ema_model)
    ema_model.load_state_dict(state)
    assert_shows(module, ema_model)
    train(model, ema_model)
    ema_model.load(file)
    assert_shows(module, ema_model)
    ema_model.reset()
    assert_shows(module, ema_model)
    for other in (torch.float64, torch.float32, dtype):
        model.to(other)
        train(model, ema_model, 3)
        assert_shows(module, ema_model)
        ours, theirs = module.state_dict(), model.state_dict()
        assert {key: t.dtype for key, t in ours.items()} == {
            key: t.dtype for key, t in theirs.items()
        }


@same_dtype_or_other
@pytest.mark.parametrize("assign", [False, True], ids=["values", "assign"])
def test_it_shows_averages_while_they_are_in_the_live_model(dtype, assign):
    model = network(dtype)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    inputs = torch.randn(3, 4, dtype=dtype)
    expected = output(module, inputs)
    for _ in range(2):
        with ema_model.use_ema(assign=assign):
            assert_shows(module, ema_model)
            assert torch.equal(output(module, inputs), expected)
            assert torch.equal(output(model, inputs), expected)
        assert torch.equal(output(module, inputs), expected)
        assert not torch.equal(output(model, inputs), expected)
    train(model, ema_model)
    assert_shows(module, ema_model)


def test_it_shows_averages_while_they_are_lent_to_another_model():
    model, other = network(), network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    inputs = torch.randn(3, 4)
    expected = output(module, inputs)
    with ema_model.use_ema(other):
        assert torch.equal(output(module, inputs), expected)
        assert torch.equal(output(other, inputs), expected)
    assert torch.equal(output(module, inputs), expected)
    train(model, ema_model)
    assert_shows(module, ema_model)


def test_each_of_several_averages_has_modules_of_its_own():
    model = network()
    ema_model = EMAModel(model, {"short": 0.5, "long": HalfLife(steps=20)})
    modules = {name: ema_model.averaged_module(name) for name in ("short", "long", "short")}
    twin = ema_model.averaged_module("short")
    train(model, ema_model)
    for swapped in ("short", "long"):
        with ema_model.use_ema(swapped):
            for name, module in (*modules.items(), ("short", twin)):
                assert_shows(module, ema_model, name)
    with pytest.raises(ArgumentError, match=r"`name` must be one of `short`, `long`, got None"):
        ema_model.averaged_module()


class Failing(TorchDispatchMode):
    """Raises at the n-th copy."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


@same_dtype_or_other
def test_a_swap_that_fails_anywhere_leaves_it_on_the_average(dtype):
    model = network(dtype)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for at in range(1, 1000):
        try:
            with Failing(at), ema_model.use_ema():
                pass
        except MemoryError:
            assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
            assert_shows(module, ema_model)
        else:
            break
    assert at > 12
    train(model, ema_model)
    assert_shows(module, ema_model)


def test_before_the_start_it_shows_the_live_weights_at_every_moment():
    model = network()
    ema_model = EMAModel(model, 0.5, update_after_step=3)
    module = ema_model.averaged_module()
    inputs = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(output(module, inputs), output(model, inputs))
        perturb(model)
        assert torch.equal(output(module, inputs), output(model, inputs))
        with ema_model.use_ema():
            assert torch.equal(output(module, inputs), output(model, inputs))
        ema_model.update()
    frozen = output(module, inputs)
    perturb(model)
    assert torch.equal(output(module, inputs), frozen)  # it has started
    assert not addresses(module) & addresses(model)
    ema_model.reset()
    perturb(model)
    assert torch.equal(output(module, inputs), output(model, inputs))


@same_dtype_or_other
def test_before_the_start_it_shows_live_weights_while_another_average_is_swapped_in(dtype):
    model = network(dtype)
    early, late = EMAModel(model, 0.5), EMAModel(model, 0.5, update_after_step=10)
    module = late.averaged_module()
    train(model, early)
    inputs = torch.randn(3, 4, dtype=dtype)
    live = output(model, inputs)
    for assign in (False, True):
        with early.use_ema(assign=assign):
            assert not torch.equal(output(model, inputs), live)
            assert torch.equal(output(module, inputs), live)
        assert torch.equal(output(module, inputs), live)


def test_a_parameter_that_is_unfrozen_later_joins():
    model = network()
    model[1].requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert not addresses(module) & addresses(model)
    train(model, ema_model)
    model[1].requires_grad_(requires_grad=True)
    train(model, ema_model)
    assert module[1].weight.data_ptr() == ema_model.averaged_parameters()["1.weight"].data_ptr()
    assert_shows(module, ema_model)


def test_frozen_parameters_follow_when_they_are_written_and_are_left_alone_else():
    model = network()
    model[0].requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    version = module[0].weight._version
    train(model, ema_model)
    assert module[0].weight._version == version
    model.load_state_dict(network().state_dict())
    ema_model.update()
    assert_shows(module, ema_model)
    model[0].weight.data = torch.ones(SIZE, 4)  # other memory, without a new version
    ema_model.update()
    assert_shows(module, ema_model)


def test_excluded_parameters_follow_however_they_are_written():
    """An optimizer may write through ``.data``, which has a version of its own."""
    model = network()
    ema_model = EMAModel(model, 0.5, exclude="0.*")
    module = ema_model.averaged_module()
    for _ in range(2):
        model[0].weight.data.add_(1)
        ema_model.update()
        assert_shows(module, ema_model)


class Counting(nn.Module):
    """Replaces a buffer at every forward pass, and makes another one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x):
        self.count = self.count + 1
        self.cache = x
        return self.linear(x)


def test_buffers_that_forward_replaces_follow():
    model = Counting()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    for number in range(1, 4):
        model(torch.randn(2, 4))
        with torch.inference_mode():
            module(torch.randn(3, 4))
        assert module.count == number
        assert module.cache.shape == (3, 4)
        ema_model.update()
        assert module.count == model.count == number
        assert module.count is not model.count
        assert not module.count.is_inference()  # it can be saved for a backward pass


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_forward_pass_in_training_mode_changes_neither_model_nor_average(model, buffers):
    """A teacher in training mode moves the statistics of its own BatchNorm."""
    ema_model = EMAModel(model, 0.5, buffers=buffers)
    module = ema_model.averaged_module()
    train(model, ema_model)
    assert not addresses(module) & addresses(model)
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: a.clone() for name, a in ema_model.averaged_parameters().items()}
    module.train()(torch.randn(8, 4))
    assert not torch.equal(module.norm.running_mean, live["norm.running_mean"])
    assert all(torch.equal(t, live[name]) for name, t in model.state_dict().items())
    now = ema_model.averaged_parameters()
    assert all(torch.equal(now[name], averages[name]) for name in averages)
    ema_model.update()
    assert_shows(module, ema_model)


class Hooked(nn.Module):
    """Has a hook, a list of its weights and losses that it keeps."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.weights = [self.linear.weight]
        self.losses = {"all": [], "last": None}
        self.drop = nn.Dropout(0.5)
        self.linear.register_forward_hook(self.count)

    def count(self, module, args, out):
        assert module is self.linear
        self.calls += 1

    def forward(self, x):
        out = self.drop(self.linear(x) @ self.weights[0])
        self.losses["last"] = out.sum()
        self.losses["all"].append(out.sum())
        return out


def test_mode_hooks_and_attributes_are_its_own():
    model = Hooked()
    ema_model = EMAModel(model, 0.5)
    loss = model(torch.randn(2, 4)).sum()
    model.note = kept = loss.detach()
    module = ema_model.averaged_module()
    assert module.training
    assert module.weights[0] is module.linear.weight
    assert module.losses == {"all": [None], "last": None}  # they have a history
    assert torch.equal(module.note, kept)
    train(model, ema_model)
    module.eval()
    assert model.training
    x = torch.randn(2, 4)
    with ema_model.use_ema():
        expected = output(model, x)
    calls = model.calls
    assert torch.equal(module(x), expected)
    assert (model.calls, module.calls) == (calls, 2)
    assert module.losses["last"] is not None
    assert not torch.equal(module.train()(x), expected)
    assert model.losses["all"][0].requires_grad


def pruned():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 4))),
        pruned,
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))),
    ],
    ids=["old weight_norm", "pruning", "orthogonal", "spectral_norm"],
)
def test_weights_that_are_computed_are_computed_from_the_averages(make):
    model = make()
    ema_model = EMAModel(model, 0.5)
    x = torch.randn(3, 4)
    model(x)
    module = ema_model.averaged_module()
    for _ in range(2):
        train(model, ema_model)
        with ema_model.use_ema():
            expected = output(model, x)
            assert torch.equal(output(module, x), expected)
        assert torch.equal(output(module, x), expected)
        assert not torch.equal(output(model, x), expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 6, 2),
        lambda: nn.GRU(4, 6, bidirectional=True).bfloat16(),
        lambda: parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0"),
        lambda: weight_norm(nn.LSTM(4, 6), "weight_hh_l0"),
    ],
    ids=["LSTM", "bfloat16 GRU", "weight_norm", "old weight_norm"],
)
def test_recurrent_layers_use_the_averages(make):
    """They keep lists of, and weak references to, their weights."""
    model = make()
    ema_model = EMAModel(model, 0.5)
    x = torch.randn(3, 5, 4).to(next(model.parameters()).dtype)
    model(x)
    module = ema_model.averaged_module()
    for _ in range(2):
        train(model, ema_model)
        with ema_model.use_ema():
            expected = output(model, x)[0]
            assert torch.equal(output(module, x)[0], expected)
        assert torch.equal(output(module, x)[0], expected)
        assert not torch.equal(output(model, x)[0], expected)


class Flattening(nn.GRU):
    """Puts its weights into one piece of memory, as cuDNN wants them."""

    def flatten_parameters(self):
        parameters = list(self.parameters())
        memory = torch.cat([parameter.detach().flatten() for parameter in parameters])
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, piece in zip(parameters, memory.split(sizes), strict=True):
            parameter.data = piece.view(parameter.shape)


def test_recurrent_layers_are_copies_where_their_weights_are_put_together():
    model = Flattening(4, 6)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    for _ in range(2):
        train(model, ema_model)
        with ema_model.use_ema():
            assert_shows(module, ema_model)
        assert_shows(module, ema_model)
        ours = [*module.parameters()]
        assert all(
            p.data_ptr() != a.data_ptr()
            for p, a in zip(ours, ema_model.averaged_parameters().values(), strict=True)
        )


@same_dtype_or_other
@pytest.mark.parametrize("separate", [False, True], ids=["one parameter", "one storage"])
def test_tied_weights_stay_tied(separate, dtype):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(dtype)
    model[1].weight = nn.Parameter(model[0].weight.data.t()) if separate else model[0].weight
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert (module[0].weight is module[1].weight) is not separate
    x = torch.randn(2, 4, dtype=dtype)
    for _ in range(2):
        perturb(model[:1])
        ema_model.update()
        with ema_model.use_ema():
            expected = output(model, x)
            assert torch.equal(output(module, x), expected)
        assert torch.equal(output(module, x), expected)
        assert torch.equal(module[1].weight, module[0].weight.t() if separate else module[0].weight)


@pytest.mark.parametrize("separate", [False, True], ids=["one-object", "one-memory"])
def test_tied_weights_whose_memory_has_gaps(separate):
    """Their average has none, so it does not have the strides of the weights."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    weight = nn.Parameter(torch.zeros(3, 6)[:, ::2])
    model[0].weight = weight
    model[1].weight = nn.Parameter(weight.detach()) if separate else weight
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    with torch.no_grad():
        weight.fill_(8.0)
    ema_model.update()
    assert bool((module[0].weight == 4).all() and (module[1].weight == 4).all())


def language_model():
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def test_a_transformers_model_generates_and_is_saved(tmp_path):
    model = language_model()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    assert module.lm_head.weight is module.transformer.wte.weight
    tokens = torch.arange(12).view(2, 6)
    with ema_model.use_ema():
        expected = output(model, tokens)
    assert torch.equal(output(module, tokens), expected)
    mask = torch.ones_like(tokens)
    made = module.generate(tokens, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert made.shape[0] == 2
    module.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, tokens), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_over_a_frozen_base_has_a_base_of_its_own():
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(language_model(), config)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert not addresses(module) & addresses(model)
    train(model, ema_model)
    tokens = torch.arange(12).view(2, 6)
    with ema_model.use_ema():
        expected = output(model, tokens)
    assert torch.equal(output(module, tokens), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_it_is_a_copy_of_the_bare_model(wrap):
    model = network()
    ema_model = EMAModel(wrap(model), 0.5)
    module = ema_model.averaged_module()
    assert type(module) is nn.Sequential
    train(model, ema_model)
    assert all(map(torch.equal, module.parameters(), ema_model.averaged_parameters().values()))


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        ([threading.Lock()], "list"),
        ((number for number in range(3)), "generator"),
        (io.TextIOWrapper(io.BytesIO()), "TextIOWrapper"),
    ],
    ids=["lock", "generator", "file"],
)
def test_what_cannot_be_copied_is_named(thing, kind):
    """By the module that holds it, also where another one refers to that module."""
    model = nn.Sequential(network(), nn.ModuleDict({"deep": nn.Linear(2, 2)}))
    model[1]["deep"].tools = thing
    model.shortcut = [model[1]["deep"]]
    model[0].register_forward_hook(model[1]["deep"].forward)
    ema_model = EMAModel(model, 0.5)
    before = dict(vars(model[1]["deep"]))
    with pytest.raises(ModelError, match=rf"`1\.deep\.tools` is a {kind} that cannot be copied"):
        ema_model.averaged_module()
    assert dict(vars(model[1]["deep"])) == before
    model[1]["deep"].tools = None
    train(model, ema_model)
    assert_shows(ema_model.averaged_module(), ema_model)


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("I am unique")


def test_a_module_that_refuses_to_be_copied_says_why():
    ema_model = EMAModel(Stubborn(2, 2), 0.5)
    with pytest.raises(ModelError, match="the model, a Stubborn, cannot be copied: I am unique"):
        ema_model.averaged_module()


def test_tensors_without_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    ema_model = EMAModel(model, 0.5)
    with pytest.raises(ModelError, match=r"got none yet for `1\.bias`, `1\.weight`"):
        ema_model.averaged_module()
    model(torch.ones(1, 4))
    module = ema_model.averaged_module()
    train(model, ema_model)
    assert type(module[1]) is nn.Linear
    assert_shows(module, ema_model)


def test_it_is_not_made_while_averages_are_swapped_in():
    model = network()
    ema_model, other = EMAModel(model, 0.5), EMAModel(model, 0.9)
    with ema_model.use_ema():
        with pytest.raises(StateError, match="averaged_module is not possible while averages"):
            ema_model.averaged_module()
        with pytest.raises(StateError, match="another average is swapped into"):
            other.averaged_module()


def test_averages_are_not_written_into_it():
    """Neither its own nor those of another model: they would overwrite the average."""
    model, other = network(), network()
    ema_model, stranger = EMAModel(model, 0.5), EMAModel(other, 0.5)
    module = ema_model.averaged_module()
    for average in (ema_model, stranger):
        with pytest.raises(ArgumentError, match="`model` must not be a module that averaged_mod"):
            average.copy_to(module)
        with pytest.raises(ArgumentError, match="got that of a Sequential"):
            average.apply_ema(module)
    train(model, ema_model)
    assert_shows(module, ema_model)


def test_copies_and_pickles_of_it_stand_still():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    others = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ]
    train(model, ema_model)
    with ema_model.use_ema():
        for other in others:
            assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    assert_shows(module, ema_model)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"]
)
def test_copies_and_pickles_of_the_average_have_no_modules(again):
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    other = again(ema_model)
    train(other.model, other)
    assert_shows(module, ema_model)
    twin = other.averaged_module()
    train(other.model, other)
    assert_shows(twin, other)
    assert_shows(module, ema_model)


def test_an_average_among_the_attributes_of_the_model_is_not_copied():
    model = network()
    model.average = ema_model = EMAModel(model, 0.5)
    train(model, ema_model)
    module = ema_model.averaged_module()
    assert module.average is None
    assert_shows(module, ema_model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
def test_programs_of_a_copy_of_it_have_these_averages_for_good():
    """As the documentation advises: a program refers to the memory of the module it was made from."""
    model = network()
    ema_model = EMAModel(model, 0.5)
    train(model, ema_model)
    fixed = copy.deepcopy(ema_model.averaged_module()).eval()
    inputs = torch.randn(3, 4)
    programs = [torch.export.export(fixed, (inputs,)).module(), torch.jit.trace(fixed, inputs)]
    expected = output(fixed, inputs)
    train(model, ema_model)
    with ema_model.use_ema():
        assert all(torch.equal(program(inputs), expected) for program in programs)


@pytest.mark.slow
def test_compiled_it_is_not_compiled_again_for_an_update_or_a_swap():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    inputs = torch.randn(3, 4)
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend)
    for _ in range(3):
        train(model, ema_model)
        assert torch.equal(output(compiled, inputs), output(module, inputs))
        with ema_model.use_ema():
            assert torch.equal(output(compiled, inputs), output(model, inputs))
    assert len(made) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("start", [0, 2])
def test_the_model_itself_may_hold_it(start):
    """As a submodule, and without a warning that it lacks itself."""
    model = network()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    ema_model = EMAModel(model, 0.5, update_after_step=start)
    module = ema_model.averaged_module()
    model.teacher = module
    train(model, ema_model, 4)
    averages = ema_model.averaged_parameters()
    assert list(averages) == [name for name, _ in network().named_parameters()]
    assert all(torch.equal(module.state_dict()[name], averages[name]) for name in averages)
    before = {name: average.clone() for name, average in averages.items()}
    with ema_model.use_ema():
        for name, average in before.items():
            assert torch.equal(module.state_dict()[name], average)
            assert torch.equal(model.state_dict()[name], average)
    assert not torch.equal(model[0].weight, module[0].weight)


@pytest.mark.parametrize("first", ["model", "module"])
def test_a_cache_of_parametrized_weights_is_not_shared_with_the_live_model(first):
    """PyTorch's own copies of parametrized modules share their entries."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    x = torch.randn(3, 4)
    live, averaged = model(x), module(x)
    assert not torch.equal(live, averaged)
    with parametrize.cached():
        (model if first == "model" else module)(x)
        for _ in range(2):
            assert torch.equal(model(x), live)
            assert torch.equal(module(x), averaged)
    assert isinstance(module[0], nn.Linear)
    parametrize.remove_parametrizations(module[0], "weight")
    assert type(module[0]) is nn.Linear
    assert torch.equal(module(x), averaged)
    assert parametrize.is_parametrized(model[0])


def test_a_cache_of_parametrized_weights_does_not_survive_an_update():
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    x = torch.randn(3, 4)
    with parametrize.cached():
        model(x)
        module(x)
        train(model, ema_model)
        assert (id(model), "weight") in parametrize._cache  # the student's stays
        shown = module(x)
        with ema_model.use_ema():
            assert torch.equal(model(x), shown)


def test_it_is_held_weakly():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    dropped = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert dropped() is None
    finally:
        gc.enable()
    train(model, ema_model, 1)
    assert ema_model._modules._followers == []
    survivor = ema_model.averaged_module()
    expected = output(survivor, torch.ones(1, 4))
    del ema_model
    gc.collect()
    assert torch.equal(output(survivor, torch.ones(1, 4)), expected)


def test_moved_or_cast_it_goes_on_in_its_new_place():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    module.bfloat16()
    for _ in range(2):
        train(model, ema_model)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert_shows(module, ema_model)
    with ema_model.use_ema():
        assert_shows(module, ema_model)
    module[1].weight.data = module[1].weight.data.float()  # as flatten_parameters() does it
    train(model, ema_model)
    assert module[1].weight.dtype == torch.float32
    assert not addresses(module) & {a.data_ptr() for a in ema_model.averaged_parameters().values()}
    assert_shows(module, ema_model)
    model.double()  # and follows the live model, where that is moved or cast
    train(model, ema_model)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    assert_shows(module, ema_model)


def test_moved_while_averages_are_swapped_in_it_stays_in_its_new_place():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    with ema_model.use_ema():
        module.double()
        assert_shows(module, ema_model)
    assert_shows(module, ema_model)
    train(model, ema_model)
    assert module[0].weight.dtype == torch.float64
    assert_shows(module, ema_model)


def test_what_is_replaced_in_it_is_left_alone():
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    module[2] = nn.Identity()
    module[1].bias = nn.Parameter(torch.ones(SIZE))
    train(model, ema_model)
    assert torch.equal(module[1].bias, torch.ones(SIZE))
    assert torch.equal(module[0].weight, ema_model.averaged_parameters()["0.weight"])


@pytest.mark.parametrize("event", ["update", "load_state_dict", "reset"])
def test_parameters_that_it_lacks_are_said_once_in_the_line_of_the_user(event):
    model = nn.Sequential(nn.Linear(2, 2))
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    model.append(nn.Linear(2, 2))
    calls = {
        "update": ema_model.update,
        "load_state_dict": lambda: ema_model.load_state_dict(EMAModel(model, 0.5).state_dict()),
        "reset": ema_model.reset,
    }
    with pytest.warns(
        EMAWarning, match=r"lacks parameters .* since: `1\.weight`, `1\.bias`"
    ) as caught:
        calls[event]()
    assert [warning.filename for warning in caught] == [__file__]
    train(model, ema_model)
    assert torch.equal(module[0].weight, ema_model.averaged_parameters()["0.weight"])


@pytest.mark.parametrize("event", ["update", "swap", "restored"])
def test_backward_through_weights_that_have_changed_is_loud(event):
    """A graph that has saved the averages is not used with others."""
    model = network()
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    ema_model.reset()  # its parameters get other memory, and have to be told of each update
    train(model, ema_model)
    x = torch.randn(3, 4, requires_grad=True)
    loss = module(x).sum()
    if event == "update":
        ema_model.update()
    else:
        ema_model.apply_ema()
        if event == "restored":
            loss = module(x).sum()
            ema_model.restore_original()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    if event == "swap":
        ema_model.restore_original()
    module(x).sum().backward()
    assert x.grad is not None


@same_dtype_or_other
def test_in_inference_mode_it_is_made_and_updated_for_any_mode(model, dtype):
    model.to(dtype)
    ema_model = EMAModel(model, 0.5)
    with torch.inference_mode():
        module = ema_model.averaged_module()
        train(model, ema_model)
        assert_shows(module, ema_model)
        with ema_model.use_ema():
            assert_shows(module, ema_model)
    train(model, ema_model)
    assert_shows(module, ema_model)
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    module(x).sum().backward()
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model_is_copied():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    train(model, ema_model)
    x = torch.randn(3, 4)
    with ema_model.use_ema():
        expected = output(model, x)
        assert torch.equal(output(module, x), expected)
    assert torch.equal(output(module, x), expected)


def test_training_is_not_changed_by_it(model):
    """Bit for bit the same live weights and averages as without a module."""
    twin = copy.deepcopy(model)
    results = []
    for net, with_module in ((model, True), (twin, False)):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(net.parameters(), 0.1)
        ema_model = EMAModel(net, 0.9)
        module = ema_model.averaged_module() if with_module else None
        for _ in range(5):
            x = torch.randn(6, 4)
            loss = net(x).square().sum()
            if module is not None:
                loss = loss + 0 * (net(x) - module(x).detach()).sum()
            else:
                loss = loss + 0 * (net(x) - x.new_zeros(())).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema_model.update()
        results.append([*net.state_dict().values(), *ema_model.averaged_parameters().values()])
    assert all(map(torch.equal, *results))


def test_a_copy_has_at_each_place_what_the_live_model_has_there():
    """Layers that change places take their averages along, and the copy computes with them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    average = EMAModel(model, 0.5)
    module = average.averaged_module()
    model[0], model[2] = model[2], model[0]
    with torch.no_grad():
        model[0].weight.fill_(8.0)
    average.update()
    with average.use_ema():
        expected = model(torch.ones(1, 2))
    assert torch.equal(module(torch.ones(1, 2)), expected)


def test_another_dtype_at_the_same_address_is_followed():
    """Before the start the copy shows live memory, which may be seen as another dtype."""
    model = nn.Linear(3, 2).half()
    average = EMAModel(model, 0.5, update_after_step=2)
    module = average.averaged_module()
    model.weight.data = model.weight.data.view(torch.bfloat16)
    average.update()
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight, model.weight)


def test_a_frozen_parameter_that_is_averaged_no_more_is_shown_as_it_is():
    """A reset goes by the rules anew, and the copy held the average until then."""
    model = nn.Linear(3, 2)
    average = EMAModel(model, 0.5)
    model.half()
    model.weight = nn.Parameter(torch.randn(2, 3).half(), requires_grad=False)
    module = average.averaged_module()
    assert not torch.equal(module.weight, model.weight)
    average.reset()
    assert torch.equal(module.weight, model.weight)
