"""What other libraries write today, read and written as ours; each by the real package."""

from __future__ import annotations

import argparse
import pickle
import warnings

import ema_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
import torch_ema
from diffusers import UNet1DModel
from diffusers import training_utils as diffusers
from flax import nnx
from torch import nn
from torch.optim import swa_utils

import ema
from benchmarks.peers import timm_utils
from ema import ArgumentError, ArgumentTypeError, CheckpointError, EMAModel, EMAWarning
from ema.checkpoint import read_state
from ema.converting.convert import convert
from ema.jax_backend import get_params_ema, params_ema, save_params_ema
from ema.jax_backend.nnx import EMA

PRECISIONS = [
    {},
    {"compensated": True},
    {"dtype": torch.bfloat16, "seed": 7},
    {"on_nonfinite": "skip"},
]
JAX_PRECISIONS = [
    {},
    {"compensated": True},
    {"accumulator_dtype": jnp.bfloat16},
    {"on_nonfinite": "skip"},
]


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def goes_on(tmp_path):
    """Load the file into a new average of the model; names and values are those of the source."""

    def check(model, expected, **options):
        ours = EMAModel(model, **options)
        ours.load(tmp_path / "ours")
        averages = ours.averaged_parameters()
        assert list(averages) == [name for name, _ in model.named_parameters()]
        for average, value in zip(averages.values(), expected, strict=True):
            assert torch.equal(average, value)
        return ours

    return check


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"decay": 0.9}, ema.RampWarmup(decay=0.9)),
        (
            {"decay": 0.99, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
            ema.InverseGammaWarmup(decay=0.99, inv_gamma=2.0, power=0.75),
        ),
        ({"decay": 0.9, "update_after_step": 3}, ema.RampWarmup(decay=0.9)),
    ],
)
@pytest.mark.parametrize("names", ["model", "list"])
def test_diffusers(tmp_path, model, goes_on, settings, schedule, names):
    """The state dict has a list without names; the run goes on with diffusers' own decays."""
    theirs = diffusers.EMAModel(model.parameters(), **settings)
    for _ in range(7):
        perturb(model)
        theirs.step(model.parameters())
    torch.save(theirs.state_dict(), tmp_path / "ema.pt")
    with pytest.raises(
        ArgumentError, match="`names` must be given, since diffusers EMAModel saves a"
    ):
        convert(tmp_path / "ema.pt", tmp_path / "ours")
    with pytest.raises(ArgumentError, match="`names` must be 6 different names, got 1: `w`"):
        convert(tmp_path / "ema.pt", tmp_path / "ours", names=["w"])
    given = model if names == "model" else [name for name, _ in model.named_parameters()]
    result = convert(tmp_path / "ema.pt", tmp_path / "ours", names=given)
    assert (result.kind, result.record.schedule) == ("diffusers EMAModel", schedule)
    after = settings.get("update_after_step", 0) + 1
    ours = goes_on(model, theirs.shadow_params, decay=schedule, update_after_step=after)
    for _ in range(5):
        perturb(model)
        theirs.step(model.parameters())
        ours.update()
    for average, value in zip(
        ours.averaged_parameters().values(), theirs.shadow_params, strict=True
    ):
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-6)


def test_a_folder_of_save_pretrained(tmp_path):
    torch.manual_seed(0)
    model = UNet1DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock1D", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    theirs = diffusers.EMAModel(
        model.parameters(), decay=0.9, model_cls=UNet1DModel, model_config=model.config
    )
    for _ in range(3):
        perturb(model)
        theirs.step(model.parameters())
    theirs.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(
        CheckpointError, match="its config or notes describe averages, but such files"
    ):
        convert(tmp_path / "pretrained", tmp_path / "ours")
    result = convert(tmp_path / "pretrained", tmp_path / "ours", averaged=True)
    assert result.kind == "save_pretrained"
    assert (result.record.step, result.record.count) == (3, 2)
    assert result.record.schedule == ema.RampWarmup(decay=0.9)
    ours = EMAModel(model, ema.RampWarmup(decay=0.9), update_after_step=1)
    ours.load(tmp_path / "ours")
    names = [name for name, _ in model.named_parameters()]
    for name, value in zip(names, theirs.shadow_params, strict=True):
        assert torch.equal(ours.averaged_parameters()[name], value)


def test_a_split_folder_of_transformers(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path / "pretrained", max_shard_size="4KB")
    assert (tmp_path / "pretrained" / "model.safetensors.index.json").exists()
    with pytest.warns(EMAWarning, match="does not say how many steps"):
        convert(tmp_path / "pretrained", tmp_path / "ours", averaged=True)
    EMAModel(model).load(tmp_path / "ours")


