"""The original's row has an image of every concept; what is made says what it excites."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_report import (  # noqa: F401  # a fixture
    BROKEN,
    Element,
    Run,
    assert_harmless,
    own_text,
    read,
    run,
    sections,
    shots,
)

import unbraid
from unbraid import Split
from unbraid.measuring.evaluate import intervals
from unbraid.reporting.channel import ReferenceRow, Shot, first_images
from unbraid.reporting.words import ABSENT, ordinal, significant
from unbraid.visualizing.features import Feature, Features

# --- the first image of each concept --------------------------------------------------------------


def responses(run: Run, channel: int) -> torch.Tensor:  # noqa: F811
    """The original channel's summed pre-activation on every image; the broken one last."""
    with torch.no_grad():
        z = run.network[:3](run.images.x)[:, channel].double().sum((1, 2))
    z[BROKEN] = -torch.inf
    return z


@pytest.fixture(scope="module")
def lopsided(run: Run) -> tuple[Split, int]:  # noqa: F811
    """A split channel that one concept fills the eight top images of: each class is a concept."""
    for channel in range(6):
        z = responses(run, channel)
        labels = [run.images.targets[i] for i in z.argsort(descending=True)[:8]]
        if len(set(labels)) == 1:
            one, other = labels[0], (labels[0] + 1) % 4
            found = unbraid.find(run.train_scan, channels={channel: [[one], [other]]})
            return unbraid.split(run.train_scan, found, method="published", rho=0.7), channel
    raise AssertionError("the fixture must have a channel that one class fills the top of")


def assert_first(page: str, run: Run, split: Split, channel: int) -> None:  # noqa: F811
    """The row ends with the missing concept's first image; hint and caption tell its rank."""
    (part,) = split.channels
    z = responses(run, channel)
    (label,) = part.concepts[1]
    own = [i for i, target in enumerate(run.images.targets) if target == label and i != BROKEN]
    best = max(own, key=lambda i: float(z[i]))
    rank = 1 + sum(float(other) > float(z[best]) for other in z)
    section = sections(page)[f"channel-{channel}"]
    row = section.all("ol", "shots")[0]
    assert len(row.all("li")) == 8
    (last,) = row.all("li", "first")
    assert last is row.all("li")[-1]
    assert re.search(r"image (\d+)", shots(last)[0].attributes["alt"])[1] == str(best)
    told = f"B comes first at {ordinal(rank)} of {len(run.images) - 1} images"
    assert told in section.all("div", "row")[0].text
    assert last.all("span", "activation")[0].text == (
        f"{significant(float(z[best]))}, {ordinal(rank)}"
    )
    assert "7 of A" in section.all("span", "tally")[0].text


def written(run: Run, split: Split, channel: int, folder: Path) -> str:  # noqa: F811
    (part,) = split.channels
    found = unbraid.find(run.train_scan, channels={channel: [list(c) for c in part.concepts]})
    return run.report(folder / "r.html", found=found, split=split, evaluation=None)


def test_a_concept_that_is_missing_at_the_top_has_its_first_image(
    run: Run,  # noqa: F811
    lopsided: tuple[Split, int],
    tmp_path: Path,
) -> None:
    page = written(run, *lopsided, tmp_path)
    assert_harmless(page)
    assert_first(page, run, *lopsided)
    rank = re.search(r"comes first at ([\d,]+)", read(page).text)
    assert rank
    with pytest.raises(AssertionError):
        assert_first(page.replace(f"at {rank[1]}", "at 2"), run, *lopsided)


def test_a_row_with_all_concepts_has_no_more(run: Run, tmp_path: Path) -> None:  # noqa: F811
    for section in sections(run.report(tmp_path / "r.html")).values():
        original = section.all("div", "row")[0]
        told = re.findall(r" (\d+) of [A-Z]", original.all("h4")[0].text)
        missing = len(section.all("div", "row")) - 1 - len(told)
        assert len(original.all("li", "first")) == missing
        assert ("comes first at" in original.text) == bool(missing)


