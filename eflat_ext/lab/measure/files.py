"""Check the output files of a measuring command before it measures, and write them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eflat_ext.lab.data.texts import InputError

Columns = tuple[str, ...]


def check_files(files: Mapping[Path, Columns], read: Iterable[str]) -> None:
    """Raise :class:`InputError` if a file cannot be written or is not one of this command.

    Args:
        files: the files to write, ``--output`` first, each with the columns of a CSV file or the
            names in a JSON file; empty for a figure. A file with other columns is not overwritten,
            nor is a figure without the file of its numbers beside it.
        read: names of the data files, which are never overwritten.
    """
    output = next(iter(files))
    # Path.exists raises where the name is too long.
    sources = [Path(name) for name in read if os.path.exists(name)]
    for path, columns in files.items():
        with writing(path, output):
            exists = path.exists()
            for source in sources:
                if exists and path.samefile(source):
                    raise InputError(f"{_named(path, output)} would overwrite the data, {source}")
            if columns and path.is_file() and not _has_columns(path, columns):
                raise InputError(
                    f"{_named(path, output)} would overwrite a file whose columns are not "
                    f"{','.join(columns)}"
                )
            if exists and not columns and not any(files[o] and o.exists() for o in files):
                raise InputError(
                    f"{_named(path, output)} would overwrite a figure that has no file of "
                    "numbers beside it"
                )
    for path in files:
        with writing(path, output):
            _check_writable(path)


@contextmanager
def writing(path: Path, output: Path) -> Iterator[None]:
    """Raise an OSError within the block as an :class:`InputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {_named(path, output)}: {error.strerror or error}"
        ) from None


def make_folder(path: Path) -> None:
    """Make the folder of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)


def write_csv(path: Path, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, each with a value for every column, and a header."""
    make_folder(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _check_writable(path: Path) -> None:
    """Raise OSError if the file cannot be written; leave no new file or folder."""
    missing = [folder for folder in path.parents if not folder.exists()]
    new = not path.exists()
    try:
        make_folder(path)
        path.open("ab").close()
        if new:
            path.unlink()
    finally:
        for folder in missing:
            if folder.exists():
                folder.rmdir()


def _named(path: Path, output: Path) -> str:
    return f"--output {path}" if path == output else f"{path} beside --output {output}"


def _has_columns(path: Path, columns: Columns) -> bool:
    """Return True if the file is empty or has these columns (in JSON, these names)."""
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(path.read_bytes() or "null")
        except ValueError:
            return False
        return content is None or (isinstance(content, dict) and tuple(content) == columns)
    expected = ",".join(columns).encode()
    with path.open("rb") as file:
        return file.readline(len(expected) + 2).rstrip(b"\r\n") == expected or not file.tell()
