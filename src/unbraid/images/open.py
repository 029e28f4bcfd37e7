"""Images for a network, from any source: in its preprocessing, labelled by its outputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from unbraid.base.arguments import as_path
from unbraid.base.errors import DataError, ModelError, UsageError, brief
from unbraid.base.tables import one_line
from unbraid.images.broken import UNLABELLED, Readable, first_readable, sort_out
from unbraid.images.division import TRAIN, VAL, divide, undivided
from unbraid.images.identity import agree
from unbraid.images.kept import keep, write_folder, write_listing, write_parts_of_folder
from unbraid.images.labels import GUESSED, Outputs, fit_any, read_classes, show_names
from unbraid.images.listing import (
    Items,
    ListedImages,
    Listing,
    Transform,
    list_folder,
    shown_in,
)
from unbraid.images.lists import CSV, PARQUET, list_rows, list_saved, list_table
from unbraid.images.mapped import Texts, distinct
from unbraid.images.own import is_own, list_own, place_of
from unbraid.images.pictures import EXTENSIONS, UNREAD
from unbraid.images.sources import FILES, SAVED, part_of, refuse_absent
from unbraid.images.tar import SHARD, is_compressed, is_url, list_shards
from unbraid.images.tensors import TENSORS
from unbraid.networks.class_names import output_names
from unbraid.networks.copying import unwrap
from unbraid.networks.models import LoadedModel
from unbraid.networks.outputs import count_outputs

if TYPE_CHECKING:
    import datasets

GivenOutputs = Sequence[str] | int | nn.Module


def open_images(
    source: str | Path,
    transform: Transform | None = None,
    labels: dict[str, int] | None = None,
    class_names: Sequence[str] = (),
    outputs: GivenOutputs | None = None,
    listed: str | Path | None = None,
) -> ListedImages:
    """Open images, wherever they are; `docs/data.md` says what they may look like.

    Args:
        source: a folder, of class folders or not; a CSV or Parquet list; tar files (one, a folder
            of them, a pattern or a URL); `hf:FOLDER`, a data set saved by `datasets`. SOURCE/train
            and SOURCE/val, where a source has no such parts, are those that it is divided into.
        transform: from an RGB picture to a tensor; None hands on the picture. Of files of tensors,
            from such a tensor to another; None brings it to float32.
        labels: label of each class; by default, what `outputs` says; with none at all, images
            count as unlabelled.
        class_names: names by label; by default those of the outputs or classes.
        outputs: the names of a network's outputs, their number, or the network, which is then run
            on one image; classes are matched with them. By default a class is its number where all
            have numbers for names, else its place among the sorted names.
        listed: a file for the list of images, which it replaces; then none of the list is in
            memory, and of processes that torchrun starts the first alone makes it, and the others
            wait and map it (docs/scale.md). Not used for `hf:FOLDER`, which its library maps.

    Returns:
        A data set of (image, label) for `unbraid.scan`. Its `reading` says how labels were found;
        a warning tells what was guessed.

    Raises:
        DataError: there are no images, the source is damaged, a class has no label, or names
            contradict each other.
        ModelError: the network cannot be run.
        UsageError: a library that it needs is not installed, or `outputs` is something else.
    """
    if labels is not None and outputs is not None:
        raise UsageError("labels and outputs both say what classes stand for; give one of them.")
    file = None if listed is None else as_path("listed", listed)
    listing = list_images(str(source), with_classes=labels != {}, listed=file)
    images = _open(listing, transform, labels, class_names, outputs)
    if isinstance(listing.ids, Texts):
        agree(images)
    return images


def from_hugging_face(
    dataset: datasets.Dataset,
    image: str = "image",
    label: str | None = "label",
    transform: Transform | None = None,
    outputs: GivenOutputs | None = None,
) -> ListedImages:
    """Make a data set for `unbraid.scan` of one of the library `datasets`.

    Args:
        dataset: with a length, so one split of it, not streamed.
        image: column of the images.
        label: column of the labels, numbers or names; None for images without.
        transform: from an RGB picture to a tensor; None hands on the picture.
        outputs: what classes are matched with, as in `open_images`.

    Returns:
        Its images. Their ids are the paths that the image column tells, or, where it tells none or
        one twice, the data set's fingerprint and the row.

    Raises:
        UsageError: it is no such data set, or `datasets` is not installed.
        DataError: a column is missing or holds something else, or names contradict each other.
    """
    return _open(list_rows(dataset, image, label, "The data set"), transform, None, (), outputs)


def _open(
    listing: Listing,
    transform: Transform | None,
    labels: dict[str, int] | None,
    class_names: Sequence[str],
    outputs: GivenOutputs | None,
) -> ListedImages:
    if listing.divided:
        warnings.warn(listing.divided, stacklevel=3)
    known = _settle(outputs, ListedImages(listing, transform, {}))
    if labels == {} or not listing.classes:
        return ListedImages(listing, transform, {}, class_names or known.names)
    if labels is not None:
        return ListedImages(listing, transform, labels, class_names)
    reading = read_classes(listing.known, known)
    if reading.note:
        warnings.warn(reading.note, stacklevel=3)
    return ListedImages(listing, transform, reading, class_names)


def _settle(outputs: GivenOutputs | None, images: ListedImages) -> Outputs:
    """Settle what a caller says of a network's outputs; a network itself is run on an image."""
    if outputs is None:
        return Outputs()
    if isinstance(outputs, int) and not isinstance(outputs, bool) and outputs > 0:
        return Outputs((), outputs)
    if isinstance(outputs, (list, tuple)) and outputs and all(isinstance(n, str) for n in outputs):
        return Outputs(tuple(outputs), len(outputs))
    if not isinstance(outputs, nn.Module):
        raise UsageError(
            f"outputs is {brief(ValueError(repr(outputs)))}; give the names of a network's outputs "
            "as a list, their number, or the network."
        )
    if images.transform is None:
        raise UsageError(
            "outputs is a network, which is run on an image to count its outputs; give transform "
            "too, or outputs as a number."
        )
    image = first_readable(images, range(len(images)))
    if image is None:
        raise DataError(
            "None of the first images can be read, so the network's outputs cannot be counted; "
            "mend them, or give outputs as a number."
        )
    try:
        n = count_outputs(outputs, image)
    except Exception as error:  # of a network of anyone's own
        raise ModelError(
            f"The network cannot run on the first image ({brief(error)}), so its outputs cannot be "
            "counted; give the transform that it needs, or outputs as a number."
        ) from error
    names = output_names(unwrap(outputs))
    return Outputs(names if len(names) == n else (), n)


