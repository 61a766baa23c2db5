"""Averages behind the training step: params here lie on the CPU as well, the thread is real."""

import gc
import sys
import threading
import weakref
from concurrent import futures

import pytest
import torch
from torch import nn

from ema.errors import StateError
from ema.rounding import stream_of
from ema.torch_backend.gpu.offload import Offload
from ema.torch_backend.swap.swap import Swap
from ema.torch_backend.tensors.sharding import box_of
from ema.torch_backend.tensors.tracked import Tracked
from ema.torch_backend.update.sweep import Sweep
from tests import processes


def sweep(kind, params, read):
    """Averages that start as ``params``, and their update from what is read."""
    dtype = torch.bfloat16 if kind == "stochastic" else torch.float32
    averages = [p.detach().to(dtype, copy=True) for p in params]
    remainders = [(torch.zeros_like(a),) if kind == "compensated" else () for a in averages]
    tracked = [
        Tracked((average,), rest, live, box_of(live), stream_of(str(index), 0), live.data_ptr())
        for index, (average, rest, live) in enumerate(zip(averages, remainders, read, strict=True))
    ]
    return [each.kept for each in tracked], Sweep(tracked)


def tensors(dtype):
    shapes = [(3, 5), (70, 80), (), (0,), (1 << 13, 40), (7,)]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    channels_last = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    return [*params, nn.Parameter(channels_last), nn.Parameter(torch.randn(6, 9).to(dtype)[:, ::2])]


def move(params, generator):
    """The optimizer's write, right after the update was handed over."""
    with torch.no_grad():
        for param in params:
            param.add_(torch.randn(param.shape, generator=generator).to(param), alpha=0.1)


