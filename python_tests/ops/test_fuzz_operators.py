"""10,000 random calls of the operators, most of them wrong, in a process of their own.

``EFLAT_FUZZ_SEED`` and ``EFLAT_FUZZ_CALLS`` give other calls. A call that ends the process or hangs
is the last one that it has printed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import cpu_only

SEED = int(os.environ.get("EFLAT_FUZZ_SEED", "0"))
CALLS = int(os.environ.get("EFLAT_FUZZ_CALLS", "10000"))


@cpu_only
@pytest.mark.proves(
    "Faults",
    "10,000 random calls of the operators: right results or clear errors, inputs unchanged",
)
def test_random_calls():
    script = Path(__file__).parents[1] / "support" / "fuzz_operators.py"
    command = [sys.executable, str(script), str(SEED), "0", str(CALLS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    *calls, last = run.stdout.splitlines()
    complaints = [
        f"{call[:1500]}\n  {complaint}"
        for call, complaint in itertools.pairwise(calls)
        if complaint.startswith("WRONG")
    ]
    assert not complaints, "\n".join(complaints[:10])
    assert run.returncode == 0, f"ended in {last}\n{run.stderr[-3000:]}"
    outcomes = json.loads(last)
    print(outcomes)
    assert sum(outcomes.values()) == CALLS
    # Neither all errors nor all results, and enough of every kind.
    for outcome, share in (
        ("compared", 0.12),
        ("checked", 0.03),
        ("traced", 0.01),
        ("RuntimeError", 0.3),
        ("ValueError", 0.05),
        ("TypeError", 0.03),
        ("NotImplementedError", 0.002),
    ):
        assert outcomes[outcome] > share * CALLS, outcomes
