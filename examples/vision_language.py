"""Fine-tune a vision-language model on questions about images, with LoRA and with EFlat-LoRA.

Without arguments it trains a small Qwen2-VL with random weights, in less than a minute on one core.
With --model, a folder or a name on the hub, it fine-tunes that Qwen2-VL checkpoint.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import easy_vqa
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from eflat_ext.trainer import eflat_optimizer

# Attention and MLP of every block of the vision tower and every layer of the language model.
BOTH_TOWERS = (
    r".*\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    r"|.*\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
# Trained in full if the weights are random.
NOT_PRETRAINED = ["merger", "embed_tokens", "lm_head"]

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen2-VL's, for images and text.
CHAT_TEMPLATE = """\
{% for message in messages %}
{%- if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Processor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video processor, which needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def small_processor(texts: Sequence[str]) -> Processor:
    """Return a processor with Qwen2-VL's special tokens and a tokenizer trained on ``texts``."""
    words = ["system user assistant You are a helpful assistant."] * len(texts)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*texts, *words], vocab_size=400, new_special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    return Processor(Qwen2VLImageProcessorPil(), tokenizer, CHAT_TEMPLATE)


def small_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLForConditionalGeneration:
    """Return a model of two vision blocks and two language layers of width 64, random weights."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
                "pad_token_id": ids["<|endoftext|>"],
            },
            vision_config={
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "initializer_range": 0.1,
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    # A patch has 1176 numbers: their sum would be far larger than the outputs of the blocks.
    model.model.visual.patch_embed.proj.weight.data /= 20
    return model


def with_lora(model: Qwen2VLForConditionalGeneration, whole: list[str] | None) -> PeftModel:
    """Add LoRA to both towers; the modules named in ``whole`` are trained in full."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=BOTH_TOWERS,
        modules_to_save=whole,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load(model: str | None, processor: Qwen2VLProcessor, dtype: torch.dtype) -> PeftModel:
    """Load a checkpoint in ``dtype`` and add LoRA; the small random model for None."""
    if model is None:
        return with_lora(small_model(processor.tokenizer), NOT_PRETRAINED)
    return with_lora(Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype), None)


class Questions(torch.utils.data.Dataset):
    """Data set of the first ``count`` questions of easy-vqa about a shape or a colour."""

    def __init__(self, part: str, count: int) -> None:
        texts, answers, images = getattr(easy_vqa, f"get_{part}_questions")()
        paths = getattr(easy_vqa, f"get_{part}_image_paths")()
        rows = zip(texts, answers, (paths[image] for image in images), strict=True)
        names = ("question", "answer", "image")
        self.rows = [dict(zip(names, r, strict=True)) for r in rows if r[1] not in ("yes", "no")]
        self.rows = self.rows[:count]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.rows[index]


class Collator:
    """Collate rows into a batch of the processor, with labels for the answer only."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor = processor
        self.answer_starts = processor.tokenizer("<|im_start|>assistant\n").input_ids

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, Tensor]:
        batch = self.processor(
            images=[[Image.open(row["image"])] for row in rows],
            text=[self.chat(row["question"], row["answer"]) for row in rows],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row in labels:
            turn = int((row == self.answer_starts[0]).nonzero()[-1])
            row[: turn + len(self.answer_starts)] = -100
        return {**batch, "labels": labels}

    def chat(self, question: str, answer: str) -> str:
        """Return the text of the chat template up to the end of the answer."""
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        answered = [{"type": "text", "text": answer}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        )
        return text.removesuffix("\n")


def best_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of answers that greedy decoding reproduces exactly."""
    tokens, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float(((tokens == labels) | (labels == -100)).all(-1).mean())}


def without_images(train: Questions, test: Questions) -> float:
    """Return the accuracy of the most frequent answer to each question."""
    answers: dict[str, Counter[str]] = {}
    for row in train.rows:
        answers.setdefault(row["question"], Counter())[row["answer"]] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    return sum(guesses.get(r["question"]) == r["answer"] for r in test.rows) / len(test)


def make_trainer(
    model: PeftModel,
    processor: Qwen2VLProcessor,
    train: Questions,
    test: Questions,
    arguments: TrainingArguments,
    rho: float | None,
) -> Trainer:
    """Return a Trainer with EFlat-LoRA of radius ``rho``, or with its own optimizer for None."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=Collator(processor),
        preprocess_logits_for_metrics=best_tokens,
        compute_metrics=exact_match,
        optimizer_cls_and_kwargs=None if rho is None else eflat_optimizer(arguments, rho=rho),
    )


def main(
    model: str | None = None,
    *,
    train_questions: int = 4000,
    test_questions: int = 256,
    steps: int = 250,
    batch_size: int = 16,
    learning_rate: float | None = None,
    rho: float = 0.05,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Fine-tune with LoRA, then with EFlat-LoRA, and print held-out loss and accuracy.

    Args:
        model: Qwen2-VL checkpoint, a folder or a name on the hub; by default a small random model.
        train_questions: Maximum number of training questions.
        test_questions: Maximum number of held-out questions.
        steps: Optimizer steps.
        batch_size: Questions per step.
        learning_rate: By default 3e-3 for the small model and 1e-4 for a checkpoint.
        rho: Radius of EFlat-LoRA's perturbation.
        seed: Seed of random weights and of the order of the questions.
        output: Folder for the two adapters.
    """
    train, test = Questions("train", train_questions), Questions("test", test_questions)
    if model is None:
        torch.set_num_threads(1)  # more threads are slower in a model this small
        processor = small_processor([r[key] for r in train.rows for key in ("question", "answer")])
    else:
        processor = Processor.from_pretrained(model)
    cuda = torch.cuda.is_available()
    lines = []
    for method, radius in (("LoRA", None), ("EFlat-LoRA", rho)):
        set_seed(seed)
        tuned = load(model, processor, torch.bfloat16 if cuda else torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                learning_rate=learning_rate or (1e-4 if model else 3e-3),
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                bf16=cuda and model is not None,
                dataloader_pin_memory=cuda,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                seed=seed,
            )
            trainer = make_trainer(tuned, processor, train, test, arguments, radius)
            trainer.train()
            found = trainer.evaluate()
        lines.append(
            f"{method:10}  loss {found['eval_loss']:.3f}  accuracy {found['eval_accuracy']:.1%}"
        )
        if output is not None:
            tuned.save_pretrained(output / method)
    print(f"{len(test)} held-out questions; without images {without_images(train, test):.1%} right")
    print("\n".join(lines))


if __name__ == "__main__":
    cyclopts.run(main)
