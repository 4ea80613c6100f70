"""Only the base optimizer's step writes parameters: their memory is read-only otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASE = Path(__file__).parents[1] / "support" / "read_only_case.py"


@pytest.fixture(scope="module")
def result() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CASE], capture_output=True, text=True)


@pytest.mark.proves("Plain loops", "never written between two steps, in read-only memory")
def test_nothing_writes_a_parameter_between_steps(result: Any) -> None:
    """Every method, onto each factor, fused, unfused, attached; evaluating, saving, merging."""
    assert "no write\n" in result.stdout, result.stderr


def test_a_write_would_be_found(result: Any) -> None:
    assert result.returncode == -signal.SIGSEGV
    assert result.stdout.endswith("no write\nwritten next\n")
