"""What eflat_ext.lab.experiment.runner does with runs that fail and files that cannot be used."""

import importlib
from pathlib import Path

import pytest
from experiment_case import SHARPNESS, make_content, rows_of, write
from tiny_model import make_rows, write_csv

from eflat_ext.lab import cli
from eflat_ext.lab.experiment import plan, results, runner
from eflat_ext.lab.finetune import comparison


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return make_content(tmp_path_factory.mktemp("experiment"))


def failing(config, model, steps):
    if config.rho > 0.1:
        raise RuntimeError("out of\nluck")
    return comparison.METHODS["eflat"](config, model, steps)


def test_failed_runs_are_kept_and_shown_and_tried_again_when_asked(content, tmp_path, capsys):
    methods = {
        "lora": {},
        "bad": {"method": "failing", "tune": {"rho": [0.05, 0.5]}},
        "hopeless": {"method": "failing", "tune": {"rho": [0.5]}},
        "after": {"method": "eflat", "like": "hopeless"},
    }
    path, file = write(tmp_path, content, methods=methods), tmp_path / "grid.csv"
    with pytest.raises(SystemExit, match="4 of 12 runs failed, the first with RuntimeError: out"):
        runner.run(path, methods={"failing": failing})
    rows = rows_of(file)
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["error"] for row in failed} == {"RuntimeError: out of"}
    assert [row["method"] for row in failed] == ["bad"] * 2 + ["hopeless"] * 2
    assert {r["tuned"] for r in rows if (r["stage"], r["method"]) == ("final", "bad")} == {
        '{"rho": 0.05}'
    }
    out, err = capsys.readouterr()
    assert err.count("Traceback") == 1 and "in failing" in err
    assert out.count("failed: tuning words") == 4 and out.count("not run: ") == 2
    assert "not run: hopeless on words: every tuning value has a failed run" in out
    assert "not run: after on words: nothing can be chosen for hopeless" in out
    assert "hopeless 0 2" in [" ".join(line.split()) for line in out.splitlines()]
    assert "12 of 18 runs" in out and "12/18 final" in err
    before = len(rows)
    with pytest.raises(SystemExit):
        runner.run(path, methods={"failing": failing})
    assert len(rows_of(file)) == before
    capsys.readouterr()
    runner.run(path, methods={"failing": comparison.METHODS["eflat"]}, retry_failed=True)
    assert "hopeless" in {row["method"] for row in rows_of(file) if row["stage"] == "final"}
    out, err = capsys.readouterr()
    counted = [line.partition(" ")[0] for line in err.splitlines() if " seed " in line]
    assert counted == [f"{k}/18" for k in range(9, 19)] and "18 of 18 runs" in out


def test_a_loss_that_is_not_finite_is_a_failed_run(content, tmp_path, capsys):
    methods = {"lora": {"lr": 1e30}, "flat": {}}
    path = write(tmp_path, content, methods=methods, seeds=[0])
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        cli.main(["experiment", str(path)])
    assert "Traceback" not in capsys.readouterr().err
    rows = {row["method"]: row for row in rows_of(tmp_path / "grid.csv")}
    assert rows["lora"]["status"] == "failed" and "not finite" in rows["lora"]["error"]
    assert cli.main(["experiment", str(path), "--method", "flat"]) == 0


def make_further_test(folder, kind):
    """A data file that no task of ``content`` can be tested on."""
    rows = {
        "labels": [(f"{text} again", "odd") for text, _ in make_rows(20)],
        "own texts": make_rows(400)[:20],
    }
    return write_csv(folder / f"{kind}.csv", rows[kind])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("layers", ["sharpness, method 'lora' on task 'words'", "['qurey']", "query"]),
        ("labels", ["task 'words': also_test: ", "labels.csv has the label 'odd'"]),
        ("own texts", ["task 'words': also_test: ", "own texts.csv has no text that"]),
    ],
)
def test_what_final_runs_cannot_use_is_found_before_the_first_tuning_run(
    content, tmp_path, capsys, monkeypatch, wrong, words
):
    monkeypatch.setattr(comparison, "train", lambda *a, **k: pytest.fail("trained"))
    if wrong == "layers":
        path = write(tmp_path, content, sharpness={**SHARPNESS, "layers": ["qurey"]})
    else:
        other = make_further_test(tmp_path, wrong)
        path = write(tmp_path, content, tasks={"words": {"also_test": ["typos", other]}})
    assert cli.main(["experiment", str(path)]) == 2
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert "Traceback" not in err and line.startswith("eflat: ")
    for word in words:
        assert word in line
    assert rows_of(tmp_path / "grid.csv") == []


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("data", "absent.csv", "absent.csv was looked for in "),
        ("test_data", "absent.jsonl", "absent.jsonl was looked for in "),
        ("also_test", ["absent.tsv"], "absent.tsv was looked for in "),
        ("model", "some/absent/model", "some/absent/model was looked for in "),
        ("label_column", "stars", "no column 'stars'"),
        pytest.param("data", "x" * 300 + ".csv", "x.csv was looked for in ", id="long data"),
        pytest.param("model", "x" * 300, "x was looked for in ", id="long model"),
    ],
)
def test_what_is_missing_is_found_before_the_first_run(
    content, tmp_path, capsys, monkeypatch, setting, name, said
):
    monkeypatch.chdir(tmp_path)
    tasks = {"words": {}, "others": {setting: name}}
    path = write(tmp_path, content, tasks=tasks)
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "task 'others'" in line and said in line
    assert (str(tmp_path) in line) == ("looked" in said)
    assert not (tmp_path / "grid.csv").exists()


