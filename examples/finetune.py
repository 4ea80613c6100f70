"""Run `eflat finetune` on a CSV file, load the adapter and classify sentences with it.

python examples/finetune.py [--steps 60]
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import cyclopts
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig


def write_rows(path: Path, count: int) -> None:
    """Write movie reviews as a CSV file with the columns text and label."""
    reviews = movie_reviews()
    rows = list(zip(reviews.texts, reviews.labels, strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)  # quotes texts that contain commas
        writer.writerows([("text", "label"), *rows[:count]])


@torch.no_grad()
def predict(folder: Path, texts: list[str]) -> list[str]:
    """Return the class names that the adapter in ``folder`` predicts."""
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = {"num_labels": len(classes), "pad_token_id": tokenizer.pad_token_id}
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **head).eval()
    inputs = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    return [classes[k] for k in model(**inputs).logits.argmax(-1).tolist()]


def main(steps: int = 60, rows: int = 1000) -> None:
    """Train with EFlat-LoRA, then load the adapter and use it.

    Args:
        steps: Optimizer steps, 16 sentences each.
        rows: Rows of the file.
    """
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "mine.csv")
        write_rows(data, rows)
        config = FinetuneConfig(
            data=str(data), method=["eflat"], steps=steps, output_dir=Path(name, "run")
        )
        folder = comparison.run(config) / "eflat" / "seed-0"
        texts = ["A wonderful film, moving and funny.", "Dull, far too long, and badly acted."]
        for text, label in zip(texts, predict(folder, texts), strict=True):
            print(f"{label}: {text}")


if __name__ == "__main__":
    cyclopts.run(main)
