"""Random wrong calls of the command ``eflat``, in a folder full of odd files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from tiny_model import make_rows, save_tiny_model, write_csv, write_jsonl

from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.measure.landscape_figure import LandscapeConfig
from eflat_ext.lab.measure.sharpness_table import SharpnessConfig

OPTIONS = [field.name for field in fields(FinetuneConfig)]
MEASURING = {
    "sharpness": [field.name for field in fields(SharpnessConfig)],
    "landscape": [field.name for field in fields(LandscapeConfig)],
}
NUMBERS = [
    *("0", "1", "2", "-1", "3.5", "nan", "inf", "-inf", "1e400", "-1e400", "1e-320", "1e-9", "1_0"),
    *("257", "2147483648", "4294967296", "9" * 30, "9" * 5000, "0x10", "1,5", "½", "\uff11\uff12"),
    *("true", "None", "null", "", " ", "-", "--", "0.999999", "1e3", "65", "301", "1e-3"),
]
WORDS = [
    *("", " ", "lora", "eflat", "LoRA", "sam", "full", "A", "B", "b", "layer", "global", "cpu"),
    *("cpu:7", "cuda", "cuda:99", "meta", "mps", "abacus", "float32", "bfloat16", "int4", "test"),
    *("validation", "text", "label", "β", "名前", "\udcff", "a\nb", "a\0b", "x" * 5000, "query"),
    *("all-linear", "qurey", "LayerNorm", "[", "{}", "../..", "%s", "{}%n", "*", "\x1b[31mred"),
]

# Of the files below: those from which no table may be read, whatever columns are asked for.
UNREADABLE = ("binary.csv", "latin.csv", "utf16.csv", "quotes.csv", "surplus.csv", "twice.csv")

# An experiment, and what is changed in it.
EXPERIMENT = """
settings: {model: model, max_length: 32, steps: 1, batch_size: 4, device: cpu}
tasks: {words: {data: data.csv}}
methods: {lora: , eflat: {tune: {rho: [0.1, 0.2]}}}
tuning: {seeds: [1]}
seeds: [0]
"""
CHANGES = {
    "good": ("", ""),
    "foreign": ("\nseeds: [0]", "\nseeds: [0]\nresults: data.csv"),
    "folder": ("\nseeds: [0]", "\nseeds: [0]\nresults: folder.csv"),
    "nowhere": ("\nseeds: [0]", "\nseeds: [0]\nresults: /proc/nope/x.csv"),
    "no-seeds": ("\nseeds: [0]", ""),
    "seeds-twice": ("\nseeds: [0]", "\nseeds: [3, 3]"),
    "seeds-shared": ("\nseeds: [0]", "\nseeds: [1]"),
    "seeds-negative": ("\nseeds: [0]", "\nseeds: [-1]"),
    "seeds-word": ("\nseeds: [0]", "\nseeds: all"),
    "no-tasks": ("{words: {data: data.csv}}", "{}"),
    "null-tasks": ("{words: {data: data.csv}}", "null"),
    "missing-data": ("data: data.csv", "data: missing.csv"),
    "surplus-data": ("data: data.csv", "data: surplus.csv"),
    "nul-data": ("data: data.csv", 'data: "a\\0b.csv"'),
    "missing-test": ("data: data.csv", "data: data.csv, also_test: [missing.csv]"),
    "noise": ("data: data.csv", "data: data.csv, label_noise: 1.5"),
    "size": ("data: data.csv", "data: data.csv, train_size: 1000"),
    "column": ("data: data.csv", "data: data.csv, text_column: body"),
    "missing-model": ("model: model", "model: ./no/model"),
    "bad-weights": ("model: model", "model: bad-weights"),
    "fraction": ("steps: 1", "steps: 1.5"),
    "nan": ("rho: [0.1, 0.2]", "rho: [.nan]"),
    "empty-grid": ("rho: [0.1, 0.2]", "rho: []"),
    "unknown-setting": ("rho: [0.1, 0.2]", "hue: [1]"),
    "unknown-method": ("lora: ,", "lora: , sam: ,"),
    "like-none": ("lora: ,", "lora: {like: sam},"),
    "device": ("device: cpu", "device: abacus"),
    "unknown-key": ("\nseeds: [0]", "\nseeds: [0]\ncolour: red"),
    "number-key": ("\nseeds: [0]", "\nseeds: [0]\n3: 4"),
    "sharpness": ("\nseeds: [0]", "\nseeds: [0]\nsharpness: {worst_rho: -1}"),
}


def make_files(folder: Path) -> list[str]:
    """Good and bad models, data, settings, runs, experiments.

    Returns the names relative to the folder, which has to be the current one.
    """
    model = folder / "model"
    save_tiny_model(model)
    write_csv(folder / "data.csv", make_rows(60))
    write_jsonl(folder / "data.jsonl", make_rows(60, classes=3))
    (folder / "empty-folder").mkdir()
    (folder / "folder.csv").mkdir()
    (folder / "folder.yaml").mkdir()
    good = (folder / "data.csv").read_bytes()
    for name, content in {
        "empty.csv": b"",
        "header.csv": b"text,label\n",
        "binary.csv": bytes(range(256)) * 20,
        "nul.csv": b"text,label\na\0b,0\nc,1\n" + good[11:],
        "latin.csv": "text,label\nschön,0\nübel,1\n".encode("latin-1"),
        "utf16.csv": "text,label\na b,0\nc d,1\n".encode("utf-16"),
        "quotes.csv": b'text,label\n"a,0\nb,1\n',
        "columns.csv": b"body,mood\na,0\nb,1\n",
        "surplus.csv": b"text,label\n" + b"a,0,x,y\nb,1,z\n" * 9,
        "short.csv": b"text,label\na\nb,1\n",
        "one-class.csv": b"text,label\n" + b"".join(b"word%d,0\n" % k for k in range(40)),
        "empty-text.csv": b"text,label\n ,0\nb,1\n",
        "twice.csv": b"text,text,label,label\na,b,0,1\nc,d,1,0\n",
        "long.csv": b"text,label\n" + b"w " * 100_000 + b",0\nb,1\n" + good[11:],
        "nul.jsonl": b'{"text": "a\\u0000b", "label": 0}\n{"text": "\\ud800", "label": 1}\n' * 30,
        "list.jsonl": b"[1, 2]\n",
        "damaged.jsonl": b'{"text": "a", "label": \n',
        "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
        "types.jsonl": b'{"text": {"a": 1}, "label": NaN}\n{"text": 3, "label": [1]}\n' * 20,
        "big.jsonl": b'{"text": ' + b"9" * 10_000 + b', "label": 1}\n',
        "keys.jsonl": b'{"1": "a"}\n{"text": "a", "label": "b"}\n',
        "tabs.tsv": good.replace(b",", b"\t"),
        "commas.tsv": good,
        "unknown.parquet": b"PAR1",
        "name \xff.csv".encode("latin-1").decode("utf-8", "surrogateescape"): good,
        "name ü.csv": good,
        "empty.yaml": b"",
        "words.yaml": b"just words\n",
        "open.yaml": b"rank: [3\n",
        "tabs.yaml": b"\trank: 3\n",
        "nul.yaml": b'data: "a\\0b.csv"\n',
        "nul-output.yaml": b'output_dir: "a\\0b"\n',
        "nul-model.yaml": b'model: "a\\0b"\n',
        "nul-test.yaml": b'test_data: "a\\0b.csv"\n',
        "binary.yaml": bytes(range(256)),
        "deep.yaml": b"a: " + b"[" * 3000 + b"\n",
        "alias.yaml": b"rank: &a [*a]\n",
        "tag.yaml": b"rank: !!python/object/apply:os.getcwd []\n",
        "unknown.yaml": b"rnak: 3\n",
        "nested.yaml": b"finetune:\n  rank: 3\n",
        "keys.yaml": b"3: 4\nnull: 1\n? [1, 2]\n: 3\n",
        "types.yaml": b"rank: {a: 1}\nmethod: {lora: 1}\n",
        "date.yaml": b"data: 2024-01-01\nrho: 2024-01-01\n",
        "true.yaml": b"rank: true\nrho: yes\n",
        "null.yaml": b"rank: null\nmethod: null\n",
        "list.yaml": b"- rank: 3\n",
        "numbers.yaml": b"rho: .nan\nlr: .inf\n",
        "surrogate.yaml": b'text_column: "\\ud800"\n',
        "methods.yaml": b"method: [[lora]]\nseeds: [[1]]\n",
        "good.yaml": b"rank: 3\nmethod: [eflat]\n",
        "good.json": b'{"rank": 3, "target_modules": ["query"]}',
        "wrong.json": b'{"rank": "3x", "seeds": [1.5]}',
    }.items():
        (folder / name).write_bytes(content)
    for name, file, content in (
        ("no-config", "config.json", None),
        ("bad-config", "config.json", b"{"),
        ("list-config", "config.json", b"[]"),
        ("odd-config", "config.json", b'{"model_type": "nonsense"}'),
        ("untyped-config", "config.json", b"{}"),
        ("wrong-sizes", "config.json", b'{"model_type": "bert", "hidden_size": 33}'),
        ("word-sizes", "config.json", b'{"model_type": "bert", "hidden_size": "many"}'),
        ("no-weights", "model.safetensors", None),
        ("bad-weights", "model.safetensors", b"damaged"),
        ("empty-weights", "model.safetensors", b""),
        ("cut-weights", "model.safetensors", (model / "model.safetensors").read_bytes()[:5000]),
        ("no-tokenizer", "tokenizer.json", None),
        ("bad-tokenizer", "tokenizer.json", b"{"),
        ("odd-tokenizer", "tokenizer.json", b'{"model": {"type": "x"}}'),
        ("bad-tokenizer-config", "tokenizer_config.json", b"[1"),
    ):
        shutil.copytree(model, folder / name)
        (folder / name / file).unlink() if content is None else (folder / name / file).write_bytes(
            content
        )
    for name, change in CHANGES.items():
        (folder / f"grid-{name}.yaml").write_text(EXPERIMENT.replace(*change), encoding="utf-8")
    _make_runs(folder)
    return sorted(path.name for path in folder.iterdir())


def _make_runs(folder: Path) -> None:
    """A run folder, and copies of it that miss something or hold what is wrong."""
    config = FinetuneConfig(
        model="model",
        data="data.csv",
        max_length=32,
        steps=1,
        device="cpu",
        method=["lora"],
        output_dir=folder / "run",
    )
    comparison.run(config)
    settings = (folder / "run" / "config.yaml").read_text(encoding="utf-8")
    for name, file, content in (
        ("run-no-config", "config.yaml", None),
        ("run-bad-config", "config.yaml", "rank: [3\n"),
        ("run-words-config", "config.yaml", "just words\n"),
        ("run-empty-config", "config.yaml", ""),
        ("run-odd-config", "config.yaml", "rnak: 3\n"),
        ("run-rank-config", "config.yaml", settings.replace("rank: 8", "rank: 0")),
        ("run-word-config", "config.yaml", settings.replace("rank: 8", "rank: many")),
        ("run-no-metrics", "lora/seed-0/metrics.json", None),
        ("run-no-adapter", "lora/seed-0/adapter_config.json", None),
    ):
        shutil.copytree(folder / "run", folder / name)
        file = folder / name / file
        file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    (folder / "run-odd-seed").mkdir()
    shutil.copytree(folder / "run" / "lora" / "seed-0", folder / "run-odd-seed/lora/seed-x")
    shutil.copy(folder / "run" / "config.yaml", folder / "run-odd-seed")


def make_arguments(rng: random.Random, files: list[str]) -> list[str]:
    """A call of one of the commands."""
    kind = rng.random()
    if kind < 0.7:
        return _fine_tune(rng, files)
    return _experiment(rng, files) if kind < 0.8 else _measurement(rng, files)


def _experiment(rng: random.Random, files: list[str]) -> list[str]:
    grids = [name for name in files if name.startswith("grid-")]
    words = [rng.choice(grids) if rng.random() < 0.8 else path(rng, files)]
    if rng.random() < 0.3:
        words += rng.choice(
            [
                *(["--jobs", jobs] for jobs in ("0", "-1", "1.5", "nan", "", "many")),
                *(["--task", name] for name in ("words", "word", "", "\udcff")),
                *(["--method", name] for name in ("lora", "eflat", "sam")),
                *(["--retry-failed"], ["--config", "good.yaml"], ["surplus"], ["--help"]),
            ]
        )
    return ["experiment", *words]


def _measurement(rng: random.Random, files: list[str]) -> list[str]:
    """Of places that are right in one of three calls, with up to two changes of the settings."""
    command = rng.choice(sorted(MEASURING))
    runs = [name for name in files if name.startswith("run")]
    good = ["run", "run/lora", "run/lora/seed-0", "run/"]
    places = [
        rng.choice(good) if kind < 0.4 else rng.choice(runs) if kind < 0.8 else path(rng, files)
        for kind in (rng.random() for _ in range(rng.choice([0, 1, 1, 1, 1, 2])))
    ]
    words: list[str] = []
    for _ in range(rng.choice([0, 1, 1, 2])):
        kind = rng.random()
        option = f"--{rng.choice(MEASURING[command]).replace('_', '-')}"
        if kind < 0.4:
            words += [option, rng.choice(NUMBERS)]
        elif kind < 0.6:
            words += [option, rng.choice(WORDS)]
        elif kind < 0.9:
            suffix = rng.choice(["", ".csv", ".json", ".png", ".svg", ".txt"])
            words += ["--output", path(rng, files) + suffix]
        else:
            words += rng.choice([["--config", "good.yaml"], ["--samples"], ["--rank", "3"], ["--"]])
    return [command, *places, *words]


def _fine_tune(rng: random.Random, files: list[str]) -> list[str]:
    """A call that is right, but for one to three changes."""
    values: dict[str, list[str]] = {
        "model": ["model"],
        "data": [rng.choice(["data.csv", "data.jsonl"])],
        "max_length": ["32"],
        "steps": ["1"],
        "batch_size": ["4"],
        "device": ["cpu"],
        "method": [rng.choice(["lora", "eflat", "flat", "lora-sam", "full"])],
        "output_dir": ["out"],
    }
    surplus: list[str] = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        kind = rng.random()
        name = rng.choice(OPTIONS)
        if kind < 0.3:
            values[name] = [rng.choice(NUMBERS)]
        elif kind < 0.45:
            values[name] = [rng.choice(WORDS) for _ in range(rng.choice([0, 1, 1, 2]))]
        elif kind < 0.7:
            names = ["model", "data", "data", "test_data", "output_dir"]
            values[rng.choice(names)] = [path(rng, files)]
        elif kind < 0.85:
            name = rng.choice([f for f in files if f.endswith((".yaml", ".json"))])
            values["config"] = [rng.choice([name, name, path(rng, files)])]
        elif kind < 0.9:
            surplus += rng.choice([["--ranks", "8"], ["extra"], ["-h0"], ["--"], ["--no-rho"]])
        elif kind < 0.95:
            fitting = {
                "rank": "4",
                "rho": "0.1",
                "onto": "A",
                "norm_scope": "global",
                "target_modules": "all-linear",
                "dtype": "bfloat16",
                "test_size": "8",
                "seeds": "3",
            }
            name = rng.choice(sorted(fitting))
            values[name] = [fitting[name]]
        else:
            surplus += [f"--{name.replace('_', '-')}={rng.choice(NUMBERS + WORDS)}"]
    # Settings of a file that are to be seen must not be given here, too.
    for name in list(values):
        if "config" in values and name in ("method", "output_dir", "data") and rng.random() < 0.3:
            del values[name]
    words = [w for n, given in values.items() for w in (f"--{n.replace('_', '-')}", *given)]
    words += surplus
    if rng.random() < 0.03:
        rng.shuffle(words)
    command = "finetune" if rng.random() < 0.97 else rng.choice(["fine", "", "FINETUNE", "β"])
    return [command, *words]


def path(rng: random.Random, files: list[str]) -> str:
    """Of a file there is, or one that is not there or cannot be."""
    odd = ["missing.csv", "missing.jsonl", "/proc/self/mem", "/dev/full", "/dev/null", "/", "", "."]
    odd += ["data.csv/inside", "data.csv/inside.csv", "n" * 300, "n" * 300 + ".csv", "/proc/nope/x"]
    odd += ["~", "new/deeper", "\udcff.csv", "a\nb", "model/config.json", "../outside.csv", "-"]
    return rng.choice(odd if rng.random() < 0.35 else files)


def state_of(folder: Path) -> dict[str, Any]:
    """Names, contents and times of everything in the folder."""
    state: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        facts = file.lstat()
        state[str(file)] = (facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return state


def describe(arguments: list[str]) -> str:
    return json.dumps(
        [a if len(a) < 80 else a[:40] + f"... {len(a)} characters" for a in arguments]
    )


def digest(folder: Path) -> str:
    """Of all contents: times can be set back."""
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            hashed.update(str(file).encode("utf-8", "surrogateescape") + file.read_bytes())
    return hashed.hexdigest()
