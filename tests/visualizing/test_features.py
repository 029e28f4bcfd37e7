"""Feature visualisations on disk: they come back, and what is damaged is told."""

import numpy as np
import pytest
from PIL import Image

from unbraid.base import schema
from unbraid.base.errors import RunError
from unbraid.visualizing import features
from unbraid.visualizing.features import Feature, Features


def some_features():
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (4, 7, 6, 4), dtype=np.uint8)
    keys = [(3, None, 0), (3, 0, 0), (3, 0, 1), (12, 1, 0)]
    made = [
        Feature(*key, Image.fromarray(picture), (n + 0.5, 0.75, -0.25))
        for n, (key, picture) in enumerate(zip(keys, pictures, strict=True))
    ]
    return Features("layer", "abc", tuple(made), {"steps": 3}, left_out=2)


def test_features_come_back_from_disk_and_are_found_by_channel_and_concept(tmp_path):
    made = some_features()
    made.save(tmp_path / "features")
    files = {path.name for path in (tmp_path / "features").iterdir()}
    assert files == {"3.png", "3.0.png", "3.0_1.png", "12.1.png", "features.json"}
    back = Features.load(tmp_path / "features")
    assert back.channels == (3, 12)
    for a, b in zip(made.features, back.features, strict=True):
        assert {**vars(a), "picture": None} == {**vars(b), "picture": None}
        assert (a.picture.mode, a.picture.tobytes()) == ("RGBA", b.picture.tobytes())
    assert {**vars(back), "features": ()} == {**vars(made), "features": ()}
    assert made.image(3) is made.features[0].picture
    assert made.image(3, 0) is made.features[1].picture
    assert [f.place for f in made.of(3, 0)] == [0, 1]
    assert made.of(3, 1) == ()
    with pytest.raises(KeyError, match="channel 3, concept 1"):
        made.image(3, 1)


def rewritten(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(old, new):
    return rewritten("features.json", lambda content: content.replace(old, new, 1))


def test_load_of_damaged_features_is_refused(tmp_path):
    for damage in (
        lambda folder: (folder / "features.json").unlink(),
        rewritten("features.json", lambda content: content[:100]),
        replaced(b'"schema": 1', b'"schema": 7'),
        lambda folder: (folder / "3.0.png").unlink(),
        rewritten("3.png", lambda content: content[:60]),
        lambda folder: Image.new("L", (5000, 1)).save(folder / "3.png"),
        replaced(b'"concept": null', b'"concept": 0'),  # which stands there already
        replaced(b'"channel": 3', b'"channel": "../3"'),
        replaced(b'"channel": 3', b'"channel": -1'),
        replaced(b"0.75", b'"x"'),
    ):
        some_features().save(tmp_path)
        damage(tmp_path)
        with pytest.raises(RunError, match="make them again"):
            Features.load(tmp_path)


def test_load_of_more_than_memory_should_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    some_features().save(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42)
    Features.load(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42 - 1)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(RunError, match="have 168 pixels"):
        Features.load(tmp_path)
    monkeypatch.setattr(schema, "MAX_BYTES", 100)
    with pytest.raises(RunError, match="too large"):
        Features.load(tmp_path)
