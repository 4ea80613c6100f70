"""Find and load trained models, with batches to measure their loss on."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn

from eflat_ext.lab.data.splits import class_names
from eflat_ext.lab.data.texts import InputError, Table, Texts
from eflat_ext.lab.data.validation import option, prefix_errors, read_yaml, section_of, validate
from eflat_ext.lab.finetune import loading, objective
from eflat_ext.lab.finetune.config import FinetuneConfig, Method, TaskType

from .config import MeasureConfig

if TYPE_CHECKING:
    from eflat_ext.lab.finetune.loading import Tokenizer

ADAPTER = "adapter"
"""Stands for the method of an adapter that is not in a run folder."""

# Settings that a run folder has of its own.
_OF_DATA = ("data", "text_column", "text_pair_column", "label_column", "max_length")


@dataclass(frozen=True)
class Trained:
    """A run of a comparison, or an adapter outside of a run folder.

    Attributes:
        folder: with the adapter, or the model of the method "full".
        name: its name in tables.
        method, seed: of the run; :data:`ADAPTER` and None outside of a run folder.
        config: the comparison's settings; None outside of a run folder.
    """

    folder: Path
    name: str
    method: str
    seed: int | None = None
    config: FinetuneConfig | None = None


@dataclass(frozen=True)
class Batch:
    """Model inputs, labels, and the number of predictions relative to the mean over all batches."""

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: float


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        model: in eval mode.
        layers: names of the layers to measure; None for those with an adapter.
        batches: to measure the loss on.
    """

    model: nn.Module
    layers: list[str] | None
    batches: list[Batch]