def images_for(
    loaded: LoadedModel, where: str, listed: Path | None = None, *, of_outputs: bool = True
) -> tuple[ListedImages, str]:
    """Open images with a network's preprocessing and labels; a note says what was guessed.

    Labels name outputs of the network, unless it is none that has one for each class.
    """
    listing = list_images(where, listed=listed)
    images, note = (_fitted if of_outputs else _unfitted)(loaded, where, listing)
    if isinstance(listing.ids, Texts):
        agree(images)
    return images, note


def _fitted(loaded: LoadedModel, where: str, listing: Listing) -> tuple[ListedImages, str]:
    own, transform, prepared = loaded.class_names, *_preparing(loaded, listing)
    given: tuple[str, ...] = ()
    if listing.classes or loaded.names.by_output:
        unread = ListedImages(listing, transform, {})
        image = first_readable(unread, range(len(unread)))
        if image is None and listing.of_tensors:  # a blank one is of unknown shape
            sort_out([Readable(unread)[0]], skip_broken=False)
        n_outputs = loaded.n_outputs(image)
        given = loaded.names.of_outputs(n_outputs)
    if not listing.classes:
        what = "class folders" if listing.root is not None else "labels"
        note = f"{where} holds images without {what}; the network's predictions are taken."
        note = f"{prepared} {listing.divided} {note}".strip()
        return ListedImages(listing, transform, {}, given or own), note
    if own and len(own) != n_outputs:
        if not given:
            raise ModelError(
                f"The network has {n_outputs} outputs but {len(own)} names for them; give a name "
                "for each, for instance with --names."
            )
        own = ()
    # Classes may be called as the network calls its outputs, or as the names that are given.
    classes = listing.known
    fitting = next((names for names in (own, given) if fit_any(classes.seen, names)), own or given)
    reading = read_classes(classes, Outputs(fitting, n_outputs))
    of_seen = {name: reading.labels[name] for name in classes.seen}
    others = loaded.names.of_classes(of_seen, reading.how == GUESSED)
    shown = replace(reading, outputs=Outputs(given or own, n_outputs))
    names = show_names(shown, others, classes.seen)
    note = " ".join(filter(None, (prepared, listing.divided, reading.note)))
    return ListedImages(listing, transform, reading, names), note


def _preparing(loaded: LoadedModel, listing: Listing) -> tuple[Transform | None, str]:
    """What brings a listing's images to what a network takes, and what there is to say of it."""
    if not listing.of_tensors:
        return loaded.transform, "" if isinstance(listing.read, Items) else loaded.note
    if loaded.tensor_transform is not None:
        return loaded.tensor_transform, (
            "The files hold tensors; each goes through the preprocessing that your function "
            "returns with the network."
        )
    return None, (
        "The files hold tensors; each goes into the network as it is, as float32, whole numbers "
        "unscaled."
    )


def _unfitted(loaded: LoadedModel, _: str, listing: Listing) -> tuple[ListedImages, str]:
    """The same where classes need no output: they go by its names, or else are counted in order."""
    transform, prepared = _preparing(loaded, listing)
    note = f"{prepared} {listing.divided}".strip()
    if not listing.classes:
        return ListedImages(listing, transform, {}), note
    classes, own = listing.known, loaded.class_names
    try:
        reading = read_classes(classes, Outputs(own, len(own) or None))
    except DataError:  # as the classes are others
        reading = read_classes(classes, Outputs())
    of_seen = {name: reading.labels[name] for name in classes.seen}
    names = show_names(reading, loaded.names.of_classes(of_seen, True), classes.seen)
    return ListedImages(listing, transform, reading, names), note


