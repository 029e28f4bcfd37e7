"""What the documents say in Python is run, every block of it, and prints what they show.

A page's blocks are run in one namespace, one after the other. What a page takes for granted, such
as `model`, is listed here, and stands for the demo's network and images.
"""

import re
from contextlib import redirect_stdout
from io import StringIO

import datasets
import pytest
import torch

import unbraid
from documents import PAGES, ROOT, blocks, spans
from unbraid.demo.network import CLASSES, LAYER, DemoNet, load_images, load_network

# Names of the pages' ResNet-50, and what stands in for them.
STAND_INS = {"layer4.2.conv3": LAYER, "1660": "0"}
TAKEN = {
    "README.md": "model train_set val_set images",
    "api.md": "unbraid scan",
    "api-scanning.md": "unbraid model train_set val_set",
    "api-finding.md": "unbraid scan",
    "api-splitting.md": "unbraid torch model val_set scan found",
    "api-measuring.md": "unbraid model model2 split val_set val_scan",
    "api-looking.md": "unbraid model model2 split scan train_set images",
    "api-reporting.md": "unbraid scan found split val_scan train_set graph features",
    "data.md": "preprocess",
    "explain.md": "unbraid torch model2 val_set",
    "figures.md": "unbraid split val_scan val_set features",
    "networks.md": "unbraid network",
    "no-labels.md": "unbraid scan",
    "places.md": "unbraid model train_set val_set",
    "steering.md": "unbraid model2 layer channel concept values images split scan",
    "tools.md": "unbraid torch model model2 split images labels",
}


def run(text, names):
    """Run all of a page's Python; what a block prints must be as shown."""
    for block in blocks(text):
        if block["language"] == "python":
            code = block["code"]
            for name, stand_in in STAND_INS.items():
                code = code.replace(name, stand_in)
            with redirect_stdout(StringIO()) as out:
                exec(code, names)
            assert block["prints"] in (None, out.getvalue())


class Scores(DemoNet):
    """A network that puts out more than its logits."""

    def forward(self, images):
        return {"scores": super().forward(images), "images": images}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Everything that a page may take for granted."""
    folder = tmp_path_factory.mktemp("known")
    model, train, test = load_network(), load_images("train"), load_images("test")
    scan = unbraid.scan(model, LAYER, train, folder / "train", batch_size=250)
    found = unbraid.find(scan)
    split = unbraid.split(scan, found)
    model2 = unbraid.apply(model, split)
    images = torch.stack([train[n][0] for n in range(8)])
    network = Scores().eval()
    network.load_state_dict(model.state_dict())
    return {
        **{"unbraid": unbraid, "torch": torch, "model": model, "model2": model2},
        **{"train_set": train, "val_set": test},
        **{"scan": scan, "found": found, "split": split},
        **{"images": images, "labels": torch.tensor(train.targets[:8])},
        **{"layer": LAYER, "channel": 0, "concept": 1, "values": torch.zeros(8)},
        "val_scan": unbraid.scan(model, LAYER, test, folder / "val", batch_size=250),
        "graph": unbraid.circuit_graph([unbraid.circuit(split, scan, 0, 1)], [(split, scan)]),
        "features": unbraid.visualize(model2, LAYER, train, [0], steps=8),
        "network": network,
        "preprocess": lambda picture: torch.tensor(picture.size),
    }


def few_rows(name, *, split):
    """Stand in for the download of a data set."""
    assert (name, split) == ("food101", "train")
    test = load_images("test")
    columns = {"image": [test.picture(n) for n in range(6)], "label": test.targets[:6]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


@pytest.mark.filterwarnings("ignore::Warning")  # the exporter's and zennit's, of what will change
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_documents_python_runs_and_prints_what_is_shown(page, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", few_rows)
    known["split"].save("split.safetensors")
    names = {name: known[name] for name in TAKEN.get(page.name, "").split()}
    run(page.read_text(), names)
    for name in {"model2", "network"} & names.keys():  # still computes the same
        logits = names[name](known["images"])
        assert torch.equal(logits, known["model"](known["images"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```python\nprint(1)\n```\n<!-- prints -->\n```text\n2\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\nprint(x, nobody_made_this)\n```\n", NameError),
        ("```py\nprint(1)\n```\n", AssertionError),  # a block that would be passed over
        ("```\nprint(1)\n```\n", AssertionError),
        ("~~~python\nprint(1)\n~~~\n", AssertionError),
        ("```python\nprint(1)\n", AssertionError),
        ("Start\n\n    unbraid demo --out x\n\nfirst.\n", AssertionError),
        ("- so:\n  ```python\n  print(1)\n  ```\n", AssertionError),
        ("```text\n$ unbraid demo --out x\n```\n", AssertionError),
    ],
)
def test_a_document_that_shows_something_else_or_hides_a_block_is_told(text, told):
    with pytest.raises(told):
        run(text, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    own = re.compile(r"(\.ci|benchmarks|docs|examples|src|tests)/[\w./-]*")
    named = [span for span in spans(text) if own.fullmatch(span)]
    assert [span for span in named if not (ROOT / span).exists()] == []
