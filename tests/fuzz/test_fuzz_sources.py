"""Lists, shards and saved data sets are sound, and can be read, or are refused in one sentence."""

import io
import tarfile
from functools import partial

import numpy as np
import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from PIL import Image
from sources import write_tar

from fuzz.mutations import HOSTILE, damaged
from fuzz.test_fuzz import EXAMPLES, Escaped, fresh, fuzz, many_of, needs_proc, sound_or_refused
from unbraid.images import lists
from unbraid.images import tar as shards
from unbraid.images.identity import fingerprint, ids_of
from unbraid.images.open import open_images

datasets = pytest.importorskip("datasets", reason="needs .[datasets]")
pyarrow = pytest.importorskip("pyarrow", reason="needs .[datasets]")
parquet = pytest.importorskip("pyarrow.parquet")
LIST = "path,label,group\n0.png,ant,a\n1.png,bee,a\n2.png,ant,b\n"
CELLS = ("0.png", "1.png", "../0.png", "ant", "0", "-1", "path")
CELLS += ('"', ",", ";", "\n", "\r", "\ufeff")
WORDS = st.sampled_from((*CELLS, *map(str, HOSTILE)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 255, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    (folder / "list.csv").write_text(LIST)
    columns = {"path": [f"{k}.png" for k in range(3)], "label": ["ant", "bee", "ant"]}
    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    pictures = [{"bytes": (folder / f"{k}.png").read_bytes(), "path": None} for k in range(3)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": columns["label"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    members = []
    for k, name in enumerate(("é0", "é1", 20 * "folder/" + "é2")):
        told = b'{"label": "ant"}' if k else b'{"label": 1}'
        members += [(f"{name}.png", pictures[k]["bytes"]), (f"{name}.json", told)]
    write_tar(folder / "gnu.tar", *members)
    write_tar(folder / "pax.tar", *members, kind=tarfile.PAX_FORMAT)
    return folder


def read_all(source):
    images = open_images(source)
    assert len(fingerprint(images, images.targets)) == 64
    assert len(set(ids_of(images) or ())) == len(images) > 0
    for k in range(len(images)):
        sound_or_refused(partial(read_one, images, k))


def read_one(images, k):
    picture, label = images[k]
    assert (picture.mode, images.targets[k]) == ("RGB", label)


def use_list(data, sound, folder):
    words = st.lists(WORDS, max_size=8).map(",".join)
    longer = words.map(lambda line: (LIST + line).encode("utf-8", "surrogatepass"))
    content = data.draw(st.one_of(damaged(LIST.encode()), longer))
    (sound / "other.csv").write_bytes(content)
    sound_or_refused(lambda: read_all(sound / "other.csv"))


@st.composite
def odd_parquet(draw):
    """Parquet that is whole, with a column or two of any type and any numbers."""
    names = ["0.png", "1.png", "2.png"]
    columns = {"path": pyarrow.array(names), "label": pyarrow.array(["ant", "bee", "ant"])}
    wide = [pyarrow.date64(), pyarrow.float64(), pyarrow.uint64(), pyarrow.time64("us")]
    wide += [make(unit) for make in (pyarrow.timestamp, pyarrow.duration) for unit in ("ms", "us")]
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.sampled_from((0, 1, 2**31, 2**62, 2**63 - 1, -1, -(2**63))))
        array = pyarrow.array([number] * 3, pyarrow.int64())
        kind = draw(st.sampled_from(("wide", "wide", "text", "list", "struct", "null", "bytes")))
        if kind == "wide":
            array = array.view(draw(st.sampled_from(wide)))
        elif kind == "text":
            array = pyarrow.array(draw(st.lists(st.sampled_from(CELLS), min_size=3, max_size=3)))
            array = array.dictionary_encode() if draw(st.booleans()) else array
        elif kind in ("list", "struct"):
            array = pyarrow.array([[number] if kind == "list" else {"path": number}] * 3)
        elif kind == "null":
            array = pyarrow.nulls(3)
        else:
            array = pyarrow.array([bytes([k, 255 - k]) for k in range(3)])
            array = array.view(pyarrow.string()) if draw(st.booleans()) else array
        columns[draw(st.sampled_from(("path", "label", "label", "group")))] = array
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def use_parquet(data, sound, folder):
    content = (sound / "list.parquet").read_bytes()
    content = data.draw(st.one_of(damaged(content), odd_parquet()))
    (sound / "other.parquet").write_bytes(content)
    sound_or_refused(lambda: read_all(sound / "other.parquet"))


def use_saved(data, sound, folder):
    own = fresh(sound / "other", sound / "saved")
    path = own / data.draw(st.sampled_from(sorted(path.name for path in own.iterdir())))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    sound_or_refused(lambda: read_all(f"hf:{own}"))


def use_tar(data, sound, folder):
    content = (sound / data.draw(st.sampled_from(("gnu.tar", "pax.tar")))).read_bytes()
    changed = bytearray(data.draw(st.one_of(damaged(content), st.just(content))))
    for start in data.draw(st.lists(st.integers(0, len(content) // 512 - 1), max_size=2)):
        block = bytearray(data.draw(damaged(content[start * 512 : start * 512 + 512]))[:512])
        block += bytes(512 - len(block))
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))  # a lie that fits
        changed[start * 512 : start * 512 + 512] = block
    (sound / "other.tar").write_bytes(changed)
    sound_or_refused(lambda: read_all(sound / "other.tar"))


READERS = {"list": use_list, "parquet": use_parquet, "saved": use_saved, "tar": use_tar}
pytestmark = [needs_proc, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("n", [2 * EXAMPLES, many_of(len(READERS))])
@pytest.mark.parametrize("reader", READERS)
def test_a_source_is_sound_or_refused(reader, n, sound, tmp_path):
    fuzz(READERS[reader], sound, tmp_path, n)


def test_sources_that_are_sound_are_read(sound):
    for name in ("list.csv", "list.parquet", "gnu.tar", "pax.tar", "saved"):
        source = f"hf:{sound / name}" if name == "saved" else sound / name
        images = open_images(source)
        assert len(images) == 3
        read_all(source)
        assert images[0][0].size == (5, 6)


class Nothing(Exception):
    """Stands for an error that is no longer caught."""


@pytest.mark.parametrize(
    ("module", "name", "instead", "reader"),
    [
        *((lists, "Exception", Nothing, reader) for reader in ("list", "parquet", "saved")),
        (shards, "decode_picture", lambda file, _: Image.open(file).convert("RGB"), "tar"),
    ],
)
def test_a_check_of_sources_left_out_is_noticed(
    module, name, instead, reader, sound, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, name, instead, raising=False)
    with pytest.raises(Escaped):
        fuzz(READERS[reader], sound, tmp_path, 2000, (Phase.generate,))
