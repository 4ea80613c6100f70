"""Load the device, data, tokenizer, pretrained model and adapter of a fine-tune."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from eflat_ext.lab.data.splits import Splits, split
from eflat_ext.lab.data.tables import read
from eflat_ext.lab.data.texts import InputError, Table, Texts

from . import packaged_models
from .config import MINILM, SMOLLM2, FinetuneConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    Model = PreTrainedModel | PeftModel
    # What turns rows of data into inputs: a processor where there are images.
    Tokenizer = PreTrainedTokenizerBase | ProcessorMixin


def find_device(config: FinetuneConfig) -> torch.device:
    """Return the device of --device.

    Raises:
        InputError: a tensor cannot be made on it.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used: {first_line(error)}") from None
    return device


def find_model(name: str) -> str:
    """Return a hub name as it is, and the absolute path of a folder or packaged model."""
    packaged = {MINILM: packaged_models.minilm, SMOLLM2: packaged_models.smollm2}
    if name not in packaged:
        # An adapter keeps this path, and is loaded from anywhere.
        return str(Path(name).resolve()) if os.path.isdir(name) else name
    return str(packaged[name]().resolve())


def load_tokenizer(path: str, config: FinetuneConfig) -> Tokenizer:
    """Return the model's tokenizer, with a token to pad with, or its processor for images.

    Raises:
        InputError: it cannot be loaded or cannot pad, or --max-length is too large for the model.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        auto: Any = AutoTokenizer if config.image_column is None else AutoProcessor
        loaded: Tokenizer = auto.from_pretrained(path)
        whole = AutoConfig.from_pretrained(path)
        positions = getattr(whole.get_text_config(), "max_position_embeddings", None)
    except Exception as error:  # those of damaged files are many and change by version
        raise InputError(f"cannot load --model {config.model}: {first_line(error)}") from None
    tokenizer = text_tokenizer(loaded)
    limit = min(tokenizer.model_max_length, positions or math.inf)
    if config.max_length > limit:
        raise InputError(
            f"--max-length must be at most {limit}, as the model takes, got {config.max_length}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of --model {config.model} has no token to pad with")
    if config.task_type == "CAUSAL_LM":
        tokenizer.padding_side = "right"  # as the labels are padded
    return loaded


def text_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the one in a processor."""
    inner: Any = getattr(tokenizer, "tokenizer", tokenizer)
    return cast("PreTrainedTokenizerBase", inner)


def read_table(config: FinetuneConfig, source: str) -> Table:
    """Read ``source``, in the columns that ``config`` names."""
    columns = config.text_column, config.label_column, config.text_pair_column
    table = read(source, *columns, config.image_column)
    if config.image_column is not None and table.images is None:
        raise InputError(f"--image-column must not be given: {source} has no images")
    return table


def read_splits(config: FinetuneConfig) -> Splits:
    """Return the parts of ``config.data``; the test part is of ``config.test_data`` if given."""
    return split(
        read_table(config, config.data),
        None if config.test_data is None else read_table(config, config.test_data),
        train_size=config.train_size,
        validation_size=config.validation_size,
        test_size=config.test_size,
        seed=config.data_seed,
        classify=config.task_type == "SEQ_CLS",
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, data: Texts, max_length: int
) -> list[dict[str, list[int]]]:
    """Return the model's inputs for each text or pair, truncated to ``max_length`` tokens.

    Of a pair the longer text is truncated first. The two are separated by a line break if the
    tokenizer, such as a language model's, has no separator token.
    """
    pairs = data.pairs
    added = tokenizer.num_special_tokens_to_add
    if pairs is not None and added(pair=True) == added(pair=False):
        pairs = [f"\n{text}" for text in pairs]
    try:
        columns = tokenizer(data.texts, pairs, truncation=True, max_length=max_length)
    except Exception as error:  # of a vocabulary without the token for unknown words, say
        raise InputError(
            f"the tokenizer of --model {tokenizer.name_or_path} cannot split the texts: "
            f"{first_line(error)}"
        ) from None
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def load_model(
    path: str, config: FinetuneConfig, classes: list[str], pad_token_id: int, method: str
) -> tuple[PreTrainedModel, list[str]]:
    """The pretrained model for the task, and which of its modules are new.

    New modules are those that the checkpoint lacks, a classification head first of all: they start
    at random and have to be trained beside an adapter.
    """
    half = config.dtype == "bfloat16" and method != "full"
    head: dict[str, Any] = {}
    if config.task_type == "SEQ_CLS":
        head["id2label"] = dict(enumerate(classes))
        head["label2id"] = {name: k for k, name in enumerate(classes)}
        head["ignore_mismatched_sizes"] = True
    try:
        model, loading = auto_model(config).from_pretrained(
            path,
            **head,
            dtype=torch.bfloat16 if half else torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # those of damaged files are many and change by version
        raise InputError(f"cannot load --model {config.model}: {first_line(error)}") from None
    if config.task_type == "CAUSAL_LM" and _sees_ahead(model):
        raise InputError(
            f"--model {config.model} sees the tokens that it is to write: --task-type CAUSAL_LM "
            "needs a causal language model, such as smollm2"
        )
    model.config.pad_token_id = pad_token_id
    keys = [*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])]
    return model, sorted({key.rpartition(".")[0] for key in keys} - {""})


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Return True if a token changes the logits at the token before it."""
    token = model.get_input_embeddings().num_embeddings // 2  # special ones are at the ends
    tokens = torch.tensor([[token, token], [token, token + 1]])
    first, second = model(input_ids=tokens).logits[:, 0]
    rounding = min(100 * torch.finfo(first.dtype).eps, 0.05)
    return bool((first - second).abs().max() > rounding * first.abs().max())


def auto_model(config: FinetuneConfig) -> Any:
    """Return the class of transformers that loads a model for the task."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if config.image_column is not None:
        return AutoModelForImageTextToText
    causal = config.task_type == "CAUSAL_LM"
    return AutoModelForCausalLM if causal else AutoModelForSequenceClassification


def add_adapter(
    config: FinetuneConfig, model: PreTrainedModel, new_modules: list[str]
) -> PeftModel:
    """Wrap ``model`` with a fresh LoRA adapter; ``new_modules`` are trained whole.

    Raises:
        InputError: --target-modules names a layer that the model lacks, or none suits.
    """
    from peft import LoraConfig, get_peft_model

    targets: list[str] | str | None = config.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    names = [name for name, _ in model.named_modules()]
    for target in config.target_modules or []:
        if targets != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in names):
            linear = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"--target-modules: the model has no layer {target!r}; its linear layers "
                f"are: {there}"
            )
    lora = LoraConfig(
        task_type=config.task_type,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=new_modules or None,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"cannot add an adapter to {config.model}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
