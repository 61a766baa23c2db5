"""Do something at a chosen bytecode of a call, or in the middle of one that another thread makes."""

import contextlib
import sys
import threading

from torch.utils._python_dispatch import TorchDispatchMode

DEADLINE = 60
"""Seconds after which what hangs is given up."""


def at_bytecode(number, action, call, modules):
    """Do ``action`` before the n-th bytecode that ``call`` runs in these modules.

    Returns:
        Whether there were as many.
    """
    files = {module.__file__ for module in modules}
    left = number

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if action is raise_interrupt and frame.f_code.co_name == "uninterrupted":
            return None  # where Ctrl-C calls another handler, which raises nothing
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                action()
        return trace

    previous = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks for it only when tracing begins
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
    return left <= 0


def interrupted_at(number, action, call, modules):
    """The same, where ``action`` leads to ``KeyboardInterrupt``: whether it came."""
    try:
        return at_bytecode(number, action, call, modules)
    except KeyboardInterrupt:
        return True


def raise_interrupt():
    raise KeyboardInterrupt


class AtFirstOperation(TorchDispatchMode):
    """Do something before the first operation of PyTorch that this thread makes.

    Args:
        action: what to do.
        name: a part of the name of that operation.
    """

    def __init__(self, action, name=""):
        super().__init__()
        self._action = action
        self._name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._action is not None and self._name in str(func):
            action, self._action = self._action, None
            action()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def running(call):
    """Another thread is in the middle of ``call``, and goes on after the block."""
    inside, go_on = threading.Event(), threading.Event()
    raised = []
    paused = []

    def pause():
        paused.append(True)
        inside.set()
        assert go_on.wait(DEADLINE)

    def run():
        try:
            with AtFirstOperation(pause):
                call()
        except BaseException as error:
            raised.append(error)
        finally:
            inside.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert inside.wait(DEADLINE)
        assert paused, raised
        yield
    finally:
        go_on.set()
        thread.join(DEADLINE)
    assert not thread.is_alive()
    assert not raised, raised


def in_thread(call):
    """What ``call`` returns or raises in another thread."""
    results = []

    def run():
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]
