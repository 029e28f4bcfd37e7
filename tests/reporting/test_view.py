"""The report on concepts that are clusters of images: its words and figures."""

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
def material(tmp_path_factory) -> dict[str, Any]:
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


def test_report_speaks_of_clusters(material, tmp_path):
    page, found = write(material, tmp_path), material["found"]
    assert f"{len(found)} pairs of clusters" in page.text
    for words in ("airs of classes", "other classes", "Interval", "Halves", "its class"):
        assert words not in page.text
    settings = page.all("dl", "settings")[0]
    assert {e.text for e in settings.all("dt")}.isdisjoint({"tau", "p"})
    assert page.all("table", "pairs")[0].rows() == [
        [
            *(str(pair.channel), number(pair.cosine)),
            *(found.name(pair.class1), f"{100 * pair.use1:.0f}%"),
            *(found.name(pair.class2), f"{100 * pair.use2:.0f}%"),
        ]
        for pair in found.pairs
    ]


@pytest.mark.parametrize("agreement", [{}, {0: math.nan, 1: math.nan}])
def test_report_shows_agreement_with_classes(material, tmp_path, agreement):
    found = replace(material["found"], agreement=material["found"].agreement | agreement)
    known = list(found.agreement.values())
    page = write(material, tmp_path, found=found)
    (table,) = page.all("table", "overview")
    channels = [int(name) for (name,) in table.rows("th")]
    assert sorted(channels) == sorted(found.agreement)
    assert [row[-1] for row in table.rows()] == [number(found.agreement[o]) for o in channels]
    mean = f"agreement with classes {number(sum(known) / len(known))}"
    assert (mean in page.all("ul", "facts")[0].text) != bool(agreement)


def test_report_calls_predicted_classes_so(material, tmp_path):
    manifest = material["scan"].manifest
    for labels in ("given", "predicted"):
        scan = replace(material["scan"], manifest=replace(manifest, labels=labels))
        page = write(material, tmp_path, scan=scan)
        assert ("with predicted class and" in page.text) == (labels == "predicted")
