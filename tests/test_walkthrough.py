"""The example notebook: run anew, it says what it says; and it holds nothing of a machine."""

from __future__ import annotations

import base64
import copy
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from execute import WALKTHROUGH, execute, read
from nbformat import NotebookNode
from PIL import Image, ImageOps

from alike import assert_alike, open_white

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def texts(notebook: NotebookNode) -> list[str]:
    """What the notebook's outputs say, in order; pictures by their kind."""
    said = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            said.append(output.get("text", data.get("text/plain", "")))
            said += [f"with {kind}" for kind in sorted(data)]
    return said


def pictures(notebook: NotebookNode) -> list[bytes]:
    """The pictures among the notebook's outputs, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.get("data", {}).get("image/png") for output in outputs]
    return [base64.b64decode(content) for content in found if content is not None]


def assert_shows_the_same(notebook: NotebookNode, other: NotebookNode) -> None:
    """As many pictures, each like the other's."""
    for one, two in zip(pictures(notebook), pictures(other), strict=True):
        assert_alike(one, two)


def assert_says_the_same(notebook: NotebookNode, other: NotebookNode) -> None:
    """The same words, and the same figures but for rounding on another machine."""
    assert len(texts(notebook)) == len(texts(other))
    for one, two in zip(texts(notebook), texts(other), strict=True):
        # Columns are as wide as their figures.
        words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (one, two)]
        assert words[0] == words[1]
        figures = [list(map(float, NUMBER.findall(text))) for text in (one, two)]
        for figure, again in zip(*figures, strict=True):
            assert math.isclose(figure, again, rel_tol=0.02, abs_tol=0.02), (figure, again, one)


def assert_of_no_machine(notebook: NotebookNode) -> None:
    """No path, time, warning or version of whoever ran it; nothing is asked of a network."""
    for cell in notebook.cells:
        assert not cell.metadata
        for output in cell.get("outputs", []):
            assert output.output_type in ("stream", "execute_result")
            assert output.get("name", "stdout") == "stdout"
            for content in [output.get("text", ""), *output.get("data", {}).values()]:
                if "image/png" in output.get("data", {}) and content == output.data["image/png"]:
                    continue
                for place in ("/tmp", "/home", "/work", "/root", str(Path.cwd()), "http", "C:\\"):
                    assert place not in content, place
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    return read(WALKTHROUGH)


@pytest.fixture(scope="module")
def fresh(kept: NotebookNode) -> NotebookNode:
    emptied = copy.deepcopy(kept)
    for cell in emptied.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return execute(emptied)


def test_the_notebook_says_what_it_says_when_run_anew(
    kept: NotebookNode, fresh: NotebookNode
) -> None:
    assert_says_the_same(kept, fresh)
    assert_shows_the_same(kept, fresh)


def test_its_outputs_hold_tables_and_a_picture(kept: NotebookNode, fresh: NotebookNode) -> None:
    for notebook in (kept, fresh):
        assert texts(notebook).count("with text/html") == 4
        assert texts(notebook).count("with image/png") == 2


def test_it_is_of_no_machine_and_small(kept: NotebookNode, fresh: NotebookNode) -> None:
    assert_of_no_machine(kept)
    assert_of_no_machine(fresh)
    assert WALKTHROUGH.stat().st_size < 300_000
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_its_prose_agrees_with_its_figures(kept: NotebookNode) -> None:
    """The gate takes from the sandals' logit far more than from the others'; outputs agree."""
    said = "\n".join(texts(kept))
    assert "max_abs_logit_diff=0.0" in said
    others, sandals = re.findall(r"right class ([\d.]+), now ([\d.]+)", said)
    drops = [float(was) - float(now) for was, now in (others, sandals)]
    assert drops[1] > 5 * abs(drops[0])
    ours, published = map(float, re.findall(r"mean separation error ([\d.]+)", said))
    assert ours < published / 2


def test_the_checkers_notice_other_figures_words_paths_and_times(kept: NotebookNode) -> None:
    k = next(n for n, cell in enumerate(kept.cells) if "error 0" in str(cell.get("outputs")))
    text = kept.cells[k].outputs[0].text
    for wrong in (text.replace("0.1", "0.2"), text.replace("mean", "median"), text + "0.1"):
        other = copy.deepcopy(kept)
        other.cells[k].outputs[0].text = wrong
        assert wrong != text
        with pytest.raises((AssertionError, ValueError)):
            assert_says_the_same(kept, other)
    placed, timed = copy.deepcopy(kept), copy.deepcopy(kept)
    placed.cells[k].outputs[0].text += "/tmp/abc"
    timed.cells[k].metadata["execution"] = {"iopub.execute_input": "2026"}
    for corrupted in (placed, timed):
        with pytest.raises(AssertionError):
            assert_of_no_machine(corrupted)


def flipped(picture: Image.Image) -> Image.Image:
    return ImageOps.mirror(picture)


def recoloured(picture: Image.Image) -> Image.Image:
    """The second concept's orange as another one."""
    picture = picture.copy()
    for x in range(picture.width):
        for y in range(picture.height):
            if picture.getpixel((x, y)) == (0xBD, 0x4F, 0x00):
                picture.putpixel((x, y), (0xD5, 0x5E, 0x00))
    return picture


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("corrupt", [flipped, recoloured])
def test_the_checker_notices_other_pictures(
    kept: NotebookNode, n: int, corrupt: Callable[[Image.Image], Image.Image]
) -> None:
    other, content = copy.deepcopy(kept), io.BytesIO()
    corrupt(open_white(pictures(kept)[n])).save(content, "PNG")
    outputs = [output for cell in other.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "image/png" in output.get("data", {})][n]
    shown["image/png"] = base64.b64encode(content.getvalue()).decode()
    with pytest.raises(AssertionError):
        assert_shows_the_same(kept, other)
    del shown["image/png"]
    with pytest.raises((AssertionError, ValueError)):
        assert_shows_the_same(kept, other)
