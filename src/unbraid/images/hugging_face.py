"""Data sets of the library `datasets` by Hugging Face."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from unbraid.base.errors import DataError, UsageError, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.dataset import UNLABELLED
from unbraid.images.listing import (
    GivenOutputs,
    ListedImages,
    Listing,
    Transform,
    by_class,
    outputs_of,
    read_listing,
)
from unbraid.images.pictures import decode_picture, read_picture
from unbraid.networks.class_names import output_number

if TYPE_CHECKING:
    import datasets


_ROWS = 100  # looked at in one go


@dataclass(frozen=True)
class Rows:
    """Reads images out of a data set's rows by place."""

    dataset: Any  # of one column, whose images are not decoded
    column: str
    ids: list[str]

    def __call__(self, index: int) -> Image.Image:
        """Read one image."""
        file, name = self.dataset[index][self.column], one_line(self.ids[index])
        content, path = (file or {}).get("bytes"), (file or {}).get("path")
        if content is not None:
            return decode_picture(io.BytesIO(content), name)
        if path is None:
            raise DataError(f"Image {name} cannot be read (its row holds none, nor a file's path).")
        return read_picture(path)


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
    listed = list_rows(dataset, image, label, "The data set")
    known = outputs_of(outputs, lambda: ListedImages(listed, transform, {}))
    reading = read_listing(listed, known)
    if reading.note:
        warnings.warn(reading.note, stacklevel=2)
    names = () if listed.classes else known.names
    return ListedImages(listed, transform, reading, names)


def list_saved(folder: str) -> Listing:
    """List the images of a data set that was saved to disk, or of a folder of Parquet files.

    Raises:
        UsageError: `datasets` is not installed.
        OutOfReach: the system fails to give it.
        DataError: there is none, or it cannot be read, or has no columns `image` and `label`.
    """
    library = _library()
    files: list[Path] = []
    rows: list[str] = []
    try:
        if Path(folder).is_dir():
            files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() == ".parquet")
        read = library.Dataset.from_parquet if files else library.load_from_disk
        dataset = read([str(file) for file in files] or folder)
        for file in files:  # their fingerprint would be of where they lie and how old they are
            rows += [f"{file.name}/{row}" for row in range(_n_rows(file))]
    except Exception as error:  # the library's, arrow's and the system's
        reason = one_line(str(error)) or type(error).__name__
        raise out_of_reach(f"Data set {folder}", error) or DataError(
            f"{folder} is no data set that `save_to_disk` saved ({reason}); name its folder."
        ) from None
    return list_rows(dataset, "image", "label", folder, rows)


def _n_rows(file: Path) -> int:
    from pyarrow import parquet

    n: int = parquet.read_metadata(file).num_rows
    return n


def list_rows(
    dataset: Any, image: str, label: str | None, source: str, rows: Sequence[str] = ()
) -> Listing:
    """List the images of a data set's rows; arguments as in `from_hugging_face`.

    `rows` are ids for images whose paths are none; by default, fingerprint and row.
    """
    library = _library()
    if isinstance(dataset, dict):
        raise UsageError(f"{source} has several splits; take one of {', '.join(dataset)}.")
    if not isinstance(dataset, library.Dataset):
        raise UsageError(
            f"{source} is a {type(dataset).__name__}; pass a datasets.Dataset, which has a length."
        )
    for column in (image, *([] if label is None else [label])):
        if column not in dataset.column_names:
            raise DataError(
                f"{source} has no column {column!r} but {', '.join(dataset.column_names)}; open it "
                "in Python with from_hugging_face(dataset, image=..., label=...)."
            )
    _make_sure(dataset.select_columns([image] if label is None else [image, label]), source)
    try:
        encoded = dataset.with_format(None).select_columns([image])
        encoded = encoded.cast_column(image, library.Image(decode=False))
        paths, sizes = _files(encoded, image)
    except Exception as error:  # of arrow, in many kinds
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"Column {image!r} of {source} holds no images ({reason}).") from None
    ids = list(rows) or [f"{dataset._fingerprint}/{row}" for row in range(len(dataset))]
    if all(paths) and len(set(paths)) == len(paths):
        ids = [str(path).replace("\\", "/") for path in paths]
    classes, class_of = _classes(dataset, label, source)
    return Listing(source, ids, Rows(encoded, image, ids), classes, class_of, sizes=sizes)


def _make_sure(dataset: Any, source: str) -> None:
    """Refuse columns that point beyond their file, which arrow itself only finds when asked."""
    try:
        dataset.data.validate(full=True)
    except Exception as error:  # of arrow, in many kinds
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{source} is damaged ({reason}); save or fetch it again.") from None


def _files(encoded: Any, column: str) -> tuple[list[str | None], list[int]]:
    """The path that each row tells, and the bytes that it holds, without decoding any."""
    import pyarrow.compute

    paths: list[str | None] = []
    sizes: list[int] = []
    for batch in encoded.with_format("arrow").iter(_ROWS):
        content = batch[column]
        paths += pyarrow.compute.struct_field(content, "path").to_pylist()
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(content, "bytes"))
        sizes += [size or 0 for size in lengths.to_pylist()]
    return paths, sizes


def _classes(dataset: Any, column: str | None, source: str) -> tuple[list[str], list[int]]:
    if column is None:
        return [], [UNLABELLED] * len(dataset)
    values = dataset.with_format(None)[column][:]
    if set(values) <= {UNLABELLED, None}:  # the habit of test splits
        return [], [UNLABELLED] * len(values)
    names = getattr(dataset.features[column], "names", None)
    if names is not None and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
        return list(names), values
    numbers = [output_number(value) for value in values]
    if not all(isinstance(value, str) for value in values) and None in numbers:
        raise DataError(
            f"Column {column!r} of {source} holds something else than classes; give numbers from 0 "
            "on, or names."
        )
    texts = zip(numbers, values, strict=True)
    return by_class([str(v if n is None else n) for n, v in texts], source)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Data sets of Hugging Face need the library datasets; pip install datasets."
        ) from None
    return datasets
