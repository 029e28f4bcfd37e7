"""Lists of images: CSV or Parquet with columns `path`, `label`, `group`; rows of Hugging Face."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.base.arguments import a_type
from unbraid.base.errors import DataError, UnbraidError, UsageError, brief, out_of_reach
from unbraid.base.tables import count, one_line
from unbraid.images.broken import UNLABELLED
from unbraid.images.listing import Listing, files_at, label_text, look_at, make_listing, seen_from
from unbraid.images.pictures import decode_picture, read_picture
from unbraid.images.tensors import refuse_both
from unbraid.networks.class_names import output_number

CSV = (".csv", ".tsv")
PARQUET = (".parquet",)
_DELIMITERS = ",;\t|"
_LONGEST_LINE = 1 << 20  # characters
_N_ROWS = 100  # of Hugging Face's, looked at in one go

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its cells by column


def list_table(path: Path) -> Listing:
    """List the images that a CSV or Parquet file names, by paths from its folder.

    An image on several lines, with another label on each, is an item for each of them.
    """
    root = os.path.abspath(path.parent)
    files: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    try:
        for where, cells in (_csv_rows if path.suffix.lower() in CSV else _parquet_rows)(path):
            files.append(os.path.join(root, _text(cells["path"], "path", where)))
            labels.append(label_text(cells["label"], where))
            if "group" in cells:
                group = cells["group"]
                group = str(group) if isinstance(group, int) else group
                groups.append(_text(group, "group", where))
    except UnbraidError:
        raise
    except Exception as error:  # of the system, csv and arrow, in many kinds
        raise out_of_reach(f"List {path}", error) or DataError(
            f"{path} is no list that can be read ({brief(error)}); write it again, CSV in UTF-8."
        ) from None
    looks = [look_at(file, f"Image {one_line(file)}, which {path} names,") for file in files]
    missing = [file for file, found in zip(files, looks, strict=True) if found is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files that {path} names are not there, the first is "
            f"{one_line(missing[0])!r}; give paths from the list's folder, with / and endings."
        )
    ids = [seen_from(root, os.path.normpath(file)) for file in files]
    sizes = [found.st_size for found in looks if found is not None]
    refuse_both(str(path), files)
    if len(set(ids)) < len(ids):
        return _one_per_label(path, ids, files, labels, groups, sizes)
    return make_listing(str(path), ids, files_at(files), labels, groups or None, sizes)


def _one_per_label(
    path: Path,
    images: list[str],
    files: list[str],
    labels: list[str],
    groups: list[str],
    sizes: list[int],
) -> Listing:
    """List images of which some have several labels; those of an image lie together, as a group."""
    lines: dict[str, list[int]] = {}
    for line, image in enumerate(images):
        lines.setdefault(image, []).append(line)
    for image, own in lines.items():
        if len({labels[line] for line in own}) < len(own):
            raise DataError(
                f"{path} names {one_line(image)} a second time; name each image once, or once for "
                "each of several labels."
            )
        if groups and len({groups[line] for line in own}) > 1:
            raise DataError(
                f"{path} has {one_line(image)} in several groups; give one for all its labels."
            )
    order = [line for own in lines.values() for line in own]
    several = {line for own in lines.values() if len(own) > 1 for line in own}
    return make_listing(
        str(path),
        [images[k] + (f" as {labels[k]}" if k in several else "") for k in order],
        files_at([files[lines[images[k]][0]] for k in order]),
        [labels[k] for k in order],
        [(groups or images)[k] for k in order],
        [sizes[k] for k in order],
    )


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell or "\0" in cell:
        raise DataError(f"{where} has no text under {column!r}; fill the cell or remove the row.")
    return cell


def _columns(names: list[str], path: Path) -> list[str]:
    """The columns to read."""
    wanted: list[str] = [name for name in ("path", "label", "group") if name in names]
    if wanted[:2] != ["path", "label"] or any(names.count(name) > 1 for name in wanted):
        found = one_line(", ".join(names))[:200]
        raise DataError(
            f"{path} has {f'the columns {found}' if found else 'no columns'}; its first row must "
            "name path, label and, if images belong together, group, each once."
        )
    return wanted


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # A longer line comes in pieces, which the reader joins or refuses.
        lines = iter(partial(file.readline, _LONGEST_LINE), "")
        header = next(lines, "")
        delimiter = max(_DELIMITERS, key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        columns = {name: names.index(name) for name in _columns(names, path)}
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        for cells in filter(None, reader):
            where = f"Line {reader.line_num + 1} of {path}"
            if len(cells) != len(names):
                raise DataError(
                    f"{where} has {count(len(cells), 'cell')} for {count(len(names), 'column')}; "
                    f"put cells that hold {delimiter!r} in quotes."
                )
            yield where, {name: cells[k] for name, k in columns.items()}


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path} needs pyarrow to be read; pip install pyarrow, or write CSV."
        ) from None
    columns = _columns(parquet.read_schema(path).names, path)
    n = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            for cells in batch.to_pylist():
                n += 1
                yield f"Row {n} of {path}", cells


# --- rows of Hugging Face -------------------------------------------------------------------------


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
            f"{source} is {a_type(dataset)}; pass a datasets.Dataset, which has a length."
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
