"""Encode texts for classification or language modelling, and compute loss and accuracy.

In language modelling a label is the text to write; its tokens are labelled with their numbers and
all other tokens with -100, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from eflat_ext.lab.data.texts import InputError

from . import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eflat_ext.lab.data.texts import Texts

    from .config import FinetuneConfig
    from .loading import Tokenizer

    # The model's inputs for one text: lists with a number for each token. An image stays as it is
    # in the data, since its pixel values may be far larger.
    Inputs = dict[str, Any]
    Label = int | list[int]

IGNORED = -100


def encode(
    config: FinetuneConfig, tokenizer: Tokenizer, part: Texts
) -> tuple[list[Inputs], list[Label]]:
    """Return the inputs of each text, and its label: a class number, or a number for each token.

    The text to write is a line break (nothing, after the chat template of a processor), the label
    and the tokenizer's end of text. If text and label together have more than ``config.max_length``
    tokens, the longer of the two is truncated first; with an image, only the label is.

    Raises:
        InputError: something in the data or ``config`` cannot be used.
    """
    texts = loading.text_tokenizer(tokenizer)
    if config.task_type == "SEQ_CLS":
        return loading.encode(texts, part, config.max_length), part.labels
    with_images, end = part.images is not None, texts.eos_token_id
    parting = "" if with_images else "\n"
    written = [f"{parting}{label}" for label in part.labels]
    completions = texts(written, add_special_tokens=False)["input_ids"]
    if end is not None:
        completions = [[*completion, end] for completion in completions]
    if with_images:
        rows = list(_prompts_with_images(config, tokenizer, part))
    else:
        rows = _prompts(texts, part, completions, config.max_length)
    labels: list[Label] = []
    for row, completion in zip(rows, completions, strict=True):
        length = len(row["input_ids"])
        after = completion[: config.max_length - length]
        for name, values in row.items():
            if name != "image":
                added = {"input_ids": after, "attention_mask": [1] * len(after)}
                row[name] = values + added.get(name, [0] * len(after))
        labels.append([IGNORED] * length + after)
    return rows, labels


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    part: Texts,
    completions: Sequence[list[int]],
    max_length: int,
) -> list[Inputs]:
    """Return the texts without an end of text, truncated to leave room for their completions."""
    rows = loading.encode(tokenizer, part, max_length)
    for k, completion in enumerate(completions):
        room = max_length - min(len(completion), max_length // 2)
        if len(rows[k]["input_ids"]) > room:
            (rows[k],) = loading.encode(tokenizer, part.rows([k]), room)
        tokens = rows[k]["input_ids"]
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            tokens = tokens[:-1]
        if not tokens:
            raise InputError(f"the text {part.texts[k]!r} has no tokens for this model")
        rows[k] = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
    return rows


def _prompts_with_images(
    config: FinetuneConfig, tokenizer: Tokenizer, part: Texts
) -> Iterator[Inputs]:
    """Yield the inputs of each text after its image, in the processor's chat template."""
    processor: Any = tokenizer
    for name in ("image_processor", "chat_template"):
        if getattr(processor, name, None) is None:
            what = name.replace("_", " ")
            raise InputError(f"--model {config.model} has no {what}, which images need")
    bos = processor.tokenizer.bos_token
    columns = part.texts, part.pairs or [""] * len(part), cast(list[Any], part.images)
    for text, pair, image in zip(*columns, strict=True):
        asked = {"type": "text", "text": f"{text}\n{pair}" if pair else text}
        messages = [{"role": "user", "content": [{"type": "image"}, asked]}]
        opened = _opened(image)
        try:
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            begun = bos is not None and prompt.startswith(bos)  # by the template
            options = {"add_special_tokens": False} if begun else {}
            outputs = dict(processor(text=[prompt], images=[opened], **options))
        except Exception as error:  # of templates and processors, which are many
            raise InputError(
                f"--model {config.model} cannot take the text {text!r} with its image: "
                f"{loading.first_line(error)}"
            ) from None
        for name in processor.image_processor.model_input_names:
            outputs.pop(name, None)  # made again with each batch
        row = {name: list(values[0]) for name, values in outputs.items()}
        length = len(row["input_ids"])
        if unknown := [name for name, values in row.items() if len(values) != length]:
            raise InputError(f"--model {config.model} needs {unknown[0]}, which is not supported")
        if length >= config.max_length:
            raise InputError(
                f"--max-length must be greater than {length}, the tokens of a text and its image, "
                f"got {config.max_length}"
            )
        yield {**row, "image": image}


def _opened(image: Any) -> Any:
    from PIL import Image

    if not isinstance(image, str):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {image}: {loading.first_line(error)}") from None


def collate(
    tokenizer: Tokenizer, inputs: Sequence[Inputs], labels: Sequence[Label], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return texts as one padded batch, and their labels, shape (texts,) or (texts, tokens)."""
    texts = loading.text_tokenizer(tokenizer)
    padding = {*texts.model_input_names, "input_ids", "attention_mask"}
    own = [name for name in inputs[0] if name in padding]
    padded = dict(texts.pad([{name: row[name] for name in own} for row in inputs]))
    padded = {name: torch.tensor(rows) for name, rows in padded.items()}
    for name in inputs[0].keys() - padding - {"image"}:  # which tokenizers do not pad
        padded[name] = pad_sequence([torch.tensor(row[name]) for row in inputs], batch_first=True)
    if "image" in inputs[0]:
        images = [_opened(row["image"]) for row in inputs]
        processor = cast(Any, tokenizer).image_processor
        made = processor(images=images, return_tensors="pt")
        padded |= {name: made[name] for name in processor.model_input_names if name in made}
    tensors = {name: tensor.to(device) for name, tensor in padded.items()}
    if isinstance(labels[0], list):
        width = tensors["input_ids"].shape[1]
        targets = cast(Sequence[list[int]], labels)
        labels = [row + [IGNORED] * (width - len(row)) for row in targets]
    return tensors, torch.tensor(labels, device=device)


def count(labels: Tensor) -> int:
    """Return the number of predictions that the loss is a mean of."""
    return labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy (nats), in float32, of classes or of the tokens to write.

    Args:
        logits: shape (texts, classes) or (texts, tokens, vocabulary).
        labels: from :func:`collate`.
        reduction: as for :func:`torch.nn.functional.cross_entropy`.
    """
    if labels.dim() == 2:
        # Select before the conversion to float32: logits are as many as the vocabulary.
        written = labels[:, 1:] != IGNORED
        logits, labels = logits[:, :-1][written], labels[:, 1:][written]
    return cross_entropy(logits.float(), labels, reduction=reduction)


def count_right(logits: Tensor, labels: Tensor) -> int:
    """Count the texts whose class, or whose every token to write, is the most probable one.

    The latter are the labels that greedy decoding writes word for word, after truncation.
    """
    if labels.dim() == 1:
        return int((logits.argmax(dim=-1) == labels).sum())
    right = (logits[:, :-1].argmax(dim=-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return int(right.all(dim=1).sum())
