"""Random calls of ``eflat``, most of them wrong: a result or a clear error, files left alone.

``EFLAT_FUZZ_SEED`` and ``EFLAT_FUZZ_CALLS`` give other calls.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import re
import shutil
import time
from collections import Counter
from functools import cache

import pytest
import torch
from fuzz_cli import UNREADABLE, describe, digest, make_arguments, make_files, state_of
from huggingface_hub import constants
from peft import PeftModel

from eflat_ext.lab import cli
from eflat_ext.lab.data import tables
from eflat_ext.lab.finetune import comparison, loading, run_folder
from eflat_ext.lab.measure import trained_models

SEED = int(os.environ.get("EFLAT_FUZZ_SEED", "0"))
CALLS = int(os.environ.get("EFLAT_FUZZ_CALLS", "1000"))
SECONDS = 30  # that a call may take


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder full of files as the current one; the plot of the losses is left out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # it may have been imported before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # A name that is no file may be one of the hub's; no network is asked here.
    monkeypatch.setattr(tables, "_read_hub", no_hub)
    monkeypatch.setattr(loading, "read", strict_read)
    monkeypatch.setattr(run_folder, "plot_losses", lambda path, results: path.write_bytes(b""))
    # Each of these takes as long as all the rest of a call.
    monkeypatch.setattr(run_folder, "versions", cache(run_folder.versions))
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    yield inside
    gc.unfreeze()


def no_hub(source):
    raise comparison.InputError(f"cannot load the hub data set {source!r}: no network")


def strict_read(source, *columns):
    """Reads, and complains of what should have been refused."""
    table = tables.read(source, *columns)
    assert source not in UNREADABLE, f"{source} was read"
    return table


def no_measuring(*_):
    raise comparison.InputError("nothing is measured here")


def pretended(config, task, method, seed, model, optimizer, on_step=lambda loss: None):
    """In place of training: its inputs are looked at, one step at most is counted."""
    assert task.steps >= 1 and len(task.train) and len(task.held_out)
    on_step(1.0)
    figures = {"accuracy": 0.5, "loss": 1.0, "train_loss": 1.0, "seconds_per_step": 0.1}
    about = {"method": method, "seed": seed, "evaluated_on": config.evaluate_on, "steps": 1}
    return comparison.Result(about | figures, [1.0])


@pytest.mark.proves(
    "Faults", "1,000 random calls of the command line: a result or a clear error, files unchanged"
)
def test_random_calls(folder, monkeypatch, capsys):
    files = make_files(folder)
    load = trained_models.load
    train = comparison.train
    before, contents = state_of(folder.parent), digest(folder.parent)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(CALLS):
        if number % 50 == 1:
            gc.freeze()  # a run collects garbage: ten times faster without all loaded modules
        rng = random.Random(f"{SEED} {number}")
        arguments = make_arguments(rng, files)
        one_step = ("--steps", "1") in itertools.pairwise(arguments)
        real = number % 25 == 0 and one_step
        monkeypatch.setattr(comparison, "train", train if real else pretended)
        # Without options: an odd number of samples or points could take for ever.
        plain = not any(word.startswith("-") for word in arguments)
        monkeypatch.setattr(trained_models, "load", load if plain else no_measuring)
        start = time.monotonic()
        try:
            code = cli.main(arguments)
        except SystemExit as error:  # an experiment some of whose runs have failed
            code, complaint = 1, str(error.code)
            if re.match(r"eflat: \d+ of \d+ runs failed", complaint):
                complaint = ""
        except BaseException as error:  # what would be a traceback
            code, complaint = -1, f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            complaint = ""
        seconds = time.monotonic() - start
        out, err = capsys.readouterr()
        after = state_of(folder.parent)
        new = sorted(after.keys() - before.keys())
        if any(after.get(name) != facts for name, facts in before.items() if not is_folder(facts)):
            complaint = "a file that was there has changed or gone"
        if code == 2:
            complaint = complaint or judge_error(err, new)
        elif not (complaint or new or "--help" in arguments or (out and "sharpness" in arguments)):
            complaint = "no result, and no error"
        if seconds > SECONDS:
            complaint = f"took {seconds:.0f} s"
        if complaint:
            wrong.append(f"{SEED} {number}: eflat {describe(arguments)}: {complaint[:300]}")
        endings = {-1: "wrong", 0: "real" if real else "ok", 1: "runs failed"}
        outcomes["wrong" if complaint else endings.get(code) or reason(err)] += 1
        for name in reversed(new):
            shutil.rmtree(name, ignore_errors=True)
            if os.path.isfile(name):
                os.remove(name)
    print(dict(outcomes))
    assert not wrong, f"{len(wrong)} of {CALLS}:\n" + "\n".join(wrong[:40])
    assert digest(folder.parent) == contents
    # Neither all errors nor all results, and errors of many kinds.
    assert outcomes["ok"] + outcomes["real"] > CALLS / 10, outcomes
    assert outcomes["real"] > 0
    assert sum(outcomes.values()) - outcomes["ok"] - outcomes["real"] > CALLS / 3, outcomes
    assert len(outcomes) > 25, outcomes


def is_folder(facts):
    return facts[0] & 0o170000 == 0o040000  # its time changes with what is made and removed in it


def judge_error(err, new):
    lines = [line for line in err.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("eflat: ")]
    if "Traceback" in err or len(ours) != 1 or lines[-1] != ours[0]:
        return f"no one-line error: {err[-300:]!r}"
    if len(ours[0]) > 1000:
        return f"an error of {len(ours[0])} characters"
    return f"left behind: {new[:4]}" if new else ""


def reason(err):
    """An error without what is particular to the call."""
    last = err.strip().splitlines()[-1]
    return re.sub(r"['\"].*?['\"]|\S*[\d./\\\"]\S*", "_", last)[:40]
