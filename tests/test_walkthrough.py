"""The example notebook: run again, it says what it says; and it holds nothing of a machine."""

import base64
import copy
import io
import math
import re

import numpy as np
import pytest
from execute import WALKTHROUGH, execute, read
from PIL import Image, ImageOps

from alike import assert_alike, open_white

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


def pictures(notebook):
    return [output.data for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_same(notebook, other):
    """The same words and pictures, and the same figures but for rounding on another machine."""
    for one, two in zip(texts(notebook), texts(other), strict=True):
        # Columns are as wide as their figures.
        words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (one, two)]
        assert words[0] == words[1]
        figures = [list(map(float, NUMBER.findall(text))) for text in (one, two)]
        for figure, again in zip(*figures, strict=True):
            assert math.isclose(figure, again, rel_tol=0.02, abs_tol=0.02), (figure, again, one)
    for pair in zip(pictures(notebook), pictures(other), strict=True):
        assert_alike(*(base64.b64decode(data["image/png"]) for data in pair))


def test_the_notebook_says_and_shows_the_same_when_run_anew():
    emptied = copy.deepcopy(KEPT)
    for cell in emptied.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert_same(KEPT, execute(emptied))
    assert [texts(KEPT).count(f"with {kind}") for kind in ("text/html", "image/png")] == [4, 2]
    assert not re.search(r"/tmp|/home|/work|/root|https?:|C:\\", "".join(texts(KEPT)))


def test_its_prose_agrees_with_its_figures():
    """The gate takes from the sandals' logit far more than from the others'; outputs agree."""
    said = "\n".join(texts(KEPT))
    assert "max_abs_logit_diff=0.0" in said
    others, sandals = re.findall(r"right class ([\d.]+), now ([\d.]+)", said)
    drops = [float(was) - float(now) for was, now in (others, sandals)]
    assert drops[1] > 5 * abs(drops[0])
    ours, published = map(float, re.findall(r"mean separation error ([\d.]+)", said))
    assert ours < published / 2


@pytest.mark.parametrize(
    ("old", "new"), [("error 0", "error 1"), ("mean", "median"), ("\n", "\n0.1")]
)
def test_other_figures_and_words_are_noticed(old, new):
    other = copy.deepcopy(KEPT)
    output = next(o for o in outputs(other) if "mean separation error 0" in o.get("text", ""))
    output.text = output.text.replace(old, new)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(KEPT, other)


def recoloured(picture):
    """The second concept's orange as another one."""
    pixels = np.asarray(picture).copy()
    pixels[(pixels == (0xBD, 0x4F, 0x00)).all(-1)] = (0xD5, 0x5E, 0x00)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("corrupt", [ImageOps.mirror, recoloured])
def test_other_pictures_are_noticed(n, corrupt):
    drawn, content = copy.deepcopy(KEPT), io.BytesIO()
    data = pictures(drawn)[n]
    corrupt(open_white(base64.b64decode(data["image/png"]))).save(content, "PNG")
    data["image/png"] = base64.b64encode(content.getvalue()).decode()
    with pytest.raises(AssertionError):
        assert_same(KEPT, drawn)
