"""Overlap on simulated streams: each is a queue, and what may run first runs first."""

import copy
import gc
import pickle
import signal
import sys
import weakref

import pytest
import torch

from ema.torch_backend.gpu import side_stream as side_stream_module
from ema.torch_backend.gpu.side_stream import SideStream
from tests import processes
from tests.torch_backend.gpu.simulation import GPU, OTHER, Wait


class Run:
    """A run of one number, its average and what was read of it, on the simulated device."""

    def __init__(self, gpu, devices=(GPU,)):
        self.tensor = torch.nn.Parameter(torch.zeros(1))  # what the optimizer is told of
        self.gpu, self.side_stream = gpu, SideStream(devices, [self.tensor])
        self.param = self.average = 0.0
        self.read = []

    def write(self):
        self.param += 1.0

    def optimizer(self, launch=None, kind=None):
        """One that writes the number, or does something else in its step."""
        return (kind or Optimizer)(launch or self.launch_write, [self.tensor])

    def launch_write(self):
        self.gpu.launch(self.write)
        with torch.no_grad():
            self.tensor.add_(1.0)  # moves the version counter

    def update(self):
        self.average += 0.25 * (self.param - self.average)

    def look(self):
        self.read.append(self.average)

    def steps(self, write, number=6):
        for index in range(number):
            write()
            self.side_stream.run(lambda: self.gpu.launch(self.update))
            if index == 3:
                self.side_stream.wait()
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

    def __init__(self, launch, params=None):
        super().__init__(params or [torch.nn.Parameter(torch.zeros(1))], {})
        self.launch = launch

    def step(self, closure=None):
        self.launch()


def test_an_optimizer_waits_for_the_update(gpu, latest_first):
    run = Run(gpu)
    run.steps(run.optimizer().step)
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_the_update_runs_beside_what_follows_it(gpu):
    """On the user's stream there is only its own work; from the second update on."""
    run = Run(gpu)
    run.steps(run.optimizer().step, number=2)
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
        run.side_stream.before_write()
        gpu.launch(run.write)

    run.steps(write)
    assert any(run.update in stream.queue for stream in gpu.streams[2:])
    gpu.drain(latest_first=latest_first)
    assert run.result == run.right()


def test_a_reader_does_not_pass_for_a_writer(gpu, latest_first):
    """An evaluation between two updates waits; the loop still writes by hand."""
    run = Run(gpu)
    optimizer = run.optimizer()
    run.steps(optimizer.step, number=1)
    for _ in range(3):
        gpu.launch(run.write)
        run.side_stream.run(lambda: gpu.launch(run.update))
        run.side_stream.wait()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]


def test_an_update_that_is_not_overlapped_comes_after_one_that_is(gpu, latest_first):
    """Two in a row, without a writer in between."""
    run, order = Run(gpu), []
    optimizer = run.optimizer(lambda: None)
    for number in range(4):
        if number < 3:
            optimizer.step()
        run.side_stream.run(lambda number=number: gpu.launch(lambda: order.append(number)))
    gpu.drain(latest_first=latest_first)
    assert order == [0, 1, 2, 3]


def test_a_user_on_a_side_stream_is_followed(gpu, latest_first):
    run = Run(gpu)
    side = gpu.stream(GPU)
    with gpu.on(side):
        run.steps(run.optimizer().step)
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

    optimizer = run.optimizer(write)
    for _ in range(4):
        optimizer.step()
        run.side_stream.run(work)
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]
    assert seen == ["write", "update"] * 4


def test_what_is_captured_is_part_of_the_graph(gpu):
    run = Run(gpu)
    optimizer = run.optimizer()
    run.steps(optimizer.step, number=2)
    gpu.drain(latest_first=False)
    gpu.capturing = True
    run.steps(optimizer.step, number=1)
    assert list(gpu.current[GPU].queue) == [run.write, run.update]


def test_replays_of_a_captured_step_are_not_overlapped(gpu, latest_first):
    """PyTorch calls the hook while it captures, and at no replay."""
    run = Run(gpu)
    optimizer = run.optimizer()
    run.steps(optimizer.step, number=2)
    gpu.drain(latest_first=latest_first)
    gpu.capturing = True
    optimizer.step()
    gpu.capturing = False
    gpu.current[GPU].queue.clear()  # captured, not run
    for _ in range(2):
        gpu.launch(run.write)  # a replay
        run.side_stream.run(lambda: gpu.launch(run.update))
    optimizer.step()  # an ordinary step of the same optimizer, before a further replay
    run.side_stream.run(lambda: gpu.launch(run.update))
    gpu.launch(run.write)
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=5)[0]


