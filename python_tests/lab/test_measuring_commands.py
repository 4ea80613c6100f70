"""``eflat sharpness`` and ``eflat landscape``, on a small run and on an adapter of its own."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from measured_case import SMALL, make_language_model, make_run, read_csv
from tiny_model import make_rows, write_csv

from eflat_ext.analysis import sharpness
from eflat_ext.analysis.full_space import mean_loss
from eflat_ext.lab import cli
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.measure import trained_models
from eflat_ext.lab.measure.config import MeasureConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("measure"))


def test_a_loaded_run_is_what_was_trained(folder, tmp_path):
    runs = trained_models.find([folder / "run"])
    assert [run.name for run in runs] == ["lora, seed 0", "eflat, seed 0", "full, seed 0"]
    for run in runs:
        loaded = trained_models.load(run, MeasureConfig(part="test", examples=1000, device="cpu:0"))
        assert run.config.device == "cpu"  # of the run, not of the measuring
        with torch.no_grad():
            values = [float(trained_models.loss(loaded.model, batch)) for batch in loaded.batches]
        expected = json.loads((run.folder / "metrics.json").read_text())["loss"]
        assert sum(values) / len(values) == pytest.approx(expected, rel=1e-5)
        assert not loaded.model.training
    (single,) = trained_models.find([folder / "run" / "eflat" / "seed-0"])
    assert (single.method, single.seed) == ("eflat", 0)
    assert [run.method for run in trained_models.find([folder / "run" / "full"])] == ["full"]
    shutil.copytree(folder / "run", tmp_path / "run")
    twice = trained_models.find([folder / "run" / "lora", tmp_path / "run" / "lora"])
    assert [run.name for run in twice] == [str(run.folder) for run in twice]
    assert len(twice) == 2


def test_a_folder_that_is_named_again_is_measured_once(folder, tmp_path):
    run = folder / "run"
    (tmp_path / "link").symlink_to(run / "eflat" / "seed-0")
    places = [run / "lora" / "seed-0", run, run / "full" / ".." / "full", tmp_path / "link"]
    assert trained_models.find(places) == trained_models.find([run])
    adapter = shutil.copytree(run / "lora" / "seed-0", tmp_path / "mine")
    assert trained_models.find([adapter, adapter / ".." / "mine"]) == trained_models.find([adapter])
    output = tmp_path / "map.png"
    given = ["landscape", str(run / "lora"), str(run / "lora" / "seed-0"), *SMALL]
    given += ["--dimensions", "2", "--points", "3", "--output", str(output)]
    assert cli.main(given) == 0
    assert len(read_csv(output.with_suffix(".csv"))) == 3 * 3


def test_a_run_in_bfloat16_is_measured_in_float32(folder, tmp_path):
    """Its losses in bfloat16 are rounded by more than they rise."""
    config = FinetuneConfig(
        model=str(folder / "model"),
        data=str(folder / "data.csv"),
        method=["lora"],
        max_length=32,
        steps=10,
        rank=4,
        lr=5e-3,
        dtype="bfloat16",
        device="cpu",
        output_dir=tmp_path / "run",
    )
    comparison.run(config)
    (run,) = trained_models.find([tmp_path / "run"])
    loaded = trained_models.load(run, MeasureConfig(examples=64, device="cpu"))
    given = (loaded.model, trained_models.loss, loaded.batches)
    rises = [sharpness.worst_case(*given, rho) for rho in (1e-3, 1e-1)]
    assert rises[0] == pytest.approx(rises[1] / 100, rel=0.2)  # of first order
    trained_loss = json.loads((run.folder / "metrics.json").read_text())["train_loss"]
    everything = trained_models.load(run, MeasureConfig(examples=1000, device="cpu"))
    given = (everything.model, trained_models.loss, everything.batches)
    assert mean_loss(*given) == pytest.approx(trained_loss, rel=1e-2)


def test_sharpness_of_a_run(folder, tmp_path, capsys):
    output = tmp_path / "sharpness.json"
    given = ["sharpness", str(folder / "run"), *SMALL, "--rho", "0.05", "0.5", "--samples", "2"]
    assert cli.main([*given, "--estimate", "--output", str(output)]) == 0
    screen = capsys.readouterr()
    for word in ("worst case", "transfer", "random", "eflat, seed 0", "tangent", "12/12"):
        assert word in screen.out + screen.err
    content = json.loads(output.read_text())
    assert content["settings"]["rho"] == [0.05, 0.5]
    numbers = content["numbers"]
    for method in ("lora", "eflat", "full"):
        own = {(r["measure"], r["rho"]): r["value"] for r in numbers if r["method"] == method}
        assert own["worst", 0.5] > own["worst", 0.05] > 0
        assert ("onto B", 0.05) in own or method == "full"
        if method != "full":
            assert own["onto B", 0.05] < own["worst", 0.05]
        assert own["random", 0.05] < own["worst", 0.05]
        assert own["loss", None] > 0
    assert {row["method"] for row in content["estimates"]} == {"lora", "eflat"}
    assert all(abs(row["cosine"]) <= 1 for row in content["estimates"])


@pytest.mark.skipif(
    importlib.util.find_spec("hessian_eigenthings") is None, reason="hessian-eigenthings is absent"
)
def test_the_hessian_of_a_run_as_csv(folder, tmp_path):
    output = tmp_path / "new" / "sharpness.csv"
    given = ["sharpness", str(folder / "run" / "lora"), *SMALL, "--radius", "filter"]
    given += ["--samples", "0", "--hessian", "lora", "--output", str(output)]
    assert cli.main(given) == 0
    own = {row["measure"]: row for row in read_csv(output)}
    assert set(own) == {"loss", "worst", "eigenvalue, lora", "trace, lora"}
    assert float(own["eigenvalue, lora"]["value"]) > 0
    assert own["loss"]["rho"] == "" and own["loss"]["standard_error"] == ""


def test_a_diverged_run_has_numbers_that_are_none(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(run / "full")
    file = run / "lora" / "seed-0" / "adapter_model.safetensors"
    save_file({name: math.nan * x for name, x in load_file(file).items()}, file)
    with_library = importlib.util.find_spec("hessian_eigenthings") is not None
    more = ["--hessian", "full"] if with_library else []
    given = [*SMALL, "--rho", "0.1", "--samples", "2", "--estimate", *more, "--layers", "query"]
    output = tmp_path / "s.json"
    assert cli.main(["sharpness", str(run), *given, "--output", str(output)]) == 0
    numbers = json.loads(output.read_text())["numbers"]
    for method in ("lora", "eflat"):
        own = [row for row in numbers if row["method"] == method]
        assert {row["measure"] for row in own} >= {"loss", "worst", "onto B", "random"}
        assert all((row["value"] is None) == (method == "lora") for row in own)
    given = ["landscape", str(run), *SMALL, "--points", "3", "--output", str(tmp_path / "l.png")]
    assert cli.main(given) == 0


def test_an_adapter_of_its_own(folder, tmp_path, capsys):
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    output = tmp_path / "s.csv"
    data = ["--data", str(folder / "data.csv"), "--max-length", "32"]
    given = [str(adapter), *SMALL, *data, "--output"]
    assert cli.main(["sharpness", *given, str(output), "--samples", "0"]) == 0
    own = {row["measure"]: float(row["value"]) for row in read_csv(output)}
    assert own["worst"] > own["onto B"] > 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "data.csv" in screen and "the train part" not in screen
    assert cli.main(["landscape", *given, str(tmp_path / "l.svg"), "--points", "3"]) == 0
    assert ">loss (nats)<" in (tmp_path / "l.svg").read_text()
    # Beside a run folder, which has its own data.
    given[1:1] = [str(folder / "run" / "lora"), "--part", "test"]
    assert cli.main(["sharpness", *given, str(output), "--samples", "0"]) == 0
    assert "the test part and " in " ".join(capsys.readouterr().out.split())
    assert {row["method"] for row in read_csv(output)} == {"lora", "adapter"}


def test_the_classes_of_an_adapter_are_its_own(folder, tmp_path):
    adapter = shutil.copytree(folder / "run" / "lora" / "seed-0", tmp_path / "mine")
    rows = make_rows(300)
    names = sorted({label for _, label in rows})
    turned = {name: f"{9 - k} {name}" for k, name in enumerate(names)}  # in the other order
    write_csv(tmp_path / "turned.csv", [(text, turned[label]) for text, label in rows])

    def loss(data):
        config = MeasureConfig(data=str(data), max_length=32, device="cpu")
        loaded = trained_models.load(*trained_models.find([adapter]), config)
        with torch.no_grad():
            return float(sum(trained_models.loss(loaded.model, batch) for batch in loaded.batches))

    expected = loss(folder / "data.csv")
    (adapter / "classes.json").write_text(json.dumps([turned[name] for name in names]))
    assert loss(tmp_path / "turned.csv") == expected
    with pytest.raises(InputError, match=f"the data have the class '{names[0]}', the adapter"):
        loss(folder / "data.csv")
    (adapter / "classes.json").unlink()
    assert loss(tmp_path / "turned.csv") != pytest.approx(expected, rel=1e-4)  # taken as they come
    (adapter / "classes.json").write_text(json.dumps(names))
    write_csv(tmp_path / "one.csv", [row for row in rows if row[1] == names[0]])
    assert loss(tmp_path / "one.csv") > 0
    (adapter / "classes.json").unlink()
    write_csv(tmp_path / "three.csv", make_rows(300, classes=3))
    with pytest.raises(InputError, match="it tells 2 classes apart, but the data have 3"):
        loss(tmp_path / "three.csv")


@pytest.mark.parametrize("words", [0, 5], ids=["sentences", "and words on their own"])
def test_a_language_model(tmp_path, words):
    """The mean over all tokens that are predicted; in a text of one token there is none."""
    from transformers import AutoTokenizer

    (run,) = trained_models.find([make_language_model(tmp_path)])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt")
    rows = [("word1", "0")] * words + make_rows(30)
    data = write_csv(tmp_path / "text.csv", rows)
    examples = 9 + words
    config = MeasureConfig(data=data, examples=examples, batch_size=4, max_length=32, device="cpu")
    loaded = trained_models.load(run, config)
    assert len(loaded.batches) == 3
    with torch.no_grad():
        mean = mean_loss(loaded.model, trained_models.loss, loaded.batches)
        total, count = 0.0, 0
        for text, _ in rows[words:examples]:
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            n = tokens.shape[1] - 1
            total += n * float(loaded.model(tokens, labels=tokens).loss)
            count += n
    assert mean == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("directions", ["random", "line"])
def test_curves_of_a_run(folder, tmp_path, directions):
    output = tmp_path / "out" / "figure.svg"
    runs = [str(folder / "run" / method) for method in ("lora", "eflat")]
    given = ["landscape", *runs, *SMALL, "--directions", directions, "--points", "3"]
    assert cli.main([*given, "--output", str(output)]) == 0
    assert "EFlat-LoRA" in output.read_text()
    rows = read_csv(output.with_suffix(".csv"))
    assert {row["method"] for row in rows} == (
        {"eflat"} if directions == "line" else {"lora", "eflat"}
    )
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    if directions == "line":
        assert [float(row["x"]) for row in rows] == [-0.5, 0.5, 1.5]
