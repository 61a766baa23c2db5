"""Overlap on simulated streams: each is a queue, and what may run first runs first."""

import copy
import gc
import pickle
import signal
import subprocess
import sys
import weakref

import pytest
import torch

from ema.torch_backend.gpu import lane as lane_module
from ema.torch_backend.gpu.lane import Lane
from tests.torch_backend.gpu.simulation import GPU, OTHER


class Run:
    """A run of one number, its average and what was read of it, on the simulated device."""

    def __init__(self, gpu, devices=(GPU,)):
        self.gpu, self.lane = gpu, Lane(devices)
        self.param = self.average = 0.0
        self.read = []

    def write(self):
        self.param += 1.0

    def update(self):
        self.average += 0.25 * (self.param - self.average)

    def look(self):
        self.read.append(self.average)

    def steps(self, write, number=6):
        for index in range(number):
            write()
            self.lane.run(lambda: self.gpu.launch(self.update))
            if index == 3:
                self.lane.wait()
                self.gpu.launch(self.look)

    def right(self, number=6):
        """The same without streams."""
        average, read = 0.0, []
        for index in range(number):
            average += 0.25 * (index + 1.0 - average)
            read += [average] if index == 3 else []
        return average, read

    @property
    def result(self):
        return self.average, self.read


class Optimizer(torch.optim.Optimizer):
    """Writes on the current stream, as those of PyTorch do."""

    def __init__(self, launch):
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {})
        self.launch = launch

    def step(self, closure=None):
        self.launch()


def test_an_optimizer_waits_for_the_update(gpu, latest_first):
    run = Run(gpu)
    run.steps(Optimizer(lambda: gpu.launch(run.write)).step)
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_the_update_runs_beside_what_follows_it(gpu):
    """On the user's stream there is only its own work; from the second update on."""
    run = Run(gpu)
    run.steps(Optimizer(lambda: gpu.launch(run.write)).step, number=2)
    user, own = gpu.current[GPU].queue, gpu.streams[-1].queue
    assert list(user).count(run.update) == 1
    assert list(own).count(run.update) == 1


def test_weights_written_by_hand_are_waited_for_without_a_word(gpu, latest_first):
    run = Run(gpu)
    run.steps(lambda: gpu.launch(run.write))
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_a_writer_by_hand_can_have_the_overlap(gpu, latest_first):
    run = Run(gpu)

    def write():
        run.lane.before_write()
        gpu.launch(run.write)

    run.steps(write)
    assert any(run.update in stream.queue for stream in gpu.streams[2:])
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_a_reader_does_not_pass_for_a_writer(gpu, latest_first):
    """An evaluation between two updates waits; the loop still writes by hand."""
    run = Run(gpu)
    optimizer = Optimizer(lambda: gpu.launch(run.write))
    run.steps(optimizer.step, number=1)
    for _ in range(3):
        gpu.launch(run.write)
        run.lane.run(lambda: gpu.launch(run.update))
        run.lane.wait()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]


def test_an_update_that_is_not_overlapped_comes_after_one_that_is(gpu, latest_first):
    """Two in a row, without a writer in between."""
    run, order = Run(gpu), []
    optimizer = Optimizer(lambda: None)
    for number in range(4):
        if number < 3:
            optimizer.step()
        run.lane.run(lambda number=number: gpu.launch(lambda: order.append(number)))
    gpu.drain(latest_first=latest_first)
    assert order == [0, 1, 2, 3]


def test_a_user_on_a_side_stream_is_followed(gpu, latest_first):
    run = Run(gpu)
    side = gpu.stream(GPU)
    with gpu.on(side):
        run.steps(Optimizer(lambda: gpu.launch(run.write)).step)
    assert not gpu.current[GPU].queue
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_two_devices_are_both_waited_for(gpu, latest_first):
    """Half of the work is on another device; the writer writes there too."""
    run = Run(gpu, (GPU, OTHER))
    seen = []

    def write():
        gpu.launch(run.write)
        gpu.launch(lambda: seen.append("write"), OTHER)

    def work():
        gpu.launch(run.update)
        gpu.launch(lambda: seen.append("update"), OTHER)

    optimizer = Optimizer(write)
    for _ in range(4):
        optimizer.step()
        run.lane.run(work)
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]
    assert seen == ["write", "update"] * 4


def test_what_is_captured_is_part_of_the_graph(gpu):
    run = Run(gpu)
    optimizer = Optimizer(lambda: gpu.launch(run.write))
    run.steps(optimizer.step, number=2)
    gpu.drain(latest_first=False)
    gpu.capturing = True
    run.steps(optimizer.step, number=1)
    assert list(gpu.current[GPU].queue) == [run.write, run.update]


def test_work_that_raises_is_waited_for_as_far_as_it_got(gpu, latest_first):
    run = Run(gpu)
    optimizer = Optimizer(lambda: gpu.launch(run.write))

    def work():
        gpu.launch(run.update)
        raise RuntimeError("out of memory")

    run.steps(optimizer.step, number=2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        run.lane.run(work)
    optimizer.step()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=3)[0]
    assert gpu.current[GPU] is gpu.streams[0]


def test_control_c_during_the_work_comes_after_it(gpu, latest_first):
    run = Run(gpu)
    optimizer = Optimizer(lambda: gpu.launch(run.write))

    def work():
        signal.raise_signal(signal.SIGINT)
        gpu.launch(run.update)

    optimizer.step()
    with pytest.raises(KeyboardInterrupt):
        run.lane.run(work)
    optimizer.step()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=1)[0]


def test_optimizers_forget_a_lane_that_is_gone(gpu):
    lane = Lane([GPU])
    lane.run(lambda: None)
    assert lane in lane_module._lanes
    gone = weakref.ref(lane)
    del lane
    gc.collect()
    assert gone() is None
    Optimizer(lambda: None).step()


def test_memory_is_held_on_the_stream_of_the_work(gpu):
    class Tensor:
        device = GPU
        streams = ()

        def record_stream(self, stream):
            self.streams += (stream,)

    here, elsewhere = Tensor(), Tensor()
    elsewhere.device = torch.device("cpu")
    run = Run(gpu)
    run.lane.hold([here, elsewhere])
    run.steps(Optimizer(lambda: gpu.launch(run.write)).step, number=2)
    assert elsewhere.streams == ()
    (stream,) = here.streams
    assert run.update in stream.queue


def test_copies_and_pickles_are_lanes_without_work(gpu):
    run = Run(gpu)
    run.steps(Optimizer(lambda: gpu.launch(run.write)).step)
    for other in (copy.deepcopy(run.lane), pickle.loads(pickle.dumps(run.lane))):
        before = [len(stream.queue) for stream in gpu.streams]
        other.wait()
        assert [len(stream.queue) for stream in gpu.streams] == before


def test_without_a_gpu_work_is_done_at_once():
    """Nothing is registered with PyTorch either."""
    code = """
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks
from ema.torch_backend.gpu.lane import Lane
from tests.torch_backend.gpu.simulation import GPU, OTHER
done = []
lane = Lane([torch.device("cpu"), torch.device("meta")])
lane.run(lambda: done.append(1))
lane.wait()
lane.synchronize()
lane.hold([torch.zeros(1)])
assert done == [1]
assert not _global_optimizer_pre_hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True)
