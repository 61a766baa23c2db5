"""One update in PyTorch: of many small tensors, of ordinary models, and of large tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.models import WEIGHT, Buffers, bare_foreach, count, gpt2, size, vectors
from benchmarks.peers import FOREACH, ONE_BY_ONE, ours, timm_average, updates
from benchmarks.setting import Setting
from benchmarks.timing import Case, Contender

ELEMENTS = 2**26
SMALL = 256


def many_small_vectors(setting: Setting) -> Case:
    """The cost of a call, not of memory: 1 000 small vectors in one list."""
    tensors = 1_000 if setting.size != "tiny" else 16
    model = vectors(tensors * SMALL, setting, tensors=tensors)
    return _many_small(model, "one ParameterList", setting)


def many_small_modules(setting: Setting) -> Case:
    """The same, two in each of 500 modules."""
    modules = 500 if setting.size != "tiny" else 8
    model = nn.Sequential(*(nn.LayerNorm(SMALL, device=setting.device) for _ in range(modules)))
    for p in model.parameters():
        nn.init.normal_(p)
    return _many_small(model, f"{modules} LayerNorms", setting)


def _many_small(model: nn.Module, modules: str, setting: Setting) -> Case:
    return Case(
        title=f"one update: {size(model)}, {modules}",
        contenders=[*updates(model), bare_foreach(model), Buffers(model, setting).lerp()],
        references=["bare foreach", "ema"],
        note="Bar: ema at most 0.7 of bare foreach, and the best peer at 6 times ema.",
    )


def gpt2_model(setting: Setting) -> Case:
    """A model of ordinary size: the cost of memory."""
    model = gpt2(setting)
    flat = Buffers(model, setting)
    peers = updates(model, without=() if setting.on_cpu else ONE_BY_ONE)
    return Case(
        title=f"one update: GPT-2, {size(model)}",
        contenders=[*peers, bare_foreach(model), flat.lerp(), flat.copy()],
        references=["flat lerp", "bare foreach"],
        traffic=12 * count(model),
        note="Bar: ema at most 1.05 of flat lerp.",
    )


def nonfinite(setting: Setting) -> Case:
    """The cost of looking for NaN and Inf."""
    model = gpt2(setting)
    skipping = ours(model, 'ema, on_nonfinite="skip"', on_nonfinite="skip")
    return Case(
        title=f"one update that looks for NaN and Inf: GPT-2, {size(model)}",
        contenders=[ours(model), skipping, Buffers(model, setting).lerp()],
        references=["flat lerp", "ema"],
        traffic=12 * count(model),
    )


def one_vector(setting: Setting) -> Case:
    """One large tensor in float32."""
    model = vectors(setting.elements(ELEMENTS, copies=12), setting)
    flat = Buffers(model, setting)
    return Case(
        title=f"one update: {size(model)}",
        contenders=[*updates(model, without=FOREACH), flat.lerp(), flat.copy()],
        references=["flat lerp"],
        traffic=12 * count(model),
    )


def mixed(setting: Setting) -> Case:
    """A float32 average of bfloat16 params, also by the two lines that people write by hand."""
    model = vectors(setting.elements(ELEMENTS, copies=12), setting, dtype=torch.bfloat16)
    flat = Buffers(model, setting)
    (params,) = (p.detach() for p in model.parameters())
    average = params.float()
    by_hand = {
        "by hand: lerp_(p.float())": lambda: average.lerp_(params.float(), WEIGHT),
        "by hand: mul_, add_": lambda: average.mul_(1 - WEIGHT).add_(params, alpha=WEIGHT),
    }
    return Case(
        title=f"one update of a float32 average: {size(model)}",
        contenders=[
            *updates(model, torch.float32, without=FOREACH),
            *(Contender(name, call) for name, call in by_hand.items()),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp", "ema"],
        traffic=10 * count(model),
        note="Flat lerp is float32 in both. Bar: ema at most 1.3 of it, and the best peer at 4"
        " times ema.",
    )


def bfloat16(setting: Setting) -> Case:
    """A bfloat16 average, rounded stochastically."""
    model = vectors(setting.elements(ELEMENTS // 2, copies=12), setting, dtype=torch.bfloat16)
    flat, small = Buffers(model, setting), Buffers(model, setting, torch.bfloat16)
    nearest = timm_average(model, by_chance=False).update
    return Case(
        title=f"one update of a bfloat16 average: {size(model)}",
        contenders=[
            ours(model, "ema, stochastic rounding", dtype=torch.bfloat16),
            Contender("timm, stochastic rounding", timm_average(model).update),
            Contender("timm, to nearest: never moves", nearest),
            small.lerp("flat lerp of bfloat16"),
            flat.lerp("flat lerp of float32"),
            small.copy(),
        ],
        references=["flat lerp of float32", "ema, stochastic rounding"],
        traffic=6 * count(model),
        note="Bar: timm with stochastic rounding at 8 times ema.",
    )


def compensated(setting: Setting) -> Case:
    """An average with a remainder."""
    model = vectors(setting.elements(ELEMENTS, copies=8), setting)
    flat = Buffers(model, setting)
    exact = ours(model, "ema, compensated", compensated=True, traffic=20 * count(model))
    return Case(
        title=f"one update with a remainder: {size(model)}",
        contenders=[ours(model), exact, flat.lerp(), flat.copy()],
        references=["flat lerp"],
        traffic=12 * count(model),
        note="The remainder is read and written too: 20 bytes in place of 12, 1.67 of flat lerp.",
    )


def many_tensors(setting: Setting) -> Case:
    """10 000 tensors against one of their size, also as a CUDA graph."""
    tensors = 10_000 if setting.size != "tiny" else 16
    many = vectors(setting.elements(ELEMENTS, copies=8), setting, tensors=tensors)
    one, flat = vectors(count(many), setting), Buffers(many, setting)
    contenders = [ours(many), ours(one, "ema, one tensor"), flat.lerp(), flat.copy()]
    if not setting.on_cpu:
        contenders.insert(1, Contender("ema, captured", _captured(ours(many).call)))
    return Case(
        title=f"one update: {size(many)}",
        contenders=contenders,
        references=["flat lerp", "ema, one tensor"],
        traffic=12 * count(many),
        note="" if setting.on_cpu else "Bar: captured at most 1.3 of one tensor.",
    )


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replay the kernels of a call, without the call."""
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
