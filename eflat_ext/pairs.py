"""Layer discovery: a PEFT model's LoRA pairs, and a name for everything that is no plain pair.

A pair is one adapter of one linear layer, ``W = W0 + s B A`` with ``A`` of shape (r, m) and ``B``
of shape (n, r). Everything is looked up when asked for: PEFT rescales, switches and merges
adapters while a model trains, and other libraries replace parameters.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

# Variants that change where or how ``s B A`` is used, but not that it is ``s B A``.
_PLAIN_VARIANTS = {"DoraLinearVariant", "ALoraLinearVariant", "MiCALinearVariant"}

_INNER = ("torch", __name__.split(".")[0])


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapter of one LoRA layer.

    Attributes:
        layer: PEFT's LoRA layer.
        adapter: the adapter's name.
        layer_name: the layer's qualified name in the model.
        module_A, module_B: the linear modules whose ``weight`` is A, B.
    """

    layer: Any
    adapter: str
    layer_name: str
    module_A: nn.Linear
    module_B: nn.Linear

    @property
    def name(self) -> str:
        """Unique within a model: the layer's qualified name and the adapter's."""
        return f"{self.layer_name}.{self.adapter}"

    @property
    def A(self) -> Tensor:
        """The (r, m) factor."""
        return self.module_A.weight

    @property
    def B(self) -> Tensor:
        """The (n, r) factor."""
        return self.module_B.weight

    @property
    def scaling(self) -> float:
        """The layer's ``s``, with rsLoRA and ``set_scale`` folded in; 0 for a deleted adapter."""
        return float(self.layer.scaling.get(self.adapter, 0.0))

    @property
    def active(self) -> bool:
        """Whether a forward pass adds ``s B A`` now: adapter there, active, enabled, not merged."""
        layer = self.layer
        return (
            self.adapter in layer.lora_B
            and layer.lora_B[self.adapter] is self.module_B
            and self.adapter in layer.active_adapters
            and not layer.disable_adapters
            and not layer.merged
        )


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """The pairs of every active adapter of a PEFT model, in module order.

    LoRA layers that are no plain pair (embeddings, convolutions, experts, attention modules and
    what lies within them, variants with a factor between A and B, factors whose memory another
    parameter shares) are named in one UserWarning: they train, but without a perturbation.

    Args:
        model: a ``PeftModel``, or any module that holds PEFT's LoRA layers.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: no LoRA layer, or none that is a plain pair.
        NotImplementedError: a factor is a DTensor.
    """
    LoraLayer, attention_class, experts_class = _peft_classes()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    shared = _shared_memory(model)
    pairs: list[LoraPair] = []
    others: list[str] = []
    attention: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        kind = type(layer).__name__
        inside = name.startswith(attention)
        if isinstance(layer, attention_class):
            attention += (f"{name}.",)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A:
                others.append(f"{name} ({kind})")
            elif adapter not in layer.lora_A or adapter not in layer.lora_B:
                continue
            # Attention merges and unmerges in its forward pass: no place for a perturbation.
            elif isinstance(layer, (attention_class, experts_class)) or inside:
                others.append(f"{name} ({kind}{' within attention' if inside else ''})")
            elif reason := _no_plain_pair(layer, adapter, shared):
                others.append(f"{name} ({kind}: {reason})")
            else:
                A, B = layer.lora_A[adapter], layer.lora_B[adapter]
                pairs.append(LoraPair(layer, adapter, name, A, B))
    if others and pairs:
        warnings.warn(
            "these LoRA layers are no plain pair of linear factors and train without a "
            f"perturbation: {', '.join(others)}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if not pairs:
        found = f", only {', '.join(others)}" if others else ""
        raise ValueError(
            "model: expected a PEFT model with LoRA on linear layers and an active adapter, got "
            f"{type(model).__name__} without any{found}"
        )
    return pairs


def stacklevel_of_user() -> int:
    """For ``warnings.warn``: the first caller that is neither this package nor torch.

    A count would not do: torch, and every learning rate scheduler, wraps ``Optimizer.step``.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    return level


def _peft_classes() -> tuple[type, type, type]:
    try:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora import layer as classes
    except ImportError as error:
        raise ImportError("finding LoRA layers needs PEFT: pip install peft") from error
    absent = type("Absent", (), {})  # classes that an older PEFT does not have
    return (
        LoraLayer,
        getattr(classes, "MultiheadAttention", absent),
        getattr(classes, "ParamWrapper", absent),
    )


def _no_plain_pair(layer: Any, adapter: str, shared: set[int]) -> str:
    """Why this adapter's factors are no plain pair; empty when they are one."""
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)):
        return f"factors are {type(A).__name__} and {type(B).__name__}"
    for factor in (A.weight, B.weight):
        if _is_dtensor(factor):
            raise NotImplementedError(
                f"{type(layer).__name__}: factors sharded as DTensor are not supported"
            )
        if factor.data_ptr() in shared:
            return "factor shares its memory with another parameter"
    if A.weight.dim() != 2 or B.weight.dim() != 2 or A.weight.shape[0] != B.weight.shape[1]:
        return f"shapes {tuple(A.weight.shape)} and {tuple(B.weight.shape)}"
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if variant != "NoneType" and variant not in _PLAIN_VARIANTS:
        return variant
    return ""


def _is_dtensor(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _shared_memory(model: nn.Module) -> set[int]:
    """Addresses at which more than one parameter starts (PEFT's tied embeddings are views)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parameter in model.parameters():  # a parameter used twice comes once
        if type(parameter) is not Parameter:
            continue  # tensor subclasses have no address of their own
        address = parameter.data_ptr()
        if address:  # 0: meta tensors and empty ones
            (shared if address in seen else seen).add(address)
    return shared
