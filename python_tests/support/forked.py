"""Start processes that are forked from one that has imported a module already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock


def start(module: str, target: Callable, *args: Any) -> Any:
    """Start a process; the first call decides which module the others find imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    process = context.Process(target=target, args=args, daemon=True)
    # Some Pythons do not tell the process that forks where the parent finds modules.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        process.start()
    return process
