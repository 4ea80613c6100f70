"""What the command ``eflat`` promises, for the most part by running it as a process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import make_rows, save_tiny_model, write_csv, write_jsonl

from eflat_ext.lab import cli
from eflat_ext.lab.finetune import comparison

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}


def eflat(*arguments, **options):
    """Run ``eflat`` as a process and wait for it."""
    command = [sys.executable, "-m", "eflat_ext.lab.cli", *map(str, arguments)]
    options = {"env": ENVIRONMENT, "timeout": 300} | options
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model and its data, and a function that makes options of them."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny_model(folder / "model")
    data = write_csv(folder / "data.csv", make_rows(300))
    standard = {"--model": model, "--data": data, "--max-length": 32, "--steps": 6}
    standard["--device"] = "cpu"

    def options(*given):
        left = {name: value for name, value in standard.items() if name not in given}
        return [*(str(word) for pair in left.items() for word in pair), *map(str, given)]

    return folder, options


def figures(folder):
    """Everything in results.json that a repeated run must reproduce."""
    runs = json.loads((folder / "results.json").read_text())["runs"]
    return [{k: v for k, v in run.items() if "seconds" not in k} for run in runs]


# --- runs --------------------------------------------------------------------------------


def test_the_default_job_in_small(tmp_path):
    small = ["--steps", 3, "--train-size", 60, "--test-size", 40, "--batch-size", 8]
    run = eflat("finetune", *small, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run folder: runs/{folder.name}/" in run.stdout
    for word in ("LoRA", "EFlat-LoRA", "accuracy", "test loss", "training loss", "s/step"):
        assert word in run.stdout
    assert "LoRA, seed 0" in run.stderr and "3/3" in run.stderr and "steps/s" in run.stderr
    assert [run["method"] for run in figures(folder)] == ["lora", "eflat"]
    assert (folder / "eflat" / "seed-0" / "adapter_model.safetensors").exists()


def test_own_data_several_methods_and_seeds_and_the_config_repeats_them(tiny, tmp_path):
    _, options = tiny
    data = write_jsonl(tmp_path / "mine.jsonl", make_rows(240, classes=3), ("q", "kind"))
    given = ["--data", data, "--text-column", "q", "--label-column", "kind"]
    given += ["--method", "lora", "flat", "--method", "eflat", "--seeds", 4, 2, "--rank", 3]
    given += ["--onto", "A", "--output-dir", tmp_path / "a"]
    first = eflat("finetune", *options(*given))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("standard error") == 1
    expected = figures(tmp_path / "a")
    assert [(run["method"], run["seed"]) for run in expected] == [
        (method, seed) for method in ("lora", "flat", "eflat") for seed in (4, 2)
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = tmp_path / "a" / "config.yaml"
    again = eflat("finetune", "--config", config, "--output-dir", "b", cwd=elsewhere)
    assert again.returncode == 0, again.stderr
    assert figures(elsewhere / "b") == expected
    settings = [
        [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for path in (config, elsewhere / "b" / "config.yaml")
    ]
    assert settings[0] == settings[1]


def test_options_win_over_the_file(tiny, tmp_path):
    _, options = tiny
    config = tmp_path / "c.yaml"
    config.write_text("method: [full]\nseeds: [1, 2]\nsteps: 50\nrho: 1e-2\n")
    folder = tmp_path / "run"
    given = options("--config", config, "--method", "lora-sam", "--output-dir", folder)
    assert cli.main(["finetune", *given]) == 0
    assert [(r["method"], r["seed"], r["steps"]) for r in figures(folder)] == [
        ("lora-sam", 1, 6),
        ("lora-sam", 2, 6),
    ]
    assert "rho: 0.01" in (folder / "config.yaml").read_text()


def test_help_names_every_option_and_default():
    run = eflat("finetune", "--help")
    assert run.returncode == 0 and run.stderr == ""
    from dataclasses import fields

    from eflat_ext.lab.finetune.config import FinetuneConfig

    for field in fields(FinetuneConfig):
        assert f"--{field.name.replace('_', '-')} " in run.stdout
    for text in ("--config", "[default: minilm]", "[default: 0.05]", "lora-sam, full]"):
        assert text in run.stdout
    overview = eflat("--help")
    assert overview.returncode == 0 and "finetune" in overview.stdout
    lines = eflat("--version").stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["python", "eflat_ext", "torch"]


@pytest.mark.parametrize("command", ["experiment", "sharpness", "landscape"])
def test_settings_in_a_file_are_for_fine_tunes_alone(capsys, tmp_path, command):
    assert cli.main([command, "--help"]) == 0
    assert "--config" not in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text("rank: 3\n")
    given = [command, "run", "--config", str(tmp_path / "c.yaml")]
    fails_with_one_sentence(capsys, given, ["--config", "nknown option"])


def test_the_packages_to_install_are_those_of_the_extra():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^finetune = \[(.*?)^\]", text, flags=re.M | re.S)
    assert re.findall(r'"([\w-]+)', extra) == cli.PACKAGES.split()


def test_a_missing_package_is_named_with_those_that_are_on_the_index(capsys, monkeypatch):
    def no_peft(*_):
        raise ModuleNotFoundError("No module named 'peft'")

    monkeypatch.setattr(comparison, "run", no_peft)
    words = ["No module named 'peft'", "pip install peft transformers"]
    fails_with_one_sentence(capsys, ["finetune"], words)


# --- what goes wrong ---------------------------------------------------------------------

WRONG = {
    "method": (["--method", "sam"], ["sam", "--method"]),
    "rank zero": (["--rank", "0"], ["--rank", "0"]),
    "rank negative": (["--rank", "-3"], ["--rank", "-3"]),
    "rank no number": (["--rank", "many"], ["--rank", "many"]),
    "rank no whole number": (["--rank", "8.5"], ["--rank must be a whole number, got '8.5'"]),
    "rank with a point": (["--rank", "8."], ["--rank must be a whole number, got '8.'"]),
    "steps no whole number": (["--steps", "2.7"], ["--steps", "2.7", "whole number"]),
    "a seed no whole number": (["--seeds", "3", "1.9"], ["--seeds", "1.9", "whole number"]),
    "batch size no whole number": (["--batch-size", "0.6"], ["--batch-size", "whole number"]),
    "rtol": (["--rtol", "1e-9"], ["--rtol", "1e-09"]),
    "device": (["--device", "abacus"], ["--device abacus"]),
    "device that is not there": (["--device", "cuda:99"], ["--device cuda:99"]),
    "dtype": (["--dtype", "int4"], ["--dtype", "int4", "bfloat16"]),
    "option": (["--ranks", "8"], ["--ranks"]),
    "argument": (["surplus"], ["'surplus' belongs to no option"]),
    "data without its option": (["mine.csv"], ["'mine.csv'", "data is given as --data mine.csv"]),
    "a corpus without its option": (["bbc-news"], ["data is given as --data bbc-news"]),
    "a near name of data": (["--data", "movie-review"], ["movie-review", "movie-reviews?"]),
    "data": (["--data", "missing.csv"], ["missing.csv"]),
    "test data": (["--test-data", "missing.jsonl"], ["missing.jsonl"]),
    "text column": (["--text-column", "body"], ["body", "text, label"]),
    "label column": (["--label-column", "mood"], ["mood", "text, label"]),
    "columns the wrong way round": (
        ["--text-column", "label", "--label-column", "text"],
        ["the test part, to evaluate on, is empty", "text of an earlier row"],
    ),
    "a column twice": (["--text-pair-column", "label"], ["--text-pair-column", "--label-column"]),
    "model": (["--model", "./no/such/model"], ["./no/such/model"]),
    "model folder": (["--model", "{folder}"], ["{folder}"]),
    "target modules": (["--target-modules", "query", "qurey"], ["qurey", "query", "value"]),
    "target module of another kind": (
        ["--target-modules", "LayerNorm", "--method", "eflat"],
        ["adapter", "LayerNorm"],
    ),
    "length": (["--max-length", "65"], ["--max-length", "65", "64"]),
    "sizes": (["--test-size", "301"], ["--test-size", "301"]),
    "no validation": (["--evaluate-on", "validation", "--validation-size", "0"], ["validation"]),
    "config": (["--config", "missing.yaml"], ["missing.yaml"]),
    "config folder": (["--config", "{folder}"], ["{folder}"]),
    "output folder in use": (["--output-dir", "{folder}"], ["--output-dir", "{folder}"]),
    "output folder is a file": (["--output-dir", "{folder}/data.csv"], ["data.csv"]),
}


def fails_with_one_sentence(capsys, arguments, words):
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert len(lines[0]) < 1000
    assert lines[0].startswith("eflat: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_that_names_it(tiny, capsys, monkeypatch, tmp_path, case):
    folder, options = tiny
    monkeypatch.chdir(tmp_path)
    given, words = ([text.format(folder=folder) for text in texts] for texts in WRONG[case])
    fails_with_one_sentence(capsys, ["finetune", *options(*given)], words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rnak: 3\n", ["rnak"]),
        ("rank: 3\nrank: 4\n", ["--config", "c.yaml, line 2: 'rank' is there twice"]),
        ("config: other.yaml\n", ["c.yaml names a file of settings itself"]),
        ("rank: high\n", ["rank", "high"]),
        ("rank: 0\n", ["--rank"]),
        ("rank: 8.5\n", ["--rank must be a whole number, got '8.5' in ", "c.yaml"]),
        ("seeds: [1, 2.0]\n", ["--seeds must be a whole number, got '2.0'"]),
        ("steps: 2.5\n", ["--steps", "must be a whole number"]),
        ("method: [lora, sam]\n", ["sam"]),
        ("rank: [3\n", ["no valid YAML"]),
        ("just words\n", ["holds no settings"]),
        ("", ["holds no settings"]),
        ('data: "a\\0b.csv"\n', ["--data", "NUL"]),
        ('output_dir: "a\\0b"\n', ["--output-dir", "NUL"]),
        ("rank: &a [*a]\n", ["holds what is no setting"]),
        (f"rank: {'9' * 10_000}\n", ["no valid YAML"]),
        (f"rank: {'x' * 10_000}\n", ["rank", "xxx ... "]),
        ("#" * 1_000_001, ["longer than 1 MB"]),
    ],
)
def test_wrong_config_files_are_named(tmp_path, capsys, content, words):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    fails_with_one_sentence(capsys, ["finetune", "--config", str(path)], words)


@pytest.mark.parametrize(
    ("rows", "test_rows", "words"),
    [
        ([("one", "a"), ("two", "a"), ("three", "a")], None, ["two classes", "'a'"]),
        ([("one", "a"), ("two", "b"), (" ", "b")], None, ["row 3", "text"]),
        (make_rows(50), [("word1", "7")], ["'7'", "not in the training data"]),
    ],
    ids=["one class", "empty text", "unseen label"],
)
def test_wrong_labels_and_texts_are_named(tiny, capsys, tmp_path, rows, test_rows, words):
    _, options = tiny
    given = ["--data", write_csv(tmp_path / "rows.csv", rows)]
    if test_rows:
        given += ["--test-data", write_csv(tmp_path / "test.csv", test_rows)]
    fails_with_one_sentence(capsys, ["finetune", *options(*given)], words)


def test_other_commands_round_no_whole_number_either(capsys):
    for arguments in (
        ["experiment", "plan.yaml", "--jobs", "1.5"],
        ["sharpness", "run", "--samples", "2.5"],
        ["landscape", "run", "--points", "21.5"],
    ):
        words = [f"{arguments[-2]} must be a whole number, got '{arguments[-1]}'"]
        fails_with_one_sentence(capsys, arguments, words)


def test_a_damaged_model_is_named(tiny, capsys, tmp_path):
    folder, options = tiny
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"damaged")
    fails_with_one_sentence(capsys, ["finetune", *options("--model", model)], [str(model)])


def test_a_tokenizer_that_cannot_split_the_texts_is_named(tiny, capsys, tmp_path):
    folder, options = tiny
    model = shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "[missing]"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = write_csv(tmp_path / "data.csv", [(f"ωmega {k}", k % 2) for k in range(40)])
    given = options("--model", model, "--data", data)
    fails_with_one_sentence(capsys, ["finetune", *given], [str(model), "tokenizer"])


def test_a_process_ends_with_exit_code_2_without_traceback(tmp_path):
    run = eflat("finetune", "--data", "missing.csv", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "eflat: cannot read missing.csv: No such file or directory\n"


def test_ctrl_c_ends_cleanly_and_keeps_what_is_done(tiny, tmp_path):
    _, options = tiny
    given = options("--steps", 1_000_000, "--output-dir", tmp_path / "run")
    command = [sys.executable, "-m", "eflat_ext.lab.cli", "finetune", *given]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background hand on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "eflat: interrupted"
    assert "Traceback" not in stderr
