"""torch.distributed.checkpoint saves and loads averages, on another number of ranks too."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import assert_same_bits
from ranks import together


@pytest.mark.proves(
    "Several devices", "FSDP2: resumes bit-exact through torch.distributed.checkpoint"
)
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_resumes_bit_exact(onto: str, tmp_path: Path) -> None:
    saved, later = together(2, "checkpoint_cases:save", str(tmp_path), onto)[0]
    for full in (False, True):
        for now, then in together(2, "checkpoint_cases:load", str(tmp_path), onto, full):
            assert_same_bits(now, saved)
            assert_same_bits(then, later)


@pytest.mark.proves("Several devices", "FSDP2: a checkpoint loads on another number of ranks")
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    saved, later = together(before, "checkpoint_cases:save", str(tmp_path), "B")[0]
    for now, then in together(after, "checkpoint_cases:load", str(tmp_path), "B"):
        assert_same_bits(now, saved)
        assert then.keys() == later.keys()
        for name, value in later.items():
            assert (then[name] - value).norm() <= 1e-4 * value.norm()


@pytest.mark.parametrize("method", ["eflat", "flat", "lora-sam"])
def test_state_before_the_first_step(method: str) -> None:
    together(2, "checkpoint_cases:state_before_the_first_step", method)
