"""Run a file of tests in a process of its own, with other settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(tests: Path, *options: str, **settings: str) -> None:
    """Run pytest on a file with these environment variables.

    Raises:
        AssertionError: a test failed, or none ran; with the end of the report.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-n", "0", str(tests), *options],
        env={**os.environ, **settings},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