def check_use(config: MeasureConfig, runs: Sequence[Trained]) -> None:
    """Raise :class:`InputError` naming a setting that none of the runs has a use for."""
    given = [f.name for f in fields(MeasureConfig) if getattr(config, f.name) != f.default]
    if useless := [name for name in _OF_DATA if name in given and all(r.config for r in runs)]:
        raise InputError(
            f"{option(useless[0])} is for an adapter that is not in a run folder; "
            f"{runs[0].folder} has its own"
        )
    if "part" in given and not any(run.config for run in runs):
        raise InputError(
            f"--part is for run folders; {runs[0].folder} is none and is measured on --data"
        )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy (nats) of a batch, times the batch's weight.

    The mean over batches is then the mean over all predictions; see :func:`.objective.loss_of`.
    """
    logits = model(**batch.inputs).logits
    return objective.loss_of(logits, batch.labels) * batch.weight


def find(places: Iterable[Path]) -> list[Trained]:
    """Return the trained models in these folders, each once.

    Args:
        places: run folders of ``eflat finetune`` (all methods and seeds in them), their
            METHOD or METHOD/seed-N folders, or folders with a PEFT adapter.

    Raises:
        InputError: a folder is none of these.
    """
    by_folder: dict[Path, Trained] = {}
    for trained in (one for place in places for one in _find(Path(place))):
        by_folder.setdefault(trained.folder.resolve(), trained)
    found = list(by_folder.values())
    if not found:
        raise InputError("nothing to measure: give a run folder or an adapter's folder")
    if len({trained.name for trained in found}) < len(found):
        found = [replace(trained, name=str(trained.folder)) for trained in found]
    return found


def data_of(runs: Iterable[Trained], config: MeasureConfig) -> list[str]:
    """Return the data of the runs, as ``--data`` and ``--test-data`` name them."""
    given = [config.data]
    for settings in (run.config for run in runs if run.config):
        given += [settings.data, settings.test_data]
    return [source for source in given if source is not None]


def load(trained: Trained, config: MeasureConfig) -> Loaded:
    """Return the trained model in float32 and eval mode on its device, with batches of its data.

    Raises:
        InputError: something in ``config`` or the folder cannot be used; the message names it.
    """
    config.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = _load_run(trained, config) if trained.config else _load_adapter(trained, config)
    loaded.model.eval()
    return loaded


def make_batches(
    tokenizer: Tokenizer,
    inputs: Sequence[dict[str, Any]],
    labels: Sequence[objective.Label],
    size: int,
    device: torch.device,
) -> list[Batch]:
    """Return batches of texts of similar length for :func:`loss`; all have predictions.

    Args:
        tokenizer: to pad with.
        inputs, labels: as :func:`eflat_ext.lab.finetune.objective.encode` gives them.
        size: texts of a batch.
        device: for the batches.

    Raises:
        InputError: no text has anything to predict.
    """
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]["input_ids"]))
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [
        objective.collate(tokenizer, [inputs[i] for i in rows], [labels[i] for i in rows], device)
        for rows in chosen
    ]
    counts = [objective.count(target) for _, target in batches]
    predicting = [(batch, n) for batch, n in zip(batches, counts, strict=True) if n]
    if not predicting:
        raise InputError(f"expected a text with a token to predict, got {len(inputs)} without one")
    mean = sum(counts) / len(predicting)
    return [Batch(*batch, n / mean) for batch, n in predicting]


# --- inner parts -------------------------------------------------------------------------


def _find(place: Path) -> list[Trained]:
    if not os.path.isdir(place):  # Path.is_dir raises where the name is too long
        raise InputError(f"{place} is no folder")
    place = place.resolve()  # "." has parents, too
    for folder, pattern in (
        (place, "*/seed-*"),
        (place.parent, "seed-*"),
        (place.parent.parent, ""),
    ):
        runs = place.glob(pattern) if pattern else [place]
        runs = [run for run in runs if (run / "metrics.json").is_file()]
        if runs and (folder / "config.yaml").is_file():
            config = _read_config(folder / "config.yaml")
            for run in runs:
                if not run.name.removeprefix("seed-").isdecimal():
                    raise InputError(f"{run}: expected seed-N as its name, N being a number")
            trained = [
                Trained(
                    run,
                    f"{run.parent.name}, {run.name.replace('-', ' ')}",
                    run.parent.name,
                    int(run.name.removeprefix("seed-")),
                    config,
                )
                for run in runs
            ]
            order = {method: k for k, method in enumerate(config.method)}
            return sorted(trained, key=lambda t: (order.get(cast(Method, t.method), 99), t.seed))
    if (place / "adapter_config.json").is_file():
        return [Trained(place, place.name, ADAPTER)]
    raise InputError(f"{place} holds neither a run of eflat finetune nor a PEFT adapter")


def _read_config(path: Path) -> FinetuneConfig:
    content = validate(section_of(FinetuneConfig), read_yaml(path), str(path))
    config = FinetuneConfig(**content.given())
    with prefix_errors(str(path)):
        config.check()
    return config


def _load_run(trained: Trained, config: MeasureConfig) -> Loaded:
    settings = replace(cast(FinetuneConfig, trained.config), device=config.device)
    device = loading.find_device(settings)
    splits = loading.read_splits(settings)
    part: Texts = getattr(splits, config.part)
    if not len(part):
        raise InputError(f"--part names the {config.part} part of {trained.folder}, which is empty")
    path = loading.find_model(settings.model)
    tokenizer = loading.load_tokenizer(path, settings)
    method = cast(Method, trained.method)
    layers = config.layers
    if method == "full":
        model: nn.Module = _from_pretrained(settings, trained.folder)
        layers = layers or _layers_of_adapter(settings, path, splits.classes)
    else:
        base, _ = loading.load_model(
            path, settings, splits.classes, loading.text_tokenizer(tokenizer).pad_token_id, method
        )
        # In bfloat16 the loss would be rounded by more than it rises.
        model = _with_adapter(base.float(), trained.folder, splits.classes)
    part = part.rows(range(len(part))[: config.examples])
    inputs, labels = objective.encode(settings, tokenizer, part)
    batches = make_batches(tokenizer, inputs, labels, config.batch_size, device)
    return Loaded(model.to(device), layers, batches)


def _layers_of_adapter(settings: FinetuneConfig, path: str, classes: list[str]) -> list[str]:
    """Return the names of the layers that have an adapter in the other methods' runs."""
    from eflat_ext.analysis.full_space import adapted_layers

    base, new = loading.load_model(path, settings, classes, 0, "lora")
    return [layer.name for layer in adapted_layers(loading.add_adapter(settings, base, new))]


