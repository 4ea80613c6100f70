"""Read labelled text: corpora of packages, CSV and JSONL files, hub data sets."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .corpora import CORPORA
from .texts import InputError, Table

# A row with the place that errors name.
_Row = tuple[str, dict[Any, Any]]


def read(
    source: str,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    image_column: str | None = None,
) -> Table:
    """Read ``source``: a corpus of a package, a .csv, .tsv or .jsonl file, or a hub data set.

    Corpora are those of :data:`eflat_ext.lab.data.corpora.CORPORA`; they have columns of their own.
    A hub data set is written ``name[:configuration][@split]`` (split "train" by default) and
    needs the ``datasets`` package. An image is a path, from the folder of the file if it is
    relative, or an image of a hub data set.

    Raises:
        InputError: the source cannot be found or read, lacks a column or has it twice, or holds
            a row longer than its header, or an empty text, second text or label.
    """
    if source in CORPORA:
        return CORPORA[source]()
    path = Path(source)
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        rows = _read_file(path, source)
    elif os.path.exists(path):  # False for an impossible name, too
        raise InputError(f"{source} is of no known format: give a .csv, .tsv or .jsonl file")
    else:
        rows = _read_hub(source)
    if not rows:
        raise InputError(f"{source} holds no rows")
    texts, labels = (_column(rows, name, source) for name in (text_column, label_column))
    pairs = None if text_pair_column is None else _column(rows, text_pair_column, source)
    images = None if image_column is None else _images(rows, image_column, source)
    return Table(texts, labels, pairs, images)


def _read_file(path: Path, source: str) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return _read_jsonl(file, source)
            return _read_csv(file, source, "\t" if path.suffix.lower() == ".tsv" else ",")
    except UnicodeDecodeError:
        raise InputError(f"{source} is not text in UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None


def _read_csv(file: Iterable[str], source: str, delimiter: str) -> list[_Row]:
    # Not by datasets or pandas: of rows longer than the header they drop the first fields.
    csv.field_size_limit(2**31 - 1)  # a field may be a whole document
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        rows = [(f"{source}, row {number}", row) for number, row in enumerate(reader, start=1)]
    except csv.Error as error:
        raise InputError(
            f"{source} is no valid CSV at line {reader.reader.line_num}: {error}"
        ) from None
    names = list(reader.fieldnames or [])
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{source} has two columns {twice[0]!r}")
    for place, row in rows:
        if surplus := row.get(None):
            mark = "tab" if delimiter == "\t" else "comma"
            raise InputError(
                f"{place} has {len(names) + len(surplus)} fields, the header {len(names)}: "
                f"quote texts that hold a {mark}"
            )
    return rows


def _read_jsonl(file: Iterable[str], source: str) -> list[_Row]:
    # Not by datasets or pyarrow: they turn texts into dates, and labels 1 and 0.5 into floats.
    rows = []
    for number, line in enumerate(file, start=1):
        place = f"{source}, line {number}"
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
                reason = getattr(error, "msg", error)
                raise InputError(f"{place} is no valid JSON: {reason}") from None
            if not isinstance(row, dict):
                raise InputError(f"{place} is no JSON object")
            rows.append((place, row))
    return rows


def _read_hub(source: str) -> list[_Row]:
    near = difflib.get_close_matches(source.lower(), CORPORA, 1, cutoff=0.8)
    meant = f"; did you mean {near[0]}?" if near else ""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source!r} is no .csv, .tsv or .jsonl file; if it names a data set of the Hugging "
            f"Face hub, install the package 'datasets' to read it{meant}"
        ) from None
    name, _, split = source.partition("@")
    name, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split or "train")
        features, rows = loaded.features, list(loaded)
    except Exception as error:  # the library's own exceptions are many and change by version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load the hub data set {source!r}: {reason[0]}{meant}") from None
    for column, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            for row in rows:  # in which hub test sets mark a hidden label with -1
                hidden = row[column] is None or row[column] < 0
                row[column] = None if hidden else kind.int2str(row[column])
    return [(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _column(rows: Sequence[_Row], column: str, source: str) -> list[str]:
    """Return a column as words.

    Raises:
        InputError: there is no such column, or a value in it is empty or no Unicode.
    """
    if column not in rows[0][1]:
        there = ", ".join(map(str, rows[0][1]))
        raise InputError(f"{source} has no column {column!r}; it has: {there}")
    values = []
    for place, row in rows:
        value = row.get(column)
        value = "" if value is None else str(value).strip()
        if not value:
            raise InputError(f"{place}: column {column!r} is empty")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InputError(
                f"{place}: column {column!r} holds half a surrogate pair, which is no character"
            )
        values.append(value)
    return values


def _images(rows: Sequence[_Row], column: str, source: str) -> list[Any]:
    """Return a column of images: of Pillow, or paths, which are relative to the file's folder."""
    images: list[Any] = [row.get(column) for _, row in rows]
    if any(image is None or isinstance(image, str) for image in images):
        images = [str(Path(source).parent / path) for path in _column(rows, column, source)]
        if missing := [path for path in images if not os.path.isfile(path)]:
            raise InputError(f"{source}: there is no image {missing[0]}")
    for (place, _), image in zip(rows, images, strict=True):
        if not isinstance(image, str) and not hasattr(image, "convert"):
            raise InputError(
                f"{place}: column {column!r} must be the path of an image, or one of Pillow, "
                f"got a {type(image).__name__}"
            )
    return images
