"""Where a model's forward passes enter, and which of them a backward pass computes again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def holders(model: nn.Module, owners: Sequence[nn.Module]) -> list[nn.Module]:
    """The model and, going inwards, its modules that hold all owners but are none themselves.

    A call may enter at any of them: ``generate`` of a wrapped model enters at the inner one.
    """
    wanted, found = set(owners), [model]
    if not wanted <= set(model.modules()):
        raise ValueError("targets: expected modules of the model, got others")
    while True:
        for child in found[-1].children():
            if child not in wanted and wanted <= set(child.modules()):
                found.append(child)
                break
        else:
            return found


def recomputing() -> bool:
    """Whether a backward pass computes something again for its gradient: activation checkpointing.

    Backward hooks that call a model run in backward passes, too, but without gradients.
    """
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
