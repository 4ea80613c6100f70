"""Build, test and measure the CUDA kernels on this machine's GPU, in about ten minutes.

    python -m bench.kernels.gpu [--no-build] [--no-tests] [--minutes 9] [--json FILE] [--plot FILE]
    python -m bench.kernels.gpu --draw FILE.json --plot FILE
    python -m bench.kernels.gpu --device cpu --tiny --no-build      the same without a GPU

Needs nvcc of the CUDA that torch was built with; setuptools, wheel and ninja to build; pytest,
hypothesis and expecttest to test. The numbers go to bench/results/gpu-<card>.json.

    us         median of many calls by CUDA events, launches included
    graph      the same call replayed as a CUDA graph
    cold       the same with caches filled with other data before each call
    of copy    bytes (both factors and gradients read once, E written once) over time, cold (the
               graph's where there is one), over the bandwidth of a 1 GiB copy within the card
    launches   numbers of kernels + copies and fills
    pinv, Gram 64, Gram 32, compiled
              time over that of the kernels of equations (1)-(3) with torch.linalg.pinv in
               float32, of the Gram form in plain torch in float64 and in float32, and of the
               latter under torch.compile, pair after pair; ~ if one pair of each shape was timed
    SAM        the same for SAM's perturbation of all pairs at once
    step       microseconds of the fused step, perturbation and AdamW in one
    of AdamW   its time over that of torch.optim.AdamW(fused=True) on the same factors
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.kernels.cases import (
    CASES,
    RHO,
    SCALING,
    TINY,
    adamw,
    columns,
    fused_step,
    gram_in,
    pinv_form,
    random_pairs,
    sam,
    shapes,
)
from bench.kernels.clock import Clock
from bench.timing import arguments, new_plot, print_table, write_json

ROOT = Path(__file__).parents[2]
PEERS = ("pinv", "gram64", "gram32", "compiled")


def build() -> None:
    """Install the package from source, against the installed torch."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "EFLAT_CUDA": "1"}, check=True)


def run_tests(device: str, more: list[str], timeout: float) -> dict[str, object]:
    """Run the operators' tests; return pytest's last line, and True if all passed."""
    files = sorted(str(p) for p in ROOT.glob("python_tests/ops/test_operators*.py"))
    # The installed package is tested, not the folder of sources.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "pythonpath=python_tests/support"]
    command += [*files, *more]
    environment = {**os.environ, "EFLAT_TEST_DEVICE": device, "PYTHONSAFEPATH": "1"}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not finished after {timeout:.0f} s"}
    lines = (run.stdout + run.stderr).strip().split("\n")
    if run.returncode:
        print("\n".join(lines[-60:]))
    return {"passed": run.returncode == 0, "summary": lines[-1]}


def output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def environment(device: torch.device) -> dict[str, object]:
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": properties.name if properties else f"CPU, {platform.machine()}",
        "multiprocessors": properties.multi_processor_count if properties else None,
        "l2_bytes": properties.L2_cache_size if properties else None,
        "driver": (output_of(*query) or "").split("\n")[0] if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed_files": len((output_of("git", "status", "--porcelain") or "").splitlines()),
    }


