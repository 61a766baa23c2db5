"""Checkpoints of programs' own: the average is found, or refused; raw weights are never taken."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import ema
from ema import CheckpointError, EMAModel, EMAWarning, MissingExtraError
from ema.checkpoint import read_state
from ema.converting import convert
from tests import processes

RAW, AVERAGE = 1.0, 9.0


def weights(value, prefix="", dots=True):
    """The state dict of a small network; all elements are equal."""
    shapes = {"blocks.0.weight": (4, 3), "blocks.0.bias": (4,), "head.weight": (2, 4)}
    return {
        prefix + (name if dots else name.replace(".", "")): torch.full(shape, value)
        for name, shape in shapes.items()
    }


RAWS, AVERAGES = weights(RAW), weights(AVERAGE)
NAMES = sorted(RAWS)
ADAM = {"state": {i: {"exp_avg": torch.ones(3), "step": 4} for i in range(3)}, "param_groups": []}
DIFFUSION = {
    **weights(RAW, "model.diffusion_model."),
    **weights(AVERAGE, "model_ema.diffusion_model", dots=False),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(100, dtype=torch.int32),
    **weights(RAW, "first_stage_model."),
    **weights(RAW, "cond_stage_model."),
}
MEANT = {
    "DiT": {"model": RAWS, "ema": AVERAGES, "opt": ADAM, "args": None},
    "DeiT": {"model": RAWS, "model_ema": AVERAGES, "optimizer": ADAM, "epoch": 3, "scaler": {}},
    "RT-DETR": {"model": RAWS, "ema": {"module": AVERAGES, "updates": 100}, "optimizer": ADAM},
    "YOLOX of DDP": {"model": RAWS, "ema": {"module": weights(AVERAGE, "module."), "updates": 100}},
    "Hydra": {"state_dict": RAWS, "ema_state_dict": AVERAGES, "global_step": 100},
    "timm of DDP": {"state_dict": RAWS, "state_dict_ema": weights(AVERAGE, "module.")},
    "StyleGAN2": {"g": RAWS, "d": weights(RAW), "g_ema": AVERAGES, "g_optim": ADAM},
    "BasicSR": {"params": RAWS, "params_ema": AVERAGES},
    "compiled": {"model": RAWS, "ema": weights(AVERAGE, "_orig_mod.module.")},
    "shadow and backup": {"model": RAWS, "ema": {"decay": 0.9, "shadow": AVERAGES, "backup": RAWS}},
    "both inside": {"net": RAWS, "ema": {"model": RAWS, "ema": AVERAGES, "step": 3}},
    "an optimizer inside": {"net": RAWS, "ema": {"net": AVERAGES, "optimizer": ADAM}},
    "by number": {"models": {0: {"model": RAWS, "ema": AVERAGES}}},
    "averages in lists": {"models": [{"raw": RAWS, "swa": AVERAGES}]},
    "counters as tensors": {
        "model": RAWS,
        "ema": AVERAGES,
        **{name: torch.tensor(3.0) for name in ("step", "lr", "loss", "best", "seen")},
    },
    "deeper": {"state": {"params": RAWS, "ema_params": AVERAGES}, "config": {"ema": 0.9}},
    "in a callback": {
        "state_dict": RAWS,
        "callbacks": {"EMACallback": {"ema_state_dict": AVERAGES, "updates": 100}},
        "optimizer_states": [ADAM],
    },
    "flat of DDP": {**weights(RAW, "module.net."), **weights(AVERAGE, "module.net_ema.")},
    "flat and alone": weights(AVERAGE, "ema_model."),
    "flat inside": {"state_dict": {**weights(RAW, "m."), **weights(AVERAGE, "ema.m.")}},
}
PROPOSED = {
    "student and teacher": {"student": RAWS, "teacher": AVERAGES, "epoch": 3},
    "DINO": {
        "student": weights(RAW, "module.backbone."),
        "teacher": weights(AVERAGE, "backbone."),
        "optimizer": ADAM,
        "dino_loss": {"center": torch.ones(1, 4)},
    },
    "momentum encoder": {"model": RAWS, "momentum_model": AVERAGES},
    "critics": {"params": {"critic": RAWS, "target_critic": AVERAGES, "actor": weights(RAW, "a.")}},
    "flat": {**weights(RAW, "student."), **weights(AVERAGE, "teacher.")},
    "flat encoders": {**weights(RAW, "encoder."), **weights(AVERAGE, "target_encoder.")},
}
KEYS = {
    "student and teacher": "teacher",
    "DINO": "teacher",
    "momentum encoder": "momentum_model",
    "critics": "params.target_critic",
    "flat": "teacher",
    "flat encoders": "target_encoder",
}
REFUSED = {
    "weights": RAWS,
    "weights of DDP": weights(RAW, "module."),
    "train state": {"model": RAWS, "optimizer": ADAM, "epoch": 3},
    "Lightning": {"state_dict": RAWS, "optimizer_states": [ADAM], "callbacks": {}, "loops": {}},
    "moments called ema": {"model": RAWS, "optimizer": {"ema": AVERAGES}},
    "a decay": {"model": RAWS, "ema": 0.999, "ema_decay": torch.tensor(0.999)},
    "a teacher of its own": {"student": RAWS, "teacher": {"resnet.weight": torch.ones(3)}},
    "a part called target": {**RAWS, "target_head.weight": torch.ones(3)},
    "a codebook": {**weights(RAW, "vq."), "vq.ema_w": torch.ones(3), "vq.ema_size": torch.ones(3)},
    "a codebook of Flax": {"params": {"vq": {"ema": weights(RAW)}, "dense": {"kernel": RAWS}}},
    "a layer of Flax": {"params": {"ema": RAWS, "Dense_1": RAWS, "target_proj": RAWS}},
    "layers": {**weights(RAW, "swa_attn."), **weights(RAW, "full_attn.")},
    "layers of a part": {"model": {"swa_block": RAWS, "full_block": RAWS}},
    "models": {"shadow_model": RAWS, "attack_model": RAWS},
    "another attention": {"backbone": RAWS, "ema": {"conv.weight": torch.ones(3)}, "head": RAWS},
    "a collection": {"params": RAWS, "ema": {"vq": {"codebook": torch.ones(3)}}},
    "no weights": {"model": RAWS, "ema_sq_grad": RAWS, "grad_ema": RAWS, "fisher_ema": RAWS},
    "momentum": {"model": RAWS, "momentum_buffer": RAWS},
    "gradients": {"training": {"grad": {"ema": RAWS}}},
    "metrics": {"metrics": {"ema": {"loss": torch.ones(()), "acc": torch.ones(())}}, "net": RAWS},
    "imagen": {
        "model": weights(RAW, "unets.0."),
        "ema": {**weights(RAW, "0.online_model."), **weights(AVERAGE, "0.ema_model.")},
    },
    "emas": {"ema": {"stds": [0.05, 0.1], "emas": [AVERAGES, AVERAGES]}, "net": RAWS},
    "pruned": {"state_dict": {k: v for k, v in DIFFUSION.items() if k.startswith("model_ema.")}},
    "domains": {**weights(RAW, "source_encoder."), **weights(RAW, "target_encoder.")},
    "towers": {"query_tower": RAWS, "target_tower": RAWS},
    "two": {"model": RAWS, "ema_short": AVERAGES, "ema_long": AVERAGES},
    "nothing": {"epoch": 3},
    "a list": [RAWS, AVERAGES],
}


def save(state, file):
    """In the form that the name of the file asks for."""
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file)
    return file


def assert_averages(result, names=NAMES):
    stored = read_state(result.place).tensors
    assert sorted(stored) == sorted(names)
    for tensor in stored.values():
        assert set(np.frombuffer(tensor.bytes(), np.float32)) == {np.float32(AVERAGE)}


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("state", MEANT.values(), ids=MEANT)
def test_the_part_that_says_so_is_the_average(tmp_path, state, memory):
    source = state if memory else save(state, tmp_path / "theirs.pt")
    result = convert(source, tmp_path / "ours", step=200)
    prefix = "m." if state is MEANT["flat inside"] else ""
    assert_averages(result, [prefix + name for name in NAMES])


@pytest.mark.parametrize("case", PROPOSED)
def test_what_may_be_an_average_or_anything_else_is_proposed(tmp_path, case):
    """A teacher may be any model, a target a hard copy of raw weights."""
    key = KEYS[case]
    with pytest.raises(CheckpointError, match=rf"\(.*`{key}`.* may be one, or another model, or a"):
        convert(PROPOSED[case], tmp_path / "ours", step=200)
    result = convert(PROPOSED[case], tmp_path / "ours", key=key, step=200)
    prefix = "backbone." if case == "DINO" else ""
    assert_averages(result, [prefix + name for name in NAMES])


@pytest.mark.parametrize("state", REFUSED.values(), ids=REFUSED)
def test_what_says_nothing_is_refused_and_nothing_is_written(tmp_path, state):
    file = save(state, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match=r"theirs\.pt: (nothing in it says|it holds)"):
        convert(file, tmp_path / "ours", step=200)
    assert not (tmp_path / "ours").exists()


def test_what_openmmlab_calls_the_state_of_the_ema_are_raw_weights(tmp_path):
    """Its hook exchanges them before a save, so that ``state_dict`` can be deployed."""
    state = {
        "state_dict": AVERAGES | {"extra": torch.ones(1)},
        "ema_state_dict": weights(RAW, "module.") | {"steps": torch.tensor(30)},
        "meta": {},
        "optimizer": ADAM,
    }
    for key in (None, "ema_state_dict"):
        result = convert(save(state, tmp_path / "x.pth"), tmp_path / "ours", key=key, force=True)
        assert_averages(result)
        assert (result.record.step, result.left_out) == (30, ("extra",))


def test_an_averaged_model_inside_a_checkpoint_of_torchvision(tmp_path):
    average = {"n_averaged": torch.tensor(30), **weights(AVERAGE, "module.module.")}
    result = convert({"model": RAWS, "model_ema": average, "epoch": 2}, tmp_path / "ours")
    assert_averages(result)
    assert (result.kind, result.record.count) == ("AveragedModel in `model_ema`", 30)


def test_a_counter_without_the_prefix_does_not_keep_it(tmp_path):
    state = {"ema": {"steps": torch.tensor(3), **weights(AVERAGE, "module.")}}
    assert_averages(convert(state, tmp_path / "ours", step=3))


@pytest.mark.parametrize(
    ("state", "step", "count"),
    [
        ({"model": RAWS, "ema": {"module": AVERAGES, "updates": 100}}, 100, 100),
        ({"model": RAWS, "ema": AVERAGES, "step": torch.tensor(70)}, 70, 70),
        ({"model": RAWS, "ema": {"module": AVERAGES, "num_updates": 7}, "step": 70}, 7, 7),
    ],
)
def test_counters_beside_an_average_are_read(tmp_path, state, step, count):
    record = convert(save(state, tmp_path / "x.pt"), tmp_path / "ours").record
    assert (record.step, record.count) == (step, count)


def test_an_epoch_counts_no_steps(tmp_path):
    with pytest.warns(EMAWarning, match="does not say how many steps"):
        convert({"model": RAWS, "ema": AVERAGES, "epoch": 70}, tmp_path / "ours")


def test_several_are_asked_for(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"several averages, `ema_long`, `ema_short`: pass key="
    ):
        convert(REFUSED["two"], tmp_path / "ours", step=1)
    assert_averages(convert(REFUSED["two"], tmp_path / "ours", key="ema_long", step=1))


@pytest.mark.parametrize(
    ("key", "state"),
    [
        ("mine", {"model": RAWS, "mine": AVERAGES}),
        ("a.b", {"a": {"b": AVERAGES, "c": RAWS}}),
        ("a.b", {"a.b": AVERAGES, "a": {"c": RAWS}}),
        ("runs.1", {"runs": [RAWS, AVERAGES]}),
        ("mine", {**weights(RAW, "net."), **weights(AVERAGE, "mine.")}),
        ("state_dict.mine", {"state_dict": {**weights(RAW, "n."), **weights(AVERAGE, "mine.")}}),
        ("teacher", REFUSED["a teacher of its own"] | {"teacher": AVERAGES}),
    ],
)
def test_a_key_names_the_part(tmp_path, key, state):
    assert_averages(convert(save(state, tmp_path / "x.pt"), tmp_path / "ours", key=key, step=1))


@pytest.mark.parametrize("key", ["none", "ema.none", "", "epoch"])
def test_a_key_that_is_not_there_is_refused_with_those_that_are(tmp_path, key):
    state = {"model": RAWS, "ema": AVERAGES, "epoch": 3}
    with pytest.raises(CheckpointError, match=r"key= .*it holds `model` \(3 tensors\), `ema`"):
        convert(state, tmp_path / "ours", key=key, step=1)


@pytest.mark.parametrize("state", [AVERAGES, {"model": AVERAGES}, {"state_dict": AVERAGES, "e": 3}])
def test_a_word_of_the_users_is_taken_and_said(tmp_path, state):
    result = convert(state, tmp_path / "ours", averaged=True, step=1)
    assert_averages(result)
    assert any("only you do" in note for note in result.notes)


def test_a_word_does_not_choose_between_parts(tmp_path):
    """One part beside the optimizer needs no choice."""
    with pytest.raises(CheckpointError, match=r"pass key= \(--key\) to name the part"):
        convert({"g": RAWS, "d": RAWS, "optimizer": ADAM}, tmp_path / "ours", averaged=True, step=1)
    assert_averages(
        convert({"net": AVERAGES, "optimizer": ADAM}, tmp_path / "ours", averaged=True, step=1)
    )


# --- latent diffusion -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["last.ckpt", "full-ema.safetensors", "flat.ckpt"])
@pytest.mark.parametrize("key", [None, "model_ema"])
def test_latent_diffusion(tmp_path, file, key):
    """Its averages have names without dots; they get those of the raw weights that they are of."""
    nested = {"state_dict": DIFFUSION, "global_step": 7, "optimizer_states": [ADAM]}
    state = nested if file == "last.ckpt" else DIFFUSION
    if key and file == "last.ckpt":
        key = "state_dict.model_ema"
    result = convert(save(state, tmp_path / file), tmp_path / "ours", key=key)
    assert_averages(result, [f"model.diffusion_model.{name}" for name in NAMES])
    assert (result.record.step, result.record.count) == (100, 100)
    assert result.record.schedule == ema.RampWarmup(decay=0.9999)
    assert "first_stage_model.head.weight" in result.left_out


def test_names_that_are_one_without_dots_are_refused(tmp_path):
    state = {
        "model.a.bc": torch.ones(1),
        "model.ab.c": torch.ones(1),
        "model_ema.abc": torch.ones(1),
    }
    with pytest.raises(CheckpointError, match=r"`model.a.bc`, `model.ab.c` are the same without"):
        convert(state, tmp_path / "ours", step=1)


def test_an_average_that_counts_nothing_has_a_constant_decay(tmp_path):
    state = DIFFUSION | {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    record = convert(state, tmp_path / "ours", step=5).record
    assert record.schedule == ema.ConstantDecay(decay=0.9999)


# --- prefixes -------------------------------------------------------------------------------------


def test_averages_of_ddp_lose_the_prefix_and_that_is_said(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        average = swa_utils.AveragedModel(DistributedDataParallel(model))
        average.update_parameters(DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()
    torch.save(average.state_dict(), tmp_path / "theirs.pt")
    result = convert(tmp_path / "theirs.pt", tmp_path / "ours")
    assert result.notes == ("all names began with `module.`, which was removed",)
    assert sorted(result.names) == sorted(name for name, _ in model.named_parameters())
    EMAModel(model).load(tmp_path / "ours")


def test_a_prefix_that_not_all_names_share_stays(tmp_path):
    state = {"module.a": torch.full((1,), AVERAGE), "b": torch.full((1,), AVERAGE)}
    assert_averages(convert({"ema": state}, tmp_path / "ours", step=1), ["module.a", "b"])


# --- folders --------------------------------------------------------------------------------------


def hugging_face(folder, weight_map, **files):
    folder.mkdir()
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    text = json.dumps({"weight_map": {k: f"{file}.safetensors" for k, file in weight_map.items()}})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_the_index_decides_which_file_a_tensor_is_taken_from(tmp_path):
    """Another may hold a stale copy."""
    folder = hugging_face(
        tmp_path / "hf",
        {"a": "one", "b": "two"},
        one={"a": torch.full((2,), AVERAGE), "b": torch.zeros(2)},
        two={"a": torch.zeros(2), "b": torch.full((2,), AVERAGE), "old": torch.zeros(1)},
    )
    assert_averages(convert(folder, tmp_path / "ours", averaged=True, step=1), ["a", "b"])


def test_what_the_index_names_must_be_there(tmp_path):
    folder = hugging_face(tmp_path / "hf", {"a": "one", "c": "one"}, one={"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"names `c`, which one\.safetensors does not hold"):
        convert(folder, tmp_path / "ours", averaged=True, step=1)


def test_an_export_of_ours_tells_how_far_its_averages_are(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    save(AVERAGES, folder / "model.safetensors")
    (folder / "ema.json").write_text(json.dumps({"weights": "ema", "step": 8, "count": 4}))
    with pytest.raises(
        CheckpointError, match="its config or notes describe averages, but such files"
    ):
        convert(folder, tmp_path / "ours")  # a model that is trained from it may be saved there
    result = convert(folder, tmp_path / "ours", averaged=True)
    assert_averages(result)
    assert (result.record.step, result.record.count) == (8, 4)


def test_a_file_of_ours_needs_no_conversion(tmp_path):
    file = EMAModel(nn.Linear(2, 2)).save(tmp_path)
    with pytest.raises(CheckpointError, match="it is a file of `ema`, which needs no conversion"):
        convert(file, tmp_path / "ours")


def test_odd_trees_are_read_or_refused_in_one_line(tmp_path):
    cyclic = {"w": torch.ones(2)}
    cyclic["self"] = cyclic
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels, or holds itself"):
        convert({"ema": cyclic}, tmp_path / "ours", step=1)
    twice = {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}
    with pytest.raises(CheckpointError, match=r"two tensors with the name 'a\.b'"):
        convert({"ema": twice}, tmp_path / "ours", step=1)
    complex_file = save({"ema": {"c": torch.ones(2, dtype=torch.complex128)}}, tmp_path / "c.pt")
    result = convert(complex_file, tmp_path / "complex", step=1)
    assert read_state(result.place).tensors["c"].dtype == "C128"
    with pytest.raises(CheckpointError, match="`rename` leaves out all of the 3 averages"):
        convert({"ema": AVERAGES}, tmp_path / "ours", step=1, rename=lambda _: None)


def test_a_list_of_averages_needs_names(tmp_path):
    state = {"model": RAWS, "ema": list(AVERAGES.values())}
    with pytest.raises(
        ema.ArgumentError, match=r"`names` must be given, since `ema` of torch\.save saves a l"
    ):
        convert(state, tmp_path / "ours", key="ema", step=1)
    assert_averages(convert(state, tmp_path / "ours", key="ema", step=1, names=list(AVERAGES)))


def test_inside_of_a_key_averages_are_told_from_raw_weights(tmp_path):
    state = {"gen": {"params": RAWS, "ema_params": AVERAGES}, "disc": {"params": RAWS}}
    assert_averages(convert(state, tmp_path / "a", key="gen", step=1))
    wrapped = {
        **weights(RAW, "ema.online_model."),
        **weights(AVERAGE, "ema.ema_model."),
        "ema.initted": torch.tensor(True),
        "ema.step": torch.tensor(5),
    }
    result = convert(wrapped, tmp_path / "b", key="ema")
    assert_averages(result)
    assert result.record.step == 5


# --- float8, sizes, targets -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_float8_is_widened_and_every_value_stays(tmp_path, dtype, suffix):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    file = save({"ema.w": codes, "ema.v": torch.ones(2)}, tmp_path / f"x.{suffix}")
    stored = read_state(convert(file, tmp_path / "ours", step=1).place).tensors
    assert stored["w"].dtype == "F32"
    found = np.frombuffer(stored["w"].bytes(), np.float32)
    np.testing.assert_array_equal(found, codes.float().numpy())
    assert list(np.signbit(found[[0, 128]])) == [False, True]


def test_float8_with_scales_is_refused(tmp_path):
    state = {"a.weight": torch.ones(2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"with a scale beside it, `a\.weight_scale`: these"):
        convert({"ema": state}, tmp_path / "ours", step=1)


def test_a_small_file_that_means_large_tensors_is_refused(tmp_path):
    file = save({"ema": {"w": torch.ones(1).expand(1 << 30)}}, tmp_path / "x.pt")
    assert file.stat().st_size < 4000
    with pytest.raises(CheckpointError, match=r"take 4,294,967,296 bytes, .* max_bytes=4294967296"):
        convert(file, tmp_path / "ours", step=1)
    assert not (tmp_path / "ours").exists()
    small = save({"ema": {"w": torch.ones(1).expand(1000)}}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="max_bytes="):
        convert(small, tmp_path / "ours", step=1, max_bytes=3999)
    convert(small, tmp_path / "ours", step=1, max_bytes=4000)


def test_an_archive_is_bounded_by_what_it_declares(tmp_path):
    """Before anything of it is unfolded."""
    plain = save({"ema": {"w": torch.zeros(50_000)}}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match=r"100,000 are allowed .* max_bytes="):
        convert(tmp_path / "y.pt", tmp_path / "ours", step=1, max_bytes=100_000)


@pytest.mark.parametrize("target", ["ours", "ours/ema.safetensors", "other.safetensors"])
def test_a_target_is_replaced_when_it_is_asked_for(tmp_path, target):
    state = {"model": RAWS, "ema": AVERAGES}
    place = convert(state, tmp_path / target, step=1).place
    before = place.read_bytes()
    with pytest.raises(CheckpointError, match=r"there is a file already: force=True \(--force\)"):
        convert(state, tmp_path / target, step=2)
    assert place.read_bytes() == before
    assert convert(state, tmp_path / target, step=2, force=True).record.step == 2


def test_a_split_state_is_a_target_too(tmp_path):
    EMAModel(nn.Linear(30, 30)).save(tmp_path, max_shard_size=200)
    with pytest.raises(CheckpointError, match="there is a file already"):
        convert({"ema": AVERAGES}, tmp_path, step=1)


def test_without_torch_its_files_are_refused_in_one_line(tmp_path):
    file = save({"ema": AVERAGES}, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ema.command.main import main\n"
        f"sys.argv = ['ema', 'convert', {str(file)!r}, {str(tmp_path / 'ours')!r}]\n"
        "main()"
    )
    done: subprocess.CompletedProcess[str]
    done = processes.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 1
    assert done.stderr == "ema: `torch` is not installed: pip install 'ema[torch]'\n"
    assert MissingExtraError.__name__ not in done.stdout


# --- files of others, where ours is expected ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "seems"),
    [
        ("x.pt", {"ema": AVERAGES}, "a file of torch.save; `ema convert`"),
        ("x.npz", "npz", "an archive of numpy.savez; `ema convert`"),
        ("x.msgpack", b"\x81\xa6params\x80" + bytes(20), "a msgpack file, as flax.serialization"),
        ("x.pkl", b"\x80\x04\x95" + bytes(20), "a pickle, as older versions of torch.save"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file, which `ema` cannot read"),
        ("x.zip", b"PK\3\4" + bytes(40), "a damaged zip archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_others_is_refused_with_what_it_seems_to_be(tmp_path, name, content, seems):
    file = tmp_path / name
    if content == "npz":
        np.savez(file, w=np.ones(2))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    for read in (read_state, EMAModel(nn.Linear(2, 2)).load):
        with pytest.raises(
            CheckpointError, match=f"{name}: `ema` did not write it: it seems to"
        ) as e:
            read(file)
        assert seems in str(e.value)


def test_a_folder_of_others_is_refused_with_what_it_seems_to_be(tmp_path):
    save(AVERAGES, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="its folder seems to be a folder of save_pretrained"):
        read_state(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_state(tmp_path / "none")
