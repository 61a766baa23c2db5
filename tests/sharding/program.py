"""One rank of a run over several processes; started by ``launch`` of ``conftest.py``.

    program.py <scenario> <rank> <ranks> <folder>

The model, its live weights at every step and so its average are functions of the seed alone: every
rank also computes them as a single process would, and compares.
"""

import dataclasses
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from ema import CheckpointError, ModelError, StateError
from ema.torch_backend import EMAModel
from ema.torch_backend.saving import gather as gather_module
from ema.torch_backend.tensors.sharding import box_of, local_of, wrapped_like

STEPS, HALF = 200, 100

OPTIONS = {  # of EMAModel, by name; each is run on every number of ranks
    "float32": {},
    "bfloat16-params": {"params": torch.bfloat16},
    "several": {"decay": {"short": 0.9, "long": 0.999}},
    "buffers": {"buffers": "average"},
    "compensated": {"compensated": True},
    "rounded": {"params": torch.bfloat16, "dtype": torch.bfloat16, "seed": 3},
    "several-compensated": {"decay": {"short": 0.9, "long": 0.999}, "compensated": True},
}


class Net(nn.Module):
    """Uneven shapes: rows that 2, 3 and 4 do not divide, one row, a scalar-like vector, a tie."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.first = nn.Linear(7, 13)
        self.norm = nn.BatchNorm1d(13)
        self.second = nn.Linear(13, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(requires_grad=False)
        self.one = nn.Linear(7, 1)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.first(self.embed(tokens)))
        x = self.frozen(self.second(torch.relu(x)))
        return self.head(x) + self.one(x)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def live_at(step, model):
    """The weights and averaged buffers of a step, whole, by name."""
    generator = torch.Generator().manual_seed(1000 + step)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    return {name: v.abs() if "var" in name else v for name, v in values.items()}


@torch.no_grad()
def put(model, values):
    """Write whole values into the local parts."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in values:
            place = box_of(tensor)
            whole = box_of(values[name])
            local_of(tensor).copy_(whole.part(values[name], place))


def whole(tensors):
    """Gathered by torch itself."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def count_differing(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
    return sum(int((ours[n] != theirs[n]).sum()) for n in ours)


class Reference:
    """The same run in one process without shards."""

    def __init__(self, options):
        options = dict(options)
        self.model = make(options.pop("params", torch.float32))
        self.average = EMAModel(self.model, **{"decay": 0.99, **options})
        self.step = 0

    def go_to(self, step):
        while self.step < step:
            self.step += 1
            put(self.model, live_at(self.step, self.model))
            self.average.update()
        return self

    def averages(self):
        labels = self.average.schedules
        return {
            f"{label} {name}": value.clone()
            for label in labels
            for name, value in self.average.averaged_parameters(label).items()
        }


def gathered(average):
    return {
        f"{label} {name}": value
        for label in average.schedules
        for name, value in whole(average.averaged_parameters(label)).items()
    }


def new_average(model, options):
    options = {key: value for key, value in options.items() if key != "params"}
    return EMAModel(model, **{"decay": 0.99, **options})


def run_to(average, model, first, last):
    for step in range(first + 1, last + 1):
        put(model, live_at(step, model))
        average.update()


# Ways to shard; each takes a model and the number of ranks and returns it sharded.


def by_module(model, ranks):
    """Two levels; the root keeps its gathered parameters after a forward pass."""
    for module in (model.first, model.second):
        fully_shard(module)
    return fully_shard(model)


def kept(model, ranks):
    for module in (model.first, model.second):
        fully_shard(module, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


def released(model, ranks):
    for module in (model.first, model.second):
        fully_shard(module, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def released_in_part(model, ranks):
    """After a forward pass parameters are sharded over half as many ranks."""
    smaller = ranks // 2 if ranks == 4 else ranks
    for module in (model.first, model.second):
        fully_shard(module, reshard_after_forward=smaller)
    return fully_shard(model, reshard_after_forward=smaller)


def mixed_precision(model, ranks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for module in (model.first, model.second):
        fully_shard(module, mp_policy=policy)
    return fully_shard(model)


def side_by_side(model, ranks):
    """Only two layers are sharded, the rest is a plain replica on every rank."""
    fully_shard(model.first)
    fully_shard(model.second)
    return model


def replicas(model, ranks):
    """A mesh of replicas of shards."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, ranks):
    """Columns and rows over one mesh dimension, FSDP over the other: strided shards."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "second": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model.first, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def by_hand(model, ranks):
    """DTensors without FSDP: some sharded, some replicated."""
    mesh = init_device_mesh("cpu", (ranks,))
    for number, module in enumerate(list(model.modules())):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module is model.head or number % 2:
                continue
            split = distribute_tensor(parameter.detach(), mesh)
            module.register_parameter(
                name, nn.Parameter(split, requires_grad=parameter.requires_grad)
            )
    return model


WAYS = [by_module, kept, released, mixed_precision, side_by_side, by_hand]
WAYS_OF_FOUR = [replicas, tensor_parallel, released_in_part]


def ways(ranks):
    return [*WAYS, *(WAYS_OF_FOUR if ranks == 4 else [])]


@contextmanager
def collectives(found):
    """Count what goes through a process group while the block runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    names = [event.name for event in profiler.events()]
    found.append([n for n in names if "c10d" in n or "gloo:" in n or "nccl:" in n])


