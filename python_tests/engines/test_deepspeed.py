"""DeepSpeed on two processes: ZeRO 0 to 3 with a perturbation attached to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import together

ON_CPU = {"device": "cpu", "pin_memory": False}
OFFLOADED = {
    "stage3_param_persistence_threshold": 0,
    "offload_optimizer": ON_CPU,
    "offload_param": ON_CPU,
}
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
    {"stage": 2, "zero": {"offload_optimizer": ON_CPU}},
    {"stage": 3, "zero": OFFLOADED},
]


@pytest.mark.proves("Several devices", "DeepSpeed ZeRO 0 to 3: 8 steps as in one process")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_as_one_process(case: dict[str, Any]) -> None:
    for errors in together(2, "deepspeed_cases:against_one_process", **case):
        assert errors.pop("weights") < 2e-6
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("onto", ["B", "A"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "experts"])
def test_kinds_of_layers_at_stage_3(kind: str, onto: str) -> None:
    together(2, "deepspeed_cases:layers", kind, onto, checkpointed=kind == "linear")


def test_a_factor_that_is_being_gathered() -> None:
    together(2, "deepspeed_cases:in_flight")


@pytest.mark.parametrize(
    ("stage", "dtype"),
    # DeepSpeed averages no fp16 gradients at stage 0 on CPUs.
    [(0, "bf16"), *((stage, dtype) for stage in (1, 2, 3) for dtype in ("bf16", "fp16"))],
)
def test_low_precision(stage: int, dtype: str) -> None:
    together(2, "deepspeed_cases:first_average", stage, dtype)


def test_gradients_that_are_not_finite() -> None:
    together(2, "deepspeed_cases:gradients_that_are_not_finite")


def test_a_layer_that_reads_its_weight_is_named() -> None:
    together(2, "deepspeed_cases:a_layer_that_reads_its_weight")


@pytest.mark.proves("Several devices", "DeepSpeed ZeRO 0 to 3: a resumed run, bit for bit")
@pytest.mark.parametrize(("dtype", "onto"), [("", "A"), ("bf16", "B")])
@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run(stage: int, dtype: str, onto: str, tmp_path: Path) -> None:
    together(2, "deepspeed_cases:resumed", stage, str(tmp_path), dtype, onto)


def test_a_checkpoint_without_a_perturbation(tmp_path: Path) -> None:
    together(2, "deepspeed_cases:loaded_without_a_perturbation", str(tmp_path))


def test_what_attach_refuses() -> None:
    together(2, "deepspeed_cases:refused_arguments")


ALONE, ATTACHED, AROUND = "alone", "attached to the optimizer", "around the optimizer"


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        *((stage, ALONE) for stage in range(4)),
        *((stage, kind) for stage in range(1, 4) for kind in (ATTACHED, AROUND)),
    ],
)
def test_a_step_without_attach(stage: int, kind: str) -> None:
    together(2, "deepspeed_cases:steps_without_attach", stage, kind)


def test_stage_0_steps_an_optimizer_of_this_package() -> None:
    together(2, "deepspeed_cases:optimizer_of_this_package")


def test_an_engine_whose_perturbation_is_updated_by_hand() -> None:
    together(2, "deepspeed_cases:updated_by_hand")
