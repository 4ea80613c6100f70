"""Hugging Face Trainer with FSDP2 in accelerate's own configuration, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import together

FSDP: list[dict[str, Any]] = [
    {},
    {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
]


@pytest.mark.proves("Several devices", "FSDP2 through Trainer: as DDP, resumed bit for bit")
@pytest.mark.parametrize("fsdp", FSDP, ids=lambda fsdp: "-".join(fsdp))
@pytest.mark.parametrize("kind", ["optimizer", "callback"])
def test_a_run_that_trainer_resumes(kind: str, fsdp: dict[str, Any], tmp_path: Path) -> None:
    for errors in together(2, "fsdp_trainer_cases:resumed", kind, str(tmp_path), fsdp):
        assert all(error < 1e-6 for error in errors.values()), errors
