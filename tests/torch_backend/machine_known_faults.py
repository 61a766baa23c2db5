"""What is known to fail and being mended: with True the machine keeps away from it."""

__all__ = [
    "KNOWN_FAULT_LATE_INCLUDE",
    "KNOWN_FAULT_NARROW_COPIES",
    "KNOWN_FAULT_NEWCOMERS",
    "KNOWN_FAULT_PARTED_TIES",
    "KNOWN_FAULT_SEVERAL_FROM_FILES",
]

KNOWN_FAULT_SEVERAL_FROM_FILES = False
"""Several averages cannot be loaded one file after the other where the files hold other tensors."""
KNOWN_FAULT_PARTED_TIES = False
"""Nothing notices new memory for a vector, or for a frozen tensor, that was tied by its memory."""
KNOWN_FAULT_NARROW_COPIES = False
"""Averages that were widened by a cast are narrow again in a copy or pickle."""
KNOWN_FAULT_LATE_INCLUDE = False
"""A frozen parameter that ``include`` asks for never joins where a state or copy did not have it."""
KNOWN_FAULT_NEWCOMERS = False
"""A newcomer joins in an update that is then skipped or refused, and so with its NaN, for good."""
