"""Calculate lower bounds of the CUDA kernels' time: bytes over bandwidth, products over rate.

    python -m bench.kernels.floor [--json FILE]

The bounds follow from the tile sizes in the sources and the cards' data sheets; gpu.py measures.
Per pair, onto B, with gradients of the factors' dtype:

    bytes      (3 n + 2 m) r elements: factors and gradients are read once, E is written once
    products   reduce: (n + m) 64 T (T + 1) / 2 with T = ceil(2r / 8) tiles, symmetric halves once;
               apply: n times 2r times r, r rounded up to 8
    step       with AdamW, float32: 28 bytes for an element of A, 36 for one of B with its average;
               AdamW alone takes 28

A product is one multiply-add of the float64 tensor cores (sm_80, 90, 100); elsewhere it is 10
float32 instructions in reduce and 11 in apply, and 1.5 or 2 shuffles (arithmetic.cuh). The longer
of both times is the bound. The second reading of B and its gradient in apply is taken to hit L2.

Split-precision schemes on other matrix units are not considered: float32 accumulators are too
coarse for the rank cutoff (rtol^2 is 1e-8), also for bf16 inputs, whose products are exact in
float32 but whose sums are not; integer units (Ozaki's scheme) would be about three times faster at
rank 64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bench.kernels.cases import CASES, Case
from bench.timing import arguments, print_table, write_json


class Card(NamedTuple):
    name: str
    bandwidth: float  # bytes per second
    products: float  # float64 multiply-adds per second; 0 for arithmetic in pairs of floats
    floats: float  # float32 instructions per second


# NVIDIA's data sheets; TFLOPS count a multiply-add as two.
CARDS = [
    Card("A100 80 GB", 2.04e12, 19.5e12 / 2, 19.5e12 / 2),
    Card("H100 SXM", 3.35e12, 67e12 / 2, 67e12 / 2),
    Card("B200", 8.0e12, 40e12 / 2, 80e12 / 2),
    Card("RTX 4090", 1.01e12, 0, 82.6e12 / 2),
    Card("L40S", 0.86e12, 0, 91.6e12 / 2),
]
REDUCE_FLOATS, APPLY_FLOATS = 11.5, 13.0  # instructions per product, shuffles included


def products(case: Case) -> tuple[float, float]:
    """Return the numbers of products of reduce and of apply."""
    r = case.rank
    tiles = math.ceil(2 * r / 8)
    reduce = sum(c * (n + m) * 64 * tiles * (tiles + 1) / 2 for c, n, m in case.layers)
    apply = sum(c * n * 4 * math.ceil(2 * r / 4) * 8 * math.ceil(r / 8) for c, n, _ in case.layers)
    return reduce, apply


def step_bytes(case: Case) -> tuple[float, float]:
    """Return the bytes of the fused step in float32, and of AdamW alone."""
    A = sum(c * m * case.rank for c, _, m in case.layers)
    B = sum(c * n * case.rank for c, n, _ in case.layers)
    return 28.0 * A + 36.0 * B, 28.0 * (A + B)


def floor(case: Case, dtype: torch.dtype, card: Card) -> dict[str, float]:
    reduce, apply = products(case)
    if card.products:
        arithmetic = (reduce + apply) / card.products
    else:
        arithmetic = (REDUCE_FLOATS * reduce + APPLY_FLOATS * apply) / card.floats
    return {"memory": case.bytes(dtype) / card.bandwidth, "arithmetic": arithmetic}


def main() -> None:
    parser = arguments(__doc__, plot=False)
    options = parser.parse_args()
    results = []
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for card in CARDS:
                name = str(dtype).removeprefix("torch.")
                times = floor(case, dtype, card)
                results.append({"case": case.name, "r": case.rank, "dtype": name} | times)
                results[-1] |= {"card": card.name, "binds": max(times, key=lambda k: times[k])}
    print_table(
        ["case", "r", "type", "card", "memory, us", "arithmetic, us", "binds"],
        [
            [x["case"], str(x["r"]), x["dtype"], x["card"]]
            + [f"{1e6 * x[key]:.1f}" for key in ("memory", "arithmetic")]
            + [x["binds"]]
            for x in results
        ],
    )
    ratios = (
        f"{case.name} r={case.rank} {a / b:.2f}" for case in CASES for a, b in [step_bytes(case)]
    )
    print(f"\nbytes of the fused step over AdamW's: {', '.join(ratios)}")
    write_json(options.json, results)


if __name__ == "__main__":
    main()
