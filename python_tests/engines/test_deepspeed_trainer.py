"""DeepSpeed through accelerate and Hugging Face Trainer, on two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import stop, together

CASES = "deepspeed_trainer_cases"


@pytest.fixture(scope="module", autouse=True)
def own_processes() -> Iterator[None]:
    """End the processes: ZeRO 3 replaces functions of torch."""
    yield
    stop()


@pytest.mark.proves("Several devices", "DeepSpeed through accelerate: as the engine's own loop")
@pytest.mark.parametrize("stage", range(4))
def test_accelerate(stage: int, tmp_path: Path) -> None:
    for errors in together(2, f"{CASES}:accelerate", stage, str(tmp_path)):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.proves("Several devices", "DeepSpeed through Trainer: as the engine's own loop")
@pytest.mark.parametrize("stage", range(4))
def test_trainer(stage: int, tmp_path: Path) -> None:
    for errors in together(2, f"{CASES}:trainer", stage, str(tmp_path)):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.proves("Several devices", "DeepSpeed through Trainer: a resumed run, bit for bit")
@pytest.mark.parametrize("stage", range(4))
def test_a_run_that_trainer_resumes(stage: int, tmp_path: Path) -> None:
    together(2, f"{CASES}:resumed_trainer", stage, str(tmp_path))
