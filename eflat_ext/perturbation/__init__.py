"""Perturb LoRA factors in training forward passes, sharded factors too."""

from .eflat import EFlatPerturbation
from .gather import SUPPORTED

__all__ = ["SUPPORTED", "EFlatPerturbation"]
