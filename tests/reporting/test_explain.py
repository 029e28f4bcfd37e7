"""Explanations as pictures, HTML and files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import unbraid
from public_calls import call
from unbraid.reporting.explain import draw_image, light_up


@pytest.fixture(scope="module")
def explained(calls):
    return call(calls["explain"], n=3)


def test_light_up_lights_places_above_zero_as_their_values_and_darkens_the_others():
    grey = Image.new("RGB", (40, 40), (100, 100, 100))
    values = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    lit = np.asarray(light_up(grey, values)).astype(int)
    corners = [lit[1, 1], lit[1, -2], lit[-2, 1], lit[-2, -2]]
    assert [corner.tolist() for corner in corners[1:3]] == [[55, 55, 55]] * 2
    assert corners[0][0] > corners[3][0] > 55
    assert corners[0][0] - corners[0][2] > corners[3][0] - corners[3][2] > 0  # orange
    half = np.asarray(light_up(grey, values, 2.0)).astype(int)
    assert half[1, 1].tolist() == lit[-2, -2].tolist()
    assert set(np.asarray(light_up(grey, -values.abs())).ravel().tolist()) == {55}


def test_the_picture_shows_a_row_for_each_concept_channel_and_lights_its_map(explained):
    own, picture = explained[0], explained.pictures[0]
    sheet = draw_image(own, picture)
    one = draw_image(replace(own, n=1), picture)
    assert sheet.width == one.width
    assert 1.5 < (sheet.height - one.height) / (one.height - 98) < 2.1
    concept, _ = own.strongest[0]
    dark = replace(concept, map=-torch.ones(2, 2))
    channels = tuple(
        replace(c, concepts=tuple(dark if part is concept else part for part in c.concepts))
        for c in own.channels
    )
    assert draw_image(replace(own, channels=channels), picture).tobytes() != sheet.tobytes()
    unknown = tuple(
        replace(c, concepts=tuple(replace(p, map=None, heatmap=None) for p in c.concepts))
        for c in own.channels
    )
    assert draw_image(replace(own, channels=unknown), picture).width < sheet.width


def test_a_notebook_and_files_show_hostile_names_as_text(explained, tmp_path):
    named = replace(explained[0], image="../<script>\udcff\u202e")
    shown = unbraid.Explanation((named,), explained.pictures[:1])
    html = shown._repr_html_()
    assert "<script" not in html
    assert "../&lt;script&gt;\\udcff" in html
    assert html.count("data:image/png;base64,") == 1
    assert len(shown) == 1
    files = shown.save(tmp_path)
    assert [file.parent for file in files] == [tmp_path] * 2
    assert [file.name for file in files] == ["script.png", "script.json"]
    assert files[1].read_bytes().isascii()
