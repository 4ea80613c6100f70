"""Run `eflat experiment` with the methods of bench/methods added.

    python -m bench.experiment bench/experiments/movies_256.yaml --jobs 2

It can be stopped at any time; the same command resumes it. `python -m bench.report bench/results`
writes the report of all results.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import cyclopts

from bench.methods.remembered import lora_sam_memory
from bench.methods.rivals import RIVALS
from bench.methods.variants import VARIANTS
from eflat_ext.lab import cli
from eflat_ext.lab.data.tables import InputError

METHODS = {**RIVALS, **VARIANTS, "lora-sam-memory": lora_sam_memory}


@functools.wraps(cli.experiment)
def main(*arguments: Any, **settings: Any) -> None:
    try:
        cli.experiment(*arguments, **settings, methods=METHODS)
    except InputError as error:
        print(f"eflat: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cyclopts.run(main)
