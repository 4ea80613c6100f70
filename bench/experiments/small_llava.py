"""Pretrain a small vision-language model and write questions on images that are new to it.

    python -m bench.experiments.small_llava runs/small-llava

No Python package contains a checkpoint of a vision-language model, so a LLaVA for 64 x 64 pixels is
pretrained on easy-vqa's questions about colours and those with the answers yes and no.
bench/experiments/easy_vqa.yaml then fine-tunes it to name the colours in negatives of the images,
where each colour is another one. It takes fifteen minutes on one core.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

import cyclopts
import easy_vqa as questions
import torch
from PIL import Image, ImageOps
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bench import csv_rows
from eflat_ext.lab.data.splits import Splits
from eflat_ext.lab.data.texts import Table
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig

PIXELS, PATCH, WIDTH, LAYERS = 64, 8, 64, 2
SPECIAL = ["<pad>", "<unk>", "<image>", "<ask>", "<answer>", "<end>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}<ask>
{%- for part in message.content %}
{%- if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %} <answer>{% endif %}"""


def make_processor(texts: list[str]) -> LlavaProcessor:
    """Return a processor whose tokens are the words of these texts; images keep their size."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<image>", "<ask>", "<answer>"],
        model_max_length=128,
    )
    size = {"height": PIXELS, "width": PIXELS}
    images = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return a model of two vision and two language layers, random weights."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    token = tokenizer.convert_tokens_to_ids
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=PIXELS, patch_size=PATCH, **shape),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=128,
                initializer_range=0.05,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=token("<end>"),
                pad_token_id=token("<pad>"),
                **shape,
            ),
            image_token_id=token("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


def easy_vqa(part: str, topics: Collection[str]) -> Table:
    """Return questions on drawings from the package easy-vqa 1.0.

    Args:
        part: "train", 4,000 drawings, or "test", 1,000 others.
        topics: of "yes or no", "shape" and "color".
    """
    texts, answers, numbers = getattr(questions, f"get_{part}_questions")()
    paths = getattr(questions, f"get_{part}_image_paths")()
    table = Table(texts, answers, images=[str(Path(paths[k]).resolve()) for k in numbers])
    of = {"yes": "yes or no", "no": "yes or no"}
    of |= dict.fromkeys(("circle", "rectangle", "triangle"), "shape")
    return table.rows(k for k, a in enumerate(answers) if of.get(a, "color") in topics)


def write_negatives(folder: Path) -> None:
    """Write questions on colours as train.csv and test.csv, with negatives of their drawings."""
    for part in ("train", "test"):
        table = easy_vqa(part, ["color"])
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for text, label, image in zip(table.texts, table.labels, table.images or [], strict=True):
            name = f"{part}/{Path(image).name}"
            ImageOps.invert(Image.open(image).convert("RGB")).save(folder / name)
            rows.append({"text": text, "label": label, "image": name})
        csv_rows.write(folder / f"{part}.csv", rows)


def main(output: Path, *, steps: int = 4000, batch_size: int = 32, lr: float = 2e-3) -> None:
    """Pretrain and save the model, and write the negatives, in folders ``model`` and ``negatives``.

    Args:
        output: Parent of these folders.
        steps: Optimizer steps.
        batch_size: Questions per step.
        lr: Peak learning rate.
    """
    write_negatives(output / "negatives")
    torch.manual_seed(0)
    train, test = (easy_vqa(part, ["yes or no", "color"]) for part in ("train", "test"))
    train, test = (part.rows(torch.randperm(len(part)).tolist()) for part in (train, test))
    shapes = easy_vqa("test", ["shape"])
    processor = make_processor([*train.texts, *train.labels, *shapes.texts, *shapes.labels])
    config = FinetuneConfig(
        model=str(output / "model"),
        task_type="CAUSAL_LM",
        image_column="image",
        full_lr=lr,
        batch_size=batch_size,
        device="cpu",
    )
    test = test.rows(range(1000))
    parts = [
        comparison.encode(config, processor, part)
        for part in (train.rows(range(steps * batch_size)[: len(train)]), test)
    ]
    splits = Splits(train, test, test, [])
    task = comparison.Task(config.model, processor, splits, *parts, torch.device("cpu"), steps)
    model = make_model(processor.tokenizer)
    optimizer = comparison.METHODS["full"](config, model, steps)
    bar = iter(track(itertools.count(), "pretraining", total=steps))
    result = comparison.train(config, task, "full", 0, model, optimizer, lambda loss: next(bar))
    print({name: result.metrics[name] for name in ("accuracy", "loss", "train_loss")})
    model.save_pretrained(config.model)
    processor.save_pretrained(config.model)


if __name__ == "__main__":
    cyclopts.run(main)
