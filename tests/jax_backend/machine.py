"""A state machine: random sequences of everything that is done to the state of ``params_ema``.

After every step of training the params and the counters are what ``machine_reference`` says, and so
are the averages: those that are copied or left alone bit for bit, those that move near the same
recursion in extended precision.

The families differ in the options that they draw. The rules stand in the files beside this one, by
idea; ``tests/torch_backend/machine.py`` is the same for ``EMAModel``.
"""

from tests.jax_backend.machine_changes import Changes
from tests.jax_backend.machine_states import States

__all__ = ["FAMILIES", "Machine", "machine_of"]

FAMILIES = ("plain", "several", "narrow", "compensated", "guarded", "double")


class Machine(Changes, States):
    """See the module; a family is a subclass."""


def machine_of(family: str) -> type[Machine]:
    """The machine that draws the options of this family."""
    return type(
        f"{family.capitalize()}Machine",
        (Machine,),
        {"family": family, "examples": 0, "steps": 0, "used": {}},
    )
