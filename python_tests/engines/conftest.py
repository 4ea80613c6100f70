"""Processes of the tests of engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import stop


@pytest.fixture(scope="package", autouse=True)
def own_processes() -> Iterator[None]:
    """End the processes after these tests: ZeRO 3 replaces functions of torch."""
    yield
    stop()