def test_ema_pytorch(tmp_path, model, goes_on):
    theirs = ema_pytorch.EMA(model, beta=0.9, update_after_step=2, update_every=2)
    for _ in range(9):
        perturb(model)
        theirs.update()
    torch.save(theirs.state_dict(), tmp_path / "ema.pt")
    result = convert(tmp_path / "ema.pt", tmp_path / "ours", update_after_step=2, update_every=2)
    assert (result.kind, result.record.step, result.record.count) == ("ema-pytorch", 9, 3)
    assert "1.running_mean" in result.left_out
    goes_on(model, theirs.ema_model.parameters(), update_after_step=2, update_every=2)


@pytest.mark.parametrize("counted", [True, False])
def test_torch_ema(tmp_path, model, goes_on, counted):
    theirs = torch_ema.ExponentialMovingAverage(model.parameters(), 0.9, use_num_updates=counted)
    for _ in range(5):
        perturb(model)
        theirs.update()
    torch.save(theirs.state_dict(), tmp_path / "ema.pt")
    given = {} if counted else {"step": 5}
    result = convert(tmp_path / "ema.pt", tmp_path / "ours", names=model, **given)
    schedule = ema.RampWarmup(decay=0.9) if counted else ema.ConstantDecay(decay=0.9)
    assert result.record.schedule == schedule
    ours = goes_on(model, theirs.shadow_params, decay=schedule)
    assert (ours.step, ours.count) == (5, 5)
    perturb(model)
    theirs.update()
    ours.update()
    for average, value in zip(
        ours.averaged_parameters().values(), theirs.shadow_params, strict=True
    ):
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-6)


def test_averaged_model(tmp_path, model, goes_on):
    """Stochastic weight averaging goes on as ``UniformAverage``, with the same mean."""
    theirs = swa_utils.AveragedModel(model)
    for _ in range(4):
        perturb(model)
        theirs.update_parameters(model)
    torch.save(theirs.state_dict(), tmp_path / "ema.pt")
    result = convert(tmp_path / "ema.pt", tmp_path / "ours", decay=ema.UniformAverage())
    assert (result.kind, result.record.count) == ("AveragedModel", 4)
    ours = goes_on(model, theirs.module.parameters(), decay=ema.UniformAverage())
    perturb(model)
    theirs.update_parameters(model)
    ours.update()
    for average, value in zip(
        ours.averaged_parameters().values(), theirs.module.parameters(), strict=True
    ):
        torch.testing.assert_close(average, value)


def timm_checkpoint(folder, model, average):
    """What timm's own saver writes, with the command line as an object in it."""
    timm = timm_utils()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        model(torch.randn(5, 3, dtype=next(model.parameters()).dtype)).sum().backward()
        optimizer.step()
        average.update(model)
    saver = timm.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="resnet50", lr=0.1, opt="adamw"),
        model_ema=average,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(epoch=3, metric=71.5)
    return folder / "model_best.pth.tar"


@pytest.mark.parametrize("version", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timm(tmp_path, model, goes_on, version):
    """Each of timm's averages, in a file of its saver, comes out with all its bits."""
    average = getattr(timm_utils(), version)(model, decay=0.9)
    file = timm_checkpoint(tmp_path, model, average)
    result = convert(file, tmp_path / "ours", step=4)
    assert (result.kind, result.record.step) == ("timm state_dict_ema", 4)
    averaged = average.ema if version == "ModelEma" else average.module
    assert not torch.equal(averaged[0].weight, model[0].weight)
    goes_on(model, averaged.parameters())


def test_timm_with_stochastic_rounding(tmp_path, model):
    """An average that timm keeps in bfloat16 stays bfloat16, with the same bits."""
    model.bfloat16()
    average = timm_utils().ModelEmaV3(model, decay=0.9)
    result = convert(timm_checkpoint(tmp_path, model, average), tmp_path / "ours", step=4)
    written = safetensors.torch.load_file(result.place)
    averaged = dict(average.module.named_parameters())
    assert written.keys() == averaged.keys()
    for name, value in averaged.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], value)


def test_lightning(tmp_path, model, goes_on):
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EMAWeightAveraging

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch):
            return self.net(batch).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = EMAWeightAveraging(decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, on workers and loggers
        trainer = pl.Trainer(
            max_steps=4,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        module = Module()
        saved = {}

        class Save(pl.Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 4:
                    trainer.save_checkpoint(tmp_path / "last.ckpt")
                    average = callback._average_model.module
                    saved.update({n: p.detach().clone() for n, p in average.named_parameters()})

        trainer.callbacks.append(Save())
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 3), batch_size=8))
    result = convert(
        tmp_path / "last.ckpt", tmp_path / "ours", rename=lambda name: name.removeprefix("net.")
    )
    assert result.kind == "Lightning WeightAveraging"
    assert result.record.step > 0
    goes_on(model, saved.values())


