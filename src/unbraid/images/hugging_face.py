"""Data sets of the library `datasets` by Hugging Face, as listings of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.base.errors import DataError, UsageError, brief, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.broken import UNLABELLED
from unbraid.images.listing import Listing, make_listing
from unbraid.images.pictures import decode_picture, read_picture
from unbraid.networks.class_names import output_number

_N_ROWS = 100  # looked at in one go


@dataclass(frozen=True)
class Rows:
    """Reads images out of a data set's rows by index."""

    dataset: Any  # of one column, whose images are not decoded
    column: str
    ids: list[str]

    def __call__(self, index: int) -> Image.Image:
        """Read one image."""
        file, name = self.dataset[index][self.column] or {}, one_line(self.ids[index])
        if file.get("bytes") is not None:
            return decode_picture(io.BytesIO(file["bytes"]), name)
        if file.get("path") is None:
            raise DataError(f"Image {name} cannot be read (its row holds none, nor a file's path).")
        return read_picture(file["path"])


def list_saved(folder: str) -> Listing:
    """List the images of a data set that was saved to disk, or of a folder of Parquet files."""
    library = _library()
    rows: list[str] = []
    try:
        inside = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
        files = [path for path in inside if path.suffix.lower() == ".parquet"]
        read = library.Dataset.from_parquet if files else library.load_from_disk
        dataset = read([str(file) for file in files] or folder)
        if files:  # whose fingerprint would be of where they lie and how old they are
            from pyarrow.parquet import read_metadata

            rows = [f"{f.name}/{k}" for f in files for k in range(read_metadata(f).num_rows)]
    except Exception as error:  # the library's, arrow's and the system's
        raise out_of_reach(f"Data set {folder}", error) or DataError(
            f"{folder} is no data set that `save_to_disk` saved ({brief(error)}); name its folder."
        ) from None
    return list_rows(dataset, "image", "label", folder, rows)


def list_rows(
    dataset: Any, image: str, label: str | None, source: str, rows: Sequence[str] = ()
) -> Listing:
    """List the images of a data set's rows."""
    library = _library()
    if isinstance(dataset, dict):
        raise UsageError(f"{source} has several splits; take one of {', '.join(dataset)}.")
    if not isinstance(dataset, library.Dataset):
        raise UsageError(
            f"{source} is a {type(dataset).__name__}; pass a datasets.Dataset, which has a length."
        )
    columns = [image] if label is None else [image, label]
    missing = next((name for name in columns if name not in dataset.column_names), None)
    if missing is not None:
        raise DataError(
            f"{source} has no column {missing!r} but {', '.join(dataset.column_names)}; open it "
            "in Python with from_hugging_face(dataset, image=..., label=...)."
        )
    try:  # columns that point beyond their file, which arrow itself only finds when asked
        dataset.select_columns(columns).data.validate(full=True)
    except Exception as error:  # of arrow, in many kinds
        raise DataError(f"{source} is damaged ({brief(error)}); save or fetch it again.") from None
    try:
        encoded = dataset.with_format(None).select_columns([image])
        encoded = encoded.cast_column(image, library.Image(decode=False))
        paths, sizes = _files(encoded, image)
    except Exception as error:  # of arrow, in many kinds
        raise DataError(f"Column {image!r} of {source} holds no images ({brief(error)}).") from None
    ids = list(rows) or [f"{dataset._fingerprint}/{row}" for row in range(len(dataset))]
    if all(paths) and len(set(paths)) == len(paths):
        ids = [str(path).replace("\\", "/") for path in paths]
    read = Rows(encoded, image, ids)
    values = [] if label is None else dataset.with_format(None)[label][:]
    if set(values) <= {UNLABELLED, None}:  # the habit of test splits
        return make_listing(source, ids, read, [None] * len(ids), sizes=sizes)
    names = getattr(dataset.features[label], "names", None)
    if names is not None and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
        return Listing(source, ids, read, list(names), values, sizes=sizes)
    numbers = [output_number(value) for value in values]
    if None in numbers and not all(isinstance(value, str) for value in values):
        raise DataError(
            f"Column {label!r} of {source} holds something else than classes; give numbers from 0 "
            "on, or names."
        )
    labels = [str(v if n is None else n) for n, v in zip(numbers, values, strict=True)]
    return make_listing(source, ids, read, labels, sizes=sizes)


def _files(encoded: Any, column: str) -> tuple[list[str | None], list[int]]:
    """The path that each row tells, and the bytes that it holds, without decoding any."""
    import pyarrow.compute

    paths: list[str | None] = []
    sizes: list[int] = []
    for batch in encoded.with_format("arrow").iter(_N_ROWS):
        paths += pyarrow.compute.struct_field(batch[column], "path").to_pylist()
        content = pyarrow.compute.struct_field(batch[column], "bytes")
        sizes += [size or 0 for size in pyarrow.compute.binary_length(content).to_pylist()]
    return paths, sizes


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Data sets of Hugging Face need the library datasets; pip install datasets."
        ) from None
    return datasets
