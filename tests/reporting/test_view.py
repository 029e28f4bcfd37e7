"""The report on concepts that are clusters of images: its words and figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unbraid
from handmade import plant
from pages import assert_harmless, read, sections
from unbraid import Findings
from unbraid.reporting.words import ABSENT, number


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a report on clusters is made from."""
    home = tmp_path_factory.mktemp("clusters")
    train, val = (plant(home / name, seed=seed).scan for name, seed in (("train", 0), ("val", 7)))
    found = unbraid.find(train, concepts="clusters")
    split = unbraid.split(train, found)
    evaluation = unbraid.evaluate(split, val)
    return {"scan": val, "train_scan": train} | {
        "found": found,
        "split": split,
        "evaluation": evaluation,
    }


def write(material: dict[str, Any], folder: Path, **changed: Any) -> str:
    text = unbraid.report(folder / "report.html", **(material | changed)).read_text()
    assert_harmless(text)
    return text


def assert_agreement(page: str, found: Findings) -> None:
    """Agreement with classes stands in the list of channels, and its mean at the top."""
    (table,) = read(page).all("table", "overview")
    assert table.all("th")[5].text == "Agreement with classes, ideal 1"
    rows = zip(table.rows("th"), table.rows(), strict=True)
    assert {int(name): row[-1] for (name,), row in rows} == {
        channel: number(value) for channel, value in found.agreement.items()
    }
    mean = sum(found.agreement.values()) / len(found.agreement)
    said = f"; agreement with classes {number(mean)}" in read(page).all("ul", "facts")[0].text
    assert said == (not math.isnan(mean))


def test_report_speaks_of_clusters(material: dict[str, Any], tmp_path: Path) -> None:
    page, found = write(material, tmp_path), material["found"]
    assert set(sections(page)) == {0, 1}
    for words in (f"{len(found)} pairs of clusters", "labels play no part"):
        assert words in read(page).text
    for words in ("airs of classes", "other classes", "Interval", "Halves", "its class"):
        assert words not in read(page).text
    settings = read(page).all("dl", "settings")[0]
    names, values = ([e.text for e in settings.all(tag)] for tag in ("dt", "dd"))
    assert {"tau", "p"}.isdisjoint(names)
    assert {("concepts", "clusters"), ("gamma", "0.5")} <= set(zip(names, values, strict=True))
    (table,) = read(page).all("table", "pairs")
    assert [e.text for e in table.all("th")] == [
        *("Channel", "Cosine", "Cluster", "Top images", "Cluster", "Top images")
    ]
    assert table.rows() == [
        [
            *(str(pair.channel), number(pair.cosine)),
            *(found.name(pair.class1), f"{100 * pair.use1:.0f}%"),
            *(found.name(pair.class2), f"{100 * pair.use2:.0f}%"),
        ]
        for pair in found.pairs
    ]
    assert_agreement(page, found)
    for wrong in ({0: 0.5}, {**found.agreement, 1: 0.5}, {**found.agreement, 2: 1.0}):
        with pytest.raises(AssertionError):
            assert_agreement(page, replace(found, agreement=wrong))
    unknown = replace(found, agreement=dict.fromkeys(found.agreement, math.nan))
    page = write(material, tmp_path, found=unknown)
    assert_agreement(page, unknown)
    assert ABSENT in read(page).all("table", "overview")[0].text


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_report_calls_predicted_classes_so(
    material: dict[str, Any], tmp_path: Path, labels: str
) -> None:
    scan = material["scan"]
    changed = replace(scan, manifest=replace(scan.manifest, labels=labels))
    page = read(write(material, tmp_path, scan=changed)).text
    for words in ("with predicted class and", "as their predicted classes would"):
        assert (words in page) == (labels == "predicted")
