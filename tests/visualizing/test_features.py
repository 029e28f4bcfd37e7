"""Feature visualisations on disk: they come back, and what is damaged is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unbraid.base import schema
from unbraid.base.errors import RunError
from unbraid.visualizing import features
from unbraid.visualizing.features import Feature, Features


def some_features() -> Features:
    random = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (7, 6, 4), dtype=np.uint8))

    made = (
        Feature(3, None, 0, picture(), (1.5, 0.5, 1.0)),
        Feature(3, 0, 0, picture(), (0.5, 0.75, -0.25)),
        Feature(3, 0, 1, picture(), (0.25, 0.5, -0.25)),
        Feature(12, 1, 0, picture(), (2.0, 0.0, 2.0)),
    )
    return Features("layer", "abc", made, {"steps": 3}, left_out=2)


def test_features_come_back_from_disk(tmp_path):
    made = some_features()
    made.save(tmp_path / "features")
    files = {path.name for path in (tmp_path / "features").iterdir()}
    assert files == {"3.png", "3.0.png", "3.0_1.png", "12.1.png", "features.json"}
    back = Features.load(tmp_path / "features")
    kept = ("layer", "weights", "settings", "left_out")
    assert [getattr(back, name) for name in kept] == ["layer", "abc", {"steps": 3}, 2]
    assert back.channels == (3, 12)
    for a, b in zip(made.features, back.features, strict=True):
        assert (a.channel, a.concept, a.place) == (b.channel, b.concept, b.place)
        assert a.responses == b.responses
        assert (a.picture.mode, a.picture.tobytes()) == ("RGBA", b.picture.tobytes())


def test_pictures_are_found_by_channel_and_concept():
    made = some_features()
    assert made.image(3) is made.features[0].picture
    assert made.image(3, 0) is made.features[1].picture
    assert [f.place for f in made.of(3, 0)] == [0, 1]
    assert made.of(3, 1) == ()
    with pytest.raises(KeyError, match="channel 3, concept 1"):
        made.image(3, 1)
    with pytest.raises(KeyError, match="channel 12"):
        made.image(12)


def first_entry(**changed: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        index = folder / "features.json"
        about = json.loads(index.read_text())
        about["features"][0] |= changed
        index.write_text(json.dumps(about))

    return damage


def twice(folder: Path) -> None:
    index = folder / "features.json"
    about = json.loads(index.read_text())
    index.write_text(json.dumps({**about, "features": 2 * about["features"]}))


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no index": lambda folder: (folder / "features.json").unlink(),
    "half an index": rewritten("features.json", lambda content: content[:100]),
    "no object": rewritten("features.json", lambda _: b"[1]"),
    "another schema": rewritten(
        "features.json", lambda c: c.replace(b'"schema": 1', b'"schema": 7')
    ),
    "no picture": lambda folder: (folder / "3.0.png").unlink(),
    "half a picture": rewritten("3.png", lambda content: content[:60]),
    "another format": lambda folder: Image.new("RGB", (3, 3)).save(folder / "3.png", "JPEG"),
    "huge": lambda folder: Image.new("L", (5000, 1)).save(folder / "3.png"),
    "twice": twice,
    "a way out": first_entry(channel="../3"),
    "negative": first_entry(channel=-1),
    "true": first_entry(channel=True),
    "half a concept": first_entry(concept=0.5),
    "no place": first_entry(place=None),
    "no list": first_entry(responses=1.0),
    "text": first_entry(responses=["x"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_load_of_damaged_features_is_refused(tmp_path, damage):
    some_features().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match="make them anew"):
        Features.load(tmp_path)


def test_more_pixels_than_memory_should_hold_are_told_before_any_is_read(tmp_path, monkeypatch):
    some_features().save(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42)
    Features.load(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42 - 1)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(RunError, match="have 168 pixels"):
        Features.load(tmp_path)


def test_an_index_of_any_size_is_not_read(tmp_path, monkeypatch):
    some_features().save(tmp_path)
    monkeypatch.setattr(schema, "MAX_BYTES", 100)
    with pytest.raises(RunError, match="too large"):
        Features.load(tmp_path)
