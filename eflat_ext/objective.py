"""What a fine-tune learns: the class of each text, or to write what follows it.

Tokens that are to be written have their own numbers as labels, all others -100, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eflat_ext import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eflat_ext.config import FinetuneConfig
    from eflat_ext.data import Texts

    Inputs = dict[str, list[int]]
    Label = int | list[int]

IGNORED = -100


def encode(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, part: Texts
) -> tuple[list[Inputs], list[Label]]:
    """The model's inputs for each text, and its label: a class number, or one for each token.

    To be written are a line break, the words of the label and the tokenizer's end of text. Of what
    is longer than ``config.max_length`` tokens the longer one, of text and label, is cut first.
    """
    inputs = loading.encode(tokenizer, part, config.max_length)
    if config.task_type == "SEQ_CLS":
        return inputs, part.labels
    written = [f"\n{label}" for label in part.labels]
    completions = tokenizer(written, add_special_tokens=False)["input_ids"]
    rows, labels = [], []
    for row, completion in zip(inputs, completions, strict=True):
        prompt = row["input_ids"]
        if tokenizer.eos_token_id is not None:
            completion = [*completion, tokenizer.eos_token_id]
            prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        completion = completion[: max(config.max_length - len(prompt), config.max_length // 2)]
        prompt = prompt[: config.max_length - len(completion)]
        tokens = prompt + completion
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens)})
        labels.append([IGNORED] * len(prompt) + completion)
    return rows, labels


def collate(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Inputs],
    labels: Sequence[Label],
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor]:
    """Some texts as one padded batch, and their labels, shape (texts,) or (texts, tokens)."""
    padded = tokenizer.pad(list(inputs), return_tensors="pt")
    tensors = {name: cast(Tensor, tensor).to(device) for name, tensor in padded.items()}
    if isinstance(labels[0], list):
        width = tensors["input_ids"].shape[1]
        rows = cast(Sequence[list[int]], labels)
        labels = [row + [IGNORED] * (width - len(row)) for row in rows]
    return tensors, torch.tensor(labels, device=device)


def count(labels: Tensor) -> int:
    """How many predictions the loss is a mean of."""
    return labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy (nats) of classes, or of the next tokens that are to be written.

    Args:
        logits: shape (texts, classes) or (texts, tokens, vocabulary).
        labels: from :func:`collate`.
        reduction: as for :func:`torch.nn.functional.cross_entropy`.
    """
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, reduction=reduction, ignore_index=IGNORED)


def count_right(logits: Tensor, labels: Tensor) -> int:
    """Texts whose class is the likeliest one, or whose every token to be written is.

    The latter is what greedy decoding writes word for word.
    """
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    right = (logits.argmax(dim=-1) == labels) | (labels == IGNORED)
    return int(right.flatten(1).all(dim=1).sum() if right.dim() == 2 else right.sum())
