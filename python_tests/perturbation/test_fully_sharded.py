"""FSDP2 on two and four processes: perturbations of sharded factors equal those of whole ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ranks import together

RANDOM_B = {"init_lora_weights": False}

CASES: list[dict[str, Any]] = [
    {},
    {"layers": False, "norm_scope": "global"},
    {"dim_A": 1},
    {"onto": "A"},
    {"onto": "A", "dim_A": 1, "norm_scope": "global"},
    {"onto": "both"},
    {"onto": "both", "dim_A": 1, "norm_scope": "global", "config": RANDOM_B},
    {"method": "flat", "norm_scope": "global"},
    # From B = 0 the pseudo-inverse of B amplifies rounding beyond any comparison.
    {"method": "flat", "onto": "A", "dim_A": 1, "config": RANDOM_B},
    {"method": "flat", "onto": "both", "dim_A": 1, "config": RANDOM_B},
    {"method": "lora-sam"},
    {"method": "lora-sam", "dim_A": 1, "norm_scope": "global", "layers": False},
]


@pytest.mark.proves("Several devices", "FSDP2: 20 steps as in one process")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_as_one_process(world: int, case: dict[str, Any]) -> None:
    for errors in together(world, "fsdp_cases:against_one_process", **case):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("onto", ["B", "A"])
def test_factors_that_are_gathered_by_modules_within_a_layer(onto: str) -> None:
    for errors in together(2, "fsdp_cases:submodules", onto):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.proves("Several devices", "FSDP2: shards within replicas (HSDP)")
def test_replicas_of_shards() -> None:
    for errors in together(4, "fsdp_cases:against_one_process", replicas=2):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "experts"])
@pytest.mark.parametrize(
    ("dim_A", "onto", "norm_scope"),
    [
        (0, "B", "layer"),
        (1, "B", "global"),
        (0, "A", "global"),
        (1, "A", "layer"),
        (0, "both", "layer"),
        (1, "both", "global"),
    ],
)
def test_operators_against_the_reference(kind: str, dim_A: int, onto: str, norm_scope: str) -> None:
    """On four ranks, with uneven shards, and empty ones of an A of two rows."""
    for errors in together(4, "fsdp_cases:operators", kind, dim_A, onto, norm_scope):
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("onto", ["B", "A", "both"])
@pytest.mark.parametrize(("dim_A", "dim_B"), [(0, 1), (1, 1), (None, 0), (1, None)])
def test_any_dimension_may_be_sharded(dim_A: int | None, dim_B: int | None, onto: str) -> None:
    """Columns of B, too; and one of the factors may be whole on every rank."""
    for kind in ("linear", "experts"):
        for errors in together(4, "fsdp_cases:operators", kind, dim_A, onto, "layer", dim_B):
            assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_steps_of_sharded_experts_equal_those_of_one_process(onto: str) -> None:
    together(2, "fsdp_cases:experts", onto)


@pytest.mark.parametrize(("dim_A", "onto"), [(0, "B"), (1, "A"), (0, "both")])
def test_ill_conditioned_factors_lose_the_condition_number_only(dim_A: int, onto: str) -> None:
    """The error grows with the condition number at most, not with its square."""
    for errors in together(
        2, "fsdp_cases:operators", "conv1d", dim_A, onto, "layer", condition=1e5
    ):
        assert max(errors.values()) < 1e-9, errors


@pytest.mark.proves("Several devices", "FSDP2: clean weights in evaluation and state_dict()")
@pytest.mark.parametrize("layers", [True, False])
def test_life_cycle(layers: bool) -> None:
    together(2, "fsdp_cases:life_cycle", layers)


@pytest.mark.proves("Several devices", "FSDP2: an evaluation between forward and backward")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layers", [True, False])
def test_an_evaluation_within_a_step(layers: bool, checkpointed: bool) -> None:
    together(2, "fsdp_cases:interrupted_step", layers, checkpointed)


@pytest.mark.proves("Several devices", "FSDP2: bfloat16 mixed precision")
@pytest.mark.parametrize("onto", ["A", "B"])
def test_mixed_precision(onto: str) -> None:
    together(2, "fsdp_cases:mixed_precision", onto)


@pytest.mark.proves("Several devices", "FSDP2: NaN on one rank, all skip alike")
@pytest.mark.parametrize(
    ("value", "dim_A", "factor", "options"),
    [
        (math.nan, 0, "B", {}),
        (math.inf, 1, "A", {"norm_scope": "global"}),
        (-math.inf, 0, "A", {"onto": "A"}),
        (math.nan, 1, "B", {"onto": "A", "norm_scope": "global"}),
    ],
)
def test_bad_gradient_on_one_rank(
    value: float, dim_A: int, factor: str, options: dict[str, Any]
) -> None:
    together(2, "fsdp_cases:bad_gradient_on_one_rank", value, dim_A, factor, **options)


@pytest.mark.parametrize("method", ["eflat", "flat", "lora-sam"])
def test_missing_gradients_on_one_rank_are_skipped_on_all(method: str) -> None:
    together(2, "fsdp_cases:missing_gradients_on_one_rank", method)


@pytest.mark.parametrize("method", ["eflat", "flat"])
def test_missing_gradients_at_the_first_step_are_skipped(method: str) -> None:
    together(2, "fsdp_cases:missing_gradients_at_the_first_step", method)


def test_replicated_dtensors_are_perturbed() -> None:
    together(2, "fsdp_cases:replicated")


@pytest.mark.proves("Several devices", "layouts that are not supported fail at construction")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "two dimensions",
            ["factor A of base_model.model.down.default has the placements (Shard(dim=0), "],
        ),
        ("mixed", ["factor A of base_model.model.down.default is no DTensor while others are"]),
        ("two meshes", ["others are on DeviceMesh"]),
        ("FSDP", ["FullyShardedDataParallel", "flattens parameters", "fully_shard"]),
    ],
)
def test_unsupported_layouts(kind: str, words: list[str]) -> None:
    for message in together(2, "fsdp_cases:refused", kind):
        assert all(word in message for word in words), message


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("method", ["eflat", "flat"])
def test_a_model_sharded_after_construction_is_perturbed(method: str, loaded: bool) -> None:
    together(2, "fsdp_cases:sharded_after_construction", method, loaded)


@pytest.mark.parametrize(
    "moment",
    [
        "before it is made",
        "before it is attached",
        "once it has run",
        "once it is attached",
    ],
)
def test_a_model_may_be_sharded_around_attach(moment: str) -> None:
    together(2, "fsdp_cases:sharded_around_an_attached_one", moment)


@pytest.mark.proves("Several devices", "engines with parameters of their own are refused")
def test_replaced_parameters() -> None:
    together(1, "fsdp_cases:replaced_parameters")


def test_a_model_that_transformers_made_tensor_parallel_is_refused(tmp_path: Path) -> None:
    for message in together(2, "fsdp_cases:tensor_parallel", str(tmp_path)):
        assert "q_proj.default, a tensor-parallel layer's" in message
