"""Only the base optimizer's step writes parameters: their memory is read-only otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).parents[1] / "support" / "read_only_case.py"


def run(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CASE, what], capture_output=True, text=True)


@pytest.mark.proves("Plain loops", "never written between two steps, in read-only memory")
def test_nothing_writes_a_parameter_between_steps() -> None:
    """Every method, onto each factor, fused, unfused, attached; evaluating, saving, merging."""
    result = run("train")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("no write\n")


def test_a_write_would_be_found() -> None:
    result = run("write")
    assert result.returncode == -signal.SIGSEGV
    assert result.stdout.endswith("written next\n")
