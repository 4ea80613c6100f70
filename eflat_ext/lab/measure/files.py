"""The files that a measuring command writes, checked before it measures."""

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
    """Raise :class:`InputError` if a file cannot be written or holds what nobody asked to lose.

    Args:
        files: all that will be written, ``--output`` first, with the columns of a CSV file or the
            names in a JSON file. One with others is not overwritten; nor is a figure, which has
            none, where the file of its numbers is missing.
        read: names of files that are read.
    """
    output = next(iter(files))
    # Path.exists raises where the name is too long.
    sources = [Path(name) for name in read if os.path.exists(name)]
    for path, columns in files.items():
        with writing(path, output):
            there = path.exists()
            for source in sources:
                if there and path.samefile(source):
                    raise InputError(f"{_named(path, output)} would overwrite the data, {source}")
            if columns and path.is_file() and not _holds(path, columns):
                raise InputError(
                    f"{_named(path, output)} would overwrite a file whose columns are not "
                    f"{','.join(columns)}"
                )
            if there and not columns and not any(files[o] and o.exists() for o in files):
                raise InputError(
                    f"{_named(path, output)} would overwrite a figure that has not its numbers "
                    "beside it"
                )
    for path in files:
        with writing(path, output):
            _try(path)


@contextmanager
def writing(path: Path, output: Path) -> Iterator[None]:
    """Within, an OSError becomes an InputError on ``path``, --output or a file beside it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {_named(path, output)}: {error.strerror or error}"
        ) from None


def make_folder(path: Path) -> None:
    """The folder of a file that is about to be written."""
    path.parent.mkdir(parents=True, exist_ok=True)


def write_csv(path: Path, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, each with a value for every column."""
    make_folder(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _try(path: Path) -> None:
    """OSError unless the file can be written; nothing is left behind."""
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


def _holds(path: Path, columns: Columns) -> bool:
    """Whether the file is empty or starts with these columns, as :func:`write_csv` writes them.

    Or, in JSON, has these names.
    """
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(path.read_bytes() or "null")
        except ValueError:
            return False
        return content is None or (isinstance(content, dict) and tuple(content) == columns)
    expected = ",".join(columns).encode()
    with path.open("rb") as file:
        return file.readline(len(expected) + 2).rstrip(b"\r\n") == expected or not file.tell()
