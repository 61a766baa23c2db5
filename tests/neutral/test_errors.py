"""The exceptions and the sentences that they carry."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

import ema
from ema import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ema.ArgumentError, ValueError),
        (ema.ArgumentTypeError, TypeError),
        (ema.ModelError, ValueError),
        (ema.StateError, RuntimeError),
        (ema.CheckpointError, ValueError),
        (ema.MissingExtraError, ImportError),
    ],
)
def test_every_error_is_ours_and_the_builtin_that_users_expect(kind, builtin):
    assert issubclass(kind, ema.EMAError)
    assert issubclass(kind, builtin)


def test_our_warning_is_a_user_warning():
    assert issubclass(ema.EMAWarning, UserWarning)


def test_a_listing_shows_the_first_names_and_how_many_more_there_are():
    assert errors.listing([]) == ""
    assert errors.listing("abc") == "`a`, `b`, `c`"
    assert errors.listing((f"w{i}" for i in range(13)), limit=2) == "`w0`, `w1` and 11 more"
    ten = errors.listing(f"w{i}" for i in range(10))
    assert ten.endswith("`w9`")
    assert "more" not in ten


def test_a_difference_lists_what_is_missing_unexpected_and_mismatched():
    text = errors.difference(iter(["a"]), iter(["b", "c"]), iter(["`d` has shape (4,), not (8,)"]))
    assert text == "missing: `a`; unexpected: `b`, `c`; `d` has shape (4,), not (8,)"


def test_equal_sets_have_an_empty_difference():
    assert errors.difference([], []) == ""


def test_a_long_difference_is_cut_after_ten_of_each_kind():
    many = [f"w{i}" for i in range(12)]
    text = errors.difference(many, many, many)
    assert text.count("and 2 more") == 3
    assert "w10" not in text


def test_a_warning_points_at_the_first_line_outside_of_the_package():
    """Through any number of frames of ours, and through the frames of a context manager."""
    namespace = {"__name__": "ema.somewhere", "warn": errors.warn}
    exec("def inner():\n    warn('odd')\n\ndef outer():\n    inner()", namespace)

    def leave_a_context():
        with contextlib.ExitStack() as stack:
            stack.callback(namespace["outer"])

    for call in (
        lambda: errors.warn("odd"),
        namespace["inner"],
        namespace["outer"],
        leave_a_context,
    ):
        with pytest.warns(ema.EMAWarning, match="odd") as seen:
            call()
        assert [warning.filename for warning in seen] == [__file__]


def test_no_module_counts_the_frames_of_a_warning_by_hand():
    """A call more in between would point it into the library."""
    package = Path(ema.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != "errors.py"]
    assert len(files) > 100
    counting = [
        file for file in files if re.search(r"stacklevel|warnings\.warn\(", file.read_text())
    ]
    assert counting == []
