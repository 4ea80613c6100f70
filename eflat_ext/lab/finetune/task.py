"""The data of a comparison: what its runs share, and what a run gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eflat_ext.lab.data.splits import Splits

if TYPE_CHECKING:
    from .loading import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Texts as model inputs, and their labels; see :func:`.objective.encode`."""

    inputs: list[dict[str, Any]]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """Data, model path and device that all runs of a comparison share."""

    model_path: str
    tokenizer: Tokenizer
    splits: Splits
    train: Tokens
    held_out: Tokens
    device: torch.device
    steps: int

    def text_keys(self) -> list[str]:
        """Return the keys of the texts of all parts; see :meth:`.Texts.text_keys`."""
        parts = (self.splits.train, self.splits.validation, self.splits.test)
        return [key for part in parts for key in part.text_keys()]


@dataclass(frozen=True)
class Result:
    """The figures of one run, and the training loss of each step."""

    metrics: dict[str, Any]
    losses: list[float]
