"""What lab.experiment promises: a grid on equal terms, tuned on validation, resumable."""

import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from experiment_case import SHARPNESS, make_content, rows_of, write
from tiny_model import make_rows, write_csv

from bench.experiment import METHODS
from eflat_ext.lab.data.splits import flip_labels, with_typos
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.experiment import plan, runner
from eflat_ext.lab.experiment.pending import known_runs
from eflat_ext.lab.experiment.results import Results, columns_of
from eflat_ext.lab.finetune import comparison

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return make_content(tmp_path_factory.mktemp("experiment"))


def figures(path):
    """All rows without what the clock says, in an order of their own."""
    timed = ("seconds_per_step", "run_seconds", "peak_memory_mib")
    rows = [tuple(v for k, v in row.items() if k not in timed) for row in rows_of(path)]
    return sorted(rows)


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    """The CSV file of the whole experiment."""
    folder = tmp_path_factory.mktemp("finished")
    return runner.run(write(folder, content, sharpness=SHARPNESS))


def test_a_part_is_run_alone_and_is_no_different(content, finished, tmp_path, capsys):
    tasks = {"words": {"train_size": 48}, "more": {"train_size": 64}}
    methods = {**content["methods"], "flat": {"rho": 0.1}}
    path = write(tmp_path, content, tasks=tasks, methods=methods, sharpness=SHARPNESS)
    part = runner.run(path, task=["words"], method=["eflat-global"])
    assert figures(part) == figures(finished)  # with lora, which it is like
    assert "14 of 14 runs" in capsys.readouterr().out
    runner.run(path, task=["words"], method=["flat"])
    assert {(r["task"], r["method"]) for r in rows_of(part)} == {
        ("words", name) for name in methods
    }
    for wrong in ({"task": ["word"]}, {"method": ["eflat"]}):
        with pytest.raises(
            InputError, match=r"must be one of (words|lora), .*, got '(word|eflat)'"
        ):
            runner.run(path, **wrong)


def test_typos_swap_inner_letters_of_a_share_of_words():
    texts = [f"Some wordlike text, with number {k} and don't_stop 12345." for k in range(300)]
    changed = with_typos(texts, 0.3, seed=1)
    assert changed == with_typos(texts, 0.3, seed=1) != with_typos(texts, 0.3, seed=2)
    words = [
        pair
        for a, b in zip(texts, changed, strict=True)
        for pair in zip(a.split(), b.split(), strict=True)
    ]
    for old, new in words:
        assert sorted(old) == sorted(new) and (old[0], old[-1]) == (new[0], new[-1])
    assert {old for old, new in words if old != new} <= {
        *("Some", "wordlike", "text,", "with", "number", "don't_stop")
    }
    swapped = [old != new for old, new in words if old == "wordlike"]
    assert 0.2 < sum(swapped) / len(swapped) < 0.4
    assert with_typos(texts, 0.0, seed=1) == texts


def test_a_misspelt_test_part_is_a_further_test(content, tmp_path):
    tasks = {"words": {"train_size": 48, "also_test": ["typos"]}}
    rows = rows_of(runner.run(write(tmp_path, content, tasks=tasks, methods={"lora": {}})))
    assert all(row["loss@typos"] != row["loss"] and row["accuracy@typos"] for row in rows)


def test_every_run_has_a_row_and_its_figures(finished):
    rows = rows_of(finished)
    stages = [(row["stage"], row["method"]) for row in rows]
    for method in ("lora", "eflat-global"):
        assert stages.count(("tuning", method)) == 4
        assert stages.count(("final", method)) == 3
    for row in rows:
        assert (row["status"], row["error"]) == ("ok", "")
        assert row["evaluated_on"] == {"tuning": "validation", "final": "test"}[row["stage"]]
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["loss"]) > 0
        assert bool(row["sharpness_worst"]) == (row["stage"] == "final")
    final = [row for row in rows if row["stage"] == "final"]
    assert all(float(row["sharpness_worst"]) > 0 for row in final)
    assert {row["seed"] for row in final} == {"0", "1", "2"}