def images_like(images: ListedImages, where: str, listed: Path | None = None) -> ListedImages:
    """Open other images with the same preprocessing and labels."""
    # Without classes there, folders are none here either.
    return _like(images, list_images(where, bool(images.labels), listed))


def _like(images: ListedImages, listing: Listing) -> ListedImages:
    if images.of_tensors != listing.of_tensors:
        one, other = ("tensors", "pictures")[:: 1 if images.of_tensors else -1]
        raise DataError(
            f"The training images are {one}, and {listing.source} holds {other}; give one kind."
        )
    others = ListedImages(listing, images.transform, images.labels, images.classes)
    if isinstance(listing.ids, Texts):
        agree(others)
    return others


def images_of_run(
    loaded: LoadedModel, where: str, listed: Mapping[str, Path], *, of_outputs: bool = True
) -> tuple[ListedImages, ListedImages, str]:
    """Open training images as `images_for` does, and validation images like them.

    The lists are kept in the files `listed`, by part, or in memory without; a source that is to be
    divided is listed once.
    """
    refuse_absent(where)
    train_place, val_place = part_of(where, TRAIN), part_of(where, VAL)
    whole = undivided(train_place)
    if whole is None or not listed or where.startswith(SAVED):
        train, note = images_for(loaded, train_place, listed.get(TRAIN), of_outputs=of_outputs)
        return train, images_like(train, val_place, listed.get(VAL)), note
    undivided(val_place)  # or it tells that one of two is missing
    listings = _keep_parts(whole[0], listed, with_classes=True)
    fitted = _fitted if of_outputs else _unfitted
    train, note = fitted(loaded, train_place, listings[TRAIN])
    agree(train)
    return train, _like(train, listings[VAL]), note


def labelled(images: ListedImages) -> bool:
    """Say whether images come with labels."""
    return distinct(images.targets) != {UNLABELLED}


def list_images(where: str, with_classes: bool = True, listed: Path | None = None) -> Listing:
    """List the images of a source as `open_images` takes it; folders in a folder may be classes."""
    if where.startswith(SAVED):  # which arrow maps anyway
        listed = None
    if (source_and_part := undivided(where)) is not None:
        source, part = source_and_part
        if listed is None:
            return divide(list_images(source, with_classes), part)
        return _keep_parts(source, {part: listed}, with_classes)[part]
    if listed is None or is_own(where):  # not of files here
        listing = _list_others(where)
        return list_folder(Path(where), with_classes) if listing is None else listing

    def write() -> None:
        listing = _list_others(where)
        if listing is None:
            write_folder(listed, Path(where), with_classes)
        else:
            write_listing(listed, listing)

    return keep([listed], write)[0]


def _keep_parts(source: str, listed: Mapping[str, Path], with_classes: bool) -> dict[str, Listing]:
    """Divide a source, and keep the list of each part in a file."""

    def write() -> None:
        listing = _list_others(source)
        if listing is None:
            write_parts_of_folder(listed, Path(source), with_classes)
            return
        for part, file in listed.items():
            write_listing(file, divide(listing, part))

    return dict(zip(listed, keep(list(listed.values()), write), strict=True))


def _list_others(where: str) -> Listing | None:
    """List the images of what is no folder of images; None of one that is."""
    if is_own(where):
        return list_own(where)
    path = Path(where)
    kind = path.suffix.lower()
    if where.startswith(SAVED):
        return list_saved(where.removeprefix(SAVED))
    is_folder = os.path.isdir(where)  # which fails in no way; who opens it tells what is wrong
    if is_url(where) or (kind == SHARD and not is_folder) or (is_folder and _holds_shards(path)):
        return list_shards(where)
    if not is_folder and kind in (*CSV, *PARQUET):
        return list_table(path)
    if not is_folder and os.path.exists(where):
        raise DataError(f"{where} is no source of images; name a folder or {', '.join(FILES)}.")
    return None


def _holds_shards(folder: Path) -> bool:
    """Whether a folder holds tar files, and neither folders nor images."""
    shown = shown_in(folder)
    shards = [p for p in shown if p.suffix.lower() == SHARD or is_compressed(p)]
    if not shards or any(os.path.isdir(path) for path in shown):
        return False
    known = (*EXTENSIONS, *UNREAD, *TENSORS)
    image = next((p for p in shown if p.suffix.lower() in known), None)
    if image is not None:
        raise DataError(
            f"{folder} holds both tar files, such as {one_line(shards[0].name)}, and images, such "
            f"as {one_line(image.name)}; move one or the other elsewhere."
        )
    return True


def absolute(where: str) -> str:
    """Name a source so that it is found again from any folder."""
    if where.startswith(SAVED):
        return SAVED + str(Path(where.removeprefix(SAVED)).resolve())
    if is_own(where):
        return place_of(where)
    return where if is_url(where) else str(Path(where).resolve())
