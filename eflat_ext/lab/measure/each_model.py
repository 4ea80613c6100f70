"""Measuring everything trained, one after the other."""

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

ABOUT = ("run", "method", "seed")
"""The first columns of every row."""
Row: TypeAlias = dict[str, Any]


def about(one: Trained) -> Row:
    """The values of :data:`ABOUT`."""
    return {"run": one.name, "method": one.method, "seed": one.seed}


def measure_each(
    runs: Sequence[Trained],
    config: MeasureConfig,
    work: int,
    measure: Callable[[Trained, Loaded, Callable[[], None]], list[Row]],
) -> list[Row]:
    """What ``measure`` finds for each of the runs, with :func:`about` before it.

    Args:
        work: steps of a run's progress bar.
        measure: called with the run, loaded, and what moves its bar on by a step.

    Raises:
        InputError: a run cannot be loaded or measured; the message names it.
    """
    from rich.progress import TimeRemainingColumn

    rows: list[Row] = []
    with make_progress(TimeRemainingColumn()) as bars:
        for one in runs:
            bar = bars.add_task(one.name, total=work)
            with named_errors(one):
                loaded = trained_models.load(one, config)
                found = measure(one, loaded, partial(bars.advance, bar))
            rows += [about(one) | row for row in found]
            bars.update(bar, completed=work)  # some have less to measure
            del loaded
            gc.collect()
    return rows


@contextmanager
def named_errors(trained: Trained) -> Iterator[None]:
    """What cannot be measured there as an :class:`InputError` that names the folder.

    A missing library is not the folder's fault and goes on as it is.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except (ValueError, NotImplementedError, ImportError) as error:
        raise InputError(f"{trained.folder}: {loading.first_line(error)}") from None
    except torch.OutOfMemoryError:
        raise InputError(f"{trained.folder}: out of memory; lower --batch-size") from None
