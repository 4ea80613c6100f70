"""Resume a run that was killed while it saved, bit-exact, and skip a step with NaN gradients.

    python examples/faults.py

A small GPT-2 with random weights is trained on the bytes of Python's help topics.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from eflat_ext.trainer import PerturbationMixin, eflat_optimizer, last_complete_checkpoint

STEPS, EVERY, BROKEN = 12, 2, 3


class SkipNotFinite(TrainerCallback):
    """Skip Trainer's steps whose gradients are NaN or infinite."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            model.zero_grad()  # a parameter without a gradient is not stepped


class Spoiled(PerturbationMixin, Trainer):
    """A trainer whose loss is NaN in one step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * (math.nan if self.state.global_step == BROKEN else 1.0)


def make_trainer(folder: Path) -> Trainer:
    text = "".join(topics.values()).encode()[: 64 * 257]
    rows = torch.tensor(list(text)).view(257, 64)
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = get_peft_model(
        GPT2LMHeadModel(shape), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=EVERY,
        learning_rate=1e-2,
        logging_steps=STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Spoiled(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=eflat_optimizer(arguments, rho=0.1),
        callbacks=[SkipNotFinite()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: Path) -> Trainer:
    """Start training, or resume from the last complete checkpoint."""
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return trainer


def differing_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    bits = a.contiguous().view(torch.int32) ^ b.contiguous().view(torch.int32)
    return sum(int(value).bit_count() for value in (bits & 0xFFFFFFFF).flatten().tolist())


def main(folder: Path) -> None:
    process = multiprocessing.Process(target=train, args=(folder / "killed",))
    process.start()
    torn = folder / "killed" / "checkpoint-6"
    while not (torn / "adapter_model.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    last = last_complete_checkpoint(folder / "killed")
    print(f"killed while it wrote {torn.name}, which holds {len(list(torn.iterdir()))} files")
    print(f"the last complete checkpoint is {last and Path(last).name}")

    resumed, whole = train(folder / "killed").model, train(folder / "whole").model
    pairs = list(zip(resumed.parameters(), whole.parameters(), strict=True))
    bits = sum(differing_bits(p.detach(), q.detach()) for p, q in pairs)
    finite = all(bool(p.isfinite().all()) for p, _ in pairs)
    print(f"after {STEPS} steps, against a run that was not killed: {bits} differing bits")
    print(f"one loss was NaN, its step was skipped: all weights are finite is {finite}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # about missing tasks and deprecations
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
