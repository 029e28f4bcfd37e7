"""One small data set, written as every kind of source, with the ids that each gives."""

import io
import json
import os
import struct
import subprocess
import tarfile
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

import unbraid
from tiny_networks import build

MEMBERS = {"ant": 5, "bee": 3}  # images by class


def to_tensor(picture):
    """What the networks of these tests take: (3, 7, 6), float64."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).double() / 255


def scanned(images, out, **options):
    return unbraid.scan(build("3x3"), "layer", images, out, batch_size=3, **options)


def write(root, members):
    """Class folders of noise, whose first pixel tells the class and the image."""
    for place, (name, n) in enumerate(members.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            pixels = np.random.default_rng(10 * place + k).integers(0, 256, (7, 6, 3))
            pixels[0, 0] = place, k, 0
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")
    return root


def rows(members):
    """Path, class and the class's place of every image, in order."""
    classes = enumerate(members.items())
    return [(f"{name}/{k}.png", name, place) for place, (name, n) in classes for k in range(n)]


PATHS = [path for path, *_ in rows(MEMBERS)]


def fraction(name):
    """As anyone would compute it: the first 16 hexadecimal digits of `printf NAME | sha256sum`."""
    said = subprocess.run(["sha256sum"], input=name.encode(), capture_output=True, check=True)
    return int(said.stdout[:16], 16) / 16**16


def keys(*sizes):
    """Ids of images in shards of so many."""
    shards = [k for k, size in enumerate(sizes) for _ in range(size)]
    return [f"train-{k:03d}.tar/{path[:-4]}" for k, path in zip(shards, PATHS, strict=True)]


def as_csv(root, members):
    lines = ["path,label", *(f"{path},{name}" for path, name, _ in rows(members))]
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


def as_odd_csv(root, members):
    """With a byte order mark, semicolons, other columns, quotes, blank lines; absolute paths."""
    text = 'note;label; path;group\r\n"a;b";' + "\r\n\r\nx;".join(
        f'"{name}";{root / path if place else "./" + path};g' for path, name, place in rows(members)
    )
    (root / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return root / "odd.csv"


def as_parquet(root, members):
    pyarrow = pytest.importorskip("pyarrow", reason="needs .[parquet]")
    parquet = pytest.importorskip("pyarrow.parquet")
    labels = [float(name) if name.isdecimal() else name for _, name, _ in rows(members)]
    coded = pyarrow.array(labels).dictionary_encode()
    table = {"path": [path for path, *_ in rows(members)], "label": coded}
    parquet.write_table(pyarrow.table(table), root / "list.parquet")
    return root / "list.parquet"


def write_tar(path, *files, kind=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # for which PAX has a header of its own
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(root, members, *sizes):
    """WebDataset shards, by the convention's own words rather than by a library."""
    left, shards = iter(rows(members)), root.parent / "shards"
    shards.mkdir(exist_ok=True)
    for k, size in enumerate(sizes or (sum(members.values()),)):
        files = []
        for path, name, _ in islice(left, size):
            told = "cls", f"{name}\n"
            if not name.isdecimal():
                told = "json", json.dumps({"label": name, "more": [1]})
            parts = {"PNG": (root / path).read_bytes(), told[0]: told[1].encode(), "mask.png": b"-"}
            files += [(f"{path[:-4]}.{ending}", part) for ending, part in parts.items()]
        write_tar(shards / f"train-{k:03d}.tar", *files)
    return shards


def as_tar(root, members):
    return write_shards(root, members) / "train-000.tar"


def as_rows(root, members, **columns):
    """With class labels, whose numbers are of their own order."""
    datasets = pytest.importorskip("datasets", reason="needs .[datasets]")
    order = sorted(members, reverse=True)
    content = {
        "image": [{"bytes": (root / p).read_bytes(), "path": p} for p, *_ in rows(members)],
        "label": [order.index(name) for _, name, _ in rows(members)],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=order)}
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def as_saved(root, members):
    as_rows(root, members).save_to_disk(root.parent / "saved")
    return f"hf:{root.parent / 'saved'}"


# Saving to disk keeps the names of files but not of their folders, so that some are equal.
SOURCES = {
    "folders": (lambda root, _: root, PATHS),
    "csv": (as_csv, PATHS),
    "odd csv": (as_odd_csv, PATHS),
    "parquet": (as_parquet, PATHS),
    "tar": (as_tar, keys(8)),
    "folder of tars": (lambda root, m: write_shards(root, m, 3, 1, 4), keys(3, 1, 4)),
    "rows": (as_rows, PATHS),
    "saved": (as_saved, None),
}


def opened(kind, root, members=MEMBERS, **options):
    source = SOURCES[kind][0](root, members)
    open_it = unbraid.from_hugging_face if kind == "rows" else unbraid.open_images
    return open_it(source, **{"transform": to_tensor, **options})


def png(values, colours, bits=16, size=None):
    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    rows = np.asarray(values).astype(">u2")
    width, height = size or (rows.shape[1], rows.shape[0])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def fail_at(monkeypatch, ending, number):
    look = os.stat

    def stat(path, *rest, **options):
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return look(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
