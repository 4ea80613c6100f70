"""EFlatCallback in sentence-transformers' trainer and in SetFit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import sentence_transformers
import torch
from models import assert_same_bits, same_bits, trainable, weights, without_dropout
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_model import make_rows, save_tiny_model
from torch import nn
from trainer_case import Averages, arguments

from eflat_ext import create_eflat_optimizer
from eflat_ext import trainer as ours
from eflat_ext.trainer.callback import FILE

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers and PEFT


def encoder(folder: Path) -> Any:
    """Return a two-layer BERT of width 32 with mean pooling and an adapter."""
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(save_tiny_model(folder / "model"))
    model = sentence_transformers.SentenceTransformer(modules=[body, Pooling(32)], device="cpu")
    torch.manual_seed(0)
    model.add_adapter(
        LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    )
    return model


def assert_perturbed(perturbed: nn.Module, around: nn.Module, plain: nn.Module) -> None:
    """Assert the trajectory of EFlatLoRA, and another one than plain LoRA's."""
    found = [weights(model) for model in (perturbed, around, plain)]
    assert_same_bits(found[0], found[1])
    names = [name for name in found[0] if "lora_" in name]
    assert len(names) == 8
    assert not any(same_bits(found[0][name], found[2][name]) for name in names)


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback in SentenceTransformerTrainer: EFlatLoRA's steps, resumed",
)
def test_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    texts = [text for text, _ in make_rows(64)]
    data = datasets.Dataset.from_dict({"anchor": texts[:32], "positive": texts[32:]})

    def train(hook: Any, callbacks: list[Any], folder: str, resume: str | None = None) -> Any:
        model = encoder(tmp_path)
        args = arguments(
            tmp_path / folder,
            sentence_transformers.SentenceTransformerTrainingArguments,
            max_steps=3,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
        )
        run = sentence_transformers.SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=callbacks,
        )
        if hook is not None:
            made = hook(args, rho=0.2, fused_step=False, model=model)
            run.optimizer_cls_and_kwargs = made
        torch.manual_seed(0)
        run.train(resume_from_checkpoint=resume)
        return run

    record = Averages(ours.EFlatCallback(rho=0.2))
    run = train(None, [record.callback, record], "whole")
    around = train(ours.eflat_optimizer, [], "around")
    assert_perturbed(run.model, around.model, train(None, [], "plain").model)
    assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[3].values())
    assert "perturbation_norm" in run.state.log_history[0]
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = train(None, [ours.EFlatCallback(rho=0.2)], "again", checkpoint)
    assert_same_bits(weights(again.model), weights(run.model))


def test_losses_with_cached_gradients_run_at_the_perturbed_point(tmp_path: Path) -> None:
    """They encode in chunks without gradients, and again within the backward pass."""
    from sentence_transformers.sentence_transformer import losses

    texts = [text for text, _ in make_rows(16)]
    gradients = []
    for name in ("", "Cached"):
        model = without_dropout(encoder(tmp_path).train())
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=1.0, rho=1.0)
        options = {"mini_batch_size": 3} if name else {}
        loss = getattr(losses, f"{name}MultipleNegativesRankingLoss")(model, **options)
        columns = [model.preprocess(part) for part in (texts[:8], texts[8:])]
        for step in range(3):
            optimizer.zero_grad()
            loss(columns, None).backward()
            if step < 2:
                optimizer.step()
        gradients.append([p.grad.clone() for p in trainable(model)])
        optimizer.zero_grad()
        with optimizer.clean():
            loss(columns, None).backward()
        gradients.append([p.grad.clone() for p in trainable(model)])
    for perturbed, clean, cached, _ in zip(*gradients, strict=True):
        assert (cached - perturbed).norm() < 1e-5 * perturbed.norm()
        assert (clean - perturbed).norm() > 1e-2 * perturbed.norm()


@pytest.mark.proves(
    "Hugging Face Trainer",
    "SetFit: EFlatCallback among the callbacks, or added to `trainer.st_trainer`",
)
@pytest.mark.parametrize("late", [False, True])
def test_setfit(late: bool, tmp_path: Path) -> None:
    """SetFit hands its callbacks other arguments and another model than Trainer does."""
    import setfit
    from sklearn.linear_model import LogisticRegression
    from trainer_case import accelerator

    rows = make_rows(16)
    columns = {"text": [text for text, _ in rows], "label": [int(label) for _, label in rows]}

    def train(hook: Any, callbacks: list[Any], folder: str) -> Any:
        accelerator()  # reset Accelerate's state
        model = setfit.SetFitModel(encoder(tmp_path), LogisticRegression())
        args = setfit.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            batch_size=4,
            body_learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=4,
            report_to="none",
        )
        data = datasets.Dataset.from_dict(columns)
        run = setfit.Trainer(model, args, data, callbacks=[] if late else callbacks)
        for callback in callbacks if late else []:
            run.st_trainer.add_callback(callback)
        if hook is not None:
            made = hook(run.st_trainer.args, rho=0.2, fused_step=False, model=model.model_body)
            run.st_trainer.optimizer_cls_and_kwargs = made
        torch.manual_seed(0)
        run.train()
        return run

    run = train(None, [ours.EFlatCallback(rho=0.2)], "whole")
    around, plain = train(ours.eflat_optimizer, [], "around"), train(None, [], "plain")
    assert_perturbed(*(one.model.model_body for one in (run, around, plain)))
    averages = load_file(tmp_path / "whole" / "checkpoint-4" / FILE)
    assert len(averages) == 4
    assert all(bool(E.any() and E.isfinite().all()) for E in averages.values())
    logged = [entry for entry in run.st_trainer.state.log_history if "embedding_loss" in entry]
    assert len(logged) == 4 and all("perturbation_norm" in entry for entry in logged)
    assert len(run.model.predict(columns["text"])) == 16
