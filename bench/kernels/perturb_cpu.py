"""Time foreach_perturb on the CPU against plain torch and against the machine's lower bound.

Per pair of factors (n, r) and (r, m), float32, onto B:

    bytes        4 (2 r m + 3 n r): A, B and their gradients are read, E is written. The second
                 reading of B and its gradient hits the cache.
    float64
    multiply-adds  (n + m) r (2r + 1) for the symmetric Gram matrices of [B | G_B] and [A | G_A]^T,
                and 2 n r^2 for E. The r x r computations are not counted.
    floor        bytes over copy speed, or multiply-adds over the rate of a large float64 matrix
                product, whichever is longer; the table names it.

Contenders in plain torch:

    pinv         equations (1)-(3) in float32 with torch.linalg.pinv, pair after pair: O(n m r)
    Gram 64      the Gram form, pair after pair, sums in float64, which ill-conditioned factors need
    Gram 32      the Gram form in float32: wrong for ill-conditioned factors (see accuracy.py)
    no kernels   the operator of devices without kernels (eflat_ext/ops/plain_torch.py), which
                keeps the kernels' accuracy for ill-conditioned factors

For the 224 pairs of Llama-2-7B (every linear layer of 32) the pinv form is timed on the seven pairs
of one layer. More tables give the time over the size and over the number of pairs, with its ratio
to half the size (2 is linear), and the slope of a line through the logarithms.

Factors are well conditioned, as trained ones mostly are, except in the case marked "ill", where the
inverses need an eigendecomposition instead of a Cholesky factorisation. Other load on the machine
slows multi-threaded contenders most: measure on an idle machine, or with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

import eflat_ext
from bench.kernels.cases import LLAMA_2_7B, RHO, SCALING, columns, gram_in, pinv_form
from bench.timing import (
    arguments,
    copy_of,
    interleaved,
    machine,
    matrix_product,
    new_plot,
    print_table,
    write_json,
)


class Case(NamedTuple):
    label: str
    shapes: list[tuple[int, int]]  # (n, m) of every pair
    r: int
    condition: float = 1  # of B
    of_pinv: int | None = None  # number of pairs that are timed in the pinv form


def same(count: int, size: int, r: int, condition: float = 1) -> Case:
    ill = ", ill" if condition > 1 else ""
    return Case(f"{count} x {size}x{size} r={r}{ill}", [(size, size)] * count, r, condition)


LLAMA_LAYER = [(n, m) for count, n, m in LLAMA_2_7B for _ in range(count // 32)]
CLAIMS = [same(48, 1024, 8), Case("224 of Llama-2-7B r=16", 32 * LLAMA_LAYER, 16, of_pinv=7)]
CASES = [
    *CLAIMS,
    same(48, 1024, 8, 1e5),
    same(12, 384, 8),
    same(1, 4096, 4),
    same(1, 4096, 8),
    same(1, 4096, 16),
    same(1, 4096, 64),
    same(48, 1024, 4),
    same(48, 1024, 16),
]
SIZES = [512, 1024, 2048, 4096, 8192]  # n = m
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128]


def random_pair(n, m, r, condition):
    gradient = torch.randn(n, m) / (n * m) ** 0.5
    A, B = torch.randn(r, m) / m**0.5, 1e-2 * torch.randn(n, r)
    B = B * condition ** -torch.linspace(0, 1, r)
    return A, B, SCALING * B.T @ gradient, SCALING * gradient @ A.T


def operator(pairs, function=eflat_ext.foreach_perturb):
    lists, scaling = columns(pairs), [SCALING] * len(pairs)
    return lambda: function(*lists, scaling, RHO)


def measure(case: Case, rounds: int) -> dict[str, float | str]:
    r = case.r
    pairs = [random_pair(n, m, r, case.condition) for n, m in case.shapes]
    total_bytes = 4 * sum(2 * r * m + 3 * n * r for n, m in case.shapes)
    multiply_adds = sum((n + m) * r * (2 * r + 1) + 2 * n * r * r for n, m in case.shapes)
    product, product_multiply_adds = matrix_product()
    gram_64, gram_32 = gram_in(torch.float64), gram_in(torch.float32)
    fast = {
        "ours": operator(pairs),
        "gram64": lambda: [gram_64(*pair) for pair in pairs],
        "gram32": lambda: [gram_32(*pair) for pair in pairs],
        "plain": operator(pairs, torch.ops.eflat_plain_torch.foreach_perturb),
        "copy": copy_of(total_bytes),
        "product": product,
    }
    some = pairs[: case.of_pinv]
    slow = {"ours": operator(some), "pinv": lambda: [pinv_form(*pair) for pair in some]}
    check(fast["ours"]()[0], fast["gram64"]())
    seconds = interleaved(fast, rounds)
    slow_seconds = interleaved(slow, max(3, rounds // 5))
    ours, peak = seconds["ours"], product_multiply_adds / seconds["product"]
    by_bytes, by_multiply_adds = seconds["copy"], multiply_adds / peak
    return {
        "case": case.label,
        "pairs": len(pairs),
        "r": r,
        "condition": case.condition,
        "seconds": ours,
        "over_pinv": slow_seconds["pinv"] / slow_seconds["ours"],
        "over_gram64": seconds["gram64"] / ours,
        "over_gram32": seconds["gram32"] / ours,
        "over_plain_torch": seconds["plain"] / ours,
        "giga_multiply_adds_per_second": multiply_adds / ours / 1e9,
        "share_of_copy_speed": by_bytes / ours,
        "share_of_product_rate": by_multiply_adds / ours,
        "bound_by": "bytes" if by_bytes > by_multiply_adds else "multiply-adds",
        "share_of_floor": max(by_bytes, by_multiply_adds) / ours,
    }


def scaling_table(title: str, points: dict[int, list], rounds: int) -> dict[str, object]:
    """Print and return the time over the size; each key of ``points`` is twice the one before."""
    seconds = interleaved({str(x): operator(pairs) for x, pairs in points.items()}, rounds)
    times = [seconds[str(x)] for x in points]
    rows = [
        [str(x), f"{1e3 * t:.3f}", f"{t / before:.2f}" if before else ""]
        for x, t, before in zip(points, times, [None, *times], strict=False)
    ]
    logarithms = torch.tensor(
        [[math.log(x), math.log(t)] for x, t in zip(points, times, strict=True)]
    )
    deviations = logarithms - logarithms.mean(0)
    slope = float((deviations[:, 0] @ deviations[:, 1]) / deviations[:, 0].square().sum())
    print()
    print_table([title, "time (ms)", "over half"], rows)
    print(f"slope of the logarithms: {slope:.2f}")
    return {"over": title, "at": list(points), "seconds": times, "slope": slope}


def measure_scaling(rounds: int) -> list[dict[str, object]]:
    tables = []
    for r in (8, 16):
        points = {2 * n: [random_pair(n, n, r, 1) for _ in range(16)] for n in SIZES}
        tables.append(scaling_table(f"n + m (16 pairs, r={r})", points, rounds))
    pairs = [random_pair(1024, 1024, 8, 1) for _ in range(max(COUNTS))]
    points = {count: pairs[:count] for count in COUNTS}
    tables.append(scaling_table("pairs (1024x1024, r=8)", points, rounds))
    return tables


def check(E, expected) -> None:
    error = max(float((x - y).norm() / y.norm()) for x, y in zip(E, expected, strict=True))
    if not error < 1e-5:
        raise SystemExit(f"the contenders do not compute the same: relative error {error:.1e}")


def draw(results, path) -> None:
    figure, axis = new_plot(figsize=(9, 4))
    bars = {"pinv form": "over_pinv", "Gram form, float64": "over_gram64"}
    bars["Gram form, float32"] = "over_gram32"
    for i, (name, key) in enumerate(bars.items()):
        places = [k + 0.27 * (i - 1) for k in range(len(results))]
        drawn = axis.bar(places, [x[key] for x in results], 0.25, label=name)
        axis.bar_label(drawn, fmt="%.3g", fontsize=7)
    axis.set_yscale("log")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(results)), [x["case"].replace(" r=", "\nr=") for x in results])
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylabel("time over that of foreach_perturb")
    axis.set_title(machine(), fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="two cases and the scaling")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    results = [measure(case, options.rounds) for case in (CLAIMS if options.quick else CASES)]
    header = ["pairs x shape", "time (ms)", "pinv", "Gram 64", "Gram 32", "no kernels", "GFMA/s"]
    header += ["of dgemm", "of copy", "bound by", "of the floor"]
    rows = [
        [
            x["case"],
            f"{1e3 * x['seconds']:.3f}",
            f"{x['over_pinv']:.0f} x",
            f"{x['over_gram64']:.1f} x",
            f"{x['over_gram32']:.1f} x",
            f"{x['over_plain_torch']:.1f} x",
            f"{x['giga_multiply_adds_per_second']:.1f}",
            f"{x['share_of_product_rate']:.0%}",
            f"{x['share_of_copy_speed']:.0%}",
            x["bound_by"],
            f"{x['share_of_floor']:.0%}",
        ]
        for x in results
    ]
    print_table(header, rows)
    tables = measure_scaling(options.rounds)
    write_json(options.json, {"cases": results, "scaling": tables})
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
