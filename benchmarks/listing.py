"""What a list of images costs: time, memory and disk of the process that writes it and of others.

    python benchmarks/listing.py synthetic 1000000 10000000   # ids made up, as long as ImageNet's
    python benchmarks/listing.py folder DIR 1000000           # a folder of links to one picture

The first writes and opens lists alone: no image is there, so that a hundred million fit on a disk.
The second makes a real folder of class folders in DIR (each name is a hard link to one of a few
files) and opens it with and without a list in a file. Every process tells its seconds and what it
holds: memory of its own, which is what must fit (RssAnon), and pages of mapped files that it has
touched (RssFile less what it was after imports), which the system shares among processes and takes
back when it wants to.
Needs nothing but unbraid.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

import unbraid
from timing import alone, print_head, print_row, seconds
from unbraid.images.dataset import labels_of
from unbraid.images.identity import agree, fingerprint, ids_of, key_of
from unbraid.images.kept import Part, read_list, write_list
from unbraid.images.listing import ListedImages
from unbraid.images.mapped import Mapped, distinct

N_CLASSES = 1000
AT_ONCE = 100_000
MOST = 10_000_000  # of which everything is measured
LINKS = 30_000  # names of one file, fewer than any file system's limit
CLASSES = [f"n{k * 7919 + 1440764:08d}" for k in range(N_CLASSES)]


def memory(name: str) -> float:
    """Memory of this process, GiB: RssAnon, RssFile or VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def parts(n: int) -> Iterator[Part]:
    """Images called as ImageNet's are, class by class."""
    for start in range(0, n, AT_ONCE):
        these = range(start, min(start + AT_ONCE, n))
        class_of = [k * N_CLASSES // n for k in these]
        ids = [f"{CLASSES[c]}/{CLASSES[c]}_{k}.JPEG" for k, c in zip(these, class_of, strict=True)]
        yield Part(ids, class_of, [110_000 + k % 9973 for k in these])


def write(file: str, n: str) -> None:
    """Process 1, but for walking through folders."""
    write_list(Path(file), {"source": "made up", "root": "/data"}, CLASSES, parts(int(n)), {}, {})


def settle(images: ListedImages) -> None:
    """What a scan asks of its images before it begins."""
    labels = labels_of(images)
    distinct(labels)
    assert ids_of(images) is not None
    fingerprint(images, labels)


def hash_list(file: str, n: str) -> None:
    """Process 1: the fingerprint, which it tells the others."""
    agree(ListedImages(read_list(Mapped(Path(file)))))


def second(file: str, n: str) -> None:
    """Process 2: everything before the first image, given the first's fingerprint."""
    images = ListedImages(read_list(Mapped(Path(file))))
    images.fingerprints = {key_of(images): "told"}  # type: ignore[attr-defined]
    settle(images)
    assert len(images) == int(n)


def epoch(file: str, n: str) -> None:
    """A process that asks for each image's path and label once, in order."""
    images = ListedImages(read_list(Mapped(Path(file))))
    for path, label in zip(images.samples.paths, images.targets, strict=True):  # type: ignore[attr-defined]
        assert path is not label


def workers(file: str, n: str) -> None:
    """Four workers of a DataLoader that ask for some paths; how much more each holds then."""
    images = ListedImages(read_list(Mapped(Path(file))))

    class Entries(torch.utils.data.Dataset[float]):
        def __len__(self) -> int:
            return min(int(n), 100)

        def __getitem__(self, index: int) -> float:
            first = index * len(images) // len(self)
            assert list(images.ids[first : first + 1000])
            return memory("RssAnon")

    loader = torch.utils.data.DataLoader(Entries(), batch_size=1, num_workers=4)
    held = list(loader)
    grown = float(held[-1].max() - held[0].min())
    print(f"a worker's own memory grew by {grown:.3f} GiB", file=sys.stderr)


def plain(folder: str, n: str) -> None:
    """Each process as it was: the folder is listed in memory."""
    settle(unbraid.open_images(folder, class_names=CLASSES))


def kept(folder: str, n: str) -> None:
    """Process 1: the folder is listed into a file."""
    settle(unbraid.open_images(folder, class_names=CLASSES, listed=f"{folder}.safetensors"))


STEPS: dict[str, Callable[[str, str], None]] = {
    **{"write": write, "hash": hash_list, "process 2": second, "an epoch": epoch},
    **{"4 workers": workers, "in memory": plain, "into a file": kept},
    "process 2, folder": lambda folder, n: second(f"{folder}.safetensors", n),
}


def measure(step: str, *arguments: object) -> None:
    """Print a row of what one process takes and holds."""
    wall, cpu, own, mapped = json.loads(alone(__file__, "one", step, *arguments))
    print_row(
        f"{int(arguments[-1]):,}",  # type: ignore[call-overload]
        step, f"{wall:.2f}", f"{cpu:.2f}", f"{own:.3f}", f"{mapped:.3f}",
    )  # fmt: skip


def one(step: str, arguments: list[str]) -> None:
    """Take a step, and tell what it took and the most that it held beyond what importing has."""
    names = ("RssAnon", "RssFile")
    before = most = [memory(name) for name in names]
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = [max(m, memory(name)) for m, name in zip(most, names, strict=True)]

    watching = threading.Thread(target=watch)
    watching.start()
    taken = seconds(lambda: STEPS[step](*arguments))
    done.set()
    watching.join()
    print(json.dumps([*taken, *(m - b for m, b in zip(most, before, strict=True))]))


def make_folder(root: Path, n: int) -> None:
    """Class folders of hard links to a few pictures."""
    if root.exists():
        return
    root.mkdir(parents=True)
    source = root.parent / "pictures"
    source.mkdir(exist_ok=True)
    for k in range(-(-n // LINKS)):
        Image.new("RGB", (8, 8), (k % 256, 0, 0)).save(source / f"{k}.jpg")
    for name in CLASSES:
        (root / name).mkdir()
    for k in range(n):
        name = CLASSES[k * N_CLASSES // n]
        os.link(source / f"{k // LINKS}.jpg", root / name / f"{name}_{k}.JPEG")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("synthetic", "folder", "one"))
    parser.add_argument("rest", nargs="+")
    asked = parser.parse_args()
    if asked.what == "one":
        one(asked.rest[0], asked.rest[1:])
        return
    print_head("images", "step", "s", "processor s", "own memory, GiB", "mapped, GiB")
    if asked.what == "folder":
        for n in map(int, asked.rest[1:]):
            root = Path(asked.rest[0]) / f"of-{n}"
            make_folder(root, n)
            for step in ("in memory", "into a file", "process 2, folder"):
                measure(step, root, n)
        return
    for n in map(int, asked.rest):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            file = Path(folder) / "images.safetensors"
            # Of more than fit on a quiet morning only what a start needs of its second process.
            more = ("hash", "process 2", "an epoch", "4 workers") if n <= MOST else ("process 2",)
            for step in ("write", *more):
                measure(step, file, n)
                if step == "write":
                    print(f"{n:,} images: {file.stat().st_size / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