def contenders(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the contenders for one pair."""
    rtol = 1e-3  # a constant, for torch.compile
    gram_32 = gram_in(torch.float32, rtol)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return {
        "gram32": gram_32,
        "gram64": gram_in(torch.float64, rtol),
        "compiled": torch.compile(gram_32, dynamic=True, backend=backend),
        "pinv": pinv_form,
    }


def peer_seconds(clock: Clock, function, pairs, limit: float = 3.0) -> dict[str, object]:
    """Time all pairs, one after another."""
    total = sum(
        count * clock.seconds(lambda pair=pair: function(*pair), budget=0.1, most=5)
        for pair, count in shapes(pairs)
    )
    if total > limit / 5:
        return {"seconds": total, "by_shape": True}
    total = clock.seconds(lambda: [function(*pair) for pair in pairs], budget=limit / 3, most=20)
    return {"seconds": total, "by_shape": False}


def relative_error(E, pairs) -> float:
    """Return the largest error against the Gram form in float64 over one pair of each shape."""
    index = {id(pair): i for i, pair in enumerate(pairs)}
    errors = []
    for pair, _ in shapes(pairs):
        expected = gram_in(torch.float64)(*(t.double() for t in pair))
        errors.append(float((E[index[id(pair)]] - expected).norm() / expected.norm()))
    return max(errors)


def measure(clock: Clock, case, dtype, peers, deadline: float) -> dict[str, object]:
    import eflat_ext

    pairs = random_pairs(case, dtype, clock.device)
    lists, scaling = columns(pairs), [SCALING] * len(pairs)

    def ours():
        return eflat_ext.foreach_perturb(*lists, scaling, RHO)

    replay, why = clock.graphed(ours)
    kernels, copies = clock.launches(ours)
    row: dict[str, object] = {
        **{"case": case.name, "rank": case.rank, "pairs": case.count},
        **{"dtype": str(dtype).removeprefix("torch."), "bytes": case.bytes(dtype)},
        **{"kernels": kernels, "copies": copies, "error": relative_error(ours()[0], pairs)},
        **{"seconds": clock.seconds(ours), "seconds_cold": clock.seconds(ours, cold=True)},
        "graph_seconds": clock.seconds(replay) if replay else None,
        "graph_seconds_cold": clock.seconds(replay, cold=True) if replay else None,
        "no_graph": why,
        "peers": {},
    }
    row["sam_seconds"] = clock.seconds(sam(pairs))
    row["adamw_seconds"] = clock.seconds(adamw(pairs))
    row["step_seconds"], row["no_step"] = None, ""
    try:
        row["step_seconds"] = clock.seconds(fused_step(pairs))
    except Exception as error:  # main counts it as a failure
        reason = str(error).strip().split("\n")[0]
        row["no_step"] = f"{type(error).__name__}: {reason}"
    for name, function in peers.items():
        if time.monotonic() > deadline:
            row["peers"][name] = {"not_measured": "out of time"}
            continue
        try:
            row["peers"][name] = peer_seconds(clock, function, pairs)
        except Exception as error:  # a missing compiler or library
            row["peers"][name] = {"not_measured": str(error).strip().split("\n")[0]}
    return row


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.1f}"


def share_of_copy(row, bandwidth: float) -> float:
    return row["bytes"] / (row["graph_seconds_cold"] or row["seconds_cold"]) / bandwidth


def label(row) -> str:
    return f"{row['pairs']} x {row['case']}, r={row['rank']}, {row['dtype']}"


def table_row(row, bandwidth: float) -> list[str]:
    ratios = []
    for name in PEERS:
        peer = row["peers"][name]
        if "seconds" not in peer:
            ratios.append("-")
        else:
            ratios.append(f"{'~' * peer['by_shape']}{peer['seconds'] / row['seconds']:.3g} x")
    step = row["step_seconds"]
    times = ("seconds", "graph_seconds", "seconds_cold", "graph_seconds_cold")
    return [
        label(row),
        f"{row['bytes'] / 1e6:.1f}",
        *(microseconds(row[key]) for key in times),
        f"{share_of_copy(row, bandwidth):.0%}",
        f"{row['kernels']}+{row['copies']}",
        *ratios,
        f"{row['sam_seconds'] / row['seconds']:.2f} x",
        microseconds(step),
        f"{step / row['adamw_seconds']:.2f}" if step else "-",
    ]


def show(results) -> None:
    about = results["environment"]
    print(
        f"{about['card']}, driver {about['driver']}, torch {about['torch']}, CUDA {about['cuda']}"
    )
    print(f"copy within the device: {results['copy_bandwidth'] / 1e9:.0f} GB/s")
    header = ["pairs", "MB", "us", "graph", "cold", "graph cold", "of copy", "launches"]
    header += ["pinv", "Gram 64", "Gram 32", "compiled", "SAM", "step", "of AdamW"]
    rows = results["rows"]
    print_table(header, [table_row(row, results["copy_bandwidth"]) for row in rows])
    notes = {f"no graph: {row['no_graph']}" for row in rows if row["no_graph"]}
    notes |= {f"no fused step: {row['no_step']}" for row in rows if row["no_step"]}
    for row in rows:
        for name, peer in row["peers"].items():
            if "not_measured" in peer:
                notes.add(f"{name}: {peer['not_measured']}")
    print("\n".join(sorted(notes)))


def draw(results, path: Path) -> None:
    rows, bandwidth = results["rows"], results["copy_bandwidth"]
    places = range(len(rows))
    figure, (times, ratios) = new_plot(ncols=2, sharey=True, figsize=(13, 1.5 + 0.5 * len(rows)))
    bars = {"seconds": "calls", "graph_seconds": "graph", "graph_seconds_cold": "graph, cold"}
    bars["seconds_cold"] = "calls, cold"
    for key, name in bars.items():
        given = [(i, row[key]) for i, row in enumerate(rows) if row[key]]
        if given:
            times.plot([1e6 * s for _, s in given], [i for i, _ in given], "o", label=name)
    floor = [1e6 * row["bytes"] / bandwidth for row in rows]
    times.plot(floor, places, "k|", markersize=14, label="bytes / copy bandwidth")
    times.set_xlabel("microseconds")
    times.set_yticks(places, [label(row) for row in rows], fontsize=8)
    times.invert_yaxis()
    for name in (*PEERS, "sam"):
        seconds = [
            row["sam_seconds"] if name == "sam" else row["peers"][name].get("seconds")
            for row in rows
        ]
        given = [(i, s / rows[i]["seconds"]) for i, s in enumerate(seconds) if s]
        ratios.plot([x for _, x in given], [i for i, _ in given], "o", label=name)
    ratios.axvline(1, color="black", linewidth=0.8)
    ratios.set_xlabel("time over that of foreach_perturb")
    for axis in (times, ratios):
        axis.set_xscale("log")
        axis.legend(fontsize=8)
    figure.suptitle(results["environment"]["card"], fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use tiny shapes and few tests")
    parser.add_argument("--no-build", action="store_true", help="use the installed package")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument(
        "--minutes", type=float, default=9, help="time after which slow contenders are skipped"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw an earlier run's numbers")
    options = parser.parse_args()
    if options.draw:
        if options.plot is None:
            parser.error("--draw needs --plot, the picture's file")
        results = json.loads(options.draw.read_text())["results"]
        show(results)
        draw(results, options.plot)
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --tiny runs the same on the CPU")
    begin = time.monotonic()
    deadline = begin + 60 * options.minutes
    results: dict[str, object] = {"environment": environment(device)}
    if not options.no_build:
        build()
    if not options.no_tests:
        # cpu:0 makes the tests copy as cuda does
        where, few = ("cuda", []) if device.type == "cuda" else ("cpu:0", ["-k", "radius"])
        results["tests"] = run_tests(where, few, timeout=max(60, 30 * options.minutes))
        print("tests:", results["tests"]["summary"])
    import eflat_ext

    results["build"] = eflat_ext.build_info()
    torch.manual_seed(0)
    clock = Clock(device)
    results["copy_bandwidth"] = clock.copy_bandwidth()
    peers = contenders(device)
    rows = []
    for case in TINY if options.tiny else CASES:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(measure(clock, case, dtype, peers, deadline))
            print(f"{label(rows[-1])}: {microseconds(rows[-1]['seconds'])} us", flush=True)
    results["rows"] = rows
    results["minutes"] = (time.monotonic() - begin) / 60
    print()
    show(results)
    card = re.sub(r"\W+", "-", results["environment"]["card"]).strip("-").lower()
    path = options.json or ROOT / "bench" / "results" / f"gpu-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    if options.plot:
        draw(results, options.plot)
    bounds = {"float32": 1e-5, "bfloat16": 5e-3}
    wrong = [label(row) for row in rows if not row["error"] < bounds[row["dtype"]]]
    if wrong:
        print(f"wrong numbers: {', '.join(wrong)}", file=sys.stderr)
    stepless = [label(row) for row in rows if row["no_step"]]
    if stepless:
        print(f"the fused step failed: {', '.join(stepless)}", file=sys.stderr)
    passed = results.get("tests", {"passed": True})["passed"]
    return int(bool(wrong or stepless) or not passed)


if __name__ == "__main__":
    raise SystemExit(main())