def trajectories(rank, ranks, folder):
    """Every option through 200 steps, saved in the middle, resumed from what 4 ranks saved."""
    report = {}
    for name, options in OPTIONS.items():
        started = time.perf_counter()
        reference = Reference(options).go_to(HALF)
        halfway = reference.averages()
        model = make(options.get("params", torch.float32))
        average = new_average(model, options)  # before it is sharded
        for step in (1, 2):
            put(model, live_at(step, model))
            average.update()
        by_module(model, ranks)
        run_to(average, model, 2, HALF)
        result = {"half": count_differing(gathered(average), halfway)}
        if ranks == 4:
            save(average, folder, name)
        # a new run with other numbers of ranks goes on from what four ranks have saved
        resumed = {}
        for way in ("file", "dcp"):
            other = make(options.get("params", torch.float32))
            put(other, live_at(HALF, other))
            by_module(other, ranks)
            again = new_average(other, options)
            load(again, folder, name, way)
            resumed[way] = count_differing(gathered(again), halfway)
            run_to(again, other, HALF, STEPS)
            result[f"{way} counters"] = [again.step, again.count]
            resumed[f"{way} at the end"] = again
        run_to(average, model, HALF, STEPS)
        final = reference.go_to(STEPS).averages()
        result["end"] = count_differing(gathered(average), final)
        for way, value in resumed.items():
            result[way] = (
                value if isinstance(value, int) else count_differing(gathered(value), final)
            )
        result["live"] = count_differing(
            whole(dict(model.named_parameters())), dict(reference.model.named_parameters())
        )
        result["seconds"] = round(time.perf_counter() - started, 1)
        report[name] = result
    return report


def save(average, folder, name):
    for label in average.schedules:
        average.save(folder / f"{name}-{label}.safetensors", name=label)
    average.export(folder / f"{name}-export.safetensors", name=next(iter(average.schedules)))
    dcp.save({"ema": average}, checkpoint_id=folder / f"{name}-dcp")


def load(average, folder, name, way):
    if way == "dcp":
        dcp.load({"ema": average}, checkpoint_id=folder / f"{name}-dcp")
        return
    for label in average.schedules:
        average.load(folder / f"{name}-{label}.safetensors", name=label)


def swaps(rank, ranks, folder):
    """Every way to shard: what a forward pass sees, who communicates, what is refused."""
    report = {}
    tokens = torch.arange(12) % 11
    for way in ways(ranks):
        model = way(make().eval(), ranks)
        average = EMAModel(model, 0.9)
        reference = Reference({"decay": 0.9})
        reference.model.eval()
        result = {"differing": 0, "live": 0, "inside": 0.0, "after": 0.0, "apart": 1.0}
        counted, forward = [], []
        for step in (1, 2):
            put(model, live_at(step, model))
            reference.go_to(step)
            if way is not by_hand:  # which leaves it to the user to bring his inputs onto a mesh
                with torch.no_grad(), collectives(forward):
                    model(tokens)  # gathered copies of the live weights
            with collectives(counted):
                average.update()
            result["differing"] += count_differing(gathered(average), reference.averages())
            with torch.no_grad():
                plain = reference.model(tokens)
                with reference.average.use_ema():
                    expected = reference.model(tokens)
                result["apart"] = min(result["apart"], away(expected, plain))
                inside, after = swapped(average, None if way is by_hand else tokens, counted)
            if inside is not None:
                result["inside"] = max(result["inside"], away(inside, expected))
                result["after"] = max(result["after"], away(after, plain))
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            result["live"] += count_differing(
                whole(dict(model.named_parameters())), dict(reference.model.named_parameters())
            )
        distance = reference.average.relative_distance()
        result["distance"] = abs(average.relative_distance() / distance - 1)
        average.verify_ranks()
        with average.use_ema():
            inside = average.state_dict()["averages"]
            theirs = dict(reference.average.averaged_parameters())
            result["state inside"] = count_differing(whole(inside), theirs)
        result |= {"forward": sum(map(len, forward)), "collectives": sum(map(len, counted))}
        if way in (by_module, kept, replicas):
            try:
                average(tokens)
            except ModelError as error:
                result["called"] = str(error)
        report[way.__name__] = result
    return report


