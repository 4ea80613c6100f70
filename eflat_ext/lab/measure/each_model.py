"""Measure trained models one after the other, with progress bars and errors that name them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.finetune import loading
from eflat_ext.lab.finetune.screen import make_progress

from . import trained_models
from .config import MeasureConfig
from .trained_models import Loaded, Trained

RUN_COLUMNS = ("run", "method", "seed")
"""The first columns of every row."""
Row: TypeAlias = dict[str, Any]


def run_columns(trained: Trained) -> Row:
    """Return the values of :data:`RUN_COLUMNS`."""
    return {"run": trained.name, "method": trained.method, "seed": trained.seed}


def measure_each(
    runs: Sequence[Trained],
    config: MeasureConfig,
    work: int,
    measure: Callable[[Trained, Loaded, Callable[[], None]], list[Row]],
) -> list[Row]:
    """Return the rows of ``measure`` for each of the runs, with :func:`run_columns` in front.

    Args:
        runs: from :func:`.trained_models.find`.
        config: the settings.
        work: steps of a run's progress bar.
        measure: called with the run, the loaded model and a function that moves the bar by a step.

    Raises:
        InputError: a run cannot be loaded or measured; the message names it.
    """
    from rich.progress import TimeRemainingColumn

    rows: list[Row] = []
    with make_progress(TimeRemainingColumn()) as bars:
        for trained in runs:
            bar = bars.add_task(trained.name, total=work)
            with named_errors(trained):
                loaded = trained_models.load(trained, config)
                found = measure(trained, loaded, partial(bars.advance, bar))
            rows += [run_columns(trained) | row for row in found]
            bars.update(bar, completed=work)  # some have less to measure
            del loaded
            gc.collect()
    return rows


@contextmanager
def named_errors(trained: Trained) -> Iterator[None]:
    """Raise an error within the block as an :class:`InputError` that names the run's folder.

    A missing library is raised as it is.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except (ValueError, NotImplementedError, ImportError) as error:
        raise InputError(f"{trained.folder}: {loading.first_line(error)}") from None
    except torch.OutOfMemoryError:
        raise InputError(f"{trained.folder}: out of memory; lower --batch-size") from None
