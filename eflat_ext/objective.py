"""What a fine-tune learns: the class of each text, or to write what follows it.

Tokens that are to be written have their own numbers as labels, all others -100, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from eflat_ext import loading
from eflat_ext.data import InputError

if TYPE_CHECKING:
    from eflat_ext.config import FinetuneConfig
    from eflat_ext.data import Texts
    from eflat_ext.loading import Tokenizer

    # The model's inputs for one text, lists with a number for each token. An image is kept as the
    # data has it, since what the model takes of it may be far larger.
    Inputs = dict[str, Any]
    Label = int | list[int]

IGNORED = -100
# What processors add to a row, and a tokenizer does not pad.
_OF_PROCESSORS = ("image", "mm_token_type_ids")


def encode(
    config: FinetuneConfig, tokenizer: Tokenizer, part: Texts
) -> tuple[list[Inputs], list[Label]]:
    """The inputs for each text, and its label: a class number, or a number for each token.

    To be written are a line break (nothing, after the chat template of a processor), the words of
    the label and the tokenizer's end of text. Of what is longer than ``config.max_length`` tokens
    the longer one, of text and label, is cut first; a text with an image is not cut.

    Raises:
        InputError: something in the data or ``config`` cannot be used.
    """
    if part.images is not None:
        prompts, parting = list(_prompts_with_images(config, tokenizer, part)), ""
    else:
        prompts, parting = (
            loading.encode(loading.of_texts(tokenizer), part, config.max_length),
            "\n",
        )
    if config.task_type == "SEQ_CLS":
        return prompts, part.labels
    texts = loading.of_texts(tokenizer)
    written = [f"{parting}{label}" for label in part.labels]
    completions = texts(written, add_special_tokens=False)["input_ids"]
    rows, labels = [], []
    for row, completion in zip(prompts, completions, strict=True):
        if texts.eos_token_id is not None:
            completion = [*completion, texts.eos_token_id]
            if row["input_ids"][-1] == texts.eos_token_id:
                row = {name: values[:-1] for name, values in row.items()}
        length = len(row["input_ids"])
        completion = completion[: max(config.max_length - length, config.max_length // 2)]
        length = min(length, config.max_length - len(completion))
        after = {"input_ids": completion, "attention_mask": [1] * len(completion)}
        zeros = [0] * len(completion)
        rows.append(
            {
                name: values if name == "image" else values[:length] + after.get(name, zeros)
                for name, values in row.items()
            }
        )
        labels.append([IGNORED] * length + completion)
    return rows, labels


def _prompts_with_images(
    config: FinetuneConfig, tokenizer: Tokenizer, part: Texts
) -> Iterator[Inputs]:
    """Each text after its image, in the processor's chat template."""
    processor: Any = tokenizer
    for name in ("image_processor", "chat_template"):
        if getattr(processor, name, None) is None:
            what = name.replace("_", " ")
            raise InputError(f"--model {config.model} has no {what}, which images need")
    columns = part.texts, part.pairs or [""] * len(part), cast(list[Any], part.images)
    for text, pair, image in zip(*columns, strict=True):
        asked = {"type": "text", "text": f"{text}\n{pair}" if pair else text}
        messages = [{"role": "user", "content": [{"type": "image"}, asked]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        row = processor(text=[prompt], images=[_opened(image)])
        length = len(row["input_ids"][0])
        if length >= config.max_length:
            raise InputError(
                f"--max-length is {config.max_length}, "
                f"but a text and its image have {length} tokens"
            )
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        yield {**{name: list(row[name][0]) for name in names if name in row}, "image": image}


def _opened(image: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, str):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read the image {image}: {loading.first_line(error)}") from None


def collate(
    tokenizer: Tokenizer, inputs: Sequence[Inputs], labels: Sequence[Label], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Some texts as one padded batch, and their labels, shape (texts,) or (texts, tokens)."""
    own = [name for name in inputs[0] if name not in _OF_PROCESSORS]
    rows = [{name: row[name] for name in own} for row in inputs]
    padded = dict(loading.of_texts(tokenizer).pad(rows, return_tensors="pt"))
    if "mm_token_type_ids" in inputs[0]:
        types = [torch.tensor(row["mm_token_type_ids"]) for row in inputs]
        padded["mm_token_type_ids"] = pad_sequence(types, batch_first=True)
    if "image" in inputs[0]:
        images = [_opened(row["image"]) for row in inputs]
        padded |= cast(Any, tokenizer).image_processor(images=images, return_tensors="pt")
    tensors = {name: cast(Tensor, tensor).to(device) for name, tensor in padded.items()}
    if isinstance(labels[0], list):
        width = tensors["input_ids"].shape[1]
        targets = cast(Sequence[list[int]], labels)
        labels = [row + [IGNORED] * (width - len(row)) for row in targets]
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
