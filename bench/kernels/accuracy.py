"""Measure the relative error of the perturbation over the condition number of both factors.

The reference is equations (1)-(3) in float64 with the same cutoff (eflat_ext.reference), for the
same rounded inputs. Gradients are consistent with one gradient of W, as in back-propagation: unlike
random ones they are small along a factor's small singular directions, where its pseudo-inverse is
large. Each number is the largest error in the Frobenius norm over seeds and transfers onto B and A.

    operator   torch.ops.eflat.perturb
    pinv       equations (1)-(3) with torch.linalg.pinv in float32 (float64 for float64)
    Gram       the Gram form in plain torch, in float32 (float64 for float64), which squares the
               condition number

The lower bound of every error is the rounding of E: 3e-8 relative for float32, 2e-3 for bfloat16,
2e-4 for float16. Beyond the cutoff, 1 / rtol = 8.2e3 at this size for types up to 32 bits, all
contenders and the reference drop the small directions.
"""

from __future__ import annotations

import torch

import eflat_ext
from bench.timing import arguments, machine, new_plot, print_table, write_json
from eflat_ext import reference
from eflat_ext.ops.autograd import gram_form

RHO, SCALING = 0.05, 2.0
N, M, R = 512, 1024, 16
CONDITIONS = (1e0, 1e1, 1e2, 1e3, 3e3, 1e4, 1e5, 1e6)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def factor(rows: int, columns: int, condition: float) -> torch.Tensor:
    left, right = (torch.linalg.qr(torch.randn(k, R).double()).Q for k in (rows, columns))
    values = condition ** -torch.linspace(0, 1, R, dtype=torch.float64)
    return (left * values) @ right.T


def random_pair(condition: float, dtype: torch.dtype):
    A, B = factor(R, M, condition).to(dtype), factor(N, R, condition).to(dtype)
    gradient = torch.randn(N, M).double()
    grad_A = SCALING * B.double().T @ gradient
    grad_B = SCALING * gradient @ A.double().T
    return A, B, grad_A.to(dtype), grad_B.to(dtype)


def in_working_type(pair):
    return [t if t.dtype == torch.float64 else t.float() for t in pair]


def operator(pair, onto, rtol):
    return eflat_ext.perturb(*pair, SCALING, RHO, onto, rtol)[0]


def pinv(pair, onto, rtol):
    A, B, grad_A, grad_B = in_working_type(pair)
    gradient = grad_B @ torch.linalg.pinv(A.T, rtol=rtol)
    gradient = (gradient + torch.linalg.pinv(B.T, rtol=rtol) @ grad_A) / (2 * SCALING)
    E_W = RHO * gradient / gradient.norm()
    if onto == "B":
        return E_W @ torch.linalg.pinv(A, rtol=rtol) / SCALING
    return torch.linalg.pinv(B, rtol=rtol) @ E_W / SCALING


def gram(pair, onto, rtol):
    U, _, c = gram_form(*in_working_type(pair), SCALING, RHO, onto, rtol)
    return c * U


CONTENDERS = {"operator": operator, "pinv": pinv, "Gram": gram}


def worst_errors(condition: float, dtype: torch.dtype, seeds: int) -> dict[str, float]:
    errors = dict.fromkeys(CONTENDERS, 0.0)
    for seed in range(seeds):
        torch.manual_seed(seed)
        pair = random_pair(condition, dtype)
        rtol = reference.default_rtol(pair[0], pair[1])
        for onto in "BA":
            expected, _ = reference.perturb(*pair, SCALING, RHO, onto, rtol)
            for name, contender in CONTENDERS.items():
                E = contender(pair, onto, rtol).to(dtype).double()
                error = float((E - expected).norm() / expected.norm())
                errors[name] = max(errors[name], error if error == error else float("inf"))
    return errors


def draw(results, path) -> None:
    figure, axes = new_plot(ncols=len(DTYPES), sharey=True, figsize=(12, 3.5))
    for axis, dtype in zip(axes, DTYPES, strict=True):
        rows = [x for x in results if x["dtype"] == str(dtype)]
        for name in CONTENDERS:
            axis.loglog([x["condition"] for x in rows], [x[name] for x in rows], "o-", label=name)
        axis.set_title(str(dtype).removeprefix("torch."))
        axis.set_xlabel("condition number of A and of B")
    axes[0].set_ylabel("relative error of E")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}; n={N}, m={M}, r={R}")
    results = [
        {"dtype": str(dtype), "condition": c, **worst_errors(c, dtype, options.seeds)}
        for dtype in DTYPES
        for c in CONDITIONS
    ]
    rows = [
        [x["dtype"].removeprefix("torch."), f"{x['condition']:.0e}"]
        + [f"{x[name]:.1e}" for name in CONTENDERS]
        for x in results
    ]
    print_table(["dtype", "condition", *CONTENDERS], rows)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
