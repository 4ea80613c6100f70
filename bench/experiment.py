"""`eflat experiment` with the rivals and variants of bench/ among the methods.

    python bench/experiment.py bench/experiments/movies_256.yaml --jobs 2

It can be stopped at any time; the same command goes on where it was. bench/report.py makes the
report of all results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cyclopts
from rivals import RIVALS
from variants import VARIANTS

from eflat_ext import experiment
from eflat_ext.data import InputError

METHODS = {**RIVALS, **VARIANTS}


def main(
    file: Path,
    *,
    task: list[str] | None = None,
    method: list[str] | None = None,
    jobs: int = 1,
    retry_failed: bool = False,
) -> None:
    """Run an experiment; see `eflat experiment --help`.

    Args:
        file: YAML file of the experiment.
        task: run only this task of the file; may be given several times.
        method: run only this method, and the one that it is like; may be given several times.
        jobs: processes, each with one thread.
        retry_failed: run again what failed before.
    """
    try:
        experiment.run(
            file,
            task=task or (),
            method=method or (),
            jobs=jobs,
            retry_failed=retry_failed,
            methods=METHODS,
        )
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    cyclopts.run(main)
