"""The in-place operators refuse to write memory that they share with another argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adamw_case import FOR_AVERAGES, WRITTEN, assert_same, copied, random_call
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Pair, make_pair, ontos, pairs, same_bits, scopes, seeds
from torch import Tensor

ops = torch.ops.eflat
FOR_EMA = (*FOR_AVERAGES, "onto", "norm_scope")
OPERATORS = {
    ops.foreach_adamw_step_: WRITTEN,
    ops.foreach_perturb_ema_: ("ema",),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def call_of(operator: Callable, *arguments: Any) -> dict[str, Any]:
    call = random_call(*arguments)
    return call if operator is ops.foreach_adamw_step_ else {name: call[name] for name in FOR_EMA}


def tensors_of(call: dict[str, Any]) -> list[tuple[str, int, Tensor]]:
    return [
        (name, i, t)
        for name, value in call.items()
        if isinstance(value, list)
        for i, t in enumerate(value)
        if isinstance(t, Tensor)
    ]


def put(call: dict[str, Any], name: str, index: int, buffer: Tensor, at: int) -> None:
    """Move an argument into a buffer, as positive numbers: a step may come to lie there."""
    t = call[name][index]
    call[name][index] = buffer[at : at + t.numel()].view(t.shape).copy_(t.abs())


def apart(call: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every entry is a tensor of its own."""
    alone = [copied({name: [t]})[name][0] for name, _, t in tensors_of(call)]
    return {
        name: [alone.pop(0) if isinstance(t, Tensor) else t for t in v]
        if isinstance(v, list)
        else v
        for name, v in copied(call).items()
    }


def assert_unchanged(call: dict[str, Any], before: dict[str, Any]) -> None:
    old = tensors_of(before)
    assert all(same_bits(x, y) for (*_, x), (*_, y) in zip(tensors_of(call), old, strict=True))
    assert int(call["skipped"]) == int(before["skipped"])


@every_operator
@given(st.integers(1, 60), ontos, scopes, st.data())
def test_any_two_arguments(
    operator: Callable, count: int, onto: str, norm_scope: str, data: st.DataObject
) -> None:
    """Overlapping by one element up to whole; and side by side, which is right."""
    pairs = [make_pair(i, 2 + i % 3, 3 + i % 4, 1 + i % 2, torch.float32) for i in range(count)]
    call = call_of(operator, pairs, onto, norm_scope)
    slots = tensors_of(call)
    written = [slot for slot in slots if slot[0] in OPERATORS[operator]]
    one = data.draw(st.sampled_from(written), "written")
    other = data.draw(st.sampled_from([slot for slot in slots if slot[:2] != one[:2]]), "other")
    first, second = data.draw(st.permutations([one, other]), "order in memory")
    overlap = data.draw(st.integers(0, min(one[2].numel(), other[2].numel())), "overlap")
    sizes = {(slot[0], slot[1], slot[2].numel()) for slot in (one, other)}
    assume(sizes != {(name, one[1], overlap) for name in ("E", "ema")})  # E[i] may be ema[i]
    buffer = torch.zeros(100)
    put(call, *first[:2], buffer, 7)
    put(call, *second[:2], buffer, 7 + first[2].numel() - overlap)
    before = copied(call)
    if overlap == 0:
        assert same_bits(operator(**call), operator(**before))
        assert_unchanged(call, before)  # the same was done to both
        return
    names = [re.escape(f"{name}[{index}]") for name, index, _ in (one, other)]
    with pytest.raises(RuntimeError, match="must not share memory with") as raised:
        operator(**call)
    assert all(re.search(rf"(^|[ ,]){name}", str(raised.value)) for name in names)
    assert_unchanged(call, before)


@every_operator
@pytest.mark.parametrize("name", ["E", "ema", "grad_A", "grad_B"])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_the_error_names_what_is_written(operator: Callable, onto: str, name: str) -> None:
    call = call_of(operator, [make_pair(i, 6, 6, 6, torch.float32) for i in range(3)], onto)
    call[name][0] = call["ema"][2]
    with pytest.raises(RuntimeError, match=rf"ema\[2\] must not share memory with {name}\[0\], si"):
        operator(**call)


@every_operator
@pytest.mark.parametrize("at", [0, 1])
def test_the_counter(operator: Callable, at: int) -> None:
    call = call_of(operator, [make_pair(0, 6, 6, 3, torch.float32)])
    numbers = torch.zeros(9, dtype=torch.int64)
    call["skipped"] = numbers[2 * at]
    call["ema"][0] = numbers.view(torch.float32).view(6, 3)
    with pytest.raises(RuntimeError, match=r"skipped must not share memory with ema\[0\]"):
        operator(**call)


@every_operator
@given(seeds, ontos)
def test_what_is_only_read_may_be_shared(operator: Callable, seed: int, onto: str) -> None:
    call = call_of(operator, [make_pair(seed + i, 5, 7, 2) for i in range(2)], onto)
    for name in ("grad_A", "grad_B", "E", "A", "B"):
        if name not in OPERATORS[operator]:
            call[name][1] = call[name][0]
    call["E"][0] = call["grad_A" if onto != "B" else "grad_B"][0].to(call["E"][0].dtype)
    separate = apart(call)
    assert same_bits(operator(**call), operator(**separate))
    assert_unchanged(call, separate)


@every_operator
@given(st.lists(pairs(), min_size=1, max_size=3), seeds, ontos, scopes)
def test_what_was_added_may_be_the_average(
    operator: Callable, given: list[Pair], seed: int, onto: str, norm_scope: str
) -> None:
    call = call_of(operator, given, onto, norm_scope, seed, "average")
    assert all(x is y for x, y in zip(call["E"], call["ema"], strict=True))
    separate = apart(call)
    assert same_bits(operator(**call), operator(**separate))
    assert_unchanged({**call, "E": []}, {**separate, "E": []})


@pytest.mark.parametrize("onto", ["B", "both"])
def test_a_strided_view_of_what_is_written(onto: str) -> None:
    """It is copied before anything is written."""
    call = random_call([make_pair(0, 9, 5, 5)], onto)
    call["grad_A"][0] = call["A"][0].T
    separate = copied(call)
    assert same_bits(ops.foreach_adamw_step_(**call), ops.foreach_adamw_step_(**separate))
    assert_same(call, separate)
