"""Data, arguments and trainers for the tests of Hugging Face Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import accelerator, assert_same_bits, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from eflat_ext import trainer as ours
from eflat_ext.lora import find_pairs

HANDS_OVER_THE_MODEL = int(transformers.__version__.split(".")[0]) >= 5


class PerturbingTrainer(ours.PerturbationMixin, Trainer):
    pass


class Read(dict[nn.Parameter, Tensor]):
    """Record each LoRA factor's value in the last forward pass that read it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for pair in find_pairs(model):
            for module in (pair.module_A, pair.module_B):
                module.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: Any) -> None:
        self[module._parameters["weight"]] = module.weight.detach().clone()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's weights, with the recorded values of the factors."""
        return {n: self.get(p, p).detach().clone() for n, p in model.named_parameters()}


class Sentences(torch.utils.data.Dataset):
    """Different token sequences with a label for each token, or one for the sequence."""

    def __init__(self, per_token: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 40, (32, 8), generator=generator)
        self.rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
        for index, row in enumerate(self.rows):
            if per_token:
                row["labels"][: index % 5] = -100  # micro-batches of different weights
            else:
                row["labels"] = row["input_ids"].sum() % 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def word_tokenizer() -> Any:
    """Return a tokenizer of the words w2 to w39."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 40)}}
    whole_words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    whole_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole_words, pad_token="<pad>", eos_token="<eos>"
    )


def arguments(
    folder: Path, cls: type[TrainingArguments] = TrainingArguments, **settings: Any
) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 5,  # one more than an epoch
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    accelerator()  # reset Accelerate's state
    return cls(**settings)


def make(
    model: nn.Module,
    args: TrainingArguments,
    hook: Callable = ours.eflat_optimizer,
    cls: type[Trainer] = PerturbingTrainer,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> Any:
    data = Sentences(per_token="CausalLM" in type(model).__name__)
    if not HANDS_OVER_THE_MODEL:
        options["model"] = model
    return cls(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=hook(args, **{"rho": 0.2, **options}),
    )


class Averages(TrainerCallback):
    """Record the averages and the weights after each step."""

    def __init__(self, callback: ours.EFlatCallback) -> None:
        self.callback = callback
        self.averages: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        averages = self.callback.perturbation.averages
        self.averages[state.global_step] = {n: E.clone() for n, E in averages.items()}
        self.weights[state.global_step] = weights(model)


def with_callback(
    model: nn.Module,
    args: Any,
    cls: type[Trainer] = Trainer,
    callbacks: list[Any] | None = None,
    data: Sentences | None = None,
    **options: Any,
) -> tuple[Any, Averages]:
    """Return a trainer with an EFlatCallback, and the record of its averages."""
    record = Averages(ours.EFlatCallback(**{"rho": 0.2, **options}))
    data = data or Sentences()
    run = cls(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*(callbacks or []), record.callback, record],
    )
    return run, record


def own(run: Any) -> Any:
    """Return the optimizer within Accelerate's wrapper."""
    return run.optimizer.optimizer


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_saved(folder: Path, clean: dict[str, Tensor]) -> None:
    """Assert that the file holds all trainable weights with the bits of ``clean``."""
    named = {re.sub(r"(\.modules_to_save)?\.default", "", n): value for n, value in clean.items()}
    saved = adapter(folder)
    assert any("lora_B" in name for name in saved)
    assert_same_bits(saved, {name: named[name] for name in saved})


RUNS: dict[str, dict[str, Any]] = {
    "eflat": {},
    "eflat unfused": {"fused_step": False},
    "eflat onto A": {"onto": "A", "norm_scope": "global"},
    "flat": {"hook": ours.flat_optimizer},
    "lora-sam": {"hook": ours.lora_sam_optimizer},
}
