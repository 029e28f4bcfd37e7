"""Lists of images in a file: CSV or Parquet, with columns `path`, `label` and perhaps `group`."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from unbraid.base.errors import DataError, UsageError, out_of_reach
from unbraid.base.tables import one_line
from unbraid.images.identity import seen_from
from unbraid.images.listing import Listing, by_class, look_at
from unbraid.images.pictures import EXTENSIONS, read_picture
from unbraid.networks.class_names import output_number

CSV = (".csv", ".tsv")
PARQUET = (".parquet",)
_NEEDED, _OPTIONAL = ("path", "label"), "group"
_DELIMITERS = ",;\t|"
_LONGEST_LINE = 1 << 20  # characters
_LONGEST_CELL = 1 << 14  # bytes of a cell in Parquet
_ROWS = 1 << 12  # of Parquet read in one go

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its cells by column


@dataclass(frozen=True)
class Files:
    """Reads image files by place."""

    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        """Read one image."""
        return read_picture(self.paths[index])


def list_table(path: Path) -> Listing:
    """List the images that a CSV or Parquet file names.

    The path of an image is relative to the file's folder; its id is that path. The label is an
    output's number or a class's name.

    Raises:
        OutOfReach: the system fails to give the list, or to look at a file that it names.
        DataError: the file is missing or damaged, lacks a column or a cell, names an image twice,
            or names files that are not there.
        UsageError: it is Parquet, and pyarrow is not installed.
    """
    root = os.path.abspath(path.parent)
    paths: dict[str, str] = {}  # by id
    labels: list[str] = []
    groups: list[str] = []
    for where, cells in (_csv_rows if path.suffix.lower() in CSV else _parquet_rows)(path):
        name = _text(cells["path"], "path", where)
        one = seen_from(root, os.path.normpath(os.path.join(root, name)))
        if one in paths:
            raise DataError(f"{where} names {one_line(name)} a second time; name each image once.")
        paths[one] = os.path.join(root, name)
        labels.append(_label(cells["label"], where))
        if _OPTIONAL in cells:
            group = cells[_OPTIONAL]
            groups.append(_text(str(group) if isinstance(group, int) else group, _OPTIONAL, where))
    classes, class_of = by_class(labels, str(path))
    files, sizes = _found(list(paths.values()), path)
    ids = [seen_from(root, os.path.normpath(file)) for file in files]
    twice = next((one for one, n in Counter(ids).items() if n > 1), None)
    if twice is not None:
        raise DataError(f"{path} names {one_line(twice)} a second time; name each image once.")
    return Listing(
        source=str(path),
        ids=ids,
        read=Files(files),
        classes=classes,
        class_of=class_of,
        groups=groups or None,
        sizes=sizes,
    )


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell or "\0" in cell:
        raise DataError(f"{where} has no text under {column!r}; fill the cell or remove the row.")
    return cell


def _label(cell: Any, where: str) -> str:
    number = output_number(cell)
    if number is not None:
        cell = str(number)
    elif isinstance(cell, int) and not isinstance(cell, bool):
        cell = str(cell)  # negative, to be told
    if not isinstance(cell, str) or not cell.strip() or cell.strip().startswith("-"):
        raise DataError(
            f"{where} has the label {one_line(repr(cell))}; give an output's number or a class's "
            "name."
        )
    return cell.strip()


def _found(files: list[str], table: Path) -> tuple[list[str], list[int]]:
    """Find the files, as their names are written on disk, and how large they are, in bytes."""
    there: list[str] = []
    sizes: list[int] = []
    missing: list[str] = []
    for named in files:
        what = f"Image {one_line(named)}, which {table} names,"
        file, found = named, look_at(named, what)
        if found is None and not named.isascii():
            file = _in_other_form(named)
            found = look_at(file, what)
        if found is None:
            missing.append(named)
        else:
            there.append(file)
            sizes.append(found.st_size)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files that {table} names are not there, the first is "
            f"{one_line(missing[0])!r}; {_advice(missing[0])}."
        )
    return there, sizes


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


def _check_columns(names: list[str], path: Path) -> list[str]:
    """The columns to read."""
    missing = [name for name in _NEEDED if name not in names]
    wanted = [*_NEEDED, _OPTIONAL]
    double = next((name for name in wanted if names.count(name) > 1), None)
    if missing or double:
        fault = f"no column {missing[0]!r}" if missing else f"two columns {double!r}"
        raise DataError(
            f"{path} has {fault}; its first row must name the columns path, label and, if images "
            "belong together, group."
        )
    return [name for name in wanted if name in names]


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _lines(file, path)
            header = next(lines, "")
            delimiter = max(_DELIMITERS, key=header.count)
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            columns = {name: names.index(name) for name in _check_columns(names, path)}
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in reader:
                where = f"Line {reader.line_num + 1} of {path}"
                if not cells:
                    continue
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
    try:
        schema = parquet.read_schema(path)
        columns = _check_columns(schema.names, path)
        texts = [name for name in columns if _is_text(schema.field(name).type, name, path)]
        # As dictionaries, since a long text that stands in the file once may be in all its rows.
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            n = 0
            for batch in file.iter_batches(columns=columns, batch_size=_ROWS):
                for cells in _written_out(batch, path).to_pylist():
                    n += 1
                    yield f"Row {n} of {path}", cells
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = one_line(str(error)) or type(error).__name__
        # A damaged file may ask for any memory, which says nothing of the system.
        away = out_of_reach(f"List {path}", error) if isinstance(error, OSError) else None
        raise away or DataError(
            f"{path} is no list that can be read ({reason}); write it anew."
        ) from None


def _is_text(kind: Any, column: str, path: Path) -> bool:
    """Whether a column of Parquet holds texts; no Python object can hold some dates and the like.

    Raises:
        DataError: it holds neither texts nor numbers.
    """
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(inner) or types.is_large_string(inner):
        return True
    if types.is_null(inner) or (types.is_primitive(inner) and not types.is_temporal(inner)):
        return False
    raise DataError(
        f"{path} holds {one_line(str(kind))} under {column!r}; write texts, or numbers as labels "
        "and groups."
    )


def _written_out(batch: Any, path: Path) -> Any:
    """A batch with texts in place of dictionaries, unless they would be too long."""
    import pyarrow
    from pyarrow import compute, types

    columns = []
    for column in batch.columns:
        coded = types.is_dictionary(column.type)
        if coded and not types.is_primitive(column.type.value_type):
            longest = compute.max(compute.binary_length(column.dictionary)).as_py()
            if (longest or 0) > _LONGEST_CELL:
                raise DataError(
                    f"{path} has a cell of {longest} bytes, more than {_LONGEST_CELL}; mend it."
                )
        columns.append(column.dictionary_decode() if coded else column)
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
