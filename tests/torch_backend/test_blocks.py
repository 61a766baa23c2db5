"""``use_ema()`` blocks that do not nest: an error, and never lost weights."""

import asyncio
import gc
import sys
import threading

import pytest
import torch
from torch import nn

from ema import StateError
from ema.torch_backend import EMAModel
from tests.torch_backend.interruptions import DEADLINE

OUT_OF_ORDER = r"`use_ema\(\)` blocks must nest, got the end of one while a block inside it"


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def averaged(decay=0.5):
    """Live weights are 1, the average is 0.5."""
    model = nn.Linear(2, 1)
    fill(model, 0.0)
    ema_model = EMAModel(model, decay)
    fill(model, 1.0)
    ema_model.update()
    return ema_model


def live(ema_model):
    """The one value that all live weights have."""
    (value,) = {v for p in ema_model.model.parameters() for v in p.flatten().tolist()}
    return value


def average(ema_model, name=None):
    averages = ema_model.averaged_parameters(name).values()
    (value,) = {v for tensor in averages for v in tensor.flatten().tolist()}
    return value


def assert_as_before(ema_model):
    """Live weights are in the model, and everything works."""
    assert (live(ema_model), average(ema_model)) == (1.0, 0.5)
    with ema_model.use_ema():
        assert live(ema_model) == 0.5
    assert live(ema_model) == 1.0
    ema_model.update()
    assert average(ema_model) == 0.75


def leave(block, error=None):
    return block.__exit__(type(error) if error else None, error, None)


@pytest.mark.parametrize("assign", [False, True])
def test_an_exit_out_of_order_puts_the_live_weights_back_and_raises(assign):
    ema_model = averaged()
    first, second = ema_model.use_ema(assign=assign), ema_model.use_ema(assign=assign)
    first.__enter__()
    second.__enter__()
    with pytest.raises(StateError, match=OUT_OF_ORDER):
        leave(first)
    assert live(ema_model) == 1.0
    leave(second)
    assert_as_before(ema_model)


@pytest.mark.parametrize("inner", [1, 2, 3])
def test_all_blocks_inside_do_nothing_after_that(inner):
    """However many there are, in whatever order they end, and with whatever they raise."""
    ema_model = averaged()
    outer = ema_model.use_ema()
    outer.__enter__()
    blocks = [ema_model.use_ema() for _ in range(inner)]
    for block in blocks:
        block.__enter__()
    with pytest.raises(StateError, match="a block inside" if inner == 1 else f"{inner} blocks ins"):
        leave(outer)
    for number, block in enumerate(blocks):
        error = ZeroDivisionError() if number == 1 else None
        assert not leave(block, error)  # which goes on to raise its own error
    assert_as_before(ema_model)


def test_a_swap_that_began_meanwhile_is_not_ended_by_an_old_block():
    ema_model = averaged()
    first, second = ema_model.use_ema(), ema_model.use_ema()
    first.__enter__()
    second.__enter__()
    with pytest.raises(StateError, match=OUT_OF_ORDER):
        leave(first)
    with ema_model.use_ema():
        leave(second)
        assert live(ema_model) == 0.5
    assert_as_before(ema_model)


def test_blocks_inside_an_open_one_may_end_in_any_order():
    """Each of them saw averages as long as it was open."""
    ema_model = averaged()
    with ema_model.use_ema():
        first, second = ema_model.use_ema(), ema_model.use_ema()
        first.__enter__()
        second.__enter__()
        leave(first)
        assert live(ema_model) == 0.5
        leave(second)
        assert live(ema_model) == 0.5
    assert_as_before(ema_model)


def test_two_generators():
    ema_model = averaged()

    def evaluate():
        with ema_model.use_ema():
            yield live(ema_model)

    first, second = evaluate(), evaluate()
    assert (next(first), next(second)) == (0.5, 0.5)
    with pytest.raises(StateError, match=OUT_OF_ORDER):
        first.close()
    second.close()
    assert_as_before(ema_model)


def test_two_coroutines():
    """The one that ends first and has begun first is told; the other one ends as it would."""
    ema_model = averaged()
    ended = []

    async def evaluate(name, begins, ends):
        await begins.wait()
        with ema_model.use_ema():
            begun[name].set()
            await ends.wait()
        ended.append(name)

    async def both():
        for name in ("first", "second"):
            begun[name] = asyncio.Event()
        now, over = asyncio.Event(), asyncio.Event()
        now.set()
        first = asyncio.create_task(evaluate("first", now, begun["second"]))
        second = asyncio.create_task(evaluate("second", begun["first"], over))
        with pytest.raises(StateError, match=OUT_OF_ORDER):
            await first
        assert live(ema_model) == 1.0
        over.set()
        await second

    begun = {}
    asyncio.run(both())
    assert ended == ["second"]
    assert_as_before(ema_model)


