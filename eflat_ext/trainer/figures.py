"""The perturbation's figures in the training log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from eflat_ext.optim.base import PerturbingOptimizer
from eflat_ext.perturbation.base import Perturbation


def figures(perturbation: Perturbation) -> dict[str, float]:
    """Return ``perturbation_norm`` and ``skipped_perturbations``; waits for the device.

    The first is the mean of the pairs' norms at the last update, missing before the first one.
    """
    found: dict[str, float] = {}
    norms = list(perturbation.norms.values())
    if norms:
        found["perturbation_norm"] = torch.stack(norms).mean().item()
    found["skipped_perturbations"] = int(perturbation.skipped)
    return found


def is_of_training(logs: Mapping[str, Any]) -> bool:
    """Return whether an entry of the log is of training, not of an evaluation."""
    return "loss" in logs or "learning_rate" in logs  # SetFit names its loss otherwise


def perturbing(optimizer: Any) -> PerturbingOptimizer | None:
    """Return the optimizer itself, or the one within accelerate's wrappers; None for another."""
    while optimizer is not None and not isinstance(optimizer, PerturbingOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
