"""Which runs of an experiment are known so far, and which are left, by the rows of its results."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter

from .plan import Experiment, Run
from .results import AllFailed, Results


def known(experiment: Experiment, results: Results) -> list[Run]:
    """The experiment's runs, but those that follow from a choice which is still to be made.

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


def unfinished(experiment: Experiment, results: Results) -> list[Run]:
    """A final run of each task and method that lacks some; what it is tuned to may be open.

    Raises:
        InputError: a row is of other settings than the experiment has now.
    """
    final = [run for run in known(experiment, results) if run.stage == "final"]
    done = Counter((run.task.name, run.method.name) for run in final if results.of(run))
    return [
        Run("final", task, method, experiment.seeds[0], {})
        for task, method in itertools.product(experiment.tasks, experiment.methods)
        if done[task.name, method.name] < len(experiment.seeds)
    ]


def pending(
    experiment: Experiment, results: Results, retried: set[tuple[str, ...]] | None
) -> tuple[list[Run], int]:
    """Runs that can start now, and how many of the experiment are left.

    All tuning comes first, then final runs seed by seed. So the final runs of a seed, whose times
    are compared, are close to each other in time.

    Args:
        retried: keys of what has been tried again; None if nothing shall be.

    Raises:
        InputError: a row is of other settings than the experiment has now, or a final run of
            others than are chosen now.
    """

    def missing(run: Run) -> bool:
        row = results.of(run)
        if row is None:
            return True
        return retried is not None and row["status"] != "ok" and run.key() not in retried

    runs = known(experiment, results)
    todo = [run for run in runs if missing(run)]
    tuning = [run for run in todo if run.stage == "tuning"]
    in_tuning = {(run.task.name, run.method.name) for run in tuning}
    for run in runs:
        first = run.stage == "final" and run.seed == experiment.seeds[0]
        if first and (run.task.name, run.method.name) not in in_tuning:
            results.check_final(run)
    left = experiment.count() - len(runs) + len(todo)
    return tuning or sorted(todo, key=lambda run: run.seed), left


def without_choice(experiment: Experiment, results: Results) -> list[str]:
    """One sentence for each method that could not be tuned.

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
