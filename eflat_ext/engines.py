"""What engines and checkpoint libraries do to an optimizer, told apart from training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .dtensors import is_dtensor, local
from .targets import parameters_of


def check_own_parameters(base: Optimizer, targets: Sequence[Tensor]) -> None:
    """RuntimeError unless the optimizer still trains the model's own parameters."""
    trained = {id(parameter) for parameter in parameters_of(base.param_groups)}
    strange = [target.shape for target in targets if id(target) not in trained]
    if strange:
        raise RuntimeError(
            "base: expected an optimizer of the model's own parameters, got one without a factor "
            f"of shape {tuple(strange[0])}; engines that replace parameters by some of their own "
            "(DeepSpeed ZeRO, FullyShardedDataParallel) are not supported"
        )


def initialises_state(base: Optimizer) -> bool:
    """Whether a step is none: torch.distributed.checkpoint makes one so that state exists.

    It has zeros for gradients, a learning rate of zero, and an optimizer without state.
    """
    if base.state or any(group.get("lr", 1.0) != 0 for group in base.param_groups):
        return False
    trained = [p for p in parameters_of(base.param_groups) if p.requires_grad]
    training = not trained or any(p.grad is None or bool(local(p.grad).any()) for p in trained)
    sharded: Any = next((parameter for parameter in trained if is_dtensor(parameter)), None)
    if sharded is not None:  # all ranks decide alike, also where some lack a gradient
        found = torch.tensor(int(training), device=local(sharded).device)
        for group in sharded.device_mesh.get_all_groups():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        training = bool(found)
    return not training
