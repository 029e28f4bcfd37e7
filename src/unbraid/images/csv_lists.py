"""Lists of images in a file: CSV or Parquet, with columns `path`, `label` and perhaps `group`."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from unbraid.base.errors import DataError, UsageError, brief, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.listing import Files, Listing, label_text, look_at, make_listing, seen_from
from unbraid.images.pictures import EXTENSIONS

CSV = (".csv", ".tsv")
PARQUET = (".parquet",)
_DELIMITERS = ",;\t|"
_LONGEST_LINE = 1 << 20  # characters

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its cells by column


def list_table(path: Path) -> Listing:
    """List the images that a CSV or Parquet file names.

    The path of an image is relative to the file's folder; its id is that path. The label is an
    output's number or a class's name.
    """
    root = os.path.abspath(path.parent)
    named: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    for where, cells in (_csv_rows if path.suffix.lower() in CSV else _parquet_rows)(path):
        named.append(os.path.join(root, _text(cells["path"], "path", where)))
        labels.append(label_text(cells["label"], where))
        if "group" in cells:
            group = cells["group"]
            groups.append(_text(str(group) if isinstance(group, int) else group, "group", where))
    files, sizes = _found(named, path)
    ids = [seen_from(root, os.path.normpath(file)) for file in files]
    return make_listing(str(path), ids, Files(files), labels, groups or None, sizes)


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell or "\0" in cell:
        raise DataError(f"{where} has no text under {column!r}; fill the cell or remove the row.")
    return cell


def _found(named: list[str], table: Path) -> tuple[list[str], list[int]]:
    """Find the files, as their names are written on disk, and how large they are, in bytes."""
    files: list[str] = []
    sizes: list[int] = []
    missing: list[str] = []
    for file in named:
        what = f"Image {one_line(file)}, which {table} names,"
        found = look_at(file, what)
        if found is None and not file.isascii():
            file = _in_other_form(file)
            found = look_at(file, what)
        if found is None:
            missing.append(file)
        else:
            files.append(file)
            sizes.append(found.st_size)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(named)} files that {table} names are not there, the first is "
            f"{one_line(missing[0])!r}; {_advice(missing[0])}."
        )
    return files, sizes


def _advice(missing: str) -> str:
    """Say what to do about the path of a file that is not there, by what is there."""
    if "://" in missing:
        return "give paths of files on this machine"
    if os.path.isfile(missing.strip()):
        return "remove the blanks around paths"
    if os.path.isfile(missing.replace("\\", "/")):
        return "write paths with / in place of \\"
    ending = next((one for one in EXTENSIONS if os.path.isfile(missing + one)), None)
    if ending:
        return f"add the ending {ending} to the names"
    return "paths are relative to the list's folder"


def _in_other_form(file: str) -> str:
    """Name a file as it is on disk, where 'é' may be one character or two."""
    folder, name = os.path.split(file)
    if not name or os.path.lexists(file):
        return file
    folder = _in_other_form(folder)
    with suppress(OSError):
        own = unicodedata.normalize("NFC", name)
        alike = (one for one in os.listdir(folder) if unicodedata.normalize("NFC", one) == own)
        name = next(alike, name)
    return os.path.join(folder, name)


def _columns(names: list[str], path: Path) -> list[str]:
    """The columns to read."""
    missing = next((name for name in ("path", "label") if name not in names), None)
    wanted: list[str] = [name for name in ("path", "label", "group") if name in names]
    double = next((name for name in wanted if names.count(name) > 1), None)
    if missing or double:
        raise DataError(
            f"{path} has {f'no column {missing!r}' if missing else f'two columns {double!r}'}; its "
            "first row must name the columns path, label and, if images belong together, group."
        )
    return wanted


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _lines(file, path)
            header = next(lines, "")
            delimiter = max(_DELIMITERS, key=header.count)
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            columns = {name: names.index(name) for name in _columns(names, path)}
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in filter(None, reader):
                where = f"Line {reader.line_num + 1} of {path}"
                if len(cells) != len(names):
                    raise DataError(
                        f"{where} has {len(cells)} cells for {len(names)} columns; put cells that "
                        f"hold {delimiter!r} in quotes."
                    )
                yield where, {name: cells[k] for name, k in columns.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise out_of_reach(f"List {path}", error) or DataError(
            f"{path} is no list that can be read ({error}); write UTF-8 CSV."
        ) from None


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise DataError(f"{path} has a line without an end; write a row for each image.")
        yield line


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path} needs pyarrow to be read; pip install pyarrow, or write CSV."
        ) from None
    n = 0
    try:
        columns = _columns(parquet.read_schema(path).names, path)
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns):
                for cells in batch.to_pylist():
                    n += 1
                    yield f"Row {n} of {path}", cells
    # The last two for dates that Python cannot hold, and damaged files that ask for any memory.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        away = out_of_reach(f"List {path}", error) if isinstance(error, OSError) else None
        raise away or DataError(
            f"{path} is no list that can be read ({brief(error)}); write it anew."
        ) from None
