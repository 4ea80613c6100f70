"""Run an experiment in one or several processes: ``eflat experiment FILE``.

The rows in the CSV file decide which runs are left, so an interrupted experiment is resumed. A run
that fails leaves a row with its error.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eflat_ext.analysis.full_space import adapted_layers
from eflat_ext.lab.data.splits import (
    flip_labels,
    mixed_order,
    random_order,
    with_typos,
    without_texts,
)
from eflat_ext.lab.data.texts import InputError, Texts
from eflat_ext.lab.finetune import comparison, loading, objective
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.finetune.loading import first_line
from eflat_ext.lab.measure.trained_models import Batch, make_batches

from .pending import known_runs, pending_runs, unfinished_finals, untunable
from .plan import TYPOS, Experiment, Run, Sharpness, load
from .results import Results, columns_of
from .screen import experiment_progress, print_failures, print_tables
from .sources import check_sources

if TYPE_CHECKING:
    from eflat_ext.lab.finetune.loading import Model

# Sentences of a batch when sharpness is measured.
_SHARPNESS_BATCH = 32
# Of the words that can have one.
_TYPOS_SHARE = 0.3
# Settings that data and tokens do not depend on.
_OF_TRAINING = {"rank", "alpha", "lora_dropout", "target_modules", "lr", "full_lr", "weight_decay"}
_OF_TRAINING |= {"warmup", "max_grad_norm", "batch_size", "epochs", "steps"}
_OF_TRAINING |= {"rho", "beta", "onto", "norm_scope", "rtol"}


def run(
    path: Path,
    *,
    task: Sequence[str] = (),
    method: Sequence[str] = (),
    jobs: int = 1,
    retry_failed: bool = False,
    methods: Mapping[str, comparison.Builder] | None = None,
) -> Path:
    """Do the runs of an experiment's file that its CSV file lacks.

    Args:
        path: a YAML file, see :mod:`eflat_ext.lab.experiment.plan`.
        task, method: names of those to run, together with the methods' ``like``; all by default.
        jobs: processes, each with one thread; with 1, all runs are in this process, whose number
            of threads is restored afterwards.
        retry_failed: repeat the runs that failed before.
        methods: further methods by name, beside those of :data:`.comparison.METHODS`; other
            processes must be able to import the functions.

    Returns:
        The CSV file.

    Raises:
        InputError: something in the file cannot be used, the CSV file belongs to another one or
            cannot be written, or a process was killed. Rows written so far stay.
        SystemExit: with code 1, after the tables are printed, if a run has failed.
    """
    extra = methods or {}
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    experiment = load(path, {**comparison.METHODS, **extra})
    results = Results(experiment.results, columns_of(experiment))
    experiment = experiment.only(task, method)
    retried: set[tuple[str, ...]] | None = set() if retry_failed else None
    if todo := pending_runs(experiment, results, retried)[0]:
        check_sources([*todo, *unfinished_finals(experiment, results)])
        results.make_file()
    with _workers(jobs, experiment, extra) as submit, experiment_progress(experiment) as show:
        while True:
            todo, left = pending_runs(experiment, results, retried)
            show.start(left)
            if not todo:
                break
            try:
                for job, future in _in_turn(todo, submit, 1 if jobs == 1 else 2 * jobs):
                    figures = future.result()
                    if retried is not None:
                        retried.add(job.key())
                    show.done(job, results.append(job, figures))
            except BrokenProcessPool:  # of a result, or of a run that was to start
                raise InputError(
                    "a process was killed, perhaps for want of memory; run again to go on"
                ) from None
    rows = [row for job in known_runs(experiment, results) if (row := results.of(job))]
    print_tables(rows)
    print_failures(experiment, rows, untunable(experiment, results))
    if errors := [row["error"] for row in rows if row["status"] != "ok"]:
        sys.exit(f"eflat: {len(errors)} of {len(rows)} runs failed, the first with {errors[0]}")
    return experiment.results


# --- one run -----------------------------------------------------------------------------


class _Unusable(InputError):
    """Raised for layers to measure or a further test that no run can use; ends the experiment."""


class Runner:
    """Does one run at a time, and caches the last task's data, tokens and further tests.

    Args:
        experiment: whose runs are done.
        methods: beside those of :data:`eflat_ext.lab.finetune.comparison.METHODS`.
    """

    def __init__(self, experiment: Experiment, methods: Mapping[str, comparison.Builder]) -> None:
        self._experiment = experiment
        self._methods = {**comparison.METHODS, **methods}
        self._prepared: dict[str, tuple[comparison.Task, dict[str, comparison.Tokens]]] = {}
        self._errors: set[str] = set()

    def __call__(self, run: Run) -> dict[str, Any]:
        """Train and measure, and return the columns of the run's row; an error is a failed run.

        Raises:
            InputError: layers to measure or a further test cannot be used. This is checked in
                tuning runs too, so that it is found early.
        """
        start = time.perf_counter()
        try:
            figures = {"status": "ok", **self._figures(run)}
        except _Unusable:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {first_line(error)}"
            figures = {"status": "failed", "error": text}
            if not isinstance(error, (InputError, FloatingPointError)) and text not in self._errors:
                self._errors.add(text)
                traceback.print_exc()
        return {**figures, "run_seconds": round(time.perf_counter() - start, 3)}

    def train(self, run: Run) -> tuple[comparison.Task, Model, comparison.Result]:
        """Train, and return the task with its drawn sentences, the model and the figures.

        Raises:
            InputError: something in the file cannot be used.
        """
        config = run.config()
        pool, _ = self._prepare(run)
        task = draw(pool, config.train_size, run.task.label_noise, run.seed)
        task = dataclasses.replace(task, steps=comparison.count_steps(config, len(task.train)))
        builder = run.method.builder
        model, optimizer = comparison.build(config, task, builder, run.seed, self._methods)
        if self._experiment.sharpness is not None:
            try:
                adapted_layers(model, self._experiment.sharpness.layers)
            except (ValueError, NotImplementedError) as error:
                where = f"sharpness, method {run.method.name!r} on task {run.task.name!r}"
                raise _Unusable(f"{where}: {first_line(error)}") from None
        with _peak_memory() as memory:
            result = comparison.train(config, task, builder, run.seed, model, optimizer)
        result.metrics.update({**memory, **result.metrics})  # a GPU's own figure comes first
        return task, model, result

    def _figures(self, run: Run) -> dict[str, Any]:
        config = run.config()
        task, model, result = self.train(run)
        metrics = result.metrics
        if not torch.tensor([metrics["loss"], metrics["train_loss"]]).isfinite().all():
            raise FloatingPointError("the loss after training is not finite")
        if run.stage == "final":
            for name, tokens in self._prepare(run)[1].items():
                loss, accuracy = comparison.evaluate(config, task, model, tokens)
                metrics |= {f"loss@{name}": loss, f"accuracy@{name}": accuracy}
            if self._experiment.sharpness is not None:
                metrics |= measure_sharpness(self._experiment.sharpness, run, task, model)
        return metrics

    def _prepare(self, run: Run) -> tuple[comparison.Task, dict[str, comparison.Tokens]]:
        """Return the task with all sentences to draw from, and the further tests."""
        config = dataclasses.replace(run.config(), train_size=None)
        of_data = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OF_TRAINING}
        name = f"{run.stage} {run.task.name} {of_data}"  # a method may change the data
        if name not in self._prepared:
            task = comparison.prepare(config)
            also = {}
            for data in run.task.also_test:
                try:
                    part = _further_test(config, task, data)
                    also[data] = comparison.encode(config, task.tokenizer, part)
                except InputError as error:
                    where = f"task {run.task.name!r}: also_test"
                    raise _Unusable(f"{where}: {error}") from None
            self._prepared = {name: (task, also)}  # most next runs are of the same task
        return self._prepared[name]


def _further_test(config: FinetuneConfig, task: comparison.Task, data: str) -> Texts:
    """Return the data that ``also_test`` names, in the task's classes, without the task's texts."""
    if data == TYPOS:
        test = task.splits.test
        pairs = None if test.pairs is None else with_typos(test.pairs, _TYPOS_SHARE, seed=1)
        texts = with_typos(test.texts, _TYPOS_SHARE, seed=0)
        return dataclasses.replace(test, texts=texts, pairs=pairs)
    rows = without_texts(loading.read_table(config, data), task.text_keys())
    if not len(rows):
        raise InputError(f"{data} has no text that the task lacks")
    if rows.kind != task.splits.train.kind:
        raise InputError(f"{data} holds {rows.kind}, but the task {task.splits.train.kind}")
    if config.task_type == "CAUSAL_LM":
        return rows
    numbers = {label: k for k, label in enumerate(task.splits.classes)}
    if unknown := set(rows.labels) - set(numbers):
        raise InputError(f"{data} has the label {min(unknown)!r}, which the task lacks")
    labels = [numbers[label] for label in rows.labels]
    return Texts(rows.texts, labels, rows.pairs, rows.images)


def draw(pool: comparison.Task, size: int | None, label_noise: float, seed: int) -> comparison.Task:
    """Return a task with training sentences drawn by the seed, some of their labels wrong.

    Args:
        pool: the task with all sentences to draw from.
        size: sentences to draw, classes in about their overall shares; None for all.
        label_noise: share of the labels that are changed to another class.
        seed: the same for all methods, so that they train on the same.
    """
    available = len(pool.train)
    if size is not None and size > available:
        raise InputError(
            f"train_size must be at most {available}, the sentences left for training, got {size}"
        )
    order = mixed_order if pool.splits.classes else random_order
    rows = order(pool.splits.train.labels, seed)[:size]
    labels = [pool.train.labels[i] for i in rows]
    if label_noise:
        labels = flip_labels(labels, label_noise, len(pool.splits.classes), seed)
    train = comparison.Tokens([pool.train.inputs[i] for i in rows], labels)
    return dataclasses.replace(pool, train=train)


def measure_sharpness(
    settings: Sharpness, run: Run, task: comparison.Task, model: Model
) -> dict[str, float]:
    """Return the rise of the training loss in the worst direction and under random noise."""
    from eflat_ext.analysis import sharpness

    config = run.config()
    some = slice(settings.sentences)
    inputs, labels = task.train.inputs[some], task.train.labels[some]
    batches = make_batches(task.tokenizer, inputs, labels, _SHARPNESS_BATCH, task.device)

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        logits = comparison.logits_of(config, model, batch.inputs)
        return objective.loss_of(logits, batch.labels) * batch.weight

    options: dict[str, Any] = {
        "norm_scope": settings.norm_scope,
        "radius": settings.radius,
        "layers": settings.layers,
    }
    worst = sharpness.worst_case(model, loss, batches, settings.worst_rho, **options)
    random = sharpness.average_case(
        model,
        loss,
        batches,
        settings.random_rho,
        samples=settings.samples,
        seed=run.seed,
        **options,
    )
    return {"sharpness_worst": worst, "sharpness_random": random.mean}


@contextlib.contextmanager
def _peak_memory() -> Iterator[dict[str, Any]]:
    """Yield a dict that holds, after the block, the peak resident memory in it (MiB), on Linux."""
    found: dict[str, Any] = {}
    status = Path("/proc/self/status")
    gc.collect()  # hooks may hold the last run's model and optimizer in a reference cycle
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # return memory that the last run freed to the system
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    yield found
    with contextlib.suppress(OSError, StopIteration):
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        found["peak_memory_mib"] = int(line.split()[1]) / 1024


# --- processes ---------------------------------------------------------------------------

_runner: Runner


def _start_worker(
    experiment: Experiment, methods: Mapping[str, comparison.Builder], parent: Connection
) -> None:
    global _runner
    torch.set_num_threads(1)
    _runner = Runner(experiment, methods)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Exit this process when the parent closes its end of the pipe, or has ended in any way."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()  # nothing is sent: this returns at the end of the pipe
    os._exit(1)


def _run_here(run: Run) -> dict[str, Any]:
    return _runner(run)


@contextlib.contextmanager
def _workers(
    jobs: int, experiment: Experiment, methods: Mapping[str, comparison.Builder]
) -> Iterator[Any]:
    """Yield a function that starts a run and returns its future."""
    if jobs == 1:
        runner = Runner(experiment, methods)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in workers, so that rows do not depend on the number of jobs

        def at_once(run: Run) -> Future[dict[str, Any]]:
            future: Future[dict[str, Any]] = Future()
            future.set_result(runner(run))
            return future

        try:
            yield at_once
        finally:
            torch.set_num_threads(threads)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when a worker loads torch
    child_end, parent_end = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(experiment, methods, child_end),
    )
    try:
        yield lambda run: pool.submit(_run_here, run)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Ends the workers: after an error, Python's exit would wait for their runs.
        parent_end.close()
        child_end.close()


def _in_turn(todo: list[Run], submit: Any, at_a_time: int) -> Iterator[tuple[Run, Future[Any]]]:
    """Yield runs and their futures as they end, with at most ``at_a_time`` of them started."""
    waiting = iter(todo)
    under_way: dict[Future[Any], Run] = {}
    while True:
        for job in waiting:
            under_way[submit(job)] = job
            if len(under_way) >= at_a_time:
                break
        if not under_way:
            return
        ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in ended:
            yield under_way.pop(future), future
