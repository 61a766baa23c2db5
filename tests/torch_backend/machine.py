"""A state machine: random sequences of everything that can be done to an ``EMAModel`` and its model.

After every step the live model and the counters are what ``machine_reference`` says, and so are the
averages, which are read after every step in half of the runs and now and then in the others.

The families differ in the options that they draw: each has its own way through an update.
The rules stand in the files beside this one, by idea.
"""

from tests.torch_backend.machine_changes import Changes
from tests.torch_backend.machine_elsewhere import Elsewhere
from tests.torch_backend.machine_states import States
from tests.torch_backend.machine_swaps import Swaps

__all__ = ["FAMILIES", "Machine", "machine_of"]

FAMILIES = ("plain", "several", "narrow", "compensated", "guarded")


class Machine(Changes, Swaps, States, Elsewhere):
    """See the module; a family is a subclass."""


def machine_of(family: str) -> type[Machine]:
    """The machine that draws the options of this family."""
    return type(
        f"{family.capitalize()}Machine", (Machine,), {"family": family, "examples": 0, "steps": 0}
    )
