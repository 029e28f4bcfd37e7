"""What the app knows and does, without the app: each answer is plain data.

Nothing is kept of a visitor. Splits and dropped pictures go by names that the page holds and sends
along, and are never changed, so no visitor can disturb another.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from unbraid.base.errors import UsageError
from unbraid.base.files import write_new
from unbraid.base.tables import one_line
from unbraid.exploring import shown
from unbraid.exploring.bench import alone, lay_out, measure, nothing_found, part_by_hand, part_of
from unbraid.exploring.opened import WHOLE, Opened
from unbraid.exploring.shown import Plain
from unbraid.images.broken import UNLABELLED, plain
from unbraid.images.dataset import picture_of
from unbraid.images.listing import ListedImages, Listing
from unbraid.images.pictures import decode_picture
from unbraid.images.which import name_of
from unbraid.measuring.explain import ImageExplanation
from unbraid.measuring.reference_images import ALIKE, ReferenceImages, reference_images
from unbraid.measuring.results import ChannelEvaluation
from unbraid.networks.copying import device_of
from unbraid.networks.outputs import logits_of, run_raw
from unbraid.networks.relevance import undisturbed
from unbraid.reporting.crops import Crops
from unbraid.reporting.explain import explain
from unbraid.reporting.pictures import open_picture, sight_of
from unbraid.reporting.words import bounded
from unbraid.running.folders import refuse_folder
from unbraid.scanning.targets import Scalar
from unbraid.splitting.splits import Split
from unbraid.surgery.apply import apply
from unbraid.surgery.gates import gate

RUN, HAND, SAVED = "run", "hand:", "saved:"  # how splits are named: that of the run, and others
ENDING = ".safetensors"
_LONGEST_NAME = 200  # bytes of a file's name
_MOST_GATE = 10.0
_N_SHOTS, _N_ROWS = 8, 8
_MOST_LAID = 400  # strongest images on the bench

One = TypeVar("One")


class Kept(Generic[One]):
    """The latest things of a kind by name; older ones go."""

    def __init__(self, most: int) -> None:  # noqa: D107
        self._most, self._things = most, OrderedDict[Any, One]()

    def get(self, name: Any) -> One | None:
        """Give what is kept under a name, None if nothing is."""
        if name in self._things:
            self._things.move_to_end(name)
        return self._things.get(name)

    def put(self, name: Any, thing: One) -> One:
        """Keep a thing."""
        self._things[name] = thing
        self._things.move_to_end(name)
        while len(self._things) > self._most:
            self._things.popitem(last=False)
        return thing

    def made(self, name: Any, make: Callable[[], One]) -> One:
        """Give what is kept under a name, or make it."""
        found = self.get(name)
        return self.put(name, make()) if found is None else found


class Seen(NamedTuple):
    """A picture that is looked at."""

    name: str
    picture: Image.Image  # as it was, RGB
    dataset: Dataset[Any]  # it alone, in the network's preprocessing


class Explorer:
    """Answers what the page asks of one run. Not for several threads at once."""

    def __init__(self, opened: Opened, save_to: Path) -> None:
        """Look at an opened run; splits made by hand are saved into a folder."""
        self.opened, self.save_to = opened, save_to
        self.version = secrets.token_hex(4)  # in addresses of pictures: another run has others
        self._splits: Kept[Split] = Kept(64)
        self._dropped: Kept[Seen] = Kept(64)
        self._own: Kept[Seen] = Kept(16)  # images of the run
        self._inputs: Kept[Tensor] = Kept(64)
        self._files: Kept[tuple[bytes, str]] = Kept(1024)
        self._networks: Kept[nn.Module] = Kept(3)
        self._explained: Kept[tuple[ImageExplanation, Image.Image]] = Kept(32)
        self._values: Kept[Tensor] = Kept(64)  # of pictures: logits, or the target
        self._references: Kept[dict[int, ReferenceImages]] = Kept(256)
        self._measured: Kept[ChannelEvaluation] = Kept(256)

    # --- what there is ---

    def overview(self) -> Plain:
        """What the run is, what is missing, and which splits there are."""
        run, split = self.opened.run, self.opened.split
        scan = self.opened.train_scan or self.opened.val_scan
        layer = split.layer if split is not None else None if scan is None else scan.layer
        assert layer is not None  # else the run would not have been opened
        return {
            "version": self.version,
            "title": bounded(run.settings.title),
            "layer": bounded(layer.name),
            "nChannels": layer.n_out,
            "missing": [bounded(one_line(words), 600) for words in self.opened.missing],
            "explains": self.opened.network is not None and self.opened.target is not None,
            "parts": self.opened.train_scan is not None,
            "hasSplit": split is not None,
            "ofPlaces": self.opened.of_places,
            "saved": self.saved(),
            "folder": bounded(str(self.save_to), 600),
        }

    def saved(self) -> list[str]:
        """Names of the splits that were saved, in order."""
        found = self.save_to.glob(f"*{ENDING}") if self.save_to.is_dir() else ()
        return sorted(path.name.removesuffix(ENDING) for path in found)

    def split(self, name: str) -> Split:
        """Give a split by its name: the run's, one just made by hand, or a saved one."""
        if name == RUN and self.opened.split is not None:
            return self.opened.split
        if name.startswith(SAVED):
            path = self._place(name.removeprefix(SAVED))
            return self._splits.made(name, lambda: self._read(path))
        found = self._splits.get(name)
        if found is None:
            what = "The run has no split" if name == RUN else "This split is gone from memory"
            raise UsageError(f"{what}; choose another one, or part a channel by hand.")
        return found

    def _read(self, path: Path) -> Split:
        split, scan = Split.load(path), self.opened.train_scan or self.opened.val_scan
        if scan is not None:
            split.require(scan)
        return split

    def channels(self, name: str) -> list[Plain]:
        """The channels of a split, with their concepts."""
        if name == RUN and self.opened.split is None:
            return []
        split = self.split(name)
        return [shown.channel_entry(split, part) for part in split.channels]

    def thumbs(self, name: str) -> dict[str, list[str]]:
        """A reference image of each concept, by channel; none where there are no pictures."""
        kind = self._kind()
        if kind is None or self.opened.images(kind) is None or not self.channels(name):
            return {}
        return shown.thumbs(self._reference(name, None, 1), kind)

    def channel(self, name: str, channel: int) -> Plain:
        """One channel of a split: reference images and measures."""
        split, kind = self.split(name), self._kind()
        part = part_of(split, channel)
        if part is None:
            raise UsageError(f"Channel {channel} is not divided; part it by hand.")
        found = None if kind is None else self._reference(name, channel, _N_SHOTS)[channel]
        measured, note = self._measure(name, channel)
        return shown.channel_view(split, part, kind or "", found, measured, note)

    def _kind(self) -> str | None:
        """Which images are shown for reference: those that fitted nothing, where they are known."""
        return next((k for k in ("val", "train") if self.opened.scan(k) is not None), None)

    def _reference(self, name: str, channel: int | None, n: int) -> dict[int, ReferenceImages]:
        kind = self._kind()
        scan = None if kind is None else self.opened.scan(kind)
        assert scan is not None
        split = self.split(name)

        def find() -> dict[int, ReferenceImages]:
            own = split if channel is None else alone(split, channel)
            return reference_images(scan, own, n=n, alike=None if n == 1 else ALIKE)

        return self._references.made((name, channel, n), find)

    def _measure(self, name: str, channel: int) -> tuple[ChannelEvaluation | None, str]:
        """Measures of a channel on validation images, and why there are none."""
        scan = self.opened.val_scan
        if scan is None:
            return None, "There are no measures without a scan of validation images."
        split = self.split(name)
        try:
            made = self._measured.get((name, channel)) or self._measured_by_run(name, channel)
            made = made or measure(split, scan, channel)
        except UsageError as error:  # a concept without validation images
            return None, f"There are no measures: {error}"
        return self._measured.put((name, channel), made), ""

    def _measured_by_run(self, name: str, channel: int) -> ChannelEvaluation | None:
        if name != RUN:
            return None
        wanted = (channel, self.split(name)[channel].concepts)
        of_same = (
            own
            for own in self.opened.measured
            if (own.channel, tuple(concept.classes for concept in own.concepts)) == wanted
        )
        return next(of_same, None)

    # --- a picture ---

    def drop(self, content: bytes, file: str) -> Plain:
        """Take a picture file, whatever its name; DataError if it is none."""
        name = bounded(one_line(file)) or "picture"
        key = hashlib.sha256(content).hexdigest()[:24]
        seen = self._dropped.get(f"drop/{key}")
        if seen is None or seen.name != name:
            seen = self._see(name, decode_picture(io.BytesIO(content), name))
        self._dropped.put(f"drop/{key}", seen)
        return {"picture": f"drop/{key}", "name": name}

    def _see(self, name: str, picture: Image.Image) -> Seen:
        def read(_index: int) -> Image.Image:
            return picture

        listing = Listing("The picture", [name], read, [], [UNLABELLED])
        transform = None if self.opened.network is None else self.opened.network.transform
        return Seen(name, picture, ListedImages(listing, transform))

    def seen(self, picture: str) -> Seen:
        """Give a picture by its name: "drop/KEY", or "train/7" and "val/7" of the run's images.

        Of place 7 that is the image that it lies in, which is "val/whole/3" too.
        """
        picture = self.whole(picture)
        kind, _, _ = picture.rpartition("/")
        if kind == "drop":
            found = self._dropped.get(picture)
            if found is None:
                raise UsageError("This picture is gone from memory; drop it again.")
            return found
        images, index = self._find(picture)

        def read() -> Seen:
            try:
                name = "/".join(name_of(images, index).split("/")[-2:])  # with its class's folder
                told, picture = bounded(one_line(name)), open_picture(images, index)
                if picture_of(images, index) is None:  # a tensor, as the network takes it
                    return Seen(told, picture, Subset(images, [index]))
                return self._see(told, picture)
            except LookupError:
                raise UsageError(f"The run has no image {index}.") from None

        return self._own.made(picture, read)

    def whole(self, picture: str) -> str:
        """Name the image that a place lies in; any other picture stays what it is."""
        if not self.opened.of_places or picture.count("/") != 1 or picture.startswith("drop/"):
            return picture
        crops, index = self._find(picture)
        if not isinstance(crops, Crops) or index >= len(crops):
            raise UsageError(f"The run has no place {index}.")
        return f"{picture.partition('/')[0]}/{WHOLE}/{crops.source(index)}"

    def _find(self, picture: str) -> tuple[Dataset[Any], int]:
        """The data set that a picture of the run is in, and its index there."""
        kind, _, which = picture.rpartition("/")
        images = self.opened.images(kind)
        if images is None or not which.isdecimal() or len(which) > 18:
            raise UsageError("The run's images are not there, or have none of this number.")
        return images, int(which)

    def explain(self, name: str, picture: str, channel: int | None) -> Plain:
        """Which concept channels a picture uses: the strongest, or those of one channel."""
        own, looked = self._explain(name, picture)
        if channel is not None and part_of(self.split(name), channel) is None:
            raise UsageError(f"Channel {channel} is not divided; part it by hand.")
        view = shown.explained_view(own, looked, channel)
        told = {"name": self.seen(picture).name, "picture": self.whole(picture)}
        return {**view, **told, "logits": self.gate(name, picture, {})}

    def _explain(self, name: str, picture: str) -> tuple[ImageExplanation, Image.Image]:
        def look() -> tuple[ImageExplanation, Image.Image]:
            model2, dataset = self._network(name), self.seen(picture).dataset
            told: dict[str, Any] = {"n": _N_ROWS, "heatmaps": False, "target": self._target()}
            made = explain(model2, dataset, **told)
            return made[0], made.pictures[0]

        return self._explained.made((name, picture), look)

    def _network(self, name: str) -> nn.Module:
        """The network with a split in it; never left with a gate in force."""
        network = self.opened.network
        if network is None:
            raise UsageError("The run's network is not there, so no picture can be explained.")
        split = self.split(name)
        return self._networks.made(name, lambda: apply(network.model, split))

    def _target(self) -> Scalar:
        """Whose relevance is told."""
        if self.opened.target is None:
            raise UsageError("The run has no target that a picture can be explained by.")
        return self.opened.target

    def gate(self, name: str, picture: str, gates: Mapping[str, float]) -> Plain:
        """Logits of a picture with concept channels scaled, such as {"10.1": 0.5}, and before.

        Of another target than a class's logit, its value alone.
        """
        split, target = self.split(name), self._target()
        before = self._values.made(picture, lambda: self._run(name, picture, {}))
        moved = {own: value for own, value in gates.items() if value != 1}
        now = self._run(name, picture, moved) if moved else before
        if not target.of_class:
            return shown.target_view(float(before[0]), float(now[0]), target.name)
        names = ["" if n in split.clusters else own for n, own in enumerate(split.class_names)]
        return shown.logits_view(before, now, names)

    def _run(self, name: str, picture: str, gates: Mapping[str, float]) -> Tensor:
        """Logits, (T,), or of another target its value, (1,)."""
        model2, layer = self._network(name), self.split(name).layer.name

        def read() -> Tensor:
            dataset = self.seen(picture).dataset
            return plain(dataset[0][0], dataset, 0)

        image = self._inputs.made(picture, read)
        images = image[None].to(device_of(model2))
        with undisturbed(model2), torch.no_grad(), ExitStack() as moved:
            for own, value in gates.items():
                channel, _, concept = own.partition(".")
                if not (channel.isdecimal() and (concept.isdecimal() or concept == "rest")):
                    raise UsageError(f"There is no concept channel {own!r}.")
                if not 0 <= value <= _MOST_GATE:
                    raise UsageError(f"A gate goes from 0 to {_MOST_GATE:g}, not {value:g}.")
                which: int | Literal["rest"] = int(concept) if concept.isdecimal() else "rest"
                moved.enter_context(gate(model2, layer, int(channel), which, value))
            output, first = run_raw(model2, images), torch.zeros(1, dtype=torch.int64)
            target = self._target()
            values = logits_of(output, 1)[0] if target.of_class else target.of(output, first, first)
            return values.detach().cpu().float()

    def picture_file(self, picture: str, side: int) -> tuple[bytes, str]:
        """A picture as a file, cut as the network sees it where that is known, and its kind."""

        def draw() -> tuple[bytes, str]:
            if self.whole(picture) != picture:  # what lies around a place
                return shown.as_file(open_picture(*self._find(picture)), side)
            seen = self.seen(picture).picture
            images = self.opened.images(picture.rpartition("/")[0])
            sight = None if picture.startswith("drop/") or images is None else sight_of(images)
            return shown.as_file(sight(seen) if sight else seen, side)

        return self._files.made((picture, side), draw)

    # --- the bench ---

    def bench(self, name: str, channel: int, n: int) -> Plain:
        """A channel's images to be put into groups; those of a split are there to begin with."""
        scan = self.opened.train_scan
        if scan is None:
            raise UsageError("There is no scan of training images, so no channel can be parted.")
        split = None if name == RUN and self.opened.split is None else self.split(name)
        laid = lay_out(scan, split, channel, min(max(n, 1), _MOST_LAID))
        part = part_of(split, channel)
        entry = {} if split is None or part is None else shown.channel_entry(split, part)
        return {
            "channel": channel,
            "groups": entry.get("concepts", []),
            "byHand": entry.get("byHand", False),
            "images": shown.bench_view(laid, "train", scan.class_names),
            "more": len(laid.index) < scan.manifest.n_images and n < _MOST_LAID,
        }

    def part(
        self, name: str, channel: int, groups: Sequence[Sequence[int]], names: Sequence[str]
    ) -> Plain:
        """Split a channel by groups of images: a new split's name, its channel, seconds it took."""
        begun, scan = time.perf_counter(), self.opened.train_scan
        if scan is None:
            raise UsageError("There is no scan of training images, so no channel can be parted.")
        if name == RUN and self.opened.split is None:
            nothing = nothing_found(scan, self.opened.run.settings.thresholds)
            made = part_by_hand(scan, nothing, channel, groups, names)
        else:
            made = part_by_hand(scan, self.split(name), channel, groups, names)
        new = f"{HAND}{secrets.token_hex(8)}"
        self._splits.put(new, made)
        view = self.channel(new, channel)
        return {"split": new, "seconds": round(time.perf_counter() - begun, 2), "channel": view}

    def save(self, split: str, name: str) -> Plain:
        """Save a split made by hand under a new name; a file that is there is never replaced."""
        made, path = self.split(split), self._place(name.strip())
        temporary = self.save_to / f".{secrets.token_hex(8)}.part"
        try:
            made.save(temporary)
            if not write_new(path, temporary.read_bytes()):
                raise UsageError(f"There is a split {bounded(path.stem)!r}; give another name.")
        finally:
            temporary.unlink(missing_ok=True)
        known = f"{SAVED}{path.name.removesuffix(ENDING)}"
        self._splits.put(known, made)
        return {"split": known, "path": str(path), "saved": self.saved()}

    def _place(self, name: str) -> Path:
        """Where a split of a name lies; UsageError for what can be no plain file's name."""
        odd = any(one in "/\\" or not one.isprintable() for one in name)
        too_long = len(name.encode("utf-8", "replace")) > _LONGEST_NAME
        if not name or name.startswith(".") or odd or too_long:
            raise UsageError(
                "Name the split by a file's name: no slash, no dot to begin with, and at most "
                f"{_LONGEST_NAME} bytes."
            )
        return self.save_to / f"{name}{ENDING}"


def open_explorer(opened: Opened, save_to: Path | None) -> Explorer:
    """Explore an opened run; splits go into the run's folder `splits` unless another is named."""
    folder = opened.run.folder / "splits" if save_to is None else save_to
    refuse_folder(folder)
    return Explorer(opened, folder)