def test_plain_safetensors(tmp_path, model, goes_on):
    """NeMo's and Kohya's: the weights, half as wide, and notes of their own, which are kept."""
    averages = {name: value.bfloat16() for name, value in model.named_parameters()}
    notes = {"format": "pt", "ss_training_comment": "ema", "step": "12"}
    safetensors.torch.save_file(averages, tmp_path / "ema-000012.safetensors", metadata=notes)
    with pytest.raises(CheckpointError, match="nothing in it says that it holds averages"):
        convert(tmp_path / "ema-000012.safetensors", tmp_path / "ours", step=12)
    result = convert(tmp_path / "ema-000012.safetensors", tmp_path / "ours", averaged=True, step=12)
    assert result.record.extra == {"ss_training_comment": "ema"}
    goes_on(model, [value.float() for value in averages.values()])


def test_our_own_state_dict(tmp_path, model, goes_on):
    theirs = EMAModel(model, 0.9)
    for _ in range(3):
        perturb(model)
        theirs.update()
    torch.save(theirs.state_dict(), tmp_path / "ema_weights.pt")
    convert(tmp_path / "ema_weights.pt", tmp_path / "ours")
    expected = theirs.averaged_parameters().values()
    assert goes_on(model, expected, decay=0.9).step == 3
    result = ema.convert(theirs.state_dict(), tmp_path / "ours", force=True)
    assert result.record.schedule == ema.ConstantDecay(decay=0.9)


@pytest.mark.parametrize("options", PRECISIONS, ids=list(map(str, PRECISIONS)))
@pytest.mark.parametrize("decay", [0.9999, {"short": 0.9, "long": 0.9999}], ids=["one", "two"])
def test_our_own_state_dict_gives_the_file_that_save_writes(tmp_path, model, decay, options):
    theirs = EMAModel(model, decay, **options)
    for value in (0.3, np.nan if "on_nonfinite" in options else 0.7):
        with torch.no_grad():
            model[0].weight.fill_(value)
        theirs.update()
    name = "long" if isinstance(decay, dict) else None
    saved = theirs.save(tmp_path / "saved", name=name)
    result = convert(theirs.state_dict(), tmp_path / "converted", name=name)
    assert result.place.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", ["", "long", None])
def test_which_of_our_own_averages_is_asked_for(tmp_path, model, name):
    with pytest.raises(ArgumentError, match="`name` must choose one of the averages `a`, `b`"):
        convert(EMAModel(model, {"a": 0.9, "b": 0.99}).state_dict(), tmp_path / "ours", name=name)


def test_a_name_for_what_has_none_is_refused(tmp_path, model):
    with pytest.raises(ArgumentError, match=r"`name` must be None: EMAModel\.state_dict\(\) holds"):
        convert(EMAModel(model, 0.9).state_dict(), tmp_path / "ours", name="long")


@pytest.mark.parametrize("options", JAX_PRECISIONS, ids=list(map(str, JAX_PRECISIONS)))
def test_an_orbax_folder_keeps_remainders_and_skipped_updates(tmp_path, options):
    tx = params_ema({"short": 0.9, "long": 0.9999}, **options)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for value in (0.3, jnp.nan if "on_nonfinite" in options else 0.7):
        _, state = tx.update({"w": jnp.full(3, value)}, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", [state])
    result = convert(tmp_path / "orbax", tmp_path / "converted", name="long")
    saved = save_params_ema(tmp_path / "saved", state, "long")
    assert result.place.read_bytes() == saved.read_bytes()


@pytest.fixture
def chain():
    tx = optax.chain(
        optax.adam(0.1), params_ema({"short": 0.5, "long": ema.HalfLife(steps=9)}, update_every=2)
    )
    params = {"layers": [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones(4)}], "n": jnp.arange(2)}
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.float32), params)
    for _ in range(5):
        _, state = tx.update(grads, state, params)
    return state, params


def test_an_orbax_folder_of_a_chain(tmp_path, chain):
    state, params = chain
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
    with pytest.raises(ArgumentError, match="`name` must choose one of the averages long, short"):
        convert(tmp_path / "orbax", tmp_path / "ours")
    result = convert(tmp_path / "orbax", tmp_path / "ours", name="long", update_every=2)
    assert (result.kind, result.record.step, result.record.count) == ("params_ema in Orbax", 5, 2)
    assert result.record.not_averaged == ("n",)
    stored = read_state(tmp_path / "ours")
    assert list(stored.tensors) == ["layers.0.kernel", "layers.1.kernel"]
    averages = get_params_ema(state, params, name="long")["layers"]
    for i, leaf in enumerate(averages):
        found = np.frombuffer(stored.tensors[f"layers.{i}.kernel"].bytes(), np.float32)
        np.testing.assert_array_equal(found, np.ravel(leaf["kernel"]))


