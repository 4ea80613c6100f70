"""Functions that the tests of EFlatCallback with several processes run on each rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from models import assert_same_bits, lora_bert, weights, without_dropout
from sharded_cases import assert_same_on_all_ranks, relative_errors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trainer_case import Sentences, arguments, with_callback
from transformers import Trainer

from eflat_ext.trainer.callback import FILE


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a case run without the state of earlier accelerators, and leave none."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()

    return run


def trained(
    folder: Path, resume: str | None = None, **settings: Any
) -> tuple[Trainer, dict[str, Tensor], dict[str, Tensor]]:
    """Return a trainer that has trained, its weights, and the averages of the last step."""
    args = arguments(folder, max_steps=4, max_grad_norm=0.05, **settings)
    data = Sentences(per_token=False)
    run, record = with_callback(without_dropout(lora_bert()), args, data=data)
    run.train(resume_from_checkpoint=resume)
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    values = weights(run.model)
    return run, {name: values[name] for name in names}, record.averages[4]


@alone
def data_parallel(folder: str) -> tuple[float, float]:
    """Return the errors against one process; check that rank 0 saves, and a resumed run."""
    root, rank = Path(folder), dist.get_rank()
    run, ours, averages = trained(root / "whole", save_strategy="steps", save_steps=2)
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    assert_same_on_all_ranks({**ours, **averages})
    assert len(list(root.rglob(FILE))) == 2 and not list(root.rglob("*.tmp"))
    _, resumed, resumed_averages = trained(root / "again", str(root / "whole" / "checkpoint-2"))
    assert_same_bits(resumed, ours)
    assert_same_bits(resumed_averages, averages)
    with mock.patch.dict(os.environ), mock.patch.object(dist, "is_initialized", lambda: False):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        single, one, expected = trained(root / f"one{rank}", per_device_train_batch_size=8)
    assert single.model_wrapped is single.model
    return relative_errors(ours, one), relative_errors(averages, expected)
