"""bench.report: means, tests and verdicts of the CSV files, the report and README's tables."""

import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench import csv_rows
from bench.report import __main__ as report
from bench.report import readme_tables, summary

ROOT = Path(__file__).parents[2]

ACCURACY = {
    "lora": [0.70, 0.72, 0.71, 0.69, 0.73],
    "eflat": [0.74, 0.77, 0.75, 0.73, 0.78],
    "flat": [0.70, 0.73, 0.70, 0.69, 0.73],
    "full": [0.60, 0.63, 0.60, 0.60, 0.62],
}
STEP = {"step": 1.017, "least": 0.99, "largest": 1.1, "peak_mib": 740.6}


def row(stage, method, seed, tuned, **figures):
    base = {"stage": stage, "task": "words", "method": method, "seed": str(seed)}
    base |= {"tuned": json.dumps(tuned), "status": "ok", "error": ""}
    return base | {name: str(value) for name, value in figures.items()}


def make_rows():
    rows = []
    for method, values in ACCURACY.items():
        for rho, score in ((0.1, 0.5), (0.2, 0.6), (0.5, 0.4)):
            rows += [row("tuning", method, s, {"rho": rho}, accuracy=score) for s in (100, 101)]
        for seed, accuracy in enumerate(values):
            rows.append(
                row(
                    "final",
                    method,
                    seed,
                    {"rho": 0.2 if method == "eflat" else 0.5},
                    accuracy=accuracy,
                    loss=1.5 - accuracy,
                    train_loss=0.25,
                    peak_memory_mib=100.0,
                    trainable_parameters=1234,
                    sharpness_worst=1.5 - accuracy + 0.01 * seed,
                    sharpness_random=0.02,
                    **{"accuracy@other": accuracy / 2, "loss@other": 0.9},
                )
            )
    lost = row("final", "flat", 5, {"rho": 0.5})
    rows.append(lost | {"status": "failed", "error": "RuntimeError: no luck"})
    return rows


def write(path, rows):
    names = list(dict.fromkeys(name for r in rows for name in r))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder / "grid.csv", make_rows())
    write(folder / "other.csv", [{"layer": "up", "cosine": "0.5"}])  # of no experiment
    return folder


@pytest.fixture
def task(results):
    (task,) = summary.load(results)
    return task


def test_means_and_standard_errors_are_over_seeds(task):
    estimate = task.estimate("lora", "accuracy")
    assert estimate.mean == pytest.approx(0.71)
    assert estimate.error == pytest.approx(math.sqrt(0.001 / 4 / 5))
    assert estimate.count == 5
    assert task.estimate("eflat", "gap").mean == pytest.approx(1.5 - 0.754 - 0.25)
    assert task.estimate("lora", "nothing") is None


def test_differences_are_paired_and_tested(task):
    comparisons = task.comparisons("accuracy")
    assert list(comparisons) == ["eflat", "flat", "full"]
    raw = [
        stats.ttest_rel(ACCURACY[method], ACCURACY["lora"]).pvalue
        for method in ("eflat", "flat", "full")
    ]
    # Holm: the smallest times 3, the next times 2, the largest as it is.
    ordered = sorted(raw)
    expected = [ordered[0] * 3, max(ordered[0] * 3, ordered[1] * 2), ordered[2]]
    for p, comparison in zip(raw, comparisons.values(), strict=True):
        assert comparison.p == pytest.approx(expected[ordered.index(p)])
    assert [c.verdict for c in comparisons.values()] == ["wins", "incomplete", "loses"]
    eflat = comparisons["eflat"]
    assert eflat.difference.mean == pytest.approx(0.044)
    interval = stats.ttest_rel(ACCURACY["eflat"], ACCURACY["lora"]).confidence_interval(0.95)
    assert (eflat.low, eflat.high) == pytest.approx((interval.low, interval.high))
    assert task.comparisons("loss")["eflat"].verdict == "wins"  # a lower loss is better
    assert task.comparisons("loss")["full"].verdict == "loses"


