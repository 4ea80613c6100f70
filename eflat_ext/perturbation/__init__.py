"""What is added to LoRA factors in training forward passes, and how; sharded factors too."""

from .eflat import EFlatPerturbation
from .gather import SUPPORTED

__all__ = ["SUPPORTED", "EFlatPerturbation"]
