"""What ``setup.py`` decides and runs: imported by it alone, and part of no wheel."""

from __future__ import annotations

from typing import NoReturn


class CannotBuild(Exception):
    """A module cannot be compiled here; the message says why."""


class NothingToBuild(CannotBuild):
    """There is nothing to compile it with or for, which is no failure unless it is asked for."""


def fail(message: object) -> NoReturn:
    """End the build with one sentence."""
    raise SystemExit(f"eflat_ext: {message}")