def test_steps_between_replays_that_nobody_saw_captured_are_not_overlapped(gpu, latest_first):
    """The graph is older than the average; what did not announce itself may write again."""
    run = Run(gpu)
    optimizer = run.optimizer()
    for step in range(8):
        if step % 4 == 3:
            optimizer.step()
        else:
            gpu.launch(run.write)  # a replay
        run.side_stream.run(lambda: gpu.launch(run.update))
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=8)[0]


def test_a_step_that_is_captured_before_the_first_update_is_seen(gpu, latest_first):
    run = Run(gpu)
    optimizer = run.optimizer()
    gpu.capturing = True
    optimizer.step()
    gpu.capturing = False
    gpu.current[GPU].queue.clear()
    for step in range(4):
        if step % 2 == 0:
            optimizer.step()
        else:
            gpu.launch(run.write)
        run.side_stream.run(lambda: gpu.launch(run.update))
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]


def test_a_state_that_was_loaded_puts_off_the_overlap_by_one_update(gpu):
    run = Run(gpu)
    optimizer = run.optimizer()
    beside = []
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                run.tensor.copy_(torch.zeros(1))
        optimizer.step()
        before = len(gpu.current[GPU].queue)
        run.side_stream.run(lambda: gpu.launch(run.update))
        beside.append(run.update not in list(gpu.current[GPU].queue)[before:])
    assert beside == [False, True, True, False, True, True]


@pytest.mark.parametrize("other_first", [True, False])
def test_another_optimizer_announces_nothing(gpu, latest_first, other_first):
    """A discriminator's, beside weights that the replay of a graph writes."""
    run = Run(gpu)
    other = Optimizer(lambda: None)
    for _ in range(4):
        if other_first:
            other.step()
        gpu.launch(run.write)
        if not other_first:
            other.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]


def test_another_optimizer_does_not_wait(gpu):
    run = Run(gpu)
    run.steps(run.optimizer().step, number=2)
    waits = sum(isinstance(work, Wait) for work in gpu.current[GPU].queue)
    Optimizer(lambda: None).step()
    assert sum(isinstance(work, Wait) for work in gpu.current[GPU].queue) == waits


@pytest.mark.parametrize("both", [True, False])
def test_all_optimizers_of_the_params_have_to_announce(gpu, latest_first, both):
    """Of two halves of a model, one may be written by the replay of a graph."""
    run = Run(gpu)
    second = torch.nn.Parameter(torch.zeros(1))
    run.side_stream = SideStream([GPU], [run.tensor, second])
    one, other = run.optimizer(), Optimizer(lambda: None, [second])
    for _ in range(4):
        if both:
            other.step()
        one.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
    assert any(run.update in stream.queue for stream in gpu.streams[2:]) == both
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=4)[0]


def test_weights_that_are_written_before_the_step_are_not_overlapped(gpu, latest_first):
    """Sharpness-aware minimization goes up first, without a word, and its base steps down."""
    run = Run(gpu)
    optimizer = run.optimizer(lambda: gpu.launch(run.write))
    for _ in range(4):
        run.launch_write()
        optimizer.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
    gpu.drain(latest_first=latest_first)
    average = 0.0
    for step in range(1, 5):
        average += 0.25 * (2.0 * step - average)
    assert run.average == average


def test_weights_that_are_written_after_the_step_are_overlapped(gpu, latest_first):
    """The step has waited; clipping weights, say, comes after it."""
    run = Run(gpu)
    optimizer = run.optimizer()
    for _ in range(4):
        optimizer.step()
        run.launch_write()
        run.side_stream.run(lambda: gpu.launch(run.update))
    assert any(run.update in stream.queue for stream in gpu.streams[2:])
    gpu.drain(latest_first=latest_first)


def test_two_steps_of_one_optimizer_between_updates_are_overlapped(gpu, latest_first):
    run = Run(gpu)
    optimizer = run.optimizer()
    for _ in range(4):
        optimizer.step()
        optimizer.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
    assert any(run.update in stream.queue for stream in gpu.streams[2:])
    gpu.drain(latest_first=latest_first)


class WithModes(Optimizer):
    """Rewrites the weights when it is told to, as schedule-free ones do."""

    def train(self):
        self.launch()

    def eval(self):
        self.launch()


