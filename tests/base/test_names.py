"""Names of files that any file system takes, and that say which image they are of."""

import unicodedata

import pytest

from unbraid.base.names import file_names

DECOMPOSED = unicodedata.normalize("NFD", "ä")


@pytest.mark.parametrize(
    ("names", "made"),
    [
        (["a/b.jpg", "c/b.png", "B.png"], ["b", "b~2", "B~3"]),
        (["two/ä.JPEG", "two/ü.JPEG", "画.png", "कि.png"], ["ä", "ü", "画", "कि"]),
        (["..", "", "\n", "\udcff\u202e"], ["image", "image~2", "image~3", "image~4"]),
        (["a\\b c.tar.gz", 'a:b*?"c', "_x.png"], ["b c.tar", "a_b_c", "_x"]),
        (["a.png", "b/a.png", "a~2.png"], ["a", "a~2", "a~2~2"]),
        (["ä.png", f"{DECOMPOSED}.png", "Ä.png"], ["ä", "ä~2", "Ä~3"]),
        (["con.png", "Lpt1.x.png", "cone.png"], ["_con", "_Lpt1.x", "cone"]),
        (["-n.png", ".hidden", "end. .png"], ["n", "hidden", "end"]),
    ],
)
def test_file_names_are_as_given_safe_and_apart(names, made):
    assert file_names(names) == made


@pytest.mark.parametrize("letter", ["x", "ä", "画", "🦈"])
def test_file_names_fit_a_file_system_while_they_are_written(letter, tmp_path):
    for name in file_names([letter * 300] * 3):
        # As `write_whole` calls it before it is whole, on a host with a long name.
        temporary = f"{name}.json.{'h' * 32}.1234567.00000000.tmp"
        assert len(temporary.encode()) <= 255
        (tmp_path / temporary).write_bytes(b"")
        assert name.startswith(letter * 40)
