"""foreach_perturb on the CPU against the same equations in plain torch, and against the machine.

Per pair of factors (n, r) and (r, m), float32, onto B:

    bytes        4 (2 r m + 3 n r): A, B and their gradients are read, E is written. The second
                 reading of B and its gradient comes out of the cache.
    float64
    multiply-adds  (n + m) r (2r + 1) for the symmetric Gram matrices of [B | G_B] and [A | G_A]^T,
                 and 2 n r^2 for E. The r x r mathematics is left out.
    floor        bytes over copy speed, or multiply-adds over the rate of a large float64 matrix
                 product, whichever is longer: of the latter from about r = 4 on.

Contenders, each as a user would write it:

    pinv         equations (1)-(3) in float32 with torch.linalg.pinv, pair after pair: O(n m r)
    Gram 64      the Gram form, pair after pair, sums in float64, which ill-conditioned factors need
    Gram 32      the Gram form in float32: wrong for ill-conditioned factors (see accuracy.py)

Factors are well conditioned, as trained ones mostly are, but for the case marked "ill", where the
inverses need an eigendecomposition instead of a Cholesky factorisation. Contenders that wait for
each other's threads suffer from other work on the machine: measure on an idle one, or with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import torch
from timing import (
    arguments,
    copy_of,
    interleaved,
    machine,
    matrix_product,
    new_plot,
    print_table,
    write_json,
)

import eflat_ext
from eflat_ext import ops

RHO, SCALING = 0.05, 2.0

# pairs, n, m, r, condition number of B
CASES = [
    (1, 4096, 4096, 16, 1),
    (48, 1024, 1024, 8, 1),
    (48, 1024, 1024, 8, 1e5),
    (1, 4096, 4096, 8, 1),
    (1, 4096, 4096, 64, 1),
    (12, 384, 384, 8, 1),
    (48, 1024, 1024, 16, 1),
]


def pinv_form(A, B, grad_A, grad_B):
    gradient = grad_B @ torch.linalg.pinv(A.T) + torch.linalg.pinv(B.T) @ grad_A
    gradient /= 2 * SCALING
    E_W = RHO * gradient / gradient.norm()
    return E_W @ torch.linalg.pinv(A) / SCALING


def gram_form(*pair):
    U, _, c = ops.gram_form(*pair, SCALING, RHO, rtol=ops.default_rtol(*pair[:2]))
    return c * U


def gram_form_64(*pair):
    rtol = ops.default_rtol(*pair[:2])  # of the type that the factors have
    U, _, c = ops.gram_form(*(t.double() for t in pair), SCALING, RHO, rtol=rtol)
    return (c * U).to(pair[0].dtype)


def random_pair(n, m, r, condition):
    gradient = torch.randn(n, m) / (n * m) ** 0.5
    A, B = torch.randn(r, m) / m**0.5, 1e-2 * torch.randn(n, r)
    B = B * condition ** -torch.linspace(0, 1, r)
    return A, B, SCALING * B.T @ gradient, SCALING * gradient @ A.T


def measure(count: int, n: int, m: int, r: int, condition: float, rounds: int) -> dict[str, float]:
    pairs = [random_pair(n, m, r, condition) for _ in range(count)]
    columns = [list(column) for column in zip(*pairs, strict=True)]
    scaling = [SCALING] * count
    total_bytes = 4 * count * (2 * r * m + 3 * n * r)
    multiply_adds = count * ((n + m) * r * (2 * r + 1) + 2 * n * r * r)
    product, product_multiply_adds = matrix_product()
    fast = {
        "ours": lambda: eflat_ext.foreach_perturb(*columns, scaling, RHO),
        "gram64": lambda: [gram_form_64(*pair) for pair in pairs],
        "gram32": lambda: [gram_form(*pair) for pair in pairs],
        "copy": copy_of(total_bytes),
        "product": product,
    }
    slow = {"ours": fast["ours"], "pinv": lambda: [pinv_form(*pair) for pair in pairs]}
    check(fast["ours"]()[0], fast["gram64"]())
    seconds = interleaved(fast, rounds)
    slow_seconds = interleaved(slow, max(3, rounds // 5))
    ours, peak = seconds["ours"], product_multiply_adds / seconds["product"]
    return {
        "pairs": count,
        "n": n,
        "m": m,
        "r": r,
        "condition": condition,
        "seconds": ours,
        "over_pinv": slow_seconds["pinv"] / slow_seconds["ours"],
        "over_gram64": seconds["gram64"] / ours,
        "over_gram32": seconds["gram32"] / ours,
        "share_of_copy_speed": seconds["copy"] / ours,
        "giga_multiply_adds_per_second": multiply_adds / ours / 1e9,
        "share_of_product_rate": multiply_adds / ours / peak,
        "share_of_floor": max(seconds["copy"], multiply_adds / peak) / ours,
    }


def check(E, expected) -> None:
    error = max(float((x - y).norm() / y.norm()) for x, y in zip(E, expected, strict=True))
    if not error < 1e-5:
        raise SystemExit(f"the contenders do not compute the same: relative error {error:.1e}")


def label(result) -> str:
    ill = ", ill" if result["condition"] > 1 else ""
    return f"{result['pairs']} x {result['n']}x{result['m']} r={result['r']}{ill}"


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
    axis.set_xticks(range(len(results)), [label(x).replace(" r", "\nr") for x in results])
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylabel("time over that of foreach_perturb")
    axis.set_title(machine(), fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="the first two claims alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    cases = CASES[:2] if options.quick else CASES
    results = [measure(*case, options.rounds) for case in cases]
    header = ["pairs x shape", "time (ms)", "pinv", "Gram 64", "Gram 32", "copy speed"]
    header += ["GFMA/s", "of dgemm", "of the floor"]
    rows = [
        [
            label(x),
            f"{1e3 * x['seconds']:.3f}",
            f"{x['over_pinv']:.0f} x",
            f"{x['over_gram64']:.1f} x",
            f"{x['over_gram32']:.1f} x",
            f"{x['share_of_copy_speed']:.0%}",
            f"{x['giga_multiply_adds_per_second']:.1f}",
            f"{x['share_of_product_rate']:.0%}",
            f"{x['share_of_floor']:.0%}",
        ]
        for x in results
    ]
    print_table(header, rows)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