def test_a_canceled_coroutine():
    """Its exit comes too early as well, and says so to whoever awaits it."""
    ema_model = averaged()

    async def evaluate(begun):
        with ema_model.use_ema():
            begun.set()
            await asyncio.Event().wait()

    async def both():
        begun = asyncio.Event()
        task = asyncio.create_task(evaluate(begun))
        await begun.wait()
        with ema_model.use_ema():
            task.cancel()
            with pytest.raises(StateError, match=OUT_OF_ORDER) as raised:
                await task
            assert isinstance(raised.value.__context__, asyncio.CancelledError)
            assert live(ema_model) == 1.0

    asyncio.run(both())
    assert_as_before(ema_model)


def test_two_threads():
    ema_model = averaged()
    entered, over = threading.Event(), threading.Event()
    raised = []

    def evaluate():
        try:
            with ema_model.use_ema():
                entered.set()
                assert over.wait(DEADLINE)
        except StateError as error:
            raised.append(error)

    with ema_model.use_ema():
        thread = threading.Thread(target=evaluate)
        thread.start()
        assert entered.wait(DEADLINE)
        over.set()
        thread.join(DEADLINE)
    assert not raised
    assert live(ema_model) == 1.0

    for event in (entered, over):
        event.clear()
    thread = threading.Thread(target=evaluate)
    thread.start()
    assert entered.wait(DEADLINE)
    with ema_model.use_ema():
        over.set()
        thread.join(DEADLINE)
        assert live(ema_model) == 1.0
    (error,) = raised
    assert "blocks must nest" in str(error)
    assert_as_before(ema_model)


def test_what_was_raised_in_the_block_is_the_context():
    ema_model = averaged()
    first, second = ema_model.use_ema(), ema_model.use_ema()
    first.__enter__()
    second.__enter__()
    error = ZeroDivisionError("its own")
    with pytest.raises(StateError, match=OUT_OF_ORDER) as raised:
        leave(first, error)
    assert raised.value.__context__ is error
    leave(second)
    assert_as_before(ema_model)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_program_stops_it_and_has_a_note(stop):
    ema_model = averaged()
    with ema_model.use_ema(), ema_model.use_ema():
        pass
    first, second = ema_model.use_ema(), ema_model.use_ema()
    first.__enter__()
    second.__enter__()
    error = stop()
    assert not leave(first, error)  # goes on to raise it
    assert "blocks must nest" in error.__notes__[0]
    leave(second)
    assert_as_before(ema_model)


def test_a_generator_that_is_collected(monkeypatch):
    """Its block ends with it; out of order, Python reports the error that it cannot raise."""
    ema_model = averaged()

    def evaluate():
        with ema_model.use_ema():
            yield

    alone = evaluate()
    next(alone)
    assert live(ema_model) == 0.5
    del alone
    gc.collect()
    assert live(ema_model) == 1.0

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reported.append(report.exc_value))
    first = evaluate()
    next(first)
    with ema_model.use_ema():
        del first
        gc.collect()
        assert live(ema_model) == 1.0
    (error,) = reported
    assert "blocks must nest" in str(error)
    del error
    reported.clear()
    assert_as_before(ema_model)


def test_restore_original_within_a_block_raises():
    """It ends what the code in the block relies on."""
    ema_model = averaged()
    with ema_model.use_ema():
        with pytest.raises(StateError, match=r"must nest, got restore_original\(\) while a block"):
            ema_model.restore_original()
        assert live(ema_model) == 1.0
    ema_model.apply_ema()
    with ema_model.use_ema():
        with pytest.raises(StateError, match=r"must nest, got restore_original\(\) while a block"):
            ema_model.restore_original()
        assert live(ema_model) == 1.0
    assert_as_before(ema_model)


def test_apply_ema_around_blocks_that_do_not_nest_needs_no_error():
    ema_model = averaged()
    ema_model.apply_ema()
    first, second = ema_model.use_ema(), ema_model.use_ema()
    first.__enter__()
    second.__enter__()
    leave(first)
    leave(second)
    assert live(ema_model) == 0.5
    ema_model.restore_original()
    assert_as_before(ema_model)


def test_a_block_that_could_not_be_entered_ends_nothing():
    """Another name, or another model, is refused, and the block that is open goes on."""
    ema_model = averaged({"short": 0.5, "long": 0.75})
    with ema_model.use_ema("short"):
        for refused in (
            ema_model.use_ema("long"),
            ema_model.use_ema(nn.Linear(2, 1), name="short"),
        ):
            with pytest.raises(StateError, match="averages are swapped in already"):
                refused.__enter__()
        assert live(ema_model) == 0.5
        with ema_model.use_ema("short"):
            pass
        assert live(ema_model) == 0.5
    assert (live(ema_model), average(ema_model, "long")) == (1.0, 0.25)


def test_another_model_out_of_order():
    """The weights of the other model come back into it."""
    ema_model, other = averaged(), nn.Linear(2, 1)
    fill(other, 7.0)
    first, second = ema_model.use_ema(other), ema_model.use_ema(other)
    first.__enter__()
    second.__enter__()
    assert other.bias.item() == 0.5
    with pytest.raises(StateError, match=OUT_OF_ORDER):
        leave(first)
    assert other.bias.item() == 7.0
    leave(second)
    assert other.bias.item() == 7.0
    assert_as_before(ema_model)
