"""TRL's SFTTrainer: with one gradient and with two, resumed, and making the PEFT model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import assert_same_bits, lora_gpt2, weights
from peft import LoraConfig
from torch import nn
from trainer_case import HANDS_OVER_THE_MODEL, Sentences, arguments, own

from eflat_ext import trainer as ours
from eflat_ext.optimizers import EFlatLoRA

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT


class Sft(ours.PerturbationMixin, trl.SFTTrainer):
    pass


def make_sft(model: nn.Module, args: Any, hook: Callable, cls: type = Sft, **options: Any) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 40)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    return cls(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row["input_ids"].tolist()} for row in Sentences()]
        ),
        processing_class=tokenizer,
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
    """``peft_config``, and no mixin."""
    args = arguments(tmp_path, trl.SFTConfig, max_steps=3)
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    base = lora_gpt2().unload()
    run = make_sft(base, args, ours.eflat_optimizer, trl.SFTTrainer, peft_config=config)
    run.train()
    assert isinstance(own(run), EFlatLoRA) and len(own(run).pairs) == 2
    assert all(bool(average.any()) for average in own(run).averages.values())
