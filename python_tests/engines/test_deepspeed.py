"""DeepSpeed on two processes: ZeRO 0 to 3 with a perturbation attached to the engine."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import together

CASES: list[dict[str, Any]] = [
    *({"stage": stage} for stage in range(4)),
    *({"stage": stage, "accumulation": 2, "clipping": 0.05} for stage in range(4)),
    {"stage": 2, "made": "before", "onto": "A"},
    {"stage": 3, "made": "before"},
    {"stage": 3, "made": "after zero.Init"},
    {"stage": 3, "zero": {}},  # factors persist: they stay whole between passes
    {"stage": 3, "onto": "A", "norm_scope": "global"},
    {"stage": 3, "onto": "both", "config": {"init_lora_weights": False}},
    {"stage": 3, "config": {"use_dora": True}},
]


@pytest.mark.proves("Several devices", "DeepSpeed ZeRO 0 to 3: 8 steps as in one process")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_as_one_process(case: dict[str, Any]) -> None:
    for errors in together(2, "deepspeed_cases:against_one_process", **case):
        assert errors.pop("weights") < 2e-6
        assert max(errors.values()) < 1e-5, errors