def test_the_choice_is_the_best_on_validation_and_takes_nothing_else(finished):
    rows = rows_of(finished)
    for method in ("lora", "eflat-global"):
        mean = {}
        for row in rows:
            if row["stage"] == "tuning" and row["method"] == method:
                accuracy, loss = mean.get(row["tuned"], (0, 0))
                mean[row["tuned"]] = accuracy + float(row["accuracy"]), loss - float(row["loss"])
        best = max(mean, key=mean.get)
        final = {
            row["tuned"] for row in rows if row["stage"] == "final" and row["method"] == method
        }
        assert final == {best}
    inherited = {yaml.safe_load(r["tuned"])["lr"] for r in rows if r["method"] == "eflat-global"}
    chosen = {
        yaml.safe_load(row["tuned"])["lr"]
        for row in rows
        if row["method"] == "lora" and row["stage"] == "final"
    }
    assert inherited == chosen


def test_a_choice_from_the_test_part_is_refused(finished, content, tmp_path):
    path = write(tmp_path, content, sharpness=SHARPNESS)
    tampered = tmp_path / "grid.csv"
    tampered.write_text(finished.read_text().replace(",validation,", ",test,"))
    grid = plan.load(path, comparison.METHODS)
    results = Results(tampered, columns_of(grid))
    with pytest.raises(AssertionError, match="validation part alone"):
        results.chosen(grid, grid.tasks[0], grid.methods[0])


def test_a_finished_experiment_runs_nothing_and_shows_its_means(finished, monkeypatch, capsys):
    before = finished.read_bytes()
    monkeypatch.setattr(comparison, "train", lambda *a, **k: pytest.fail("trained again"))
    runner.run(finished.with_name("grid.yaml"))
    assert finished.read_bytes() == before
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "words" in shown
    final = [r for r in rows_of(finished) if (r["stage"], r["method"]) == ("final", "lora")]
    figures = []
    for name, scale, digits in (("accuracy", 100, 2), ("loss", 1, 4)):
        values = [scale * float(row[name]) for row in final]
        mean, error = statistics.fmean(values), statistics.stdev(values) / 3**0.5
        figures.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
    lr = yaml.safe_load(final[0]["tuned"])["lr"]
    assert f"lora lr {lr} 3 {figures[0]} {figures[1]} 0" in shown


def test_rows_of_runs_that_the_file_has_no_more_do_not_count(finished, content, tmp_path, capsys):
    (chosen,) = {
        r["tuned"] for r in rows_of(finished) if (r["stage"], r["method"]) == ("final", "lora")
    }
    lora = {"tune": {"lr": [yaml.safe_load(chosen)["lr"]]}}
    path = write(
        tmp_path, content, sharpness=SHARPNESS, methods={**content["methods"], "lora": lora}
    )
    (tmp_path / "grid.csv").write_bytes(finished.read_bytes())
    runner.run(path)
    out, err = capsys.readouterr()
    assert "12 of 12 runs" in out and "12/12" in err
    assert rows_of(tmp_path / "grid.csv") == rows_of(finished)


def test_a_row_cut_off_is_run_again(finished, content, tmp_path):
    path = write(tmp_path, content, sharpness=SHARPNESS)
    whole = finished.read_bytes()
    (tmp_path / "grid.csv").write_bytes(whole[: int(0.7 * len(whole))])
    assert figures(runner.run(path)) == figures(finished)


def test_killed_processes_go_on_where_they_were(finished, content, tmp_path):
    path = write(tmp_path, content, sharpness=SHARPNESS)
    command = [sys.executable, "-m", "bench.experiment", str(path), "--jobs", "2"]  # adds methods
    csv_file = tmp_path / "grid.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not csv_file.exists() or csv_file.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = csv_file.read_bytes()
    assert runner.run(path) == csv_file
    assert csv_file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert figures(csv_file) == figures(finished)


