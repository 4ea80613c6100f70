"""Hugging Face Trainer: EFlat-LoRA as one line, two gradients, and the perturbation's log.

Training, evaluating, saving and resuming need nothing from here: any Trainer takes an optimizer of
this package. This is for users who let Trainer make the optimizer, for the methods whose step
needs two gradients, and for the perturbation's figures in the log.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("eflat_ext.trainer needs transformers: pip install transformers") from error

from .callback import EFlatCallback
from .checkpoints import last_complete_checkpoint
from .mixin import PerturbationMixin
from .optimizer_factory import (
    OptimizerFactory,
    eflat_optimizer,
    flat_optimizer,
    lora_sam_optimizer,
)

__all__ = [
    "EFlatCallback",
    "OptimizerFactory",
    "PerturbationMixin",
    "eflat_optimizer",
    "flat_optimizer",
    "last_complete_checkpoint",
    "lora_sam_optimizer",
]
