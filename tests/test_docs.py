"""What the documents say: their Python and the notebook run, commands and links are there.

A page's blocks are run in one namespace; what it takes for granted stands for the demo's.
"""

import copy
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch
from cyclopts import CycloptsError
from execute import WALKTHROUGH, execute, read

import unbraid
from unbraid import cli
from unbraid.demo.network import CLASSES, LAYER, DemoNet, load_images, load_network

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_FENCE = re.compile(
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```\n"
    r"(?:<!-- prints -->\n```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def blocks(text):
    """List a page's blocks; AssertionError for one that this would miss."""
    text = text.rstrip("\n") + "\n"
    found = list(_FENCE.finditer(text))
    printing = sum(block["prints"] is not None for block in found)
    assert text.count("```") + text.count("~~~") == 2 * (len(found) + printing)
    assert text.count("<!-- prints -->") == printing
    assert {block["language"] for block in found} <= {"python", "sh", "text"}
    return found


def spans(text):
    """List the pieces of code that stand in the text itself."""
    return _SPAN.findall(_FENCE.sub("", text.rstrip("\n") + "\n"))


# Names of the pages' ResNet-50, and what stands in for them.
STAND_INS = {"layer4.2.conv3": LAYER, "1660": "0"}
TAKEN = {
    "README.md": "model train_set val_set images",
    "data.md": "preprocess",
    "figures.md": "unbraid split val_scan val_set features",
    "networks.md": "unbraid network",
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
    split = unbraid.split(scan, unbraid.find(scan))
    model2 = unbraid.apply(model, split)
    images = torch.stack([train[n][0] for n in range(8)])
    network = Scores().eval()
    network.load_state_dict(model.state_dict())
    return {
        **{"unbraid": unbraid, "torch": torch, "model": model, "model2": model2},
        **{"train_set": train, "val_set": test, "scan": scan, "split": split},
        **{"images": images, "labels": torch.tensor(train.targets[:8])},
        **{"layer": LAYER, "channel": 0, "concept": 1, "values": torch.zeros(8)},
        "val_scan": unbraid.scan(model, LAYER, test, folder / "val", batch_size=250),
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


def test_a_document_that_shows_something_else_or_hides_a_block_is_told():
    for text, told in (
        ("```python\nprint(1)\n```\n<!-- prints -->\n```text\n2\n```\n", AssertionError),
        ("```python\nx = 1\n```\n\n```python\nprint(x, nobody_made_this)\n```\n", NameError),
        ("```py\nprint(1)\n```\n", AssertionError),  # a block that would be passed over
        ("```\nprint(1)\n```\n", AssertionError),
        ("~~~python\nprint(1)\n~~~\n", AssertionError),
        ("```python\nprint(1)\n", AssertionError),
        ("- so:\n  ```python\n  print(1)\n  ```\n", AssertionError),
    ):
        with pytest.raises(told):
            run(text, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_and_commands_that_a_page_names_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    own = re.compile(r"(\.ci|benchmarks|docs|examples|src|tests)/[\w./-]*")
    named = [span for span in spans(text) if own.fullmatch(span)]
    assert [span for span in named if not (ROOT / span).exists()] == []
    scripts = [block["code"].replace("\\\n", " ") for block in blocks(text)]
    for part in re.split(r"&&|\n", "\n".join(scripts)):
        if re.match(r"\s*(unbraid|torchrun) ", part):
            check_command(part)
    for span in spans(text):
        if span.startswith(("unbraid ", "--")):
            check_command(span, whole=False)


def check_command(text, whole=True):
    """A command of unbraid has what it needs and no more; a part of one names what there is."""
    words = shlex.split(text, comments=True)
    own = words[words.index("unbraid") + 1 :] if "unbraid" in words else words
    if whole:
        cli.app.parse_args(own, exit_on_error=False, print_error=False)
        return
    named = [name for name in cli.app if not name.startswith("-")] if own is words else own[:1]
    arguments = [one for name in named for one in cli.app[name].assemble_argument_collection()]
    known = {name for argument in arguments for name in argument.names}
    assert {word for word in own if word.startswith("--")} <= known


def test_a_command_that_would_not_be_understood_is_told():
    for text, whole, told in (
        ("unbraid runs", False, KeyError),
        ("unbraid demo --layer", False, AssertionError),
        ("--outs", False, AssertionError),
        ("unbraid demo", True, CycloptsError),
        ("torchrun -m unbraid find x --tau high", True, CycloptsError),
    ):
        with pytest.raises(told):
            check_command(text, whole)


def said_by(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs]
    return "\n".join(texts), [sorted(output.get("data", {})) for output in outputs]


def assert_same_notebook(one, other):
    """The same words and kinds of output; figures may be rounded as on another machine."""
    (text, kinds), (again, kinds_again) = said_by(one), said_by(other)
    words = [NUMBER.sub("#", told).split() for told in (text, again)]  # columns may be wider
    assert (words[0], kinds) == (words[1], kinds_again)
    figures = [list(map(float, NUMBER.findall(told))) for told in (text, again)]
    assert figures[0] == pytest.approx(figures[1], rel=0.02, abs=0.02)


def test_the_walkthrough_says_the_same_when_run_anew_and_other_words_are_noticed():
    kept = read(WALKTHROUGH)
    emptied = copy.deepcopy(kept)
    for cell in emptied.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert_same_notebook(kept, execute(emptied))
    assert not re.search(r"/tmp|/home|/work|/root|https?:|C:\\", said_by(kept)[0])
    for old, new in (("error 0.1", "error 0.2"), ("mean", "median"), ("\n", "\n0.1")):
        other = copy.deepcopy(kept)
        for output in [o for cell in other.cells for o in cell.get("outputs", []) if "text" in o]:
            output.text = output.text.replace(old, new)
        with pytest.raises(AssertionError):
            assert_same_notebook(kept, other)
