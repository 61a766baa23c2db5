"""The code blocks of the pages on PyTorch run, one after the other."""

import re
from pathlib import Path

import pytest

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
    assert len(blocks) == 6
    for block in blocks:
        exec(block, names)
    assert names["ema_model"].count == 5
    assert set(names["head_only"].averaged_parameters()) == {"head.weight", "head.bias"}
    assert not names["target"].requires_grad
    assert names["resumed"].count == 5


def test_links_between_the_pages_lead_somewhere():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+\.\w+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