def different(ours, theirs):
    together = zip(ours, theirs, strict=True)
    return sum(
        int((a != b).sum()) for ones, others in together for a, b in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("kind", ["plain", "compensated", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_200_steps_have_the_bits_of_the_plain_update(kind, dtype):
    """With swaps and copies of the state in between, and the next write right behind each update."""
    params = tensors(dtype)
    offload = Offload(params)
    ours, behind = sweep(kind, params, offload.staged)
    theirs, plain = sweep(kind, params, params)
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 201):
        move(params, generator)
        plain([0.01], count)
        offload.run(lambda count=count: behind([0.01], count))
        if count % 50 == 0:
            offload.wait()
            names = [str(index) for index in range(len(params))]
            averages = {name: several[0] for name, several in zip(names, ours, strict=True)}
            live = dict(zip(names, params, strict=True))
            swap = Swap(nn.Module(), averages, live, None)
            swap.apply()
            assert all(torch.equal(p, a[0].to(p)) for p, a in zip(params, theirs, strict=True))
            swap.restore()
        if count % 70 == 0:
            offload.wait()
            state = [tuple(slot.clone() for slot in several) for several in ours]
            assert different(state, theirs) == 0
    offload.wait()
    assert different(ours, theirs) == 0


def test_the_host_goes_on_while_the_average_is_made():
    param = torch.ones(3)
    offload = Offload([param])
    may, seen = threading.Event(), []
    offload.run(lambda: (may.wait(), seen.append(offload.staged[0].clone())))
    try:
        param.zero_()
        assert seen == []
    finally:
        may.set()
    offload.wait()
    assert torch.equal(seen[0], torch.ones(3))


def test_the_next_update_waits_for_the_one_before(monkeypatch):
    """The first one lasts until the second is waiting for it."""
    offload, seen = Offload([torch.ones(3)]), []
    waits, wait = threading.Event(), futures.wait
    monkeypatch.setattr(futures, "wait", lambda work: (waits.set(), wait(work)))
    offload.run(lambda: (waits.wait(), seen.append(1)))
    try:
        offload.run(lambda: seen.append(2))
        assert seen[:1] == [1]
    finally:
        waits.set()
    offload.wait()
    assert seen == [1, 2]


@pytest.mark.parametrize("call", ["run", "wait"])
def test_what_the_thread_raised_is_raised_once_at_the_next_call(call):
    offload, seen = Offload([torch.ones(3)]), []

    def fail():
        raise RuntimeError("no memory left")

    offload.run(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        offload.wait() if call == "wait" else offload.run(lambda: seen.append(0))
    offload.wait()
    offload.run(lambda: seen.append(1))
    offload.wait()
    assert seen == [1]


def test_control_c_while_waiting_leaves_the_update_whole():
    """It comes when the wait has begun, and the update ends after it."""
    code = """
import gc, signal, threading, torch
from concurrent import futures
from ema.torch_backend.gpu.offload import Offload

gc.disable()  # Python drops what a handler raises while it collects
offload, seen = Offload([torch.ones(3)]), []
may, waits, came, wait = threading.Event(), threading.Event(), threading.Event(), futures.wait
futures.wait = lambda work: (waits.set(), wait(work))

def handler(number, frame):
    if not came.is_set():
        came.set()
        raise KeyboardInterrupt

def interrupt():
    waits.wait()
    while not came.is_set():  # a signal right before a thread waits for a lock does not wake it
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        came.wait(0.1)

signal.signal(signal.SIGINT, handler)
offload.run(lambda: (may.wait(), seen.append(1)))
threading.Thread(target=interrupt).start()
try:
    offload.wait()
except KeyboardInterrupt:
    assert seen == []
    may.set()
    offload.wait()
    assert seen == [1]
else:
    raise SystemExit("it was not interrupted")
finally:
    may.set()
"""
    processes.run([sys.executable, "-c", code])


def test_the_thread_ends_with_the_average():
    before = set(threading.enumerate())
    offload = Offload([torch.ones(3)])
    assert set(threading.enumerate()) == before
    offload.run(lambda: None)
    offload.wait()
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(offload)
    del offload
    gc.collect()
    assert gone() is None
    thread.join()  # or the test never ends


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "del offload"])
def test_a_process_ends_after_the_work(ending):
    """The work begins when the interpreter ends, and lets the main thread go ahead."""
    code = f"""
import atexit, threading, time, torch
from ema.torch_backend.gpu.offload import Offload

offload, ends, late = Offload([torch.ones(3)]), threading.Event(), threading.Event()

def work():
    ends.wait()
    for _ in range(10_000):
        time.sleep(0)
    print("too late" if late.is_set() else "done", flush=True)

offload.run(work)
threading._register_atexit(ends.set)  # before threads are waited for, and what follows after it
atexit.register(late.set)
{ending}
"""
    assert processes.run([sys.executable, "-c", code]).stdout == "done\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_fork_finds_the_update_done_and_can_go_on():
    """As the workers of a loader do; parent and child both make further updates."""
    code = """
import os, threading, torch
from ema.torch_backend.gpu.offload import Offload

average, offload, forks = torch.zeros(3), Offload([torch.ones(3)]), threading.Event()
os.register_at_fork(before=forks.set)  # the latest comes first
work = lambda: (forks.wait(), average.add_(offload.staged[0]))
offload.run(work)
child = os.fork()
assert average.tolist() == [1, 1, 1], average
offload.run(work)
offload.wait()
assert average.tolist() == [2, 2, 2], average
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    processes.run([sys.executable, "-W", "ignore", "-c", code])


def test_staging_takes_little_more_than_the_params():
    """In allocations of a power of two, of which PyTorch locks no other."""
    live = [
        torch.empty(size, dtype=torch.bfloat16) for size in [50257 * 64, 3 << 20, 768, 1 << 20, 5]
    ]
    staged = Offload(live).staged
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in staged}
    assert all(size.bit_count() == 1 for size in storages.values())
    needed = sum(tensor.numel() * 2 for tensor in live)
    assert needed <= sum(storages.values()) < 2 * needed


def test_staged_tensors_do_not_overlap_and_keep_their_layout():
    live = tensors(torch.float32)
    staged = Offload(live).staged
    for index, tensor in enumerate(staged):
        tensor.fill_(index)
    assert [t.unique().tolist() for t in staged] == [
        [i] if t.numel() else [] for i, t in enumerate(live)
    ]
    assert staged[-2].stride() == live[-2].stride()
    assert staged[-1].is_contiguous()


def test_an_update_within_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(StateError, match="CUDA graph"):
        Offload([torch.ones(3)]).run(lambda: None)
