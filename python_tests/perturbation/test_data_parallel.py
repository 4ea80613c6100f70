"""DistributedDataParallel on two and four processes: every rank computes the same by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ranks import together

RANDOM_B = {"init_lora_weights": False}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("eflat", {}),
    ("eflat", {"fused_step": False, "norm_scope": "global", "wrapped": True}),
    ("eflat", {"onto": "A", "wrapped": True}),
    ("eflat", {"onto": "A", "norm_scope": "global", "fused_step": False}),
    ("flat", {"wrapped": True}),
    # From B = 0 the pseudo-inverse of B amplifies rounding beyond any comparison.
    ("flat", {"onto": "A", "norm_scope": "global", "config": RANDOM_B}),
    ("lora-sam", {}),
    ("lora-sam", {"norm_scope": "global", "wrapped": True}),
]


@pytest.mark.proves("Several devices", "DDP: 20 steps as in one process, same bits on all ranks")
@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_without_communication(world: int, method: str, options: Any) -> None:
    for errors in together(world, "ddp_cases:against_one_process", method, **options):
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.proves("Several devices", "DDP: accumulation within no_sync()")
@pytest.mark.parametrize("method", ["eflat", "flat", "lora-sam"])
def test_accumulation(method: str) -> None:
    together(2, "ddp_cases:accumulation", method)


@pytest.mark.proves("Several devices", "DDP: the inner model in eval() is clean on one rank alone")
def test_evaluation_of_the_inner_model() -> None:
    together(2, "ddp_cases:evaluation_of_the_inner_model")


@pytest.mark.proves("Several devices", "DDP: a layer that one rank does not run")
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_a_layer_that_one_rank_does_not_run(onto: str) -> None:
    together(2, "ddp_cases:layer_unused_on_one_rank", onto)


@pytest.mark.proves("Several devices", "DDP: NaN on one rank, all skip alike")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_bad_gradient_on_one_rank(value: float, fused: bool) -> None:
    together(2, "ddp_cases:bad_gradient_on_one_rank", value, fused_step=fused)


@pytest.mark.proves("Several devices", "Trainer on two processes")
def test_trainer(tmp_path: Path) -> None:
    together(2, "ddp_cases:in_trainer", str(tmp_path))