def test_tasks_that_were_tuned_count_once_together(results, task):
    def others(name, methods, shift, seeds):
        rows = [r | {"task": name} for r in make_rows() if r["method"] in methods]
        for r in rows:
            if r["method"] == "eflat" and r["stage"] == "final":
                r["accuracy"] = str(float(r["accuracy"]) - shift)
        return [r for r in rows if r["stage"] == "tuning" or int(r["seed"]) < seeds]

    more = others("more", ("lora", "eflat", "flat"), 0.1, 3)
    write(results / "more.csv", more)
    write(results / "most.csv", others("most", ("lora", "eflat"), 0.3, 5))
    write(results / "untuned.csv", [r | {"task": "un"} for r in more if r["stage"] == "final"])
    tasks = summary.load(results)
    assert [t.is_tuned() for t in tasks] == [True, True, True, False]
    assert set(summary.pooled(tasks[:2], "accuracy")) == set()  # two tasks are too few
    found = summary.pooled(tasks[:3], "accuracy")
    assert set(found) == {"eflat"}
    own = [a - b for a, b in zip(ACCURACY["eflat"], ACCURACY["lora"], strict=True)]
    means = [sum(own) / 5, sum(own[:3]) / 3 - 0.1, sum(own) / 5 - 0.3]
    comparison = found["eflat"].comparison
    assert (comparison.difference.count, found["eflat"].runs) == (3, 13)
    assert comparison.difference.mean == pytest.approx(sum(means) / 3)
    assert comparison.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    overview = report.report(tasks).split("## words")[0]
    assert "over 3 tasks with tuning" in overview
    assert f"| EFlat-LoRA | 3 | 13 | {100 * comparison.difference.mean:+.2f}" in overview


def test_methods_of_other_tasks_stand_beside_the_published_one_on_the_same(results):
    rows = make_rows()
    for name, shift in (("b", 0.1), ("c", 0.2), ("d", 0.4)):
        kept = [r for r in make_rows() if name != "d" or r["method"] in ("lora", "eflat")]
        rows += [
            r | {"task": name, "accuracy": str(float(r["accuracy"]) - shift)}
            if r["method"] == "eflat"
            else r | {"task": name}
            for r in kept
        ]
    write(results / "grid.csv", rows)
    found = summary.pooled(summary.load(results), "accuracy")
    assert found["eflat"].published == pytest.approx(found["eflat"].comparison.difference.mean)
    assert found["eflat"].comparison.difference.mean == pytest.approx(0.044 - 0.7 / 4)
    assert found["full"].published == pytest.approx(0.044 - 0.1)


def test_no_verdict_where_runs_are_lost(results):
    rows = make_rows()
    for r in rows:
        if (r["method"], r["stage"], r["seed"]) == ("eflat", "final", "2"):
            r["sharpness_worst"] = "nan"
    write(results / "grid.csv", rows)
    (task,) = summary.load(results)
    assert task.comparisons("accuracy")["eflat"].verdict == "wins"
    assert task.comparisons("accuracy")["flat"].verdict == "incomplete"  # one run failed
    sharpness = task.comparisons("sharpness_worst")
    assert sharpness["eflat"].verdict == "incomplete" and sharpness["eflat"].difference.count == 4
    assert all(math.isfinite(c.p) for c in sharpness.values())
    assert task.comparisons("sharpness_worst")["full"].verdict == "larger"  # neither good nor bad
    failed = row("final", "lora", 5, {"rho": 0.5}) | {"status": "failed", "error": "no"}
    write(results / "grid.csv", [*rows, failed])
    (task,) = summary.load(results)
    assert {c.verdict for c in task.comparisons("accuracy").values()} == {"incomplete"}
    several = [r | {"task": name} for name in "abc" for r in rows]
    write(results / "grid.csv", several)
    found = summary.pooled(summary.load(results), "accuracy")
    assert {m for m, p in found.items() if p.comparison.verdict == "incomplete"} == {"flat"}
    assert set(found) == {"eflat", "flat", "full"}


def test_pairing_is_by_seed_not_by_order(results):
    rows = make_rows()
    write(results / "grid.csv", rows)
    expected = summary.load(results)[0].comparisons("accuracy")
    write(results / "grid.csv", [*rows[::-1]])
    again = summary.load(results)[0].comparisons("accuracy")
    for method, comparison in expected.items():
        assert again[method].difference.mean == pytest.approx(comparison.difference.mean)
        assert again[method].p == pytest.approx(comparison.p)


def test_holm_equals_a_textbook_case():
    assert summary.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert summary.holm([0.9, 0.8]) == [1.0, 1.0]
    assert summary.holm([]) == []


def test_differences_without_variance_are_tested_by_their_sign():
    assert summary._p([0.0] * 5) == 1.0
    exact = stats.binomtest(5, 5).pvalue
    assert summary._p([-0.5] * 5) == summary._p([0.5] * 5) == pytest.approx(exact)


