"""The code blocks of the page on PyTorch run; the page on scaling says what the plan says."""

import math
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema import plan_ema
from ema.command.main import build_app
from ema.plan.quantities import parse_quantity, show_bytes, show_seconds

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def names():
    """A classifier with a head, and what a loop needs."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = {"body": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8), "head": nn.Linear(8, 2)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_function": nn.functional.mse_loss,
        "loader": [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)],
        "inputs": torch.randn(3, 4),
    }


def test_the_blocks_of_the_pytorch_page_run(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "pytorch.md").read_text(), re.M | re.S)
    assert len(blocks) == 10
    for block in blocks:
        exec(block, names)
    assert names["ema_model"].count == 5
    assert names["swa"].averaged_parameters()["0.weight"].item() == pytest.approx(25.75)
    assert names["normed"][1].num_batches_tracked == 4
    assert set(names["head_only"].averaged_parameters()) == {"head.weight", "head.bias"}
    assert not names["target"].requires_grad
    assert type(names["teacher"]) is type(names["model"])
    assert names["resumed"].count == 5


def test_links_between_the_pages_lead_somewhere():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+\.\w+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


SCALING = (DOCS / "scaling.md").read_text()


def rows_below(heading):
    """The cells of the first table below a heading, without its head."""
    table = re.search(r"(?:^\|.*\n)+", SCALING.partition(f"\n{heading}")[2], re.M)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()][
        2:
    ]


def test_the_plans_of_the_scaling_page_are_what_the_commands_print():
    blocks = re.findall(r"^```console\n\$ ema (.*)\n((?:.*\n)*?)```", SCALING, re.M)
    assert len(blocks) == 2
    for command, shown in blocks:
        assert CliRunner().invoke(build_app(), shlex.split(command)).stdout == shown


def test_the_bytes_on_the_scaling_page_are_those_of_the_plan():
    *kinds, guard = rows_below("## The model")
    assert len(kinds) == 6
    for average, params, _, bytes_moved in kinds:
        dtype, compensated = re.match(r"\w+", average)[0], "compensated" in average
        plan = plan_ema(1, dtype=dtype, param_dtype=params, compensated=compensated)
        assert plan.traffic.total == int(bytes_moved)
    for dtype, more in zip(("bf16", "fp32"), re.findall(r"\d", guard[-1]), strict=True):
        assert plan_ema(1, param_dtype=dtype, on_nonfinite="skip").traffic.guard == int(more)


def test_the_jobs_on_the_scaling_page_are_those_of_the_plan():
    kinds = ({}, {"dtype": "bf16"}, {"compensated": True}, {"offload": True})
    units = {"million": 1e6, "billion": 1e9, "trillion": 1e12}
    rows = rows_below("## Typical jobs")
    assert len(rows) == 7
    for params, ranks, *cells in rows:
        number, unit = params.split()
        for cell, settings in zip(cells, kinds, strict=True):
            plan = plan_ema(int(number) * units[unit], int(ranks), **settings)
            held = show_bytes(plan.average_bytes + plan.remainder_bytes)
            assert cell == f"{held}, {show_seconds(plan.update_seconds)}"


def test_the_shares_on_the_scaling_page_follow_from_its_formula():
    text = SCALING.partition("**The share of a step")[2]
    tokens, _, shares = re.findall(r"^\|(.*)\|$", text, re.M)[:3]
    for count, share in list(zip(tokens.split("|"), shares.split("|"), strict=True))[1:]:
        expected = 10 * 0.4 * 989e12 / (6 * int(count.replace(" ", "")) * 3.35e12)
        assert share.strip() == f"{100 * expected:.2g} %"


def test_the_defaults_of_the_plan_are_the_bandwidths_of_the_scaling_page():
    plan = plan_ema(1)
    named = re.findall(r"`--(\w+(?:-\w+)+)`\) \| (\S+) \|", SCALING)
    assert len(named) == 4
    for option, value in named:
        assert getattr(plan, option.replace("-", "_")) == parse_quantity(option, value)


def test_the_schedules_of_the_page_on_schedules_run_in_the_frameworks_that_it_names(capsys):
    """``Warmup`` in both, ``Milestones`` in JAX; the table of the page names every class of ours."""
    import jax
    import jax.numpy as jnp
    import torch

    import ema

    text = (DOCS / "schedules.md").read_text()
    names = {"__name__": "page"}
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(block, names)
    assert "Schedule:                 Warmup(decay=0.999, updates=100)" in capsys.readouterr().out
    warmup = names["Warmup"](decay=0.5, updates=3)
    milestones = names["Milestones"]((0.5, 0.75), (2,))
    # what three updates towards 0 leave of 1
    for schedule, left in ((warmup, 0.0689655), (milestones, 0.5 * 0.5 * 0.75)):
        tx = ema.params_ema(schedule)
        params, state = jnp.ones(()), tx.init(jnp.ones(()))
        for _ in range(3):
            _, state = jax.jit(tx.update)(-params, state, params)
        assert float(state.params_ema) == pytest.approx(left, rel=1e-5)
    module = torch.nn.Linear(1, 1)
    average = ema.EMAModel(module, warmup)
    average.update()
    assert average.decay == pytest.approx(1 - math.exp(-1 / 3))
    rows = set(re.findall(r"^\| `(\w+)\(", text, re.M))
    assert rows == set(ema.schedules.SCHEDULES)


def test_the_schedules_of_the_peers_are_ours():
    """And a peer whose row is in the table has a row in the tests."""
    text = (DOCS / "peers.md").read_text()
    from ema.schedules import SCHEDULES

    named = {name for name in SCHEDULES if f"{name}(" in text or f"{name}.from_std(" in text}
    assert len(named) >= 8  # a number is a ConstantDecay; no peer has a HalfLife
    rows = re.findall(r"^\| \*\*(.+?)\*\*", text, re.M)
    tested = (Path(__file__).parents[1] / "peers" / "test_trajectories.py").read_text()
    named = {"torch": "AveragedModel", "flax": "nnx.EMA", "optax": "incremental_update"}
    for row in rows:
        assert f'"{named.get(row, row)}"' in tested, row
