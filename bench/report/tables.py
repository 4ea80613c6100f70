"""Titles, cells and Markdown tables of the report and of README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report.summary import Comparison, Estimate

TITLES = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "lora-sam": "LoRA-SAM",
    "flat": "Flat-LoRA",
    "eflat": "EFlat-LoRA",
    "eflat-global": "EFlat-LoRA, global norm",
    "eflat-A": "EFlat-LoRA onto A",
    "eflat-A-global": "EFlat-LoRA onto A, global norm",
    "random-flat": "Flat-LoRA by random perturbation",
    "bi-lora": "Bi-LoRA",
    "eflat-full": "EFlat-LoRA without transfer",
    "eflat-tangent": "EFlat-LoRA, tangent space",
    "eflat-both": "EFlat-LoRA onto both",
    "eflat-restored": "EFlat-LoRA, radius restored",
    "lora-sam-ema": "LoRA-SAM, averaged",
    "lora-sam-memory": "LoRA-SAM, remembered",
    "full-sam": "SAM on the full weights",
    "sketch-1": "sketch of the gradient, rank 1",
    "sketch-4": "sketch of the gradient, rank 4",
    **{f"eflat-beta-{beta}": f"EFlat-LoRA, beta {beta}" for beta in ("0.1", "0.5", "1")},
    **{f"eflat-rtol-{rtol}": f"EFlat-LoRA, rtol {rtol}" for rtol in ("0.01", "0.1")},
    "eflat-full-0.02": "EFlat-LoRA without transfer, rho 0.02",
    "sketch-1-0.02": "sketch of the gradient, rank 1, rho 0.02",
    **{f"full-sam-{rho}": f"SAM on the full weights, rho {rho}" for rho in ("0.02", "0.05")},
    **{f"lora-rank-{rank}": f"LoRA, rank {rank}" for rank in (2, 32)},
    **{f"eflat-rank-{rank}": f"EFlat-LoRA, rank {rank}" for rank in (2, 32)},
}


def title(method: str) -> str:
    """Return the name of a method in the report."""
    return TITLES.get(method, method)


COMPARED = ["difference", "95 % interval", "p", "verdict"]


def compared_cells(comparison: Comparison | None, scale: float, digits: int) -> list[str]:
    if comparison is None:
        return ["", "", "", ""]
    c = comparison
    interval = f"{scale * c.low:+.{digits}f} to {scale * c.high:+.{digits}f}"
    difference = (
        f"{scale * c.difference.mean:+.{digits}f} ± {scale * c.difference.error:.{digits}f}"
    )
    return [difference, interval, f"{c.p:.3f}" if c.p >= 0.001 else "< 0.001", c.verdict]


def percent(estimate: Estimate | None) -> str:
    return _with_error(estimate, 100, 2)


def plain(estimate: Estimate | None) -> str:
    return _with_error(estimate, 1, 4)


STEP = ["", "time of a step over LoRA's", "least to largest run", "peak memory, MiB"]


def step_rows(times: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the rows below :data:`STEP`, from :func:`summary.step_times`."""
    return [
        [
            title(method),
            f"{found['step']:.3f}",
            f"{found['least']:.3f} to {found['largest']:.3f}",
            f"{found['peak_mib']:.0f}",
        ]
        for method, found in times.items()
    ]


def _with_error(estimate: Estimate | None, scale: float, digits: int) -> str:
    if estimate is None:
        return ""
    text = f"{scale * estimate.mean:.{digits}f}"
    return text + (f" ± {scale * estimate.error:.{digits}f}" if estimate.count > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns without a cell are left out."""
    used = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    lines = [[head[k] for k in used], ["---"] * len(used), *[[r[k] for k in used] for r in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
