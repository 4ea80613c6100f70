"""Find the runs of an experiment that are known so far, and those that are still to be done."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter

from .plan import Experiment, Run
from .results import AllFailed, Results


def known_runs(experiment: Experiment, results: Results) -> list[Run]:
    """Return the runs that are known: all but those whose settings are not chosen yet.

    Raises:
        InputError: a row is of other settings than the experiment has now.
    """
    runs: list[Run] = []
    for task, method in itertools.product(experiment.tasks, experiment.methods):
        with contextlib.suppress(AllFailed):
            inherited = results.inherited(experiment, task, method)
            if inherited is None:
                continue
            runs += experiment.tuning(task, method, inherited)
            chosen = results.chosen(experiment, task, method)
            if chosen is not None:
                runs += [Run("final", task, method, seed, chosen) for seed in experiment.seeds]
    return runs


def unfinished_finals(experiment: Experiment, results: Results) -> list[Run]:
    """Return a final run of each task and method that lacks some, without its tuned settings.

    Raises:
        InputError: a row is of other settings than the experiment has now.
    """
    final = [run for run in known_runs(experiment, results) if run.stage == "final"]
    done = Counter((run.task.name, run.method.name) for run in final if results.of(run))
    return [
        Run("final", task, method, experiment.seeds[0], {})
        for task, method in itertools.product(experiment.tasks, experiment.methods)
        if done[task.name, method.name] < len(experiment.seeds)
    ]


def pending_runs(
    experiment: Experiment, results: Results, retried: set[tuple[str, ...]] | None
) -> tuple[list[Run], int]:
    """Return the runs that can start now, and how many of the experiment are left.

    All tuning comes first, then final runs seed by seed, so that final runs of one seed, whose
    times are compared, follow each other.

    Args:
        retried: keys of the failed runs that have been repeated; None to repeat none.

    Raises:
        InputError: a row is of other settings than the experiment has now, or a final run of
            others than are chosen now.
    """

    def missing(run: Run) -> bool:
        row = results.of(run)
        if row is None:
            return True
        return retried is not None and row["status"] != "ok" and run.key() not in retried

    runs = known_runs(experiment, results)
    todo = [run for run in runs if missing(run)]
    tuning = [run for run in todo if run.stage == "tuning"]
    in_tuning = {(run.task.name, run.method.name) for run in tuning}
    for run in runs:
        first = run.stage == "final" and run.seed == experiment.seeds[0]
        if first and (run.task.name, run.method.name) not in in_tuning:
            results.check_final(run)
    left = experiment.count() - len(runs) + len(todo)
    return tuning or sorted(todo, key=lambda run: run.seed), left


def untunable(experiment: Experiment, results: Results) -> list[str]:
    """Return a sentence for each method that could not be tuned.

    Raises:
        InputError: a row is of other settings than the experiment has now.
    """
    sentences = []
    for task, method in itertools.product(experiment.tasks, experiment.methods):
        try:
            results.chosen(experiment, task, method)
        except AllFailed as error:
            sentences.append(str(error))
    return sentences
