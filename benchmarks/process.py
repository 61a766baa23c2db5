"""Work in a process of its own.

What an earlier case has freed stays with the allocator, and then the copies that some peers make in
every call cost as little as half of what they cost in a new process. Where the system can, the new
process is forked from one in which the peers are imported and nothing else has happened: importing
them takes longer than most cases. Where there is a GPU it is spawned: what has looked at the GPU, as
some imports do, must not be forked.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

__all__ = ["in_fresh_process"]

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module; what it takes and returns is pickled."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    server = can_fork and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["benchmarks.preloaded"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *args, **kwargs).result()