# --- files that cannot be used ---------------------------------------------------------


@pytest.mark.parametrize(
    "foreign",
    [
        b"one line",
        b"word,count\na,1\nb,2",
        b"\x89PNG\r\n\x1a\n\xff\xfe",
        b"stage,task\n\0,\n",
        b"\n",
    ],
)
def test_files_of_others_are_refused_and_stay_as_they_are(content, tmp_path, capsys, foreign):
    path = write(tmp_path, content, results="mine")
    (tmp_path / "mine").write_bytes(foreign)
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'mine'} h" in line and "rename or delete it" in line
    assert (tmp_path / "mine").read_bytes() == foreign


def test_a_file_cut_off_within_its_header_is_begun_anew(content, tmp_path):
    path = write(tmp_path, content)
    columns = results.columns_of(plan.load(path, comparison.METHODS))
    file = tmp_path / "grid.csv"
    file.write_text(",".join(columns)[:-30])
    results.Results(file, columns)
    assert file.read_text() == ""


def test_columns_that_cannot_be_added_leave_the_file_as_it_is(content, tmp_path, capsys):
    path = write(tmp_path, content, tasks={"words": {"also_test": ["typos"]}})
    columns = results.columns_of(plan.load(path, comparison.METHODS))
    before = ",".join(columns[:-2]) + "\n"
    (tmp_path / "grid.csv").write_text(before)
    (tmp_path / "unfinished-grid.csv").mkdir()
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write {tmp_path / 'grid.csv'}: " in line
    assert (tmp_path / "grid.csv").read_text() == before


def test_a_method_whose_data_are_missing_is_found_before_the_first_run(content, tmp_path, capsys):
    methods = {"lora": {"tune": {"lr": [1e-3, 1e-2]}}, "late": {"method": "lora", "data": "no.csv"}}
    path = write(tmp_path, content, methods=methods)
    assert cli.main(["experiment", str(path)]) == 2
    assert "no.csv" in capsys.readouterr().err
    assert not (tmp_path / "grid.csv").exists()