def test_equal_figures_tie_and_one_seed_is_not_tested(results):
    rows = [r for r in make_rows() if r["method"] == "lora"]
    same = [r | {"method": "eflat"} for r in rows]
    write(results / "grid.csv", [*rows, *same])
    comparison = summary.load(results)[0].comparisons("accuracy")["eflat"]
    assert (comparison.p, comparison.verdict) == (1.0, "ties")
    alone = [r for r in [*rows, *same] if r["stage"] == "tuning" or r["seed"] == "0"]
    write(results / "grid.csv", alone)
    assert summary.load(results)[0].comparisons("accuracy") == {}
    assert "70.00" in report.report(summary.load(results))


def test_ratio_correlation_and_choice_are_computed(task):
    assert task.ratio("eflat", "peak_memory_mib") == 1.0
    r, low, high, count = task.correlation("sharpness_worst", "gap")
    assert low < r < high and count == 20 and r > 0.9
    assert task.choice("eflat") == summary.Choice({"rho": 0.2}, 3, [])
    assert task.choice("lora").at_edge == ["rho"]
    curve = task.tuning_curve("eflat", "rho")
    assert [(rho, e.mean, e.count) for rho, e in curve] == [
        (0.1, 0.5, 2),
        (0.2, 0.6, 2),
        (0.5, 0.4, 2),
    ]


def test_a_repeated_run_counts_once(results):
    rows = make_rows()
    failed = [r for r in rows if r["status"] == "failed"]
    good = row("final", "flat", 5, {"rho": 0.5}, accuracy=0.7, loss=0.8, train_loss=0.25)
    write(results / "grid.csv", [*rows, good])
    (task,) = summary.load(results)
    assert len(failed) == 1 and task.failures() == []
    assert len(task.runs("flat")) == 6


