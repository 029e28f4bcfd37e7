"""The colours of concepts: told apart by colour-blind people too, and legible on the page."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

import unbraid
from unbraid.reporting.paper import COLOURS

STYLE = (Path(unbraid.__file__).parent / "reporting" / "style.css").read_text()
APART = 10.0  # CIELAB; about 2 is a just noticeable difference

Three = tuple[float, float, float]

# Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, table 1, severity 1: a kind of
# cone is missing. On linear RGB.
SIGHTS: dict[str, tuple[Three, Three, Three]] = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# IEC 61966-2-1: sRGB to XYZ, with the white of D65.
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)


def linear(colour: str) -> list[float]:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def lab(colour: str, sight: str) -> Three:
    """CIELAB of a colour as somebody with these cones sees it."""
    seen = [
        min(max(math.fsum(m * c for m, c in zip(row, linear(colour), strict=True)), 0.0), 1.0)
        for row in SIGHTS[sight]
    ]
    xyz = [math.fsum(m * c for m, c in zip(row, seen, strict=True)) for row in XYZ]
    ratios = [value / white for value, white in zip(xyz, WHITE, strict=True)]
    x, y, z = (
        t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in ratios
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def least_distance(colours: list[str], sight: str) -> float:
    places = [lab(colour, sight) for colour in colours]
    return min(math.dist(one, other) for one, other in itertools.combinations(places, 2))


def assert_told_apart(colours: list[str]) -> None:
    """Every two of the colours differ, whichever kind of cone is missing."""
    for sight in SIGHTS:
        assert least_distance(colours, sight) >= APART, sight


def of_the_page() -> tuple[list[str], list[str]]:
    """The page's concept colours, in light and in dark."""
    found = re.findall(r"--c\d: (#\w{6})", STYLE)
    assert len(found) == 16
    return found[:8], found[8:]


def test_figures_have_the_pages_colours_on_white() -> None:
    assert list(COLOURS) == of_the_page()[0]


@pytest.mark.parametrize("dark", [False, True])
def test_every_two_colours_are_told_apart_by_colour_blind_people(dark: bool) -> None:
    assert_told_apart(of_the_page()[dark])


@pytest.mark.parametrize(
    "colours",
    [
        "#0072b2 #bd4f00 #00845f #b0508e #8a6f00 #33475b #7b5a45 #5b5fc7",  # brown beside orange
        "#56b4e9 #ff9350 #34c79c #e38fc6 #dcb93c #a5d8f7 #c9a78f #a9acf5",  # two pale blues
    ],
)
def test_the_checker_notices_colours_that_only_some_tell_apart(colours: str) -> None:
    assert least_distance(colours.split(), "all cones") > APART
    with pytest.raises(AssertionError):
        assert_told_apart(colours.split())


def test_distances_are_those_that_are_known() -> None:
    """White and black are 100 apart for everyone; pure red is where tables have it."""
    for sight in SIGHTS:
        assert least_distance(["#ffffff", "#000000"], sight) == pytest.approx(100, abs=0.1)
    assert lab("#ff0000", "all cones") == pytest.approx((53.2, 80.1, 67.2), abs=0.1)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_cards_and_their_letters_from_them(dark: bool) -> None:
    grounds = [re.findall(rf"--{name}: (#\w{{6}})", STYLE)[dark] for name in ("back", "card", "on")]
    for colour, ground in itertools.product(of_the_page()[dark], grounds):
        assert contrast(colour, ground) >= 4.5, (colour, ground)


def contrast(one: str, other: str) -> float:
    """As WCAG defines it."""
    low, high = sorted(
        math.fsum(m * c for m, c in zip(XYZ[1], linear(colour), strict=True))
        for colour in (one, other)
    )
    return (high + 0.05) / (low + 0.05)
