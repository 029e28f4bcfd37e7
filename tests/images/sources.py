"""One small data set, written as every kind of source, with the ids that each gives."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import unbraid

Members = dict[str, int]  # images by class
MEMBERS: Members = {"ant": 5, "bee": 3}


def to_tensor(picture: Image.Image) -> Tensor:
    """What the networks of these tests take: (3, 7, 6), float64."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).double() / 255


def write(root: Path, members: Members) -> Path:
    """Class folders of noise, whose first pixel tells the class and the image."""
    for place, (name, n) in enumerate(members.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            pixels = np.random.default_rng(10 * place + k).integers(0, 256, (7, 6, 3))
            pixels[0, 0] = place, k, 0
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")
    return root


def rows(members: Members) -> list[tuple[str, str, int]]:
    """Path, class and the class's place of every image, in order."""
    return [
        (f"{name}/{k}.png", name, place)
        for place, (name, n) in enumerate(members.items())
        for k in range(n)
    ]


# --- sources: each writes itself beside the class folders, and says what it is --------------------


def as_csv(root: Path, members: Members, text: Callable[[str], str] = str) -> Path:
    with (root / "list.csv").open("w", newline="") as file:
        cells = [(path, text(name)) for path, name, _ in rows(members)]
        csv.writer(file).writerows([("path", "label"), *cells])
    return root / "list.csv"


def as_odd_csv(root: Path, members: Members) -> Path:
    """With a byte order mark, semicolons, other columns, quotes, blank lines; absolute paths."""
    text = 'note;label; path;group\r\n"a;b";' + "\r\n\r\nx;".join(
        f'"{name}";{root / path if place else "./" + path};g' for path, name, place in rows(members)
    )
    (root / "odd.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return root / "odd.csv"


def as_parquet(root: Path, members: Members) -> Path:
    import pyarrow
    from pyarrow import parquet

    labels = [float(name) if name.isdecimal() else name for _, name, _ in rows(members)]
    coded = pyarrow.array(labels).dictionary_encode()
    table = {"path": [path for path, *_ in rows(members)], "label": coded}
    parquet.write_table(pyarrow.table(table), root / "list.parquet")
    return root / "list.parquet"


def write_shards(root: Path, members: Members, *sizes: int) -> Path:
    """WebDataset shards, by the convention's own words rather than by a library."""
    left = rows(members)
    shards = root.parent / "shards"
    shards.mkdir(exist_ok=True)
    for k, size in enumerate(sizes or (len(left),)):
        with tarfile.open(shards / f"train-{k:03d}.tar", "w") as tar:
            for path, name, _ in left[:size]:
                key = path.removesuffix(".png")
                add(tar, f"{key}.PNG", (root / path).read_bytes())
                if name.isdecimal():
                    add(tar, f"{key}.cls", f"{name}\n".encode())
                else:
                    add(tar, f"{key}.json", json.dumps({"label": name, "more": [1]}).encode())
                add(tar, f"{key}.mask.png", b"of no concern")
        left = left[size:]
    return shards


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_tar(root: Path, members: Members) -> Path:
    return write_shards(root, members) / "train-000.tar"


def as_webdataset(root: Path, members: Members) -> Path:
    """As the library writes shards."""
    from webdataset import TarWriter

    with TarWriter(str(root.parent / "written.tar")) as tar:
        for path, name, _ in rows(members):
            kind = {"cls": int(name)} if name.isdecimal() else {"json": {"label": name}}
            content = (root / path).read_bytes()
            tar.write({"__key__": path.removesuffix(".png"), "png": content, **kind})
    return root.parent / "written.tar"


def as_rows(root: Path, members: Members, **columns: Any) -> Any:
    """With class labels, whose numbers are of their own order."""
    import datasets

    order = sorted(members, reverse=True)
    content: dict[str, Any] = {
        "image": [{"bytes": (root / p).read_bytes(), "path": p} for p, *_ in rows(members)],
        "label": [order.index(name) for _, name, _ in rows(members)],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=order)}
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def as_saved(root: Path, members: Members) -> str:
    as_rows(root, members).save_to_disk(root.parent / "saved")
    return f"hf:{root.parent / 'saved'}"


def as_saved_parquet(root: Path, members: Members) -> str:
    (root.parent / "parquet").mkdir()
    as_rows(root, members).to_parquet(root.parent / "parquet" / "train.parquet")
    return f"hf:{root.parent / 'parquet'}"


def by_path(root: Path, members: Members) -> list[str]:
    return [path for path, *_ in rows(members)]


def by_key(*sizes: int, name: str = "train-{:03d}.tar") -> Callable[[Path, Members], list[str]]:
    def ids(root: Path, members: Members) -> list[str]:
        shards = [name.format(k) for k, size in enumerate(sizes) for _ in range(size)]
        keys = [path.removesuffix(".png") for path, *_ in rows(members)]
        return [f"{shard}/{key}" for shard, key in zip(shards, keys, strict=True)]

    return ids


def by_row(root: Path, members: Members) -> list[str]:
    """Saving to disk keeps the names of files but not of their folders, so that some are equal."""
    import datasets

    saved = datasets.load_from_disk(root.parent / "saved")
    return [f"{saved._fingerprint}/{k}" for k in range(len(saved))]


SOURCES: dict[str, tuple[Callable[[Path, Members], Any], Callable[[Path, Members], list[str]]]] = {
    "folders": (lambda root, _: root, by_path),
    "csv": (as_csv, by_path),
    "odd csv": (as_odd_csv, by_path),
    "parquet": (as_parquet, by_path),
    "tar": (as_tar, by_key(8)),
    "folder of tars": (lambda root, members: write_shards(root, members, 3, 5), by_key(3, 5)),
    "pattern": (lambda root, m: write_shards(root, m, 3, 1, 4) / "train-*.tar", by_key(3, 1, 4)),
    "webdataset's own": (as_webdataset, by_key(8, name="written.tar")),
    "rows": (as_rows, by_path),
    "saved": (as_saved, by_row),
    "saved as parquet": (as_saved_parquet, by_path),
}


def opened(kind: str, root: Path, members: Members = MEMBERS, **options: Any) -> Any:
    source = SOURCES[kind][0](root, members)
    open_it = unbraid.from_hugging_face if "rows" in kind else unbraid.open_images
    return open_it(source, **{"transform": to_tensor, **options})


def fail_at(monkeypatch: Any, ending: str, number: int) -> None:
    """Let the system fail to look at a file."""
    look = os.stat

    def stat(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return look(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