def _load_adapter(trained: Trained, config: MeasureConfig) -> Loaded:
    from peft import PeftConfig

    if config.data is None:
        raise InputError(f"{trained.folder} is no run of eflat finetune: give its --data")
    try:
        adapter = PeftConfig.from_pretrained(str(trained.folder))
    except Exception as error:  # those of damaged files are many and change by version
        raise InputError(f"cannot load {trained.folder}: {loading.first_line(error)}") from None
    kind = str(getattr(adapter.task_type, "value", adapter.task_type))
    if kind not in get_args(TaskType):
        raise InputError(
            f"{trained.folder} is an adapter for {kind}; the command takes SEQ_CLS and CAUSAL_LM, "
            "the functions of eflat_ext.sharpness take every model"
        )
    causal = kind == "CAUSAL_LM"
    options: dict[str, Any] = {}
    path = str(adapter.base_model_name_or_path)
    settings = FinetuneConfig(
        model=path,
        task_type=cast(TaskType, kind),
        text_column=config.text_column,
        text_pair_column=config.text_pair_column,
        label_column=config.text_column if causal else config.label_column,
        max_length=config.max_length,
        device=config.device,
    )
    device = loading.find_device(settings)
    tokenizer = loading.text_tokenizer(loading.load_tokenizer(path, settings))
    table = loading.read_table(settings, config.data)
    names: list[str] = []
    if not causal:
        names = _class_names(trained.folder, table)
        options["num_labels"] = len(names)
    base = _from_pretrained(settings, path, **options)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = _with_adapter(base, trained.folder, names)
    table = table.rows(range(len(table))[: config.examples])
    inputs = loading.encode(tokenizer, table, config.max_length)
    labels: list[Any] = (
        [row["input_ids"] for row in inputs]  # of the whole text, nothing is asked of a label
        if causal
        else [names.index(label) for label in table.labels]
    )
    try:
        batches = make_batches(tokenizer, inputs, labels, config.batch_size, device)
    except InputError as error:
        given = f"--data {config.data}, --max-length {config.max_length}"
        raise InputError(f"{given}: {error}") from None
    return Loaded(model.to(device), config.layers, batches)


def _class_names(folder: Path, table: Table) -> list[str]:
    """Return the classes of the adapter's classes.json, or else of the data, in their order."""
    names = class_names(table.labels)
    file = folder / "classes.json"
    if not file.is_file():
        return names
    try:
        own = list(map(str, json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file}: {loading.first_line(error)}") from None
    for name in names:
        if name not in own:
            told = ", ".join(own)
            raise InputError(
                f"{folder}: the data have the class {name!r}, the adapter tells {told} apart"
            )
    return own


def _from_pretrained(settings: FinetuneConfig, path: str | Path, **options: Any) -> Any:
    """Load the model for the task in float32; bfloat16 rounds a loss by more than its rise."""
    try:
        return loading.auto_model(settings).from_pretrained(path, dtype=torch.float32, **options)
    except Exception as error:  # as above
        raise InputError(f"cannot load the model {path}: {loading.first_line(error)}") from None


def _with_adapter(base: Any, folder: Path, classes: Sequence[str]) -> nn.Module:
    """Return the model with the adapter of ``folder``; ``classes`` are those of the data."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # as above
        raise InputError(f"cannot load {folder}: {_loading_error(error, len(classes))}") from None


def _loading_error(error: Exception, classes: int) -> str:
    """Return why an adapter cannot be loaded; torch names different shapes after its first line."""
    for line in str(error).splitlines():
        if found := re.search(r"size mismatch .*Size\(\[(\d+).*Size\(\[(\d+)", line):
            if int(found[2]) == classes:
                return f"it tells {found[1]} classes apart, but the data have {classes}"
            return line.strip().rstrip(".")
    return loading.first_line(error)