def swapped(average, tokens, counted):
    """Outputs inside ``use_ema`` and after it, each after a forward pass that kept its weights."""

    def run():
        return None if tokens is None else average.model(tokens)

    run()
    block = average.use_ema()
    with collectives(counted):
        block.__enter__()
    inside = run()
    with collectives(counted):
        block.__exit__(None, None, None)
    return inside, run()


def away(found, expected):
    """How far a prediction is from another one."""
    return float((as_plain(found) - expected).norm() / expected.norm())


def as_plain(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def training(rank, ranks, folder):
    """A real optimizer on shards: what it leaves in them is what is averaged."""
    model = by_module(make(), ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = EMAModel(model, 0.9)
    plain = make()
    expected = EMAModel(plain, 0.9)
    for step in range(5):
        torch.manual_seed(step)
        tokens = torch.randint(0, 11, (6,))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        for name, value in whole(dict(model.named_parameters())).items():
            dict(plain.named_parameters())[name].data.copy_(value)
        expected.update()
    found = whole(average.averaged_parameters())
    return {"differing": count_differing(found, dict(expected.averaged_parameters()))}


def replicated(rank, ranks, folder):
    """DDP, and replicas of shards: a bit that differs is found, with its name and its rank."""
    report = {}
    model = DistributedDataParallel(make())
    average = EMAModel(model, 0.9)
    for step in (1, 2):
        put(model.module, live_at(step, model.module))
        average.update()
    average.verify_ranks()
    report["ddp"] = flipped(average, "first.weight", rank, ranks - 1)
    several = EMAModel(make(), {"short": 0.9, "long": 0.99})
    several.verify_ranks()
    if rank == ranks - 1:
        several._counters = dataclasses.replace(several._counters, step=several.step + 1)
    report["counter"] = refusal(several)
    exact = EMAModel(make(), 0.9, compensated=True)
    exact.verify_ranks()
    remainder = exact._averages.remainders(0)["first.weight"]
    remainder[0, 0] = float(rank == ranks - 1)
    report["remainder"] = refusal(exact)
    if ranks == 4:
        model = replicas(make(), ranks)
        average = EMAModel(model, 0.9)
        average.verify_ranks()
        report["hsdp"] = flipped(average, "embed.weight", rank, 3)
        model = side_by_side(make(), ranks)
        average = EMAModel(model, 0.9)
        average.verify_ranks()
        report["side by side"] = flipped(average, "embed.weight", rank, 1)
    return report


def guarded(rank, ranks, folder):
    """One NaN in one shard: every rank skips, or raises, and none goes on alone."""
    model = by_module(make(), ranks)
    report = {}
    for on_nonfinite in ("skip", "raise"):
        average = EMAModel(model, 0.9, on_nonfinite=on_nonfinite)
        put(model, live_at(1, model))
        average.update()
        values = live_at(2, model)
        values["second.weight"][-1, -1] = float("nan")
        put(model, values)
        error = None
        try:
            average.update()
        except StateError as raised:
            error = str(raised)
        put(model, live_at(3, model))
        average.update()
        report[on_nonfinite] = (average.step, average.count, average.skipped, error)
    return report


def flipped(average, name, rank, where):
    if rank == where:
        local_of(average.averaged_parameters()[name]).view(torch.int32).view(-1)[3] ^= 1
    return refusal(average)


def refusal(average):
    try:
        average.verify_ranks()
    except StateError as error:
        return str(error)
    return None


def memory(rank, ranks, folder):
    """The resident memory at its peak that an average adds, against its share."""
    model = nn.Sequential(*[nn.Linear(4000, 5001, bias=False) for _ in range(2 * ranks)])
    for module in model:
        fully_shard(module)
    fully_shard(model)
    share = sum(local_of(p).numel() * 4 for p in model.parameters())
    warm = EMAModel(fully_shard(nn.Linear(3, 3)), 0.9)
    warm.update()
    before = reset_peak()
    average = EMAModel(model, 0.9)
    for _ in range(3):
        average.update()
    swapped = average.use_ema()
    swapped.__enter__()
    swapped.__exit__(None, None, None)
    return {"share": share, "peak": peak() - before}


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def killed(rank, ranks, folder):
    """A rank is killed in the middle of a save; the others fail, and the last file is whole."""
    victim = int(os.environ["EMA_TEST_VICTIM"])
    model = by_module(make(), ranks)
    average = new_average(model, {})
    run_to(average, model, 0, 1)
    average.save(folder / "ema.safetensors")
    run_to(average, model, 1, 2)
    name = "_receive" if victim == 0 else "_send"
    original, calls = getattr(gather_module, name), []

    def armed(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 9)
        return original(*args)

    if rank == victim:
        setattr(gather_module, name, armed)
    try:
        average.save(folder / "ema.safetensors")
    except Exception as error:
        (folder / f"rank{rank}.json").write_text(json.dumps({"raised": type(error).__name__}))
        os._exit(0)  # the group is broken: nothing is left to be agreed on
    return {"raised": None}


def failing(rank, ranks, folder):
    """Rank 0 cannot write: every rank hears of it, and all go on."""
    model = by_module(make(), ranks)
    average = EMAModel(model, 0.9)
    (folder / "occupied").write_text("")
    try:
        average.save(folder / "occupied")
    except CheckpointError as error:
        message = str(error)
    average.save(folder / "good.safetensors")
    return {"message": message, "written": (folder / "good.safetensors").exists()}


def gathers(rank, ranks, folder):
    """What rank 0 brings together is what torch gathers, for each way to shard."""
    report = {}
    for way in ways(ranks):
        model = way(make(), ranks)
        put(model, live_at(1, model))
        names = list(dict(model.named_parameters()))
        tensors = [*dict(model.named_parameters()).values()]
        expected = whole(dict(model.named_parameters()))

        def look(whole_of, names=names, tensors=tensors, expected=expected):
            found = {name: whole_of(t) for name, t in zip(names, tensors, strict=True)}
            return count_differing(found, expected)

        report[way.__name__] = gather_module.on_first_rank(tensors, look)
        again = wrapped_like(local_of(tensors[0]), tensors[0])
        assert torch.equal(as_plain(again), as_plain(tensors[0]))
    return report


def page(rank, ranks, folder):
    """The blocks of docs/sharding.md, one after the other."""
    model = nn.Sequential()
    model.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)])
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    names = {
        "model": model,
        "folder": folder / f"page-{ranks}",
        "loader": [(torch.ones(2, 3), torch.zeros(2, 3))] * 3,
        "loss_function": nn.functional.mse_loss,
    }
    text = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        lines = block.replace("for inputs", f"{OPTIMIZER}\nfor inputs")
        exec(lines, names)
    same = count_differing(
        whole(names["resumed"].averaged_parameters()),
        whole(names["ema_model"].averaged_parameters()),
    )
    return {"blocks": len(blocks), "differing": same, "distance": names["distance"]}


OPTIMIZER = "import torch; optimizer = torch.optim.SGD(model.parameters(), lr=0.1)"

SCENARIOS = {
    "all": [trajectories, gathers, swaps, training, guarded, replicated, failing, page],
    "memory": [memory],
    "killed": [killed],
}


def main():
    scenario, rank, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    folder = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"rendezvous-{scenario}-{ranks}").absolute().as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(days=1),  # the others may be as slow as they like; pytest ends what hangs
    )
    report = {}
    for part in SCENARIOS.get(scenario) or [globals()[scenario]]:
        began = time.perf_counter()
        report[part.__name__] = part(rank, ranks, folder)
        if rank == 0:
            print(part.__name__, round(time.perf_counter() - began, 1), flush=True)
    (folder / f"{scenario}-{ranks}-rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
