"""The calculated floor counts the kernels' products: tiles that cover the matrices, no more."""

from __future__ import annotations

import sys

import pytest

from bench.kernels import cases, floor


@pytest.mark.parametrize("r, waste", [(1, 40), (4, 2), (8, 1.5), (16, 1.25), (64, 1.07)])
def test_products_are_those_of_the_tiles(r, waste):
    case = cases.Case("some", r, [(3, 100, 50), (1, 7, 1000)])
    reduce, apply = floor.products(case)
    needed = sum(c * (n + m) * r * (2 * r + 1) for c, n, m in case.layers)
    assert needed <= reduce <= waste * needed
    needed = sum(c * n * 2 * r * r for c, n, _ in case.layers)
    assert needed <= apply <= waste * needed


def test_the_command_prints_every_case_and_card(capsys):
    sys.argv = ["floor.py"]
    floor.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("H100" in line for line in lines) == 2 * len(cases.CASES)
    assert any("binds" in line for line in lines)
