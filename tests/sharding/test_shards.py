"""Averages of shards: those of a single process, to the last bit, wherever the shards lie.

What is compared is counted in ``program.py``; one element that differs fails here.
"""

import importlib.util
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from ema.checkpoint import read_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(10_800)]

SPEC = importlib.util.spec_from_file_location("program", Path(__file__).with_name("program.py"))
program = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(program)

RANKS = (1, 2, 3, 4)
STEPS = [program.STEPS, program.STEPS]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("option", program.OPTIONS)
def test_the_gathered_average_is_that_of_a_single_process(runs, ranks, option):
    """After 100 and 200 steps, an average that began before the model was sharded."""
    for report in runs[ranks]:
        found = report["trajectories"][option]
        assert (found["half"], found["end"], found["live"]) == (0, 0, 0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("option", program.OPTIONS)
@pytest.mark.parametrize("way", ["file", "dcp"])
def test_what_four_ranks_saved_goes_on_elsewhere(runs, ranks, option, way):
    """From ``ema.safetensors`` and from torch.distributed.checkpoint: equal, and so it stays."""
    for report in runs[ranks]:
        found = report["trajectories"][option]
        assert (found[way], found[f"{way} at the end"]) == (0, 0)
        assert found[f"{way} counters"] == STEPS


@pytest.mark.parametrize("option", program.OPTIONS)
@pytest.mark.parametrize("way", ["file", "dcp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_four_ranks_saved_goes_on_without_torch_distributed(runs, shared, option, way):
    options = program.OPTIONS[option]
    reference = program.Reference(options).go_to(program.HALF)
    model = program.make(options.get("params", torch.float32))
    program.put(model, program.live_at(program.HALF, model))
    average = program.new_average(model, options)
    if way == "dcp":
        dcp.load({"ema": average}, checkpoint_id=shared / f"{option}-dcp", no_dist=True)
    else:
        program.load(average, shared, option, way)
    assert program.count_differing(program.gathered(average), reference.averages()) == 0
    program.run_to(average, model, program.HALF, program.STEPS)
    final = reference.go_to(program.STEPS).averages()
    assert program.count_differing(program.gathered(average), final) == 0


@pytest.mark.parametrize("option", program.OPTIONS)
def test_the_files_are_those_of_a_single_process(runs, shared, option, tmp_path):
    """Byte for byte, state and export: how many ranks there were does not show."""
    reference = program.Reference(program.OPTIONS[option]).go_to(program.HALF).average
    for label in reference.schedules:
        reference.save(tmp_path / "ema.safetensors", name=label)
        saved = shared / f"{option}-{label}.safetensors"
        assert saved.read_bytes() == (tmp_path / "ema.safetensors").read_bytes()
        assert read_state(saved).record.step == program.HALF
    first = next(iter(reference.schedules))
    reference.export(tmp_path / "export.safetensors", name=first)
    exported = shared / f"{option}-export.safetensors"
    assert exported.read_bytes() == (tmp_path / "export.safetensors").read_bytes()
    state = safetensors.torch.load_file(exported)
    assert state.keys() == reference.model.state_dict().keys()


def each(runs, part):
    """The reports of one part: ranks, way and what was found."""
    for ranks, reports in runs.items():
        for report in reports:
            for way, found in report[part].items():
                yield ranks, way, found


def test_updates_and_swaps_communicate_nothing(runs):
    """Counted by the profiler, which sees what a forward pass communicates."""
    found = [(ranks, way, f["collectives"]) for ranks, way, f in each(runs, "swaps")]
    assert {where for where in found if where[2]} == set()
    seen = {(ranks, way) for ranks, way, f in each(runs, "swaps") if f["forward"] > 0}
    assert {way.__name__ for way in program.ways(4)} - {w for r, w in seen if r == 4} == {"by_hand"}


def test_the_next_forward_sees_a_swap_however_parameters_are_kept(runs):
    """Inside the block the averages, after it the live weights; gathered copies do not matter."""
    for ranks, way, found in each(runs, "swaps"):
        limit = 0.03 if way == "mixed_precision" else 1e-6
        assert found["apart"] > 0.3, (ranks, way)
        assert found["inside"] < limit, (ranks, way)
        assert found["after"] < limit, (ranks, way)
        assert (found["differing"], found["live"], found["state inside"]) == (0, 0, 0), (ranks, way)


def test_the_distance_is_that_of_a_single_process(runs):
    for ranks, way, found in each(runs, "swaps"):
        assert found["distance"] < 1e-6, (ranks, way)


def test_a_teacher_under_fully_shard_is_refused(runs):
    called = [found["called"] for _, _, found in each(runs, "swaps") if "called" in found]
    assert len(called) > 10
    assert all("call it inside use_ema()" in message for message in called)


def test_rank_0_gathers_what_torch_gathers(runs):
    """On every mesh: uneven, empty, strided and replicated parts."""
    assert [where for where in each(runs, "gathers") if where[2] != 0] == []


def test_an_optimizer_on_shards_moves_what_is_averaged(runs):
    assert {found for _, _, found in each(runs, "training")} == {0}


def test_ranks_agree_on_what_is_not_finite(runs):
    """One NaN in one shard: all of them skip the update, or all raise."""
    for reports in runs.values():
        for report in reports:
            found = report["guarded"]
            assert found["skip"] == [3, 2, 1, None]
            *counters, error = found["raise"]
            assert counters == [2, 2, 0]
            assert "must be finite to be averaged" in error
        texts = [report["guarded"]["raise"][-1] for report in reports]
        assert sum("`second.weight`" in text for text in texts) == 1


def test_a_bit_that_differs_between_replicas_is_found(runs):
    """Under DDP, on a mesh of replicas, and beside shards; every rank is told."""
    for ranks in (2, 3, 4):
        for report in runs[ranks]:
            found = report["replicated"]
            assert f"`first.weight` on rank {ranks - 1}," in found["ddp"]
            assert f"`step` on rank {ranks - 1}," in found["counter"]
            assert f"`first.weight, remainder` on rank {ranks - 1}," in found["remainder"]
    for report in runs[4]:
        found = report["replicated"]
        assert "`embed.weight` on rank 3," in found["hsdp"]
        assert "`embed.weight` on rank 1," in found["side by side"]
    assert runs[1][0]["replicated"]["ddp"] is None


def test_when_rank_0_cannot_write_every_rank_hears_of_it(runs):
    for reports in runs.values():
        for report in reports:
            assert "it is a file: name a folder" in report["failing"]["message"]
            assert report["failing"]["written"]


def test_the_blocks_of_the_page_run(runs):
    for reports in runs.values():
        for report in reports:
            assert (report["page"]["blocks"], report["page"]["differing"]) == (4, 0)
            assert 0 < report["page"]["distance"] < 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_during_a_save_leaves_the_last_file_whole(start, tmp_path, victim):
    """The other rank raises instead of waiting for good."""
    start("killed", 2, tmp_path, may_fail=(victim,), EMA_TEST_VICTIM=str(victim))
    assert '"raised": null' not in (tmp_path / f"rank{1 - victim}.json").read_text()
    state = read_state(tmp_path)
    assert state.record.step == 1
    average = program.Reference({}).go_to(1).average
    again = program.new_average(program.make(), {})
    again.load(tmp_path)
    assert program.count_differing(again.averaged_parameters(), average.averaged_parameters()) == 0
    again.save(tmp_path)
    assert [file.name for file in tmp_path.glob(".ema*")] == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_an_average_takes_its_share_of_memory(start, tmp_path):
    """With its start, three updates and a swap: at most 1.05 of the bytes of its shards."""
    for report in start("memory", 2, tmp_path):
        found = report["memory"]
        assert found["peak"] <= 1.05 * found["share"], found
        assert found["peak"] >= 0.95 * found["share"], found
