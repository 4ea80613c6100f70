"""The CSV file of an experiment: one row for each run, written as soon as the run has ended.

A row cut off by a crash or a full disk is dropped when the file is read. A file that is not an
experiment's own stays as it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eflat_ext.data import InputError
from eflat_ext.plan import Experiment, Method, Run, Settings, Task

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
    """The columns of an experiment's file; those of a further test are ``accuracy@DATA``."""
    also = dict.fromkeys(data for task in experiment.tasks for data in task.also_test)
    tests = [f"{figure}@{data}" for data in also for figure in ("accuracy", "loss")]
    return [*KEY, *_STATE, *FIGURES, *tests]


class Results:
    """The rows of an experiment so far.

    Args:
        path: the file, which need not be there.
        columns: in their order.

    Raises:
        InputError: the file cannot be read, or is one of other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, list(columns)
        self._rows: dict[tuple[str, ...], Row] = {}
        for row in _read(path, self._columns):
            self._rows[tuple(row[name] for name in KEY)] = row

    def rows(self) -> list[Row]:
        """One for each run; of a run that was tried again, the last."""
        return list(self._rows.values())

    def of(self, run: Run) -> Row | None:
        """The row of ``run``, if it has ended.

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
        """Make an empty file if there is none, so that one that cannot be written is known early.

        Raises:
            InputError: it cannot be written.
        """
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("ab").close()

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
        """What is chosen for the method that this one is like; nothing if there is none.

        Raises:
            AllFailed: nothing can be.
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
        """The tuned settings of a method: those with the best mean on the validation part.

        A setting with a failed run is out. Of equally accurate ones the one with the lower loss is
        taken.

        Returns:
            None while tuning runs are missing.

        Raises:
            AllFailed: no setting is left.
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
    """No value of a grid can be chosen."""


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


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file; one cut off is dropped, once the header has shown whose file it is."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not content:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    if content.startswith(b"stage,task,") and ",".join(columns).encode().startswith(content):
        with _writing(path):
            os.truncate(path, 0)  # cut off within our header
        return []
    try:
        reader = csv.DictReader(io.StringIO(whole.decode()))
        header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"{path} holds no results of an experiment: rename or delete it") from None
    if header != list(columns):
        raise InputError(f"{path} has other columns than this experiment: rename or delete it")
    if len(whole) < len(content):
        with _writing(path):
            os.truncate(path, len(whole))
    return rows


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
