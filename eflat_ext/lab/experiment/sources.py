"""Check that the models and data of an experiment can be read, before its first run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from eflat_ext.lab.data.corpora import CORPORA
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.finetune import loading
from eflat_ext.lab.finetune.config import FinetuneConfig

from .plan import TYPOS, Run


def check_sources(runs: Iterable[Run]) -> None:
    """Read the data of all runs, except corpora of packages, and look for the models.

    Raises:
        InputError: something is missing or cannot be read; the message names it, its task and, for
            a relative path, the folder that it was looked for in.
    """
    seen: set[tuple[str | None, ...]] = set()
    for run in runs:
        config = run.config()
        names = config.data, config.test_data, *run.task.also_test
        columns = config.text_column, config.label_column, config.text_pair_column
        for name in dict.fromkeys(names):
            key = name, *columns, config.image_column
            if name is None or name in (TYPOS, *CORPORA) or key in seen:
                continue
            seen.add(key)
            try:
                loading.read_table(config, name)
            except InputError as error:
                raise _of_task(run, error, name) from None
        if (config.model,) not in seen:
            seen.add((config.model,))
            try:
                _find_model(config)
            except InputError as error:
                raise _of_task(run, error, config.model) from None


def _find_model(config: FinetuneConfig) -> None:
    path = loading.find_model(config.model)
    if not os.path.isdir(path):  # the hub's: its tokenizer tells whether it can be had
        loading.load_tokenizer(path, config)


def _of_task(run: Run, error: InputError, name: str) -> InputError:
    looked = not os.path.isabs(name) and not os.path.exists(name)  # of any length
    where = f" ({name} was looked for in {Path.cwd()})" if looked else ""
    return InputError(f"task {run.task.name!r}: {error}{where}")
