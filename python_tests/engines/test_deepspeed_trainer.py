"""DeepSpeed through accelerate and Hugging Face Trainer, on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import together

CASES = "deepspeed_trainer_cases"


@pytest.mark.proves("Several devices", "DeepSpeed through accelerate: as the engine's own loop")
@pytest.mark.parametrize("stage", range(4))
def test_accelerate(stage: int, tmp_path: Path) -> None:
    for errors in together(2, f"{CASES}:accelerate", stage, str(tmp_path)):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.proves("Several devices", "DeepSpeed through Trainer: as its own loop, resumed")
@pytest.mark.parametrize("stage", range(4))
def test_trainer(stage: int, tmp_path: Path) -> None:
    for errors in together(2, f"{CASES}:trainer", stage, str(tmp_path)):
        assert max(errors.values()) < 1e-5, errors
