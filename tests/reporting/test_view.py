"""The report on concepts that are clusters of images: its words and figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unbraid
from handmade import plant
from pages import Element, assert_harmless, read
from unbraid.reporting.words import number


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a report on clusters is made from."""
    home = tmp_path_factory.mktemp("clusters")
    train, val = (plant(home / name, seed=seed).scan for name, seed in (("train", 0), ("val", 7)))
    found = unbraid.find(train, concepts="clusters")
    split = unbraid.split(train, found)
    evaluation = unbraid.evaluate(split, val)
    names = ("scan", "train_scan", "found", "split", "evaluation")
    return dict(zip(names, (val, train, found, split, evaluation), strict=True))


def write(material: dict[str, Any], folder: Path, **changed: Any) -> Element:
    text = unbraid.report(folder / "report.html", **(material | changed)).read_text()
    assert_harmless(text)
    return read(text)


def agreement_in(page: Element) -> tuple[dict[int, str], str]:
    """Agreement with classes in the list of channels, and what is said of it at the top."""
    (table,) = page.all("table", "overview")
    assert table.all("th")[5].text == "Agreement with classes, ideal 1"
    rows = zip(table.rows("th"), table.rows(), strict=True)
    told = page.all("ul", "facts")[0].text.partition("agreement with classes ")[2]
    return {int(name): row[-1] for (name,), row in rows}, told[:5]


def test_report_speaks_of_clusters(material: dict[str, Any], tmp_path: Path) -> None:
    page, found = write(material, tmp_path), material["found"]
    for words in (f"{len(found)} pairs of clusters", "labels play no part"):
        assert words in page.text
    for words in ("airs of classes", "other classes", "Interval", "Halves", "its class"):
        assert words not in page.text
    settings = page.all("dl", "settings")[0]
    names, values = ([e.text for e in settings.all(tag)] for tag in ("dt", "dd"))
    assert {"tau", "p"}.isdisjoint(names)
    assert {("concepts", "clusters"), ("gamma", "0.5")} <= set(zip(names, values, strict=True))
    (table,) = page.all("table", "pairs")
    heads = [head.text for head in table.all("th")]
    assert heads == ["Channel", "Cosine", *["Cluster", "Top images"] * 2]
    assert table.rows() == [
        [
            *(str(pair.channel), number(pair.cosine)),
            *(found.name(pair.class1), f"{100 * pair.use1:.0f}%"),
            *(found.name(pair.class2), f"{100 * pair.use2:.0f}%"),
        ]
        for pair in found.pairs
    ]


@pytest.mark.parametrize("agreement", [{}, {1: 0.25}, {0: math.nan, 1: math.nan}])
def test_report_shows_agreement_with_classes(
    material: dict[str, Any], tmp_path: Path, agreement: dict[int, float]
) -> None:
    found = replace(material["found"], agreement=material["found"].agreement | agreement)
    known = list(found.agreement.values())
    mean = "" if math.nan in agreement.values() else number(sum(known) / len(known))
    cells = {channel: number(value) for channel, value in found.agreement.items()}
    assert agreement_in(write(material, tmp_path, found=found)) == (cells, mean)


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_report_calls_predicted_classes_so(
    material: dict[str, Any], tmp_path: Path, labels: str
) -> None:
    scan = material["scan"]
    changed = replace(scan, manifest=replace(scan.manifest, labels=labels))
    page = write(material, tmp_path, scan=changed).text
    for words in ("with predicted class and", "as their predicted classes would"):
        assert (words in page) == (labels == "predicted")