def test_the_rows_in_bench_are_still_those_of_their_files():
    methods = {**comparison.METHODS, **METHODS}
    for path in (ROOT / "bench" / "experiments").glob("*.yaml"):
        grid = plan.load(path, methods)
        rows = rows_of(grid.results) if grid.results.exists() else []
        results = Results(grid.results, columns_of(grid))
        assert len([run for run in known_runs(grid, results) if results.of(run)]) == len(rows), path


def test_other_settings_than_the_rows_have_are_refused(finished, content, tmp_path):
    before = finished.read_bytes()[:-9]  # a row cut off
    (tmp_path / "grid.csv").write_bytes(before)
    settings = {**content["settings"], "steps": 5}
    path = write(tmp_path, content, sharpness=SHARPNESS, settings=settings)
    with pytest.raises(InputError, match="with other settings"):
        runner.run(path)
    path = write(tmp_path, content, sharpness=SHARPNESS)
    for columns in (b"run_seconds", b"device,run_seconds", b"run_seconds,device,loss@other"):
        other = before.replace(b"run_seconds,device", columns, 1)
        (tmp_path / "grid.csv").write_bytes(other)
        with pytest.raises(InputError, match="other columns"):
            runner.run(path)
        assert (tmp_path / "grid.csv").read_bytes() == other


def test_a_task_with_further_tests_is_added_to_the_rows_that_are_there(
    finished, content, tmp_path, monkeypatch
):
    other = write_csv(tmp_path / "other.csv", make_rows(60, seed=7))
    more = {"train_size": 64, "also_test": ["typos", other]}
    tasks = {"more": more, "words": {"train_size": 48}}
    path = write(tmp_path, content, tasks=tasks, sharpness=SHARPNESS)
    file = tmp_path / "grid.csv"
    file.write_bytes(finished.read_bytes() + b"a row cut off")
    runner.run(path, method=["lora"])
    old, new = rows_of(finished), rows_of(file)
    names = [f"{figure}@{data}" for data in ("typos", other) for figure in ("accuracy", "loss")]
    assert new[: len(old)] == [row | dict.fromkeys(names, "") for row in old]
    added = [row for row in new[len(old) :] if row["stage"] == "final"]
    assert len(added) == 3 and all(row[name] for row in added for name in names)
    assert {row["task"] for row in new[len(old) :]} == {"more"}
    # Those of a task that is put first come first.
    tasks = {"first": {"also_test": [other]}, **tasks}
    path = write(tmp_path, content, tasks=tasks, sharpness=SHARPNESS)
    monkeypatch.setattr(comparison, "train", lambda *a, **k: pytest.fail("trained again"))
    before = file.read_bytes()
    runner.run(path, task=["words", "more"], method=["lora"])
    assert file.read_bytes() == before  # nothing was to run
    grid = plan.load(path, comparison.METHODS)
    Results(file, columns_of(grid)).make_file()
    assert rows_of(file) == new
    assert list(rows_of(file)[0]) == columns_of(grid)
    assert [path.name for path in tmp_path.glob("unfinished-*")] == []


# --- equal terms -------------------------------------------------------------------------


def test_methods_of_one_seed_train_on_the_same(content, tmp_path, monkeypatch):
    seen = {}

    def train(config, task, method, seed, *_, **__):
        seen.setdefault((seed, config.evaluate_on), []).append(
            (task.train, task.steps, task.held_out)
        )
        raise RuntimeError("seen")

    monkeypatch.setattr(comparison, "train", train)
    methods = {name: {} for name in comparison.METHODS}
    with pytest.raises(SystemExit, match="15 of 15 runs failed, the first with RuntimeError: seen"):
        runner.run(write(tmp_path, content, methods=methods))
    assert len(seen) == 3
    for tasks in seen.values():
        assert len(tasks) == len(methods)
        assert all(task == tasks[0] for task in tasks)
    drawn = [tasks[0][0].inputs for tasks in seen.values()]
    assert drawn[0] != drawn[1] != drawn[2]


