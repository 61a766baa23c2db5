"""Methods of one object that are replaced for a while."""

import copy
import inspect
import pickle

import pytest
from torch import nn

from ema.torch_backend.trainer.overrides import overridden


class Thing:
    """Something with a method."""

    def __init__(self):
        self.value = 1

    def add(self, number=1):
        return self.value + number


def twice(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


def test_a_method_is_replaced_inside_the_block_only():
    """For this object, with its own arguments, and whatever is raised."""
    thing, other = Thing(), Thing()
    with overridden(thing, add=twice):
        assert (thing.add(number=2), other.add(2)) == (6, 3)
        assert inspect.signature(thing.add) == inspect.signature(other.add)
    assert vars(thing) == {"value": 1}
    with pytest.raises(ZeroDivisionError), overridden(thing, add=twice):
        raise ZeroDivisionError
    assert vars(thing) == {"value": 1}


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [Thing, nn.Linear])
def test_copies_are_without_the_replacements(make, kind):
    """Also where several stand one over the other."""
    thing = Thing() if kind is Thing else nn.Linear(2, 2)
    method = "add" if kind is Thing else "extra_repr"
    plain = set(vars(thing))
    with overridden(thing, **{method: twice}), overridden(thing, **{method: twice}):
        other = make(thing)
    assert set(vars(other)) == plain
    assert getattr(other, method)() == getattr(thing, method)()


def test_an_attribute_that_was_there_before_is_back_and_in_copies():
    """As where somebody else has replaced the method of one object."""
    thing = Thing()
    thing.add = len
    with overridden(thing, add=twice), overridden(thing, add=twice):
        assert thing.add("ab") == 8
        assert copy.deepcopy(thing).add is len
    assert thing.add is len


def test_blocks_that_do_not_nest():
    """The one that ends first passes calls on until the other has ended too."""
    thing = Thing()
    first, second = overridden(thing, add=twice), overridden(thing, add=twice)
    first.__enter__()
    second.__enter__()
    assert thing.add() == 8
    first.__exit__(None, None, None)
    assert thing.add() == 4
    second.__exit__(None, None, None)
    assert thing.add() == 2
    assert vars(thing) == {"value": 1}