def test_an_optimizer_with_modes_announces_nothing(gpu, latest_first):
    run = Run(gpu)
    optimizer = run.optimizer(kind=WithModes)
    average = 0.0
    for step in range(4):
        optimizer.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
        optimizer.eval()
        average += 0.25 * (2 * step + 1 - average)
    gpu.drain(latest_first=latest_first)
    assert run.average == average


@pytest.mark.parametrize("which", ["model", "submodule", "optimizer"])
def test_loading_a_state_waits(gpu, latest_first, which):
    run = Run(gpu)
    inner = torch.nn.Module()
    inner.weight = run.tensor
    model = torch.nn.Sequential(inner)
    run.side_stream = SideStream([GPU], [run.tensor], [inner])
    optimizer = run.optimizer()
    loaded = {"model": model, "submodule": inner, "optimizer": optimizer}[which]
    state = copy.deepcopy(loaded.state_dict())
    average = 0.0
    for step in range(4):
        optimizer.step()
        run.side_stream.run(lambda: gpu.launch(run.update))
        loaded.load_state_dict(state)
        gpu.launch(lambda: setattr(run, "param", 10.0))
        average += 0.25 * ((11.0 if step else 1.0) - average)
    gpu.drain(latest_first=latest_first)
    assert run.average == average


def test_a_module_carries_no_lane_into_copies_and_pickles(gpu):
    run = Run(gpu)
    module = torch.nn.Linear(1, 1)
    run.side_stream = SideStream([GPU], module.parameters(), [module])
    run.steps(run.optimizer().step, number=2)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    before = [len(stream.queue) for stream in gpu.streams]
    for other in copies:
        other.load_state_dict(module.state_dict())
    assert [len(stream.queue) for stream in gpu.streams] == before
    run.side_stream.release()
    assert not module._load_state_dict_pre_hooks


class Plain(torch.optim.Optimizer):
    """Its step can be compiled as a whole; those of PyTorch break the graph themselves."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.add_(param.grad, alpha=-0.1)


@pytest.mark.parametrize("optimizer", [Plain, torch.optim.AdamW])
def test_a_compiled_step_announces_nothing(gpu, optimizer):
    """It is traced as a whole where it can be, and its updates come in order."""
    run = Run(gpu)
    run.side_stream.run(lambda: None)  # has the hook registered
    optimizer = optimizer([run.tensor])
    run.tensor.grad = torch.ones(1)
    step = torch.compile(optimizer.step, fullgraph=isinstance(optimizer, Plain), backend="eager")
    for _ in range(2):
        step()
        run.side_stream.run(lambda: gpu.launch(run.update))
    assert list(gpu.current[GPU].queue).count(run.update) == 2
    assert run.tensor.item() < 0


def test_work_that_raises_is_waited_for_as_far_as_it_got(gpu, latest_first):
    run = Run(gpu)
    optimizer = run.optimizer()

    def work():
        gpu.launch(run.update)
        raise RuntimeError("out of memory")

    run.steps(optimizer.step, number=2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        run.side_stream.run(work)
    optimizer.step()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=3)[0]
    assert gpu.current[GPU] is gpu.streams[0]


def test_control_c_during_the_work_comes_after_it(gpu, latest_first):
    run = Run(gpu)
    optimizer = run.optimizer()

    def work():
        signal.raise_signal(signal.SIGINT)
        gpu.launch(run.update)

    optimizer.step()
    with pytest.raises(KeyboardInterrupt):
        run.side_stream.run(work)
    optimizer.step()
    gpu.drain(latest_first=latest_first)
    assert run.average == run.right(number=1)[0]


def test_optimizers_forget_a_lane_that_is_gone(gpu):
    side_stream = SideStream([GPU])
    side_stream.run(lambda: None)
    assert side_stream in side_stream_module._side_streams
    gone = weakref.ref(side_stream)
    del side_stream
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
    run.side_stream.hold([here, elsewhere])
    run.steps(run.optimizer().step, number=2)
    assert elsewhere.streams == ()
    (stream,) = here.streams
    assert run.update in stream.queue


def test_without_a_gpu_work_is_done_at_once():
    """Nothing is registered with PyTorch either."""
    code = """
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks
from ema.torch_backend.gpu.side_stream import SideStream
from tests.torch_backend.gpu.simulation import GPU, OTHER, Wait
done = []
side_stream = SideStream([torch.device("cpu"), torch.device("meta")])
side_stream.run(lambda: done.append(1))
side_stream.wait()
side_stream.synchronize()
side_stream.hold([torch.zeros(1)])
assert done == [1]
assert not _global_optimizer_pre_hooks
"""
    processes.run([sys.executable, "-c", code])
