"""What the documents say in Python is run, every block of it, and prints what they show.

A page's blocks are run in one namespace, one after the other. What a page takes for granted, such
as `model`, is listed here, and stands for the demo's network and images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

import unbraid
from documents import PAGES, ROOT, blocks, spans
from unbraid.demo.network import CLASSES, LAYER, load_images, load_network

Names = dict[str, Any]

# Names of the pages' ResNet-50, and what stands in for them.
STAND_INS = {"layer4.2.conv3": LAYER, "1660": "0"}
TAKEN = {
    "README.md": ("model", "train_set", "val_set", "images"),
    "data.md": ("preprocess",),
    "figures.md": ("unbraid", "split", "val_scan", "val_set", "features"),
    "networks.md": ("unbraid", "network"),
    "steering.md": (
        *("unbraid", "model2", "layer", "channel", "concept"),
        *("values", "images", "split", "scan"),
    ),
    "tools.md": ("unbraid", "torch", "model", "model2", "split", "images", "labels"),
}
N_IMAGES = 8  # in `images`


def run(text: str, names: Names) -> str:
    """Run all of a page's Python; what a block prints must be as shown. All that was printed."""
    printed = ""
    for block in blocks(text):
        if block.language == "python":
            code = block.code
            for name, stand_in in STAND_INS.items():
                code = code.replace(name, stand_in)
            with redirect_stdout(StringIO()) as out:
                exec(code, names)
            if block.prints is not None:
                assert out.getvalue() == block.prints
            printed += out.getvalue()
    return printed


class Scores(nn.Module):
    """A network that puts out more than its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = load_network()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.inner(images), "images": images}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """Everything that a page may take for granted."""
    folder = tmp_path_factory.mktemp("known")
    model, train, test = load_network(), load_images("train"), load_images("test")
    scan = unbraid.scan(model, LAYER, train, folder / "train", batch_size=250)
    split = unbraid.split(scan, unbraid.find(scan))
    model2 = unbraid.apply(model, split)
    images = torch.stack([train[n][0] for n in range(N_IMAGES)])
    return {
        **{"unbraid": unbraid, "torch": torch, "model": model, "model2": model2},
        **{"train_set": train, "val_set": test, "scan": scan, "split": split},
        **{"images": images, "labels": torch.tensor(train.targets[:N_IMAGES])},
        **{"layer": LAYER, "channel": 0, "concept": 1, "values": torch.zeros(N_IMAGES)},
        "val_scan": unbraid.scan(model, LAYER, test, folder / "val", batch_size=250),
        "features": unbraid.visualize(model2, LAYER, train, [0], steps=8),
        "network": Scores().eval(),
        "preprocess": lambda picture: torch.tensor(picture.size),
    }


def few_rows(name: str, *, split: str) -> datasets.Dataset:
    """Stand in for the download of a data set."""
    assert (name, split) == ("food101", "train")
    test = load_images("test")
    columns = {"image": [test.picture(n) for n in range(6)], "label": test.targets[:6]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


# What is there when a page has been run.
CHECKS: dict[str, Callable[[Names, str, Path], object]] = {}


def checks(page: str) -> Callable[[Callable[[Names, str, Path], None]], None]:
    return lambda function: CHECKS.update({page: function})


@checks("README.md")
def _(names: Names, printed: str, _folder: Path) -> None:
    assert "max_abs_logit_diff=0.0" in printed
    assert "concept 0 of channel 0" in printed
    assert names["logits"].shape == (N_IMAGES, 10)
    assert not torch.equal(names["logits"], names["model"](names["images"]))


@checks("data.md")
def _(names: Names, _printed: str, _folder: Path) -> None:
    images = names["images"]
    assert (len(images), images.classes) == (6, list(CLASSES))
    assert images[0][0].tolist() == [28, 28]
    assert [images[n][1] for n in range(6)] == load_images("test").targets[:6]


@checks("figures.md")
def _(_names: Names, _printed: str, folder: Path) -> None:
    assert (folder / "densities.pdf").read_bytes().startswith(b"%PDF")


@checks("networks.md")
def _(names: Names, _printed: str, _folder: Path) -> None:
    images = torch.zeros(2, 1, 28, 28)
    assert torch.equal(names["network"](images), load_network()(images))


@checks("steering.md")
def _(names: Names, printed: str, _folder: Path) -> None:
    assert names["logits"].shape == (N_IMAGES, 10)
    assert "concept 1 of channel 0" in printed
    assert torch.equal(names["model2"](names["images"]), load_network()(names["images"]))


@checks("tools.md")
def _(names: Names, _printed: str, folder: Path) -> None:
    assert (folder / "split.onnx").stat().st_size > 0
    for name in ("values", "relevance"):
        assert names[name].shape[0] == N_IMAGES
        assert names[name].abs().max() > 0
    with names["composite"].context(names["plain"]) as explained:
        assert torch.equal(explained(names["images"]), names["plain"](names["images"]))
    assert names["model2"].get_submodule(LAYER).names
    assert torch.equal(names["model2"](names["images"]), names["model"](names["images"]))


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.filterwarnings("ignore::Warning")  # the exporter's and zennit's, of what will change
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_a_documents_python_runs_and_prints_what_is_shown(page, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", few_rows)
    known["split"].save("split.safetensors")
    names = {name: known[name] for name in TAKEN.get(page.name, ())}
    printed = run(page.read_text(), names)
    CHECKS.get(page.name, lambda *_: None)(names, printed, tmp_path)


def test_what_a_page_takes_for_granted_is_used_there_and_checked():
    assert TAKEN.keys() == CHECKS.keys()
    for page, names in TAKEN.items():
        (path,) = (p for p in PAGES if p.name == page)
        code = "".join(block.code for block in blocks(path.read_text()))
        assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_a_document_that_shows_something_else_is_told():
    with pytest.raises(AssertionError):
        run("```python\nprint(1)\n```\n<!-- prints -->\n```text\n2\n```\n", {})


def test_a_block_is_run_whether_marked_or_not():
    with pytest.raises(NameError):
        run("Words.\n\n```python\nx = 1\n```\n\n```python\nprint(x, nobody_made_this)\n```\n", {})


@pytest.mark.parametrize(
    "text",
    [
        "```py\nprint(1)\n```\n",
        "```\nprint(1)\n```\n",
        "- so:\n  ```python\n  print(1)\n  ```\n",
        "~~~python\nprint(1)\n~~~\n",
        "```python\nprint(1)\n",
        "```python\nprint(1)\n```\n\n<!-- prints -->\n```text\n1\n```\n",
        "```text\n$ unbraid demo --out x\n```\n",
        "Start\n\n    unbraid demo --out x\n\nfirst.\n",
    ],
)
def test_a_block_that_would_be_passed_over_is_told(text):
    with pytest.raises(AssertionError):
        blocks(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_looked_at_and_links_and_files_that_a_page_names_are_there(page):
    text = page.read_text()
    blocks(text)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    own = re.compile(r"(\.ci|benchmarks|docs|examples|src|tests)/[\w./-]*")
    named = [span for span in spans(text) if own.fullmatch(span)]
    assert [span for span in named if not (ROOT / span).exists()] == []
