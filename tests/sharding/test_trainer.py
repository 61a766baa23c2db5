"""The Trainer and Accelerate with FSDP2, two processes under torchrun."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ema import EMAModel
from tests import processes

PROGRAM = Path(__file__).with_name("trainer_program.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(once) -> Path:
    """Where the two processes have put everything."""
    return once("trainer", run)


def run(folder):
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *(
            "--rdzv-conf",
            "read_timeout=3600,keep_alive_interval=3600",
        ),  # a busy machine is not dead
        *("--nproc-per-node", "2", str(PROGRAM), str(folder)),
    ]
    processes.run(command, {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})


@pytest.fixture(scope="module")
def ranks(home) -> list[dict]:
    """What each of them has found."""
    return [torch.load(home / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(home) -> GPT2LMHeadModel:
    """A model of the same shapes in this process."""
    return GPT2LMHeadModel(GPT2Config(**json.loads((home / "config.json").read_text())))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_callback_averages_what_the_trainer_shards(ranks):
    """On both ranks the recursion over the gathered weights of each step."""
    for found in ranks:
        assert found["first"]["sharded"]
        assert found["first"]["step"] == 6
        assert_same(found["first"]["averages"], found["first"]["by hand"])
        assert len(found["first"]["distances"]) == 6


def test_a_resumed_run_is_the_uninterrupted_one(ranks):
    for found in ranks:
        assert_same(found["resumed"]["averages"], found["first"]["averages"])
        assert found["resumed"]["metrics"][6] == found["first"]["metrics"][6]


def test_a_checkpoint_goes_on_in_one_process(ranks, home, plain):
    average = EMAModel(plain, 0.9)
    average.load(home / "run" / "checkpoint-6")
    assert average.step == 6
    assert_same(average.averaged_parameters(), ranks[0]["first"]["averages"])


def test_the_averaged_model_is_written_whole(ranks, home):
    """``from_pretrained`` reads it, and it has the loss that the evaluation reported."""
    model = GPT2LMHeadModel.from_pretrained(home / "run" / "ema")
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    assert_same(parameters, ranks[0]["first"]["averages"])
    assert model.lm_head.weight is model.transformer.wte.weight
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))[:8]
    loss = model.eval()(input_ids=rows, labels=rows).loss.item()
    assert ranks[0]["first"]["metrics"][6] == pytest.approx(loss, rel=1e-4)


def test_an_adapter_in_sharded_checkpoints(ranks, home):
    """Averaged, resumed and exported; the base takes no part."""
    for found in ranks:
        adapter = found["adapter"]
        assert adapter["sharded"]
        assert len(adapter["averages"]) == 6
        assert_same(adapter["averages"], adapter["by hand"])
        assert_same(found["adapter resumed"]["averages"], adapter["averages"])
        assert found["adapter resumed"]["metrics"][6] == adapter["metrics"][6]
    written = safetensors.torch.load_file(home / "adapter" / "ema" / "adapter_model.safetensors")
    averages = {
        name.replace(".default", "").replace(".modules_to_save", ""): value
        for name, value in ranks[0]["adapter"]["averages"].items()
    }
    assert_same(written, averages)


def test_a_loop_with_accelerate(ranks, home, plain):
    """Begun before ``prepare`` or after it, the average is the same; evaluated and exported."""
    for found in ranks:
        looped = found["accelerate"]
        assert looped["sharded"]
        assert_same(looped["before"], looped["after"])
    plain.load_state_dict(safetensors.torch.load_file(home / "accelerated.safetensors"))
    parameters = {name: value.detach() for name, value in plain.named_parameters()}
    looped = ranks[0]["accelerate"]
    assert_same(parameters, looped["after"])
    loss = plain.eval()(input_ids=looped["tokens"], labels=looped["tokens"]).loss.item()
    # the model of the loop was in training mode, where GPT-2 drops out
    assert looped["loss"] == pytest.approx(loss, rel=0.05)
