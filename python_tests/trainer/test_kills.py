"""After SIGKILL at any moment, files hold clean weights and training resumes bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from kill_case import EVERY, STEPS, compare, train
from models import assert_same_bits
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_model import make_rows, save_tiny_model, write_csv
from trainer_case import assert_saved

from eflat_ext.trainer import last_complete_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")


def finished(hook: str, folder: Path, resume: str | None, outcome: Path) -> dict[str, Any]:
    process = forked.start("kill_case", train, hook, folder, resume, outcome)
    process.join()
    assert process.exitcode == 0
    return torch.load(outcome, weights_only=False)


def killed(kind: str, hook: str, folder: Path, whole: dict[str, Any], rng: random.Random) -> None:
    """Start a run and kill it: at any time, a moment after a save began, or within a write."""
    ours, theirs = Pipe(duplex=False)
    tear = (rng.randrange(whole["writes"]), rng.random()) if kind == "write" else None
    process = forked.start("kill_case", train, hook, folder, None, folder / "never", theirs, tear)
    if tear is None:
        assert ours.recv() == "begin"
        seconds = whole["seconds"][0]
        if kind == "save":
            for _ in range(rng.randint(1, STEPS // EVERY)):
                assert ours.recv() == "save"
            seconds = whole["seconds"][1]
        time.sleep(rng.uniform(0, 0.9 * seconds))
        process.kill()
    process.join()
    # The run may end before the signal.
    assert process.exitcode == -signal.SIGKILL or (process.exitcode == 0 and tear is None)


def look(folder: Path, whole: dict[str, Any]) -> int:
    """Assert that files hold their step's state; return the number of incomplete checkpoints."""
    last = last_complete_checkpoint(folder)
    last_step = int(last.rpartition("-")[2]) if last else 0
    incomplete = 0
    for checkpoint in folder.glob("checkpoint-*"):
        step = int(checkpoint.name.partition("-")[2])
        complete = step <= last_step
        incomplete += not complete
        assert whole["steps"][step]
        try:
            assert_saved(checkpoint, whole["steps"][step])
        except (OSError, SafetensorError):  # absent or torn
            assert not complete
        try:
            state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        except (OSError, RuntimeError, EOFError):
            assert not complete
        else:
            assert_same_state(state, whole["states"][step])
        others = {path.name for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt")}
        assert others <= {"optimizer.pt", "scheduler.pt", "training_args.bin"}
    return incomplete


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, entry in a["state"].items():
        assert_same_bits(entry, b["state"][key])


def kill_and_resume(hook: str, kinds: list[str], tmp_path: Path) -> int:
    whole = finished(hook, tmp_path / "whole", None, tmp_path / "whole.pt")
    assert len(whole["log"]) == STEPS and len(whole["steps"]) == STEPS // EVERY
    rng = random.Random(seed := random.SystemRandom().randrange(2**32))
    print("seed", seed)  # shown when it fails
    incomplete = 0
    for number, kind in enumerate(kinds):
        folder = tmp_path / str(number)
        last: str | None = f"{folder}/checkpoint-{STEPS}"
        while last == f"{folder}/checkpoint-{STEPS}":  # killed too late, nothing was left to do
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            killed(kind, hook, folder, whole, rng)
            found = look(folder, whole)
            last = last_complete_checkpoint(folder)
        incomplete += found
        again = finished(hook, folder, last, tmp_path / "again.pt")
        assert_same_bits(again["weights"], whole["weights"])
        assert_same_state(again["optimizer"], whole["optimizer"])
        assert again["log"] == whole["log"]
        assert look(folder, whole) == 0
    return incomplete


@pytest.mark.proves("Faults", "killed at twenty moments, also while saving, it resumes bit-exact")
@pytest.mark.proves("Hugging Face Trainer", "a killed run resumes bit-exact")
def test_killed_runs_resume_bit_exact(tmp_path: Path) -> None:
    kinds = ["any"] * 7 + ["save"] * 6 + ["write"] * 7
    assert kill_and_resume("eflat", kinds, tmp_path) >= 7


def test_killed_runs_of_two_gradients_resume_bit_exact(tmp_path: Path) -> None:
    assert kill_and_resume("flat", ["any", "save", "write"], tmp_path) >= 1


def test_the_last_complete_checkpoint_is_the_newest_with_a_whole_state_file(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "missing") is None
    states = {"9": "{}", "10": '{"global_step": 10}\n', "11": "", "12": '{"global_', "13": None}
    for step, state in {**states, "x": "{}", "14-old": "{}"}.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.proves("Faults", "a killed eflat finetune leaves nothing that looks complete")
def test_a_killed_comparison_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    """Adapters are those of finished runs, and a table exists only when all runs are finished."""
    settings = {
        "model": save_tiny_model(tmp_path / "model"),
        "data": write_csv(tmp_path / "data.csv", make_rows(200)),
        "method": ["eflat", "flat"],
        "seeds": [0, 1],
        "max_length": 32,
        "steps": 6,
        "rank": 4,
        "device": "cpu",
    }
    begin = time.monotonic()
    process = forked.start("kill_case", compare, {**settings, "output_dir": tmp_path / "whole"})
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - begin
    assert not list((tmp_path / "whole").rglob("unfinished-*"))
    whole = {path.relative_to(tmp_path / "whole"): path for path in runs_of(tmp_path / "whole")}
    assert len(whole) == 4

    rng = random.Random(seed := random.SystemRandom().randrange(2**32))
    print("seed", seed)
    unfinished = 0
    for number in range(4):
        folder = tmp_path / str(number)
        process = forked.start("kill_case", compare, {**settings, "output_dir": folder})
        if number == 0:
            time.sleep(rng.uniform(0, seconds))
        else:  # while it saves
            saves, seen = rng.randint(1, 4), set()
            while len(seen) < saves and process.is_alive():
                seen |= {str(path) for path in folder.glob("*/unfinished-*")}
        process.kill()
        process.join()
        unfinished += bool(list(folder.glob("*/unfinished-*")))
        for path in runs_of(folder):
            expected = whole[path.relative_to(folder)]
            files = [load_file(run / "adapter_model.safetensors") for run in (path, expected)]
            assert_same_bits(*files)
            assert json.loads((path / "metrics.json").read_text())["steps"] == 6
            assert (path / "loss.csv").read_text() == (expected / "loss.csv").read_text()
        if (folder / "results.json").exists():
            assert len(json.loads((folder / "results.json").read_text())["runs"]) == 4
        if (folder / "results.csv").exists():
            with (folder / "results.csv").open() as file:
                assert len(list(csv.DictReader(file))) == 4
    assert unfinished >= 1


def runs_of(folder: Path) -> list[Path]:
    return list(folder.glob("*/seed-*"))