@pytest.mark.parametrize("form", ["object", "state", "pure"])
def test_nnx_ema(tmp_path, form):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    theirs = nnx.EMA(model, decay=0.9, only=nnx.Param)
    theirs.update(model)
    source = theirs
    if form != "object":
        state = nnx.state(theirs)
        source = tmp_path / "orbax"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(source, nnx.to_pure_dict(state) if form == "pure" else state)
    if form == "object":
        convert(source, tmp_path / "ours", step=1, decay=0.9)
    else:
        result = convert(source, tmp_path / "ours", step=1, decay=0.9, averaged=True)
        assert "says that `params` are averages; only you do" in result.notes[0]
    stored = read_state(tmp_path / "ours")
    names = ["layers.0.bias", "layers.0.kernel", "layers.1.bias", "layers.1.kernel"]
    assert list(stored.tensors) == names
    found = np.frombuffer(stored.tensors["layers.0.kernel"].bytes(), np.float32)
    kernel = theirs.apply_to(model).layers[0].kernel
    np.testing.assert_array_equal(found, np.ravel(kernel[...]))


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("options", JAX_PRECISIONS, ids=list(map(str, JAX_PRECISIONS)))
def test_our_own_ema_of_nnx_keeps_what_is_finer_than_the_model(tmp_path, options, pure):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    average = EMA(model, 0.99, **options)
    model.kernel[...] = model.kernel[...] * jnp.bfloat16(1.7)
    average.update(model)
    state = nnx.state(average)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", nnx.to_pure_dict(state) if pure else state)
    # what is not finer than the model is params and counters, which others have too
    averaged = "accumulator_dtype" in options
    result = convert(tmp_path / "orbax", tmp_path / "converted", averaged=averaged)
    saved = save_params_ema(tmp_path / "saved", average.state())
    assert result.place.read_bytes() == saved.read_bytes()


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    torch.save({"state_dict_ema": Malicious()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"state_dict_ema": Malicious()}))
    torch.save({"ema": nn.Linear(2, 2)}, tmp_path / "c.pt")
    for file, message in {
        "a.pt": "it holds an object of print, but only tensors and plain values are read",
        "b.pt": "its pickle holds more than plain values, or has a pickle_protocol of 4",
        "c.pt": r"it holds an object of torch\.nn\.modules\.linear\.Linear, .* save its state_dict",
    }.items():
        with pytest.raises(CheckpointError, match=f"{file}: .*{message}") as error:
            convert(tmp_path / file, tmp_path / "ours")
        assert "weights_only" not in str(error.value)  # PyTorch advises to switch it off
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {}, "optimizer": {}}, "that it holds averages: it holds `model`, `optimizer`"),
        ([1, 2], "it holds a list, not a state dict"),
        ({"shadow_params": 3, "num_updates": 1, "decay": 0.9}, "`shadow_params` must be a list"),
        ({"n_averaged": torch.tensor(1)}, "it holds no tensor whose name begins with `module"),
        ({"n_averaged": "x", "module.w": torch.ones(1)}, "`n_averaged` must be a count, got 'x'"),
        ({"ema": {"w": torch.arange(3)}}, "none of its 1 tensors can be an average"),
        ({"state_dict_ema": {"w": 3}}, "'w' must be a tensor with a string as its name, got int"),
        (
            {"ema": {"w": torch.ones(2), "s": torch.eye(2).to_sparse()}},
            "`s` is .* layout torch.sparse_coo",
        ),
        (
            {"ema": {"w": torch.ones(2, device="meta")}},
            "`w` is on the meta device, which holds no values",
        ),
        (
            {"shadow_params": [torch.ones(1)], "num_updates": 3},
            "torch-ema must have `decay`",
        ),
        (
            {
                "shadow_params": [torch.ones(1)],
                "optimization_step": 1,
                "decay": 2.0,
                "min_decay": 0,
            },
            "this is not a state of diffusers' EMAModel",
        ),
    ],
)
def test_what_is_not_known_is_said(tmp_path, state, message):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.pt", tmp_path / "ours", step=1)


def test_sources_that_cannot_be_read(tmp_path, model):
    (tmp_path / "noise.pt").write_bytes(b"PK\3\4" + b"x" * 100)
    (tmp_path / "empty").mkdir()
    for name in ("noise.pt", "empty", "none"):
        with pytest.raises(CheckpointError, match=name):
            convert(tmp_path / name, tmp_path / "ours")
    with pytest.raises(ArgumentTypeError, match=r"`source` must be a path, .* got Sequential"):
        convert(model, tmp_path / "ours")
    EMAModel(model).save(tmp_path / "already")
    with pytest.raises(CheckpointError, match="needs no conversion"):
        convert(tmp_path / "already", tmp_path / "ours")
