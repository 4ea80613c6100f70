"""Leaves out one barrier of the CUDA kernels at a time and sees whether a test program notices.

    python drop_barriers.py [--allow COUNT] PROGRAM [ARGUMENT]...

PROGRAM runs kernels by host_cuda.h, is built with ThreadSanitizer, and passes when nothing is left
out. Where the absence of a barrier goes unnoticed, the program misses a case or the kernel does not
need the barrier. Fails if there are more of those than COUNT (default 0). Fences count as barriers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TIMEOUT = 60.0  # seconds


def run(command: list[str], variable: str, value: str) -> tuple[int | None, str]:
    """Exit status, None when the time is up, and what was printed."""
    environment = {**os.environ, variable: value, "EFLAT_HOST_CUDA_STRICT_FENCES": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def barriers(command: list[str]) -> list[str]:
    status, output = run(command, "EFLAT_HOST_CUDA_LIST_BARRIERS", "1")
    if status != 0:
        sys.exit(f"{' '.join(command)} fails with every barrier in place:\n{output}")
    lines = [line.split() for line in output.splitlines()]
    return [words[1] for words in lines if words and words[0] == "barrier"]


def noticed(command: list[str], barrier: str) -> str:
    """Return the words in which a missing barrier was reported; empty if it was not."""
    status, output = run(command, "EFLAT_HOST_CUDA_DROP_BARRIER", barrier)
    if status is None:
        return "no end"
    if "ThreadSanitizer: data race" in output:
        return "race"
    if "host_cuda: " in output:
        return output[output.index("host_cuda: ") + 11 :].splitlines()[0]
    return "" if status == 0 else "wrong numbers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allow", type=int, default=0, metavar="COUNT")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    names = barriers(arguments.command)
    if not names:
        sys.exit("no barrier was passed")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(
            zip(names, pool.map(lambda name: noticed(arguments.command, name), names), strict=True)
        )
    for name, result in results.items():
        print(f"{name:48} {result or 'NOT NOTICED'}")
    missed = sum(not result for result in results.values())
    print(f"{len(names)} barriers left out in turn, {missed} not noticed")
    if missed > arguments.allow:
        sys.exit(
            f"at most {arguments.allow} may go unnoticed: test a case that needs the barrier,"
            " or remove it"
        )


if __name__ == "__main__":
    main()
