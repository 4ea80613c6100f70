"""``eflat sharpness`` and ``eflat landscape``: what they refuse, and what they leave alone."""

import shutil

import pytest
import torch
from measured_case import SMALL, make_language_model, make_run, read_csv
from tiny_model import make_rows, write_csv

from eflat_ext.lab import cli
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.measure import each_model, trained_models
from eflat_ext.lab.measure.config import MeasureConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("measure"))


WRONG = {
    "no folder": (["sharpness", "{folder}/missing"], ["missing"]),
    "no run": (["sharpness", "{folder}/model"], ["model", "neither"]),
    "no data": (["sharpness", "{adapter}"], ["--data"]),
    "data": (["sharpness", "{folder}/run", "--data", "none.csv"], ["--data", "run"]),
    "column": (["landscape", "{folder}/run", "--text-column", "zzz"], ["--text-column", "run"]),
    "length": (["sharpness", "{folder}/run", "--max-length", "9"], ["--max-length", "run"]),
    "part": (
        ["sharpness", "{adapter}", "--data", "{folder}/data.csv", "--part", "test"],
        ["--part", "mine"],
    ),
    "rho": (["sharpness", "{folder}/run", "--rho", "-1"], ["--rho", "-1"]),
    "radius": (["sharpness", "{folder}/run", "--radius", "row"], ["row"]),
    "samples": (["sharpness", "{folder}/run", "--samples", "1"], ["--samples"]),
    "rtol": (["sharpness", "{folder}/run", "--rtol", "2"], ["--rtol"]),
    "layers": (["sharpness", "{folder}/run", "--layers", "qurey"], ["qurey", "layer.0.", "query"]),
    "classes": (
        ["sharpness", "{adapter}", "--data", "{three}", "--max-length", "32"],
        ["mine", "'2'", "0, 1 apart"],
    ),
    "long name": (
        [
            "sharpness",
            "{adapter}",
            "--data",
            "{long}.csv",
            "--max-length",
            "32",
            "--output",
            "a.csv",
        ],
        ["cannot read xxx", "too long"],
    ),
    "output": (["sharpness", "{folder}/run", "--output", "a.txt"], ["a.txt", ".csv"]),
    "examples": (["sharpness", "{folder}/run", "--examples", "0"], ["--examples"]),
    "device": (["sharpness", "{folder}/run", "--device", "abacus"], ["abacus"]),
    "figure": (["landscape", "{folder}/run", "--output", "a.gif"], ["a.gif", ".png"]),
    "points": (["landscape", "{folder}/run", "--points", "2"], ["--points"]),
    "extent": (["landscape", "{folder}/run", "--extent", "0"], ["--extent"]),
    "rise": (["landscape", "{folder}/run", "--rise", "--points", "4"], ["--rise"]),
    "line": (["landscape", "{folder}/run/lora", "--directions", "line"], ["two"]),
    "plane": (
        ["landscape", "{folder}/run", "--directions", "line", "--dimensions", "2"],
        ["--dimensions"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_that_names_it(folder, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    given, words = WRONG[case]
    three = write_csv(tmp_path / "three.csv", make_rows(30, classes=3))
    places = {"folder": folder, "adapter": adapter, "three": three, "long": "x" * 300}
    assert cli.main([text.format(**places) for text in given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eflat: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("command", ["sharpness", "landscape"])
def test_output_that_cannot_be_written_is_named_before_measuring(
    folder, tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setattr(trained_models, "load", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.csv").mkdir()
    (tmp_path / "taken.png").mkdir()
    for output in (tmp_path / "file" / "s", tmp_path / "taken"):
        path = output.with_suffix(".csv" if command == "sharpness" else ".png")
        assert cli.main([command, str(folder / "run"), *SMALL, "--output", str(path)]) == 2
        assert f"cannot write --output {path}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.csv", "taken.png"]


LANDSCAPE_COLUMNS = "run,method,seed,sample,x,y,loss"


@pytest.mark.parametrize(
    ("command", "output", "taken"),
    [
        (["landscape"], "taken.png", "taken.csv"),
        (["sharpness"], "taken.csv", "taken.csv"),
        (["sharpness", "--estimate"], "taken.csv", "taken-estimate.csv"),
    ],
)
def test_no_file_of_others_is_overwritten(
    folder, tmp_path, capsys, monkeypatch, command, output, taken
):
    monkeypatch.setattr(trained_models, "load", lambda *_: pytest.fail("measured"))
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    for text in ("text,label\nword1,0\n", LANDSCAPE_COLUMNS + ",more\n", "\nnotes\n"):
        (tmp_path / taken).write_text(text)
        path = tmp_path / output
        assert cli.main([command[0], str(folder / "run"), *command[1:], "--output", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / taken) in error and f"--output {path}" in error
        assert (tmp_path / taken).read_text() == text
    assert {p.name for p in tmp_path.iterdir()} == {"mine", taken}
    # Data are never overwritten, whatever their columns.
    data = tmp_path / "x" / ".." / taken
    (tmp_path / "x").mkdir()
    for columns in (LANDSCAPE_COLUMNS, "run,method,seed,measure,rho,value,standard_error"):
        (tmp_path / taken).write_text(columns + "\n")
        given = [command[0], str(adapter), *command[1:], "--data", str(data), "--output"]
        assert cli.main([*given, str(tmp_path / output)]) == 2
        assert "would overwrite" in capsys.readouterr().err


def test_the_data_of_a_run_are_not_overwritten(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    text = "run,method,seed,measure,rho,value,standard_error\n"
    (tmp_path / "test.csv").write_text(text)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("test_data: null", f"test_data: {tmp_path}/test.csv")
    )
    given = ["sharpness", str(run), "--output", str(tmp_path / "test.csv")]
    assert cli.main(given) == 2
    assert "would overwrite the data" in capsys.readouterr().err
    assert (tmp_path / "test.csv").read_text() == text


def test_names_in_brackets_are_shown_as_they_are(folder, tmp_path, capsys):
    data = shutil.copy(folder / "data.csv", tmp_path / "[bold]d[v1].csv")
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "my[bold]run[v2]")
    call = [str(adapter), "--data", str(data), "--max-length", "32", *SMALL, "--samples", "0"]
    assert cli.main(["sharpness", *call, "--estimate"]) == 0
    shown = capsys.readouterr()
    assert "[bold]d[v1].csv" in "".join(shown.out.split()) and "my[bold]run[v2]" in shown.out
    assert "my[bold]run[v2]" in shown.err  # the bar


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("sharpness", "results.json"),
        ("sharpness", "lora/seed-0/metrics.json"),
        ("landscape", "loss.png"),
    ],
)
def test_the_files_of_a_run_are_not_overwritten(folder, capsys, command, name):
    file = folder / "run" / name
    before = file.read_bytes()
    assert cli.main([command, str(folder / "run"), "--output", str(file)]) == 2
    assert "would overwrite" in capsys.readouterr().err and name in str(file)
    assert file.read_bytes() == before


def test_a_refused_call_leaves_no_folder_behind(folder, tmp_path, capsys):
    for name in ("new/deeper/s.csv", "x" * 300 + ".csv"):
        arguments = ["sharpness", str(folder / "run"), "--output", str(tmp_path / name)]
        assert cli.main([*arguments, "--layers", "none"]) == 2
        assert cli.main(["sharpness", "x" * 300]) == 2
    assert not list(tmp_path.iterdir())
    assert "is no folder" in capsys.readouterr().err


def test_every_file_is_named_and_may_be_written_again(folder, tmp_path, capsys):
    path = tmp_path / "s.csv"
    given = ["sharpness", str(folder / "run" / "lora"), *SMALL, "--samples", "0", "--rho", "0.1"]
    for _ in range(2):
        assert cli.main([*given, "--estimate", "--output", str(path)]) == 0
        screen = capsys.readouterr().out
        assert f"numbers: {path}\n" in screen
        assert f"numbers: {tmp_path / 's-estimate.csv'}\n" in screen
    columns = ["run", "method", "seed", "layer", "estimate", "rtol", "cosine", "norm_ratio"]
    assert list(read_csv(tmp_path / "s-estimate.csv")[0])[:8] == columns


def test_a_damaged_run_is_named(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(run / "eflat" / "seed-0", run / "eflat" / "seed-best")
    with pytest.raises(InputError, match=r"eflat/seed-best: expected seed-N"):
        trained_models.find([run])
    for method, file in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        seed = run / method / "seed-0"
        (seed / file).write_bytes(b"not of its kind")
        with pytest.raises(InputError, match=f"cannot load .*{seed}: "):
            trained_models.load(*trained_models.find([seed]), MeasureConfig(device="cpu"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [lora]\nrnak: 3", ["rnak is no known name"]),
        ("max_length: many", ["max_length", "'many'", "whole number"]),
        ("task_type: GUESS", ["task_type", "'GUESS'", "SEQ_CLS"]),
        ("method: lora", ["method", "'lora'", "list"]),
        ("rank: 0", ["rank must be at least 1, got 0"]),
        ("lora", ["names and values"]),
        ("{", ["no valid YAML"]),
    ],
)
def test_damaged_settings_are_named(folder, tmp_path, text, words):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "config.yaml").write_text(text + "\n")
    with pytest.raises(InputError, match=r"run/config\.yaml") as caught:
        trained_models.find([run])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_model.safetensors", "not of its kind"),
        ("adapter_config.json", "[]"),
        ("adapter_config.json", "{"),
    ],
)
def test_a_damaged_adapter_is_named(folder, tmp_path, file, text):
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    (adapter / file).write_text(text)
    config = MeasureConfig(data=str(folder / "data.csv"), max_length=32, device="cpu")
    with pytest.raises(InputError, match=r"cannot load .*mine: "):
        trained_models.load(*trained_models.find([adapter]), config)


def test_an_adapter_of_another_model_does_not_fit(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    file = adapter / "adapter_model.safetensors"
    wide = {n: x[:, :7].contiguous() if "lora_A" in n else x for n, x in load_file(file).items()}
    save_file(wide, file)
    config = MeasureConfig(data=str(folder / "data.csv"), max_length=32, device="cpu")
    with pytest.raises(InputError, match=r"mine: size mismatch for .*lora_A.*\[4, 7\].*\[4, 32\]"):
        trained_models.load(*trained_models.find([adapter]), config)


def test_texts_in_which_nothing_is_predicted_are_named(tmp_path):
    """The first token of a text is not."""
    (adapter,) = trained_models.find([make_language_model(tmp_path)])
    words = write_csv(tmp_path / "words.csv", [("word1", "0"), ("word2", "1")])
    sentences = write_csv(tmp_path / "sentences.csv", make_rows(3))
    for data, max_length, texts in ((words, 32, 2), (sentences, 1, 3)):
        config = MeasureConfig(data=data, max_length=max_length, device="cpu")
        given = rf"--data {data}, --max-length {max_length}: expected .* to predict, got {texts} "
        with pytest.raises(InputError, match=given):
            trained_models.load(adapter, config)


def test_what_cannot_be_measured_names_its_folder(tmp_path):
    one = trained_models.Trained(tmp_path / "here", "here", "adapter")
    for error, says in [
        (ValueError("odd\nand more"), "odd"),
        (NotImplementedError("no such layer"), "no such layer"),
        (torch.OutOfMemoryError("on the device"), "lower --batch-size"),
    ]:
        with pytest.raises(InputError, match=f"here: .*{says}"), each_model.named_errors(one):
            raise error
    with pytest.raises(ModuleNotFoundError, match="a library"), each_model.named_errors(one):
        raise ModuleNotFoundError("a library")
