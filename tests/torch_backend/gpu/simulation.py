"""Streams of two GPUs as queues: what may run first runs first, or last."""

import contextlib
from collections import deque

import torch

GPU = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)


class Simulation:
    """Streams of devices, as far as they order work; no clock, no memory."""

    def __init__(self):
        self.streams = []
        self.capturing = False
        self.current = {device: self.stream(device) for device in (GPU, OTHER)}

    def stream(self, device):
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream):
        before = self.current[stream.device]
        self.current[stream.device] = stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    def launch(self, work, device=GPU):
        self.current[device].queue.append(work)

    def drain(self, *, latest_first):
        """Run everything, on the streams made last or first as far as they need not wait."""
        order = self.streams[::-1] if latest_first else self.streams
        while any(stream.queue for stream in self.streams):
            # one piece of work at a time, on the first stream whose next piece is ready
            ready = (s for s in order if s.queue and getattr(s.queue[0], "ready", lambda: True)())
            next(ready).queue.popleft()()


class Stream:
    def __init__(self, simulation, device):
        self.simulation, self.device, self.queue = simulation, device, deque()

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event):
        assert not self.simulation.capturing, "an event from outside would end the capture"
        self.queue.append(Wait(event.last))


class Wait:
    def __init__(self, mark):
        self.mark = mark

    def ready(self):
        return self.mark["done"]

    def __call__(self):
        pass


class Event:
    last = {"done": True}  # noqa: RUF012

    def __init__(self, *, blocking=False):
        self.blocking = blocking

    def record(self, stream):
        mark = self.last = {"done": False}
        stream.queue.append(lambda: mark.update(done=True))

    def synchronize(self):
        raise AssertionError("the host must not wait")
