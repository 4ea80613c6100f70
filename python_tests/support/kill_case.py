"""Runs of Trainer and of ``eflat finetune`` in processes that tests kill."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from models import lora_gpt2, weights
from torch import Tensor
from trainer_case import PerturbingTrainer, arguments, make, own
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from eflat_ext import trainer as ours
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig

STEPS, EVERY = 10, 2  # saved at every second step
HOOKS = {"eflat": ours.eflat_optimizer, "flat": ours.flat_optimizer}
# The functions that write the files of a checkpoint, and the position of the path.
WRITERS = [
    (torch, "save", 1),
    (peft.peft_model, "safe_save_file", 1),
    (TrainerState, "save_to_json", 1),
]


class Record(TrainerCallback):
    """Record weights and optimizer state at each save of a run that is not killed."""

    def __init__(self) -> None:
        self.run: Any = None
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.optimizers: dict[int, dict[str, Any]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights[state.global_step] = weights(model)
        saved = args.output_dir + f"/checkpoint-{state.global_step}/optimizer.pt"
        self.optimizers[state.global_step] = torch.load(saved, weights_only=True)


def train(
    hook: str,
    folder: Path,
    resume: str | None,
    outcome: Path,
    tell: Any = None,
    tear: tuple[int, float] | None = None,
) -> None:
    """Train to the end unless killed; write the final state to the file ``outcome``.

    Args:
        hook: "eflat" or "flat".
        folder: folder of its checkpoints.
        resume: the checkpoint it starts from.
        outcome: the file.
        tell: end of a pipe that is sent "begin", and "save" before each save.
        tear: (n, share): kill itself while it writes file number n, when this share is written.
    """
    torch.set_num_threads(1)
    counted = _count_writes(tear)

    class Telling(PerturbingTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if tell is not None and not begun:
                begun.append(1)
                tell.send("begin")
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if tell is not None:
                tell.send("save")
            start = time.perf_counter()
            super()._save_checkpoint(*args, **kwargs)
            seconds.append(time.perf_counter() - start)

    begun: list[int] = []
    seconds: list[float] = []
    record = Record()
    args = arguments(
        folder,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=EVERY,
        logging_steps=1,
        max_grad_norm=0.05,
    )
    run = make(lora_gpt2(), args, HOOKS[hook], Telling, [record] if resume is None else [])
    start = time.perf_counter()
    run.train(resume_from_checkpoint=resume)
    result = {
        "weights": weights(run.model),
        "optimizer": own(run).state_dict(),
        "log": [entry for entry in run.state.log_history if "loss" in entry],
        "steps": {} if resume else record.weights,
        "states": {} if resume else record.optimizers,
        "seconds": (time.perf_counter() - start, max(seconds, default=0.0)),
        "writes": counted[0],
    }
    torch.save(result, outcome)


def compare(settings: dict[str, Any]) -> None:
    """Run ``eflat finetune``."""
    torch.set_num_threads(1)
    comparison.run(FinetuneConfig(**settings))


def _count_writes(tear: tuple[int, float] | None) -> list[int]:
    counted = [0]

    def wrap(owner: Any, name: str, position: int) -> None:
        write = getattr(owner, name)

        def torn(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            if tear is not None and counted[0] == tear[0]:
                path = args[position]
                os.truncate(path, int(os.path.getsize(path) * tear[1]))
                os.kill(os.getpid(), signal.SIGKILL)
            counted[0] += 1
            return result

        setattr(owner, name, torn)

    for writer in WRITERS:
        wrap(*writer)
    return counted


# Late imports happen before the fork, too.
with tempfile.TemporaryDirectory() as _folder:
    make(lora_gpt2(), arguments(Path(_folder)))
gc.freeze()  # Trainer collects garbage: without copying the pages of what was imported
