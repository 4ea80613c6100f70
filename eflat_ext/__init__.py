"""EFlat-LoRA."""
import torch
from . import _C