def test_ranks_are_those_of_all_images(run: Run) -> None:  # noqa: F811
    wanted = {part.channel: set(range(len(part.concepts))) for part in run.split.channels}
    first = first_images(run.scan, run.split, wanted)
    assert set(first) == {(channel, k) for channel, ks in wanted.items() for k in ks}
    for part in run.split.channels:
        z = responses(run, part.channel)
        for k, labels in enumerate(part.concepts):
            own = [i for i, t in enumerate(run.images.targets) if t in labels and i != BROKEN]
            best = max(own, key=lambda i: float(z[i]))
            one = first[part.channel, k]
            assert (one.index, one.label) == (best, run.images.targets[best])
            assert one.rank == 1 + int((z > z[best]).sum())
            assert one.activation == pytest.approx(float(z[best]), rel=1e-4, abs=1e-4)
    assert first_images(run.scan, run.split, {}) == {}


@pytest.mark.parametrize(("n", "expected"), [(8, (5, 3)), (5, (2, 3)), (3, (1, 2)), (1, (1, 0))])
def test_fewer_images_leave_room_for_the_first_ones(n: int, expected: tuple[int, int]) -> None:
    shot = Shot(0, 0, "a", "b", 1.0, None)
    row = ReferenceRow(None, (shot,) * 5, (shot,) * 3).with_fewer(n)
    assert (len(row.shots), len(row.firsts)) == expected


# --- what is made says what it excites ------------------------------------------------------------


def excited(section: Element) -> list[str]:
    return [figure.all("span", "excites")[0].text for figure in section.all("figure", "feature")]


def test_a_visualisation_says_what_it_excites(run: Run, tmp_path: Path) -> None:  # noqa: F811
    part = run.split.channels[0]
    n = len(part.concepts)
    made = tuple(
        Feature(part.channel, k, place, Image.new("RGBA", (9, 9)), (100.0, *values))
        for place in (0, 1)
        for row, k in enumerate((None, *range(n)))
        for values in [[9.04 - row - 3 * j - 50 * place for j in range(n)]]
    )
    page = run.report(tmp_path / "r.html", features=Features("2", "any", made))
    assert_harmless(page)
    assert excited(sections(page)[f"channel-{part.channel}"]) == [
        " ".join(f"{'ABCD'[j]} {significant(9.04 - row - 3 * j, 2)}" for j in range(n))
        for row in range(1 + n)
    ]


# --- what is divided by nothing -------------------------------------------------------------------


def test_no_ratio_to_a_mean_that_is_not_told_from_zero(run: Run, tmp_path: Path) -> None:  # noqa: F811
    channel = run.evaluation.channels[0]
    answers = run.evaluation.responses[channel.channel]
    own = answers.concept == 0
    z = answers.original.clone()
    z[own] -= z[own].mean()
    changed = replace(answers, original=z)
    known = intervals(changed)
    assert known is not None
    assert known.means[0][0] < 0 < known.means[0][1]
    responses = {**run.evaluation.responses, channel.channel: changed}
    evaluation = replace(run.evaluation, responses=responses)
    page = run.report(tmp_path / "r.html", evaluation=evaluation)
    section = sections(page)[f"channel-{channel.channel}"]
    rows = section.all("table")[0].all("tbody")[0].all("tr")
    for k, row in enumerate(rows):
        cells = row.all("td")
        zero = [low <= 0 <= high for low, high in known.means]
        dashes = [zero[k], any(z for n, z in enumerate(zero) if n != k), False, False, False]
        assert [own_text(cell) == ABSENT for cell in cells[1:]] == dashes
        assert ["not told from 0" in cell.text for cell in cells[1:]] == dashes
    assert own_text(rows[0].all("td")[1]) == ABSENT


def test_means_are_those_of_repeated_images(run: Run) -> None:  # noqa: F811
    answers = run.evaluation.responses[run.split.channels[0].channel]
    known = intervals(answers)
    assert known is not None
    generator = torch.Generator().manual_seed(3)
    for k, (low, high) in enumerate(known.means):
        z = answers.original[answers.concept == k].double()
        draws = torch.randint(len(z), (2000, len(z)), generator=generator)
        expected = z[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        width = float(expected[1] - expected[0])
        assert abs(low - float(expected[0])) < 0.2 * width
        assert abs(high - float(expected[1])) < 0.2 * width
