"""One update in PyTorch: of many small tensors, of ordinary models, and of large tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.models import (
    WEIGHT,
    Buffers,
    bare_foreach,
    count,
    gpt2,
    many_small,
    one_tensor,
    size,
    split,
)
from benchmarks.peers import FOREACH, ONE_BY_ONE, ours, timm, updates
from benchmarks.setting import Setting
from benchmarks.timing import Case, Contender

ELEMENTS = 2**26


def many_small_vectors(setting: Setting) -> Case:
    """The cost of a call, not of memory."""
    model = many_small(setting)
    return _many_small(f"one update: {size(model)}, one ParameterList", model, setting)


def many_small_modules(setting: Setting) -> Case:
    """The same in 500 modules."""
    model = many_small(setting, in_modules=True)
    title = f"one update: {size(model)}, {len(list(model.children()))} LayerNorms"
    return _many_small(title, model, setting)


def _many_small(title: str, model: nn.Module, setting: Setting) -> Case:
    return Case(
        title=title,
        contenders=[*updates(model), bare_foreach(model), Buffers(count(model), setting).lerp()],
        references=["bare foreach", "ema"],
        finish=setting.finish,
        note="Bar: ema at most 0.7 of bare foreach, and the best peer at 6 times ema.",
    )


def gpt2_model(setting: Setting) -> Case:
    """A model of ordinary size: the cost of memory."""
    model = gpt2(setting)
    flat = Buffers(count(model), setting)
    without = () if setting.on_cpu else ONE_BY_ONE
    return Case(
        title=f"one update: GPT-2, {size(model)}",
        contenders=[
            *updates(model, without=without),
            bare_foreach(model),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp", "bare foreach"],
        finish=setting.finish,
        traffic=12 * count(model),
        note="Bar: ema at most 1.05 of flat lerp.",
    )


def nonfinite(setting: Setting) -> Case:
    """The cost of looking for NaN and Inf."""
    model = gpt2(setting)
    skipping = ours(model, 'ema, on_nonfinite="skip"', on_nonfinite="skip")
    return Case(
        title=f"one update that looks for NaN and Inf: GPT-2, {size(model)}",
        contenders=[ours(model), skipping, Buffers(count(model), setting).lerp()],
        references=["flat lerp", "ema"],
        finish=setting.finish,
        traffic=12 * count(model),
    )


def one_vector(setting: Setting) -> Case:
    """One large tensor in float32."""
    model = one_tensor(setting.elements(ELEMENTS, copies=12), setting)
    flat = Buffers(count(model), setting)
    return Case(
        title=f"one update: {size(model)}",
        contenders=[*updates(model, without=FOREACH), flat.lerp(), flat.copy()],
        references=["flat lerp"],
        finish=setting.finish,
        traffic=12 * count(model),
    )


def mixed(setting: Setting) -> Case:
    """A float32 average of bfloat16 params, also by the two lines that people write by hand."""
    model = one_tensor(setting.elements(ELEMENTS, copies=12), setting, torch.bfloat16)
    flat = Buffers(count(model), setting)
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
            *(Contender(name=name, call=call) for name, call in by_hand.items()),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp", "ema"],
        finish=setting.finish,
        traffic=10 * count(model),
        note="Flat lerp is float32 in both. Bar: ema at most 1.3 of it, and the best peer at 4"
        " times ema.",
    )


def bfloat16(setting: Setting) -> Case:
    """A bfloat16 average, rounded stochastically."""
    model = one_tensor(setting.elements(ELEMENTS // 2, copies=12), setting, torch.bfloat16)
    flat, small = (Buffers(count(model), setting, d) for d in (torch.float32, torch.bfloat16))
    plain = timm(model, None, stochastic_rounding=False)
    return Case(
        title=f"one update of a bfloat16 average: {size(model)}",
        contenders=[
            ours(model, "ema, stochastic rounding", dtype=torch.bfloat16),
            Contender(name="timm, stochastic rounding", call=timm(model, None)),
            Contender(name="timm, to nearest: never moves", call=plain),
            small.lerp("flat lerp of bfloat16"),
            flat.lerp("flat lerp of float32"),
            small.copy(),
        ],
        references=["flat lerp of float32", "ema, stochastic rounding"],
        finish=setting.finish,
        traffic=6 * count(model),
        note="Bar: timm with stochastic rounding at 8 times ema.",
    )


def compensated(setting: Setting) -> Case:
    """An average with a remainder."""
    model = one_tensor(setting.elements(ELEMENTS, copies=8), setting)
    flat = Buffers(count(model), setting)
    exact = ours(model, "ema, compensated", compensated=True, traffic=20 * count(model))
    return Case(
        title=f"one update with a remainder: {size(model)}",
        contenders=[ours(model), exact, flat.lerp(), flat.copy()],
        references=["flat lerp"],
        finish=setting.finish,
        traffic=12 * count(model),
        note="The remainder is read and written too: 20 bytes in place of 12, 1.67 of flat lerp.",
    )


def many_tensors(setting: Setting) -> Case:
    """10 000 tensors against one of their size, also as a CUDA graph."""
    tensors = 10_000 if setting.size != "tiny" else 16
    many = split(setting.elements(ELEMENTS, copies=8), tensors, setting)
    one = one_tensor(count(many), setting)
    flat = Buffers(count(many), setting)
    contenders = [ours(many), ours(one, "ema, one tensor"), flat.lerp(), flat.copy()]
    if not setting.on_cpu:
        contenders.insert(1, Contender(name="ema, captured", call=_captured(ours(many).call)))
    return Case(
        title=f"one update: {size(many)}",
        contenders=contenders,
        references=["flat lerp", "ema, one tensor"],
        finish=setting.finish,
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
