"""Read and write the CSV file of an experiment, one row for each run that has ended.

A row cut off by a crash or a full disk is dropped when the file is read. A file that lacks the
columns of further tests, of tasks added later, gets them before the next row. A file with other
columns is refused and not changed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eflat_ext.lab.data.texts import InputError

from .plan import Experiment, Method, Run, Settings, Task

Row = dict[str, str]

KEY = ("stage", "task", "method", "seed", "tuned")
_STATE = ("status", "error", "digest")
FIGURES = (
    "evaluated_on",
    "accuracy",
    "loss",
    "train_loss",
    "steps",
    "seconds_per_step",
    "peak_memory_mib",
    "trainable_parameters",
    "skipped_perturbations",
    "sharpness_worst",
    "sharpness_random",
    "run_seconds",
    "device",
)


def columns_of(experiment: Experiment) -> list[str]:
    """Return the columns of an experiment's CSV file, with ``accuracy@DATA`` for further tests."""
    also = dict.fromkeys(data for task in experiment.tasks for data in task.also_test)
    tests = [f"{figure}@{data}" for data in also for figure in ("accuracy", "loss")]
    return [*KEY, *_STATE, *FIGURES, *tests]


class Results:
    """The rows of an experiment so far.

    Args:
        path: the CSV file; it may be missing.
        columns: of the file, in their order.

    Raises:
        InputError: the file cannot be read, or has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, list(columns)
        self._rows: dict[tuple[str, ...], Row] = {}
        header, rows = _read(path, self._columns)
        self._lacks_columns = header != self._columns
        for row in rows:
            self._rows[tuple(row[name] for name in KEY)] = row

    def of(self, run: Run) -> Row | None:
        """Return the row of ``run``, or None if it has not ended.

        Raises:
            InputError: the row is of other settings than the experiment has now.
        """
        row = self._rows.get(run.key())
        if row is not None and row["digest"] != run.digest():
            raise InputError(
                f"{self._path} holds runs of {run.method.name!r} on {run.task.name!r} with other "
                "settings than the experiment has now: rename or delete it"
            )
        return row

    def check_final(self, run: Run) -> None:
        """Raise :class:`InputError` if there are final runs of other tuned settings than this."""
        for row in self._rows.values():
            same = (row["stage"], row["task"], row["method"]) == run.key()[:3]
            if same and row["tuned"] != run.key()[-1]:
                raise InputError(
                    f"{self._path} holds final runs of {run.method.name!r} on {run.task.name!r} "
                    f"with {row['tuned']}, but now {run.key()[-1]} is chosen: delete those rows"
                )

    def make_file(self) -> None:
        """Create the file if it is missing, so that an unwritable path is found early.

        A file that lacks some of the columns gets them, with empty cells. Call before ``append``.

        Raises:
            InputError: it cannot be written.
        """
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("ab").close()
            if self._lacks_columns:
                self._add_columns()

    def _add_columns(self) -> None:
        _, rows = _read(self._path, self._columns)
        wider = self._path.with_name(f"unfinished-{self._path.name}")
        try:
            with wider.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self._path, wider)
            os.replace(wider, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                wider.unlink()
            raise
        self._lacks_columns = False

    def append(self, run: Run, figures: Mapping[str, Any]) -> Row:
        """Write the row of a run that has ended.

        Raises:
            InputError: the file cannot be written.
        """
        row = dict.fromkeys(self._columns, "")
        row.update({name: str(value) for name, value in figures.items() if name in row})
        row.update(zip(KEY, run.key(), strict=True), digest=run.digest())
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, lineterminator="\n")
        with _writing(self._path), self._path.open("ab") as file:
            if not self._path.stat().st_size:
                writer.writeheader()
            writer.writerow(row)
            file.write(buffer.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows[run.key()] = row
        return row

    def inherited(self, experiment: Experiment, task: Task, method: Method) -> Settings | None:
        """Return the settings chosen for the method's ``like``; none if it has no ``like``.

        Returns:
            None while tuning runs are missing.

        Raises:
            AllFailed: no value can be chosen.
            InputError: a row is of other settings than the experiment has now.
        """
        if method.like is None:
            return {}
        try:
            return self.chosen(experiment, task, experiment.method(method.like))
        except AllFailed:
            raise AllFailed(
                f"{method.name} on {task.name}: nothing can be chosen for {method.like}, which it "
                "is like"
            ) from None

    def chosen(self, experiment: Experiment, task: Task, method: Method) -> Settings | None:
        """Return the tuned settings of a method: those with the best mean on the validation part.

        Settings with a failed run are never chosen. Ties in accuracy are decided by the loss, and
        the other way round.

        Returns:
            None while tuning runs are missing.

        Raises:
            AllFailed: no setting is left.
            InputError: a row is of other settings than the experiment has now.
        """
        inherited = self.inherited(experiment, task, method)
        if inherited is None or not method.tune:
            return inherited
        scores: dict[str, list[tuple[float, float]]] = {}
        for run in experiment.tuning(task, method, inherited):
            row = self.of(run)
            if row is None:
                return None
            scores.setdefault(run.key()[-1], []).append(_score(row, experiment.choose_by))
        best = max(scores, key=lambda tuned: _mean(scores[tuned]))
        if not math.isfinite(_mean(scores[best])[0]):
            raise AllFailed(f"{method.name} on {task.name}: every tuning value has a failed run")
        settings: Settings = json.loads(best)
        return settings


class AllFailed(Exception):
    """Raised when no value of a grid can be chosen, since each has a failed run."""


def _score(row: Row, by: str) -> tuple[float, float]:
    if row["status"] != "ok":
        return -math.inf, -math.inf
    if row["evaluated_on"] != "validation":
        raise AssertionError("settings are chosen on the validation part alone")
    loss, accuracy = -float(row["loss"]), float(row["accuracy"])
    return (accuracy, loss) if by == "accuracy" else (loss, accuracy)


def _mean(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = (statistics.fmean(column) for column in zip(*scores, strict=True))
    return first, second


def _read(path: Path, columns: list[str]) -> tuple[list[str], list[Row]]:
    """Return the header and the rows of a file, which may lack columns of further tests.

    A row cut off is removed from the file, if the header is an experiment's.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return columns, []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not content:
        return columns, []
    whole = content[: content.rfind(b"\n") + 1]
    if content.startswith(b"stage,task,") and ",".join(columns).encode().startswith(content):
        with _writing(path):
            os.truncate(path, 0)  # cut off within our header
        return columns, []
    try:
        reader = csv.DictReader(io.StringIO(whole.decode()))
        header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path} holds no results of an experiment: rename or delete it") from None
    own = len(KEY) + len(_STATE) + len(FIGURES)
    if header[:own] != columns[:own] or sorted(header) != sorted(set(header) & set(columns)):
        raise InputError(f"{path} has other columns than this experiment: rename or delete it")
    if len(whole) < len(content):
        with _writing(path):
            os.truncate(path, len(whole))
    return header, [{name: row.get(name) or "" for name in columns} for row in rows]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
