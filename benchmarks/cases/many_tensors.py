"""10 000 tensors against a single one of their size, also as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.limits import Flat
from benchmarks.measure import Case, Contender
from benchmarks.models import count, one_tensor, size, split
from benchmarks.peers import ours
from benchmarks.setting import Setting

__all__ = ["build"]


def build(setting: Setting) -> Case:
    tensors = 10_000 if setting.size != "tiny" else 16
    elements = setting.elements(2**26, copies=8)
    many = split(elements, tensors, setting)
    one = one_tensor(count(many), setting)
    flat = Flat(count(many), setting)
    contenders = [ours(many), ours(one, "ema, one tensor"), flat.lerp(), flat.copy()]
    if not setting.on_cpu:
        contenders.insert(1, Contender(name="ema, captured", call=captured(ours(many).call)))
    return Case(
        title=f"one update: {size(many)}",
        contenders=contenders,
        references=["flat lerp", "ema, one tensor"],
        finish=setting.finish,
        traffic=12 * count(many),
        note="" if setting.on_cpu else "Bar: captured at most 1.3 of one tensor.",
    )


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The kernels of a call, replayed without it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