def test_runs_that_a_file_holds_are_not_repeated(tmp_path):
    path = tmp_path / "new" / "runs.csv"
    asked = []

    def rows_of(size, seed):
        asked.append((size, seed))
        return [{"size": size, "seed": seed, "value": len(asked) / 3} for _ in range(2)]

    def complete(runs, **options):
        return csv_rows.complete(path, ("size", "seed"), runs, rows_of, **options)

    assert [row["value"] for row in complete([(64, 0)])] == ["0.3333"] * 2
    rows = complete([(64, 0), (64, 1)])
    assert asked == [(64, 0), (64, 1)] and [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    rows = complete([(64, 0)], again=True)
    assert asked[2:] == [(64, 0)] and len(rows) == 4
    assert {(row["seed"], row["value"]) for row in rows} == {("1", "0.6667"), ("0", "1")}
    before = path.read_bytes()

    def fails(size, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        csv_rows.complete(path, ("size", "seed"), [(64, 2)], fails)
    assert path.read_bytes() == before


def test_the_report_says_who_wins_and_shows_what_failed(results, task):
    text = report.report([task])
    lines = text.splitlines()
    (line,) = [x for x in lines if x.startswith("* Accuracy against LoRA")]
    assert line == (
        "* Accuracy against LoRA — wins: EFlat-LoRA (+4.40 points); "
        "ties: none; loses: full fine-tuning (-10.00 points); incomplete: Flat-LoRA (+0.00 points)."
    )
    assert "* Accuracy on other against LoRA" in text
    assert "| EFlat-LoRA | 75.40 ± 0.93 | +4.40 ± 0.24 |" in text
    assert "1 run failed:" in text and "Flat-LoRA, rho 0.5, seed 5: RuntimeError: no luck" in text
    assert "over all 20 final runs" in text
    assert "The time of a step" not in text and "| 1.00 | 1,234 |" in text
    timed = report.report([task], times={"eflat": STEP})
    assert "| EFlat-LoRA | 1.017 | 0.990 to 1.100 | 741 |" in timed
    assert "| EFlat-LoRA | rho 0.2 | 3 |  | 6 | 5 | 0 |" in lines
    assert "| LoRA | rho 0.5 | 3 | rho | 6 | 5 | 0 |" in lines


def test_runs_that_two_experiments_share_are_named_once(results, task):
    again = [r | {"task": "again"} for r in make_rows() if r["stage"] == "final"]
    write(results / "more.csv", [r for r in again if r["method"] != "full" and r["seed"] in "01"])
    (one, other) = summary.load(results)
    assert summary.shared(other, [one]) == {"words": ["lora", "eflat", "flat"]}
    assert summary.shared(one, [other]) == {}
    text = report.report([one, other])
    assert text.count("no further evidence") == 1
    assert "LoRA, EFlat-LoRA, Flat-LoRA are among those of words: some of its seeds" in text


def test_correlations_of_all_tasks_stand_side_by_side(task):
    r, low, high, count = task.correlation("sharpness_worst", "gap", "full")
    text = report.report([task])
    assert f"| words | {count} | {r:.2f} ({low:.2f} to {high:.2f}) |" in text
    r, low, high, count = task.correlation("sharpness_worst", "gap", "full", within=True)
    assert f"| {r:.2f} ({low:.2f} to {high:.2f}) |" in text


def test_correlations_within_methods_leave_out_what_sets_methods_apart():
    generator = random.Random(7)
    rows, x, y, ones = [], [], [], []
    for k, method in enumerate(("lora", "eflat", "flat")):
        for seed in range(6):
            noise = generator.gauss(0, 1)
            x.append(10.0 * k + noise)
            y.append(-20.0 * k + noise + generator.gauss(0, 0.3))
            ones.append([float(k == j) for j in range(3)])
            figures = {"sharpness_worst": x[-1], "loss": y[-1], "train_loss": 0.0}
            rows.append(row("final", method, seed, {}, **figures))
    task = summary.TaskResults("grid", "words", rows)
    r, low, high, count = task.correlation("sharpness_worst", "gap")
    plain = stats.pearsonr(x, y)
    interval = plain.confidence_interval(0.95)
    assert (r, low, high) == pytest.approx((plain.statistic, interval.low, interval.high))
    within, low, high, count = task.correlation("sharpness_worst", "gap", within=True)
    # The partial correlation: that of the residuals, given which method it is.
    residuals = [v - np.array(ones) @ np.linalg.lstsq(ones, v, rcond=None)[0] for v in (x, y)]
    assert within == pytest.approx(stats.pearsonr(*residuals).statistic)
    assert r < -0.9 and within > 0.8 and low < within < high and count == 18
    assert math.atanh(high) - math.atanh(low) == pytest.approx(2 * 1.959964 / math.sqrt(18 - 2 - 3))


def test_strings_may_be_tuned_as_numbers_are(results):
    rows = make_rows()
    for r in rows:
        r["tuned"] = json.dumps({"onto": "A", **json.loads(r["tuned"])})
    other = [
        r | {"tuned": r["tuned"].replace('"A"', '"B"')} for r in rows if r["stage"] == "tuning"
    ]
    write(results / "grid.csv", [*rows, *other])
    text = report.report(summary.load(results))
    assert "| EFlat-LoRA | onto A, rho 0.2 | 6 |  | 12 | 5 | 0 |" in text
    assert "| LoRA | onto A, rho 0.5 | 6 | rho | 12 | 5 | 0 |" in text
    assert "Flat-LoRA, onto A, rho 0.5, seed 5: RuntimeError: no luck" in text


def test_the_command_writes_the_same_every_time_and_checks_it(results):
    def write():  # in a process of its own, with other hashes
        subprocess.run([sys.executable, "-m", "bench.report", str(results)], check=True)

    steps = {"results": [{"method": "eflat", **STEP}]}
    (results / "step.json").write_text(json.dumps(steps))
    with pytest.raises(SystemExit, match="out of date"):
        report.main(results, check=True)
    write()
    written = results.parent / "REPORT.md"
    assert "| EFlat-LoRA | 1.017 | 0.990 to 1.100 | 741 |" in written.read_text()
    figures = sorted((results.parent / "figures").iterdir())
    assert len(figures) == 3
    for figure in figures:
        assert f"figures/{figure.name}" in written.read_text()
    before = [path.read_bytes() for path in (written, *figures)]
    report.main(results, check=True)
    write()
    assert [path.read_bytes() for path in (written, *figures)] == before
    written.write_text(written.read_text() + "edited")
    with pytest.raises(SystemExit, match="out of date"):
        report.main(results, check=True)


@pytest.mark.skipif(not summary.load(ROOT / "bench/results"), reason="no results yet")
def test_the_report_is_up_to_date():
    report.main(ROOT / "bench/results", check=True)


def test_tables_of_the_readme_are_made_from_the_files():
    readme = readme_tables.README.read_text(encoding="utf-8")
    names = re.findall(r"<!-- table: (\w+) -->", readme)
    assert set(names) == {*readme_tables.TABLES, "end"} and names.count("end") == len(names) // 2
    begin = readme.index("| LoRA |", readme.index("<!-- table: movies -->"))
    wrong = readme[:begin] + "| LoRA | 99.99 " + readme[begin:]
    assert readme_tables.renewed(wrong, ROOT / "bench/results") == readme
