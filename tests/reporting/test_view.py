"""The report on concepts that are clusters of images: its words and figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import unbraid
from handmade import Planted, plant
from pages import Element, assert_harmless, read, sections
from unbraid import Evaluation, Findings, Split
from unbraid.reporting.words import number


@dataclass
class Run:
    train: Planted
    val: Planted
    found: Findings
    split: Split
    evaluation: Evaluation

    def report(self, path: Path, **changes: object) -> str:
        parts = {"found": self.found, "split": self.split, "evaluation": self.evaluation, **changes}
        unbraid.report(path, scan=self.val.scan, train_scan=self.train.scan, **parts)
        return path.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("clusters")
    train, val = (plant(home / name, seed=seed) for name, seed in (("train", 0), ("val", 7)))
    found = unbraid.find(train.scan, concepts="clusters")
    split = unbraid.split(train.scan, found)
    return Run(train, val, found, split, unbraid.evaluate(split, val.scan))


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run.report(tmp_path_factory.mktemp("page") / "report.html")


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the table in the section with a heading."""
    (section,) = (
        s for s in read(page).all("section") if s.attributes.get("aria-labelledby") == heading
    )
    rows = section.all("tr")
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in rows]


def test_the_page_speaks_of_clusters(page: str, run: Run) -> None:
    assert_harmless(page)
    text = read(page).text
    for words in (f"{len(run.found)} pairs of clusters", "labels play no part"):
        assert words in text
    for words in (
        "airs of classes",
        "other classes",
        "Interval",
        "Halves",
        "Uncertain",
        "its class",
    ):
        assert words not in text
    settings = dict(
        (row.all("dt")[0].text, row.all("dd")[0].text)
        for row in read(page).all("dl", "settings")[0].all("div")
    )
    assert (settings["concepts"], settings["gamma"]) == ("clusters", "0.5")
    assert not {"tau", "p"} & set(settings)
    assert set(sections(page)) == {0, 1}


def assert_agreement(page: str, found: Findings) -> None:
    """Agreement with classes stands in the list of channels, and its mean at the top."""
    head, *rows = table(page, "channels")
    assert head[-1] == "Agreement with classes, ideal 1"
    assert {int(row[0]): row[-1] for row in rows} == {
        channel: number(value) for channel, value in found.agreement.items()
    }
    mean = sum(found.agreement.values()) / len(found.agreement)
    facts = " ".join(fact.text for fact in read(page).all("ul", "facts")[0].all("li"))
    assert f"; agreement with classes {number(mean)}" in facts


def test_agreement_with_classes_is_shown(page: str, run: Run) -> None:
    assert_agreement(page, run.found)
    for wrong in ({0: 0.5}, {**run.found.agreement, 1: 0.5}, {**run.found.agreement, 2: 1.0}):
        with pytest.raises(AssertionError):
            assert_agreement(page, replace(run.found, agreement=wrong))


def test_pairs_are_listed_with_their_part_of_the_top_images(page: str, run: Run) -> None:
    head, *rows = table(page, "pairs")
    assert head == ["Channel", "Cosine", *["Cluster", "Top images"] * 2]
    assert rows == [
        [
            str(pair.channel),
            number(pair.cosine),
            *(run.found.name(pair.class1), f"{100 * pair.use1:.0f}%"),
            *(run.found.name(pair.class2), f"{100 * pair.use2:.0f}%"),
        ]
        for pair in run.found.pairs
    ]


def test_unknown_agreement_is_a_dash(run: Run, tmp_path: Path) -> None:
    unknown = replace(run.found, agreement=dict.fromkeys(run.found.agreement, float("nan")))
    page = run.report(tmp_path / "report.html", found=unknown)
    assert {row[-1] for row in table(page, "channels")[1:]} == {"\N{EN DASH}"}
    assert "agreement with" not in read(page).all("ul", "facts")[0].text


def test_predicted_classes_are_called_so(run: Run, page: str, tmp_path: Path) -> None:
    manifest = replace(run.val.scan.manifest, labels="predicted")
    val = replace(run.val, scan=replace(run.val.scan, manifest=manifest))
    predicted = replace(run, val=val).report(tmp_path / "report.html")
    words = "with predicted class and summed pre-activation"
    assert words in read(predicted).text
    assert words not in read(page).text
    assert "as their predicted classes would" in read(predicted).text
