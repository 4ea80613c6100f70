"""bench.kernels.gpu and the benchmarks of optimizer steps run on the CPU, with tiny shapes."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from bench import timing
from bench.kernels import cases, clock, gpu
from bench.training import fused_step, many_layers


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process; return its exit code and what it printed."""

    def run(*options: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        try:
            code = gpu.main()
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_the_command_runs_on_the_cpu(tmp_path, command):
    file, picture = tmp_path / "numbers.json", tmp_path / "picture.svg"
    options = ["--device", "cpu", "--tiny", "--no-build", "--json", str(file)]
    code, output = command(*options, "--plot", str(picture))
    assert code == 0, output
    assert "tests: " in output and " passed" in output
    results = json.loads(file.read_text())["results"]
    assert results["tests"]["passed"]
    assert results["environment"]["torch"] == torch.__version__
    assert results["copy_bandwidth"] > 0
    assert len(results["rows"]) == 2 * len(cases.TINY)
    for row in results["rows"]:
        for key in ("seconds", "seconds_cold", "sam_seconds", "adamw_seconds"):
            assert row[key] > 0
        assert row["graph_seconds"] is None and row["no_graph"]
        assert row["step_seconds"] > 0 and not row["no_step"]
        assert all(row["peers"][name]["seconds"] > 0 for name in gpu.PEERS)
    drawn = tmp_path / "again.svg"
    code, output = command("--draw", str(file), "--plot", str(drawn))
    assert code == 0, output
    assert picture.stat().st_size > 0 and drawn.stat().st_size > 0
    assert gpu.label(results["rows"][0]) in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_is_missing_is_named(command):
    code, output = command("--no-build")
    assert code == 2 and "torch finds no CUDA device" in output
    code, output = command("--draw", "numbers.json")
    assert code == 2 and "--draw needs --plot" in output


def test_the_build_is_from_source_against_the_installed_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **rest: calls.append(command))
    gpu.build()
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-build-isolation" in command and "--no-deps" in command and command[-1] == "."


def test_failing_tests_are_reported(tmp_path, monkeypatch):
    tests = tmp_path / "python_tests" / "ops" / "test_operators.py"
    tests.parent.mkdir(parents=True)
    tests.write_text("def test_fails():\n    assert False\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    result = gpu.run_tests("cpu", [], 120)
    assert not result["passed"] and "1 failed" in result["summary"]
    assert gpu.run_tests("cpu", [], 0.01)["summary"] == "not finished after 0 s"


def test_a_fused_step_that_fails_fails_the_command(tmp_path, monkeypatch, command):
    def broken(pairs):
        raise RuntimeError("no kernel image\nis available")

    file = tmp_path / "numbers.json"
    options = ["--device", "cpu", "--tiny", "--no-build", "--no-tests", "--json", str(file)]
    monkeypatch.setattr(gpu, "TINY", cases.TINY[:1])
    monkeypatch.setattr(gpu, "contenders", lambda device: dict.fromkeys(gpu.PEERS, lambda *_: None))
    assert command(*options)[0] == 0
    monkeypatch.setattr(gpu, "fused_step", broken)
    code, output = command(*options)
    assert code == 1
    assert "the fused step failed: " in output
    assert "no fused step: RuntimeError: no kernel image" in output
    rows = json.loads(file.read_text())["results"]["rows"]
    assert len(rows) == 2 and all(row["peers"]["pinv"]["seconds"] > 0 for row in rows)


def test_contenders_that_fail_or_are_late_leave_the_others_alone():
    def broken(*pair):
        raise RuntimeError("no compiler\nat all")

    on_cpu, case = clock.Clock(torch.device("cpu")), cases.TINY[0]
    peers = {**gpu.contenders(on_cpu.device), "compiled": broken}
    later = time.monotonic() + 100
    row = gpu.measure(on_cpu, case, torch.float32, peers, later)
    assert row["peers"]["compiled"] == {"not_measured": "no compiler"}
    assert row["peers"]["pinv"]["seconds"] > 0
    late = gpu.measure(on_cpu, case, torch.float32, peers, 0.0)
    assert all(peer == {"not_measured": "out of time"} for peer in late["peers"].values())
    assert gpu.table_row(late, 1e9)[8:12] == ["-"] * 4
    results = {"environment": gpu.environment(torch.device("cpu")), "copy_bandwidth": 1e9}
    gpu.show({**results, "rows": [row, late]})


def test_slow_contenders_are_timed_by_shape():
    pairs = cases.random_pairs(cases.TINY[1], torch.float32, torch.device("cpu"))
    on_cpu = clock.Clock(torch.device("cpu"))
    slow = gpu.peer_seconds(on_cpu, lambda *pair: time.sleep(0.01), pairs, limit=0.02)
    assert slow["by_shape"] and 0.03 <= slow["seconds"] < 0.3
    assert not gpu.peer_seconds(on_cpu, lambda *pair: None, pairs)["by_shape"]


def test_cases_have_the_sizes_of_their_models():
    by_name = {(case.name, case.rank): case for case in cases.CASES}
    llama = by_name["Llama-2-7B, all linear", 16]
    assert llama.count == 224
    assert by_name["Qwen2.5-VL-7B, all linear", 16].count == 28 * 7 + 32 * 5
    one = by_name["one 4096x4096", 16]
    assert one.bytes(torch.float32) == 4 * 16 * 4096 * 5
    assert one.bytes(torch.bfloat16) == 2 * 16 * 4096 * 5
    pairs = cases.random_pairs(cases.TINY[1], torch.bfloat16, torch.device("cpu"))
    assert [(p.B.shape[0], p.A.shape[1]) for p in pairs] == [(20, 30), (20, 30), (30, 20)]
    assert [count for _, count in cases.shapes(pairs)] == [2, 1]
    elements = sum(2 * p.A.numel() + 3 * p.B.numel() for p in pairs)
    assert cases.TINY[1].bytes(torch.bfloat16) == 2 * elements


def test_contenders_compute_what_they_are_compared_with():
    torch.manual_seed(0)
    pairs = cases.random_pairs(cases.TINY[1], torch.float32, torch.device("cpu"))
    scaling = [cases.SCALING] * len(pairs)
    E, _ = torch.ops.eflat.foreach_perturb(*cases.columns(pairs), scaling, cases.RHO)
    assert gpu.relative_error(E, pairs) < 1e-6
    assert gpu.relative_error([2 * e for e in E], pairs) > 0.9
    for contender in gpu.contenders(torch.device("cpu")).values():
        for e, pair in zip(E, pairs, strict=True):
            assert float((contender(*pair) - e).norm() / e.norm()) < 1e-3
    perturbations = cases.sam(pairs)()
    assert float(torch.cat([e.flatten() for e in perturbations]).norm()) == pytest.approx(cases.RHO)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (fused_step, ["--layers", "1", "--rank", "2", "--rounds", "1"]),
        (many_layers, ["--one", "--layers", "3"]),
    ],
    ids=["fused_step", "many_layers"],
)
def test_the_benches_of_an_optimizer_step_run(module, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    monkeypatch.setattr(
        module, "interleaved", lambda contenders, *_, **__: timing.interleaved(contenders, 1, 0.0)
    )
    module.main()
    assert capsys.readouterr().out.strip()
