"""The example notebook: run anew, it says what it says; and it holds nothing of a machine."""

import copy
import math
import re

import pytest
from execute import WALKTHROUGH, execute, read

KEPT = read(WALKTHROUGH)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook):
    """What the notebook's outputs say, in order; pictures by their kind."""
    said = []
    for output in outputs(notebook):
        data = output.get("data", {})
        said.append(output.get("text", data.get("text/plain", "")))
        said += [f"with {kind}" for kind in sorted(data)]
    return said


def assert_same(notebook, other):
    """The same words and kinds of output; figures may be rounded as on another machine."""
    for one, two in zip(texts(notebook), texts(other), strict=True):
        # Columns are as wide as their figures.
        words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (one, two)]
        assert words[0] == words[1]
        figures = [list(map(float, NUMBER.findall(text))) for text in (one, two)]
        for figure, again in zip(*figures, strict=True):
            assert math.isclose(figure, again, rel_tol=0.02, abs_tol=0.02), (figure, again, one)


def test_the_notebook_says_and_shows_the_same_when_run_anew():
    emptied = copy.deepcopy(KEPT)
    for cell in emptied.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert_same(KEPT, execute(emptied))
    assert [texts(KEPT).count(f"with {kind}") for kind in ("text/html", "image/png")] == [4, 2]
    assert not re.search(r"/tmp|/home|/work|/root|https?:|C:\\", "".join(texts(KEPT)))


@pytest.mark.parametrize(("old", "new"), [("0.1", "0.2"), ("mean", "median"), ("\n", "\n0.1")])
def test_other_figures_and_words_are_noticed(old, new):
    other = copy.deepcopy(KEPT)
    output = next(o for o in outputs(other) if "mean separation error 0" in o.get("text", ""))
    output.text = output.text.replace(old, new)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(KEPT, other)
