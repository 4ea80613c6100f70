"""TRL's trainers: SFT resumes and may create the PEFT model; completions are generated once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, lora_gpt2, weights
from peft import LoraConfig
from torch import Tensor, nn
from trainer_case import HANDS_OVER_THE_MODEL, Sentences, arguments, own, word_tokenizer

from eflat_ext import EFlatLoRA, create_flat_optimizer
from eflat_ext import trainer as ours

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT


class Sft(ours.PerturbationMixin, trl.SFTTrainer):
    pass


def make_sft(model: nn.Module, args: Any, hook: Callable, cls: type = Sft, **options: Any) -> Any:
    return cls(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row["input_ids"].tolist()} for row in Sentences()]
        ),
        processing_class=word_tokenizer(),
        optimizer_cls_and_kwargs=hook(args, rho=0.2, model=None if HANDS_OVER_THE_MODEL else model),
        **options,
    )


@pytest.mark.proves(
    "Hugging Face Trainer",
    "TRL's SFTTrainer trains, logs and resumes bit-exact, with one gradient and with two",
)
@pytest.mark.parametrize("hook", [ours.eflat_optimizer, ours.flat_optimizer])
def test_sft_trainer_resumes(hook: Callable, tmp_path: Path) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = arguments(
            tmp_path, trl.SFTConfig, save_strategy="steps", save_steps=1, logging_steps=1
        )
        model = lora_gpt2()
        run = make_sft(model, args, hook)
        run.train(resume_from_checkpoint=resume)
        logged = [entry for entry in run.state.log_history if "loss" in entry]
        assert logged and all("perturbation_norm" in entry for entry in logged)
        results.append(weights(model))
    assert_same_bits(*results)


@pytest.mark.skipif(not HANDS_OVER_THE_MODEL, reason="its hook needs a model that exists")
def test_sft_trainer_makes_the_peft_model(tmp_path: Path) -> None:
    args = arguments(tmp_path, trl.SFTConfig, max_steps=3)
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    base = lora_gpt2().unload()
    run = make_sft(base, args, ours.eflat_optimizer, trl.SFTTrainer, peft_config=config)
    run.train()
    assert isinstance(own(run), EFlatLoRA) and len(own(run).pairs) == 2
    assert all(bool(average.any()) for average in own(run).averages.values())


@pytest.mark.proves(
    "Hugging Face Trainer",
    "TRL's GRPOTrainer and RLOOTrainer: both gradients of a step on the same completions",
)
@pytest.mark.parametrize("iterations", [1, 2])  # steps that train on the same completions
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_both_passes_train_on_the_same_completions(
    method: str, iterations: int, tmp_path: Path
) -> None:
    """No more completions are generated than with one gradient."""
    base = getattr(trl, f"{method}Trainer")
    generations: list[list[str]] = []
    seen: list[Tensor] = []

    class Recorder(base):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["completion_ids"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Flat(ours.PerturbationMixin, Recorder):
        pass

    def reward(completions: list[str], **_: Any) -> list[float]:
        generations.append(completions)
        return [float(len(set(text.split()))) for text in completions]

    def train(cls: type, **options: Any) -> None:
        generations.clear()
        seen.clear()
        args = arguments(
            tmp_path,
            getattr(trl, f"{method}Config"),
            num_generations=2,
            num_iterations=iterations,
            max_completion_length=6,
            max_steps=4,
            beta=0.0,
        )
        model = lora_gpt2()
        if cls is Flat:
            options["optimizers"] = (create_flat_optimizer(model, torch.optim.AdamW, lr=0.1), None)
        run = cls(
            model=model,
            args=args,
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": f"w{i} w{i + 1}"} for i in range(2, 34)]
            ),
            processing_class=word_tokenizer(),
            **options,
        )
        run.train()
        assert run._step == 4 * 2
        assert len(generations) == 4 // iterations

    train(Recorder)
    plain = list(seen)
    train(Flat)
    assert len(plain) == 4 * 2 and len(seen) == 4 * 4
    assert torch.equal(seen[0], plain[0]) and torch.equal(seen[1], plain[1])
    for at in (0, 1, 4, 5, 8, 9, 12, 13):
        assert torch.equal(seen[at], seen[at + 2])
        assert at % 2 or not torch.equal(seen[at], seen[at + 1])
