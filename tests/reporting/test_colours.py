"""The colours of concepts: told apart by colour-blind people too, and legible on the page."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

import unbraid
from unbraid.reporting.matplotlib_style import COLOURS

STYLE = (Path(unbraid.__file__).parent / "reporting" / "style.css").read_text()
LIGHT, DARK = zip(*[iter(re.findall(r"--c\d: (#\w{6})", STYLE))] * 8, strict=True)
APART = 10.0  # CIELAB; about 2 is a just noticeable difference

# Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, table 1, severity 1: a kind of
# cone is missing. On linear RGB.
SIGHTS = {
    "all cones": "1 0 0  0 1 0  0 0 1",
    "protanopia": "0.152286 1.052583 -0.204868  0.114503 0.786281 0.099216"
    "  -0.003882 -0.048116 1.051998",
    "deuteranopia": "0.367322 0.860646 -0.227968  0.280085 0.672501 0.047413"
    "  -0.011820 0.042940 0.968881",
    "tritanopia": "1.255528 -0.076749 -0.178779  -0.078411 0.930809 0.147602"
    "  0.004733 0.691367 0.303900",
}
# IEC 61966-2-1: sRGB to XYZ, with the white of D65.
XYZ = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
WHITE = (0.9505, 1.0, 1.089)


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(colour: str, sight: str) -> tuple[float, float, float]:
    """CIELAB of a colour as somebody with these cones sees it."""
    cones = np.array(SIGHTS[sight].split(), dtype=float).reshape(3, 3)
    t = XYZ @ (cones @ linear(colour)).clip(0, 1) / WHITE
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def least_distance(colours: list[str], sight: str) -> float:
    places = [lab(colour, sight) for colour in colours]
    return min(math.dist(one, other) for one, other in itertools.combinations(places, 2))


FORMER = ["#0072b2", "#bd4f00", "#00845f", "#b0508e", "#8a6f00", "#33475b", "#7b5a45", "#5b5fc7"]


@pytest.mark.parametrize(("colours", "fine"), [(LIGHT, True), (DARK, True), (FORMER, False)])
def test_every_two_colours_are_told_apart_by_colour_blind_people(colours, fine):
    assert least_distance(colours, "all cones") > APART
    assert all(least_distance(colours, sight) >= APART for sight in SIGHTS) == fine


def test_colours_of_figures_are_those_of_the_page():
    assert COLOURS == LIGHT
