"""``use_ema()`` blocks, which must nest.

The block that put the averages into the model takes them out. Blocks inside it change nothing, so
each of them sees averages as long as that one is open. If it ends first (two coroutines, two
generators, two threads), the code in the other blocks would see live weights without noticing, and
nothing can stop that code. So the exit that came too early raises.
"""

from __future__ import annotations

import dataclasses

from ema.errors import StateError
from ema.torch_backend.swap.swap import Swap

__all__ = ["ENDED_BESIDE", "Block", "ended_inside", "report"]

ENDED_BESIDE = (
    "one thread at a time may use an EMAModel, got the end of a `use_ema()` block while a call of"
    " another thread runs: the live weights are back when that call ends"
)
"""The text for an exit during another thread's call."""


@dataclasses.dataclass(eq=False)
class Block:
    """One ``with use_ema():``.

    Attributes:
        swap: has put the averages in; None before that, and in a block inside another one.
        turn: number of the turn in which the block was entered.
        left: whether the block has ended.
    """

    swap: Swap | None = None
    turn: int = 0
    left: bool = False


def ended_inside(ending: str, number: int) -> str:
    """Report that averages were taken out while blocks were open.

    Args:
        ending: the call that took them out.
        number: of the blocks.
    """
    blocks = "a block" if number == 1 else f"{number} blocks"
    return (
        f"`use_ema()` blocks must nest, got {ending} while {blocks} inside it had not ended: the"
        " live weights are back, and the code in there reads them from now on"
    )


def report(problem: str, error: BaseException | None) -> None:
    """Raise a ``StateError``. If the program is being stopped, add a note to its error instead.

    Args:
        problem: its text.
        error: the exception that ends the block, if any.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        error.add_note(problem)
        return
    raise StateError(problem)
