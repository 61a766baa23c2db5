"""Pictures of live and averaged curves."""

from __future__ import annotations

import sys

import pytest

import ema
from ema.plotting import Curve, plot_live_and_averaged, save
from tests import processes


def curve(**changes):
    fields = {"title": "a run", "steps": [1, 2, 3], "live": [2, 1, 0.5], "averaged": [2, 0.9, 0.4]}
    return Curve(**{**fields, **changes})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_panel_a_curve_on_a_common_scale(count):
    """Each with two lines, a legend, and the values where they end."""
    figure = plot_live_and_averaged([curve()] * count, title="Loss", ylabel="nats")
    assert len(figure.axes) == count
    assert len({panel.get_ylim() for panel in figure.axes}) == 1
    for panel in figure.axes:
        labels = [text.get_text() for text in panel.get_legend().get_texts()]
        assert labels == ["live", "averaged"]
        assert [text.get_text() for text in panel.texts] == ["0.50", "0.40"]
    assert figure.axes[0].get_ylabel() == "nats"
    assert figure.get_suptitle() == "Loss"


@pytest.mark.parametrize(
    ("changes", "log", "scale"),
    [
        ({}, None, "log"),
        ({}, False, "linear"),
        ({"live": [2, 1.9, 1.8], "averaged": [2, 2, 2]}, None, "linear"),
        ({"live": [2, 1, 0]}, None, "linear"),
        ({"live": [2, 1.9, 1.8], "averaged": [2, 2, 2]}, True, "log"),
    ],
)
def test_the_scale_is_logarithmic_where_values_span_a_lot(changes, log, scale):
    figure = plot_live_and_averaged([curve(**changes)], log=log)
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_it_is_saved_in_the_format_of_the_suffix(tmp_path, suffix):
    """Into a folder that need not be there."""
    path = tmp_path / "a" / "b" / f"picture.{suffix}"
    assert save(plot_live_and_averaged([curve()]), path) == path
    assert path.stat().st_size > 3000


def test_the_global_state_of_matplotlib_is_not_touched():
    """In a process of its own, where nothing else has loaded pyplot."""
    program = (
        "import sys, ema.plotting as p\n"
        "p.plot_live_and_averaged([p.Curve(title='t', steps=[0, 1], live=[2, 1], averaged=[2, 1])])\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    processes.run([sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], r"`curves` must not be empty"),
        ([curve(live=[1.0])], r"of 'a run' must be of one length, got \(3, 1, 3\)"),
        ([curve(steps=[], live=[], averaged=[])], r"of 'a run' must not be empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused(curves, message):
    with pytest.raises(ema.ArgumentError, match=message):
        plot_live_and_averaged(curves)
