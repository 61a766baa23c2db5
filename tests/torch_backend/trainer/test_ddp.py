"""Two processes under torchrun: the same average in each, written by one."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ema.torch_backend.trainer import last_complete_checkpoint
from tests import processes
from tests.torch_helpers import assert_same

PROGRAM = Path(__file__).with_name("ddp_program.py")


def run(config, folder, *arguments, program=PROGRAM):
    """Both processes to their end: the exit code and what they have said."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        # a busy machine is not dead
        *("--rdzv-conf", "read_timeout=3600,keep_alive_interval=3600"),
        *(str(program), json.dumps(config), str(folder), *arguments),
    ]
    done = processes.run(command, {"OMP_NUM_THREADS": "1"}, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def ranks(config, tmp_path):
    """What the two processes have found."""
    code, output = run(config, tmp_path)
    assert code == 0, output
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_every_process_holds_the_same_average_and_one_writes_it(ranks):
    """That of the best step by hand; resumed from elsewhere, attached, it is the same again."""
    one, two = ranks
    assert_same(one["state"]["averages"], two["state"]["averages"])
    assert_same(one["weights"], two["weights"])
    assert one["by_hand"]
    assert two["by_hand"]
    assert one["state"]["step"] == two["state"]["step"] == int(one["best"].rpartition("-")[2])
    assert list(one["metrics"]) == [2, 4, 6, 8]
    assert one["metrics"] == two["metrics"]

    names = [Path(path).parent.name for path in one["saves"]]
    assert names == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 6, 8)]
    assert two["saves"] == []

    for rank in ranks:
        assert_same(rank["resumed_state"]["averages"], rank["state"]["averages"])
        assert_same(rank["resumed_weights"], rank["weights"])
        assert rank["resumed_metrics"] == rank["metrics"]


@pytest.mark.slow
def test_a_checkpoint_that_another_process_did_not_finish_is_not_complete(config, tmp_path):
    """The main one has written all of its own, and waits; without it the average would be there."""
    code, _ = run(config, tmp_path, "kill")
    assert code != 0
    files = {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "trainer_state.json" in files
    assert not files & {"rng_state_1.pth", "ema.safetensors"}
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_a_save_without_an_event_in_two_processes(config, tmp_path):
    """Written once all have saved; alone only on SIGTERM, and another save is warned of."""
    code, output = run(config, tmp_path, program=PROGRAM.with_name("ddp_saves.py"))
    assert code == 0, output
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(one) == 8
    for case, found in one.items():
        unknown = case.startswith("ByHand") and case.endswith("alone")
        assert (found["complete"], found["right"]) == ((False, None) if unknown else (True, True))
        assert len(found["warned"]) == unknown, case
        assert two[case] == {**found, "warned": []}