def test_a_method_with_tokens_of_its_own_trains_on_them(content, tmp_path, monkeypatch):
    prepared = []
    prepare = comparison.prepare
    monkeypatch.setattr(
        comparison, "prepare", lambda c: prepared.append(c.max_length) or prepare(c)
    )
    methods = {"lora": {}, "short": {"method": "lora", "max_length": 3}, "flat": {"rho": 0.1}}
    path = write(tmp_path, content, methods=methods, seeds=[0])
    together = {row["method"]: row for row in rows_of(runner.run(path))}
    assert prepared == [32, 3, 32]
    (tmp_path / "grid.csv").unlink()
    (alone,) = rows_of(runner.run(path, method=["short"]))
    assert together["short"]["loss"] == alone["loss"] != together["lora"]["loss"]
    prepared.clear()
    path = write(tmp_path, content, methods={"lora": {}, "flat": {"rho": 0.1}}, results="two.csv")
    runner.run(path)
    assert prepared == [32]


def test_training_sentences_are_none_of_the_held_out_ones(content, tmp_path):
    grid = plan.load(write(tmp_path, content), comparison.METHODS)
    run = plan.Run("final", grid.tasks[0], grid.methods[0], 0, {})
    pool = comparison.prepare(replace(run.config(), train_size=None))
    for seed in range(5):
        task = runner.draw(pool, 48, 0.0, seed)
        drawn = {tuple(row["input_ids"]) for row in task.train.inputs}
        assert len(task.train) == 48
        assert not drawn & {tuple(row["input_ids"]) for row in task.held_out.inputs}
        share = sum(pool.train.labels) / len(pool.train)
        assert sum(task.train.labels) / 48 == pytest.approx(share, abs=1 / 48)


def test_label_noise_changes_as_many_labels_as_it_says(content, tmp_path):
    grid = plan.load(write(tmp_path, content), comparison.METHODS)
    run = plan.Run("final", grid.tasks[0], grid.methods[0], 0, {})
    pool = comparison.prepare(replace(run.config(), train_size=None))
    clean, noisy = (runner.draw(pool, 50, share, 3) for share in (0.0, 0.2))
    assert clean.train.inputs == noisy.train.inputs
    pairs = zip(clean.train.labels, noisy.train.labels, strict=True)
    assert sum(a != b for a, b in pairs) == 10
    assert noisy.held_out == clean.held_out
    flipped = flip_labels([0, 1, 2] * 20, 1.0, 3, seed=1)
    assert all(a != b for a, b in zip(flipped, [0, 1, 2] * 20, strict=True))
    assert set(flipped) == {0, 1, 2}


def test_further_tests_hold_no_sentence_of_the_task(content, tmp_path):
    rows = make_rows(400)[:50] + make_rows(60, seed=7)
    other = write_csv(tmp_path / "other.csv", rows)
    task = {"words": {"train_size": 48, "also_test": [other]}}
    path = write(tmp_path, content, tasks=task, methods={"lora": {}}, seeds=[0])
    (row,) = rows_of(runner.run(path))
    wrong = (1 - float(row[f"accuracy@{other}"])) * 60
    assert wrong == pytest.approx(round(wrong), abs=1e-6)  # of the 60 new ones alone


def test_lists_of_sizes_and_noise_are_tasks_of_their_own(content, tmp_path):
    tasks = {"w": {"train_size": [16, 32], "label_noise": [0, 0.25]}}
    grid = plan.load(write(tmp_path, content, tasks=tasks), comparison.METHODS)
    assert [(t.name, t.settings["train_size"], t.label_noise) for t in grid.tasks] == [
        ("w-16-noise0", 16, 0.0),
        ("w-16-noise25", 16, 0.25),
        ("w-32-noise0", 32, 0.0),
        ("w-32-noise25", 32, 0.25),
    ]
    assert grid.count() == 4 * 2 * (2 * 2 + 3)


def test_peak_memory_is_of_the_block_alone():
    with runner._peak_memory() as before:
        pass
    with runner._peak_memory() as during:
        block = torch.ones(64 * 2**20 // 4)
        del block
    with runner._peak_memory() as after:
        pass
    if before:
        assert during["peak_memory_mib"] - before["peak_memory_mib"] > 32
        assert during["peak_memory_mib"] - after["peak_memory_mib"] > 32