def test_results_that_cannot_be_written_are_refused_before_the_first_run(
    content, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(comparison, "train", lambda *a, **k: pytest.fail("trained"))
    path = write(tmp_path, content, results="/proc/none.csv")
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot write /proc/none.csv: " in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"methods": {"lora": {"tune": {"rhoo": [1]}}}},
            ["methods.lora.tune.rhoo is no known name"],
        ),
        (
            {"methods": {"lora": {"tune": {"rho": 1}}}},
            ["methods.lora.tune.rho must be a list, got 1"],
        ),
        ({"methods": {"lora": {"rho": "wide"}}}, ["methods.lora.rho must be a number, got 'wide'"]),
        ({"methods": {"lora": {"lr": -1}}}, ["methods.lora.lr must be greater than 0, got -1"]),
        (
            {"tasks": {"a": {}, "b": {"batch_size": 0}}},
            ["tasks.b.batch_size must be at least 1, got 0"],
        ),
        ({"tasks": {"a": []}}, ["tasks.a must be names and values, got []"]),
        ({"tasks": {"a": {"train_size": [32, 32]}}}, ["tasks", "distinct names", "'a-32' twice"]),
        (
            {"tasks": {"a": {"train_size": [32]}, "a-32": {}}},
            ["tasks", "distinct names", "'a-32' twice"],
        ),
        (
            {"methods": {"lora": {"tune": {"lr": [1e-3, "1e-3"]}}}},
            ["methods.lora.tune.lr must be distinct values, got [0.001, '1e-3']"],
        ),
        (
            {"methods": {"lora": {"method": ["lora"]}}},
            ["methods.lora.method must be a word, got ['lora']"],
        ),
        ({"methods": {"lora": {"like": 5}}}, ["methods.lora.like must be a word, got 5"]),
        ({"methods": {"lora": []}}, ["methods.lora must be names and values, got []"]),
        ({"methods": {"sam": {}}}, ["methods.sam.method must be one of ", "lora-sam", "got 'sam'"]),
        (
            {"methods": {"lora": {"like": "flat"}}},
            ["methods.lora.like must be one of lora, got 'flat'"],
        ),
        ({"methods": {}}, ["methods must be at least one, got {}"]),
        ({"tasks": {"t": {"train_sizes": 3}}}, ["tasks.t.train_sizes is no known name"]),
        ({"tasks": {"t": {"label_noise": 2}}}, ["tasks.t.label_noise must be less than 1, got 2"]),
        ({"seeds": [100]}, ["seeds must be none of tuning.seeds, got 100 in both"]),
        ({"seeds": [3, 4, 3]}, ["seeds must be distinct values, got [3, 4, 3]"]),
        ({"tuning": {"seeds": [9, 9]}}, ["tuning.seeds must be distinct values, got [9, 9]"]),
        ({"seeds": 3}, ["seeds must be a list, got 3"]),
        ({"seeds": [-3]}, ["each of seeds must be at least 0, got -3"]),
        ({"tuning": {"seeds": [2**64]}}, ["tuning.seeds", f"less than {2**32}, got {2**64}"]),
        ({"tuning": {}}, ["tuning.seeds must be at least one, for methods.lora.tune"]),
        (
            {"tuning": {"seeds": [9], "choose_by": "test"}},
            ["tuning.choose_by must be 'accuracy' or 'loss', got 'test'"],
        ),
        ({"sharpness": {"worst_rho": 1}}, ["sharpness.random_rho is missing"]),
        (
            {"sharpness": {**SHARPNESS, "worst_rho": "wide"}},
            ["sharpness.worst_rho must be a number, got 'wide'"],
        ),
        (
            {"sharpness": {**SHARPNESS, "layers": "query"}},
            ["sharpness.layers must be a list, got 'query'"],
        ),
        (
            {"sharpness": {**SHARPNESS, "radius": "row"}},
            ["sharpness.radius must be ", "'filter', got 'row'"],
        ),
        (
            {"sharpness": {**SHARPNESS, "samples": 1}},
            ["sharpness.samples must be at least 2, got 1"],
        ),
        ({"results": 5}, ["results must be a word, got 5"]),
        ({"results": "a\0b.csv"}, ["results must be UTF-8 without NUL, got 'a\\x00b.csv'"]),
        ({"seeds": ["first"]}, ["each of seeds must be a whole number, got 'first'"]),
        ({"tuning": {"seeds": [0.5]}}, ["each of tuning.seeds must be a whole number, got 0.5"]),
        (
            {"tasks": {"t": {"label_noise": "some"}}},
            ["tasks.t.label_noise must be a number, got 'some'"],
        ),
        ({"tasks": {"t": {"also_test": [1]}}}, ["each of tasks.t.also_test must be a word, got 1"]),
        (
            {"methods": {"lora": {"steps": "many"}}},
            ["methods.lora.steps must be a whole number, got 'many'"],
        ),
        (
            {"methods": {"eflat": {"onto": "C"}}},
            ["methods.eflat.onto must be 'B', 'A' or 'both', got 'C'"],
        ),
        ({"surplus": 1}, ["surplus is no known name"]),
    ],
)
def test_wrong_files_are_one_sentence_that_names_it(content, tmp_path, capsys, changes, words):
    path = write(tmp_path, content, **changes)
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "grid.csv").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds:\n- 0", "seeds:\n- 2020-99-99", ["no valid YAML", "month"]),
        ("seeds:\n- 0", "tasks: {}\nseeds:\n- 0", ["'tasks' is there twice"]),
        ("train_size: 48", "train_size: 48\n    train_size: 64", ["'train_size' is there twice"]),
        ("tasks:", "tasks: &all\n  self: [*all]", ["tasks.self must be names and values"]),
        ("tasks:", "? [a]\n: 1\ntasks:", ["no valid YAML", "unhashable"]),
    ],
)
def test_yaml_that_cannot_be_used(content, tmp_path, capsys, old, new, words):
    path = write(tmp_path, content)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert cli.main(["experiment", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in [str(path) if "YAML" in words[0] else "", *words]:
        assert word in line


def test_tasks_and_methods_may_be_names_alone(content, tmp_path):
    path = write(tmp_path, content, tasks={"words": None}, methods={"lora": None})
    path.write_text(path.read_text().replace(" null", ""))
    assert "words:\n" in path.read_text()
    grid = plan.load(path, comparison.METHODS)
    assert grid.tasks[0].settings == {**content["settings"], "train_size": None}
    assert grid.methods == [plan.Method("lora", "lora")]


def test_the_file_of_the_page_can_be_used(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "experiment.md"
    (tmp_path / "movies.yaml").write_text(page.read_text().split("```yaml\n")[1].split("```")[0])
    grid = plan.load(tmp_path / "movies.yaml", comparison.METHODS)
    assert [task.name for task in grid.tasks] == ["movies-64", "movies-256"]
    assert grid.results == tmp_path / "movies.csv" and grid.count() == 2 * (3 * 3 * 2 + 3 * 5)


def test_yaml_numbers_without_a_dot_are_numbers(content, tmp_path):
    path = write(tmp_path, content)
    path.write_text(path.read_text().replace("0.001", "1e-3"))
    grid = plan.load(path, comparison.METHODS)
    assert grid.methods[0].tune["lr"] == [1e-3, 1e-2]


def test_the_script_with_further_methods_says_the_same(content, tmp_path, capsys, monkeypatch):
    script = importlib.import_module("bench.experiment")
    path = write(tmp_path, content, seeds=[])
    with pytest.raises(SystemExit) as ended:
        script.main(path)
    assert ended.value.code == cli.main(["experiment", str(path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second == f"eflat: {path}: seeds must be at least one, got []"
