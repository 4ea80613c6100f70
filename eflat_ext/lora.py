"""Find the LoRA pairs of a PEFT model, and name the layers that are no plain pair.

A pair is one adapter of one layer, ``W = W0 + s B A`` with ``A`` of shape (r, m) and ``B`` of
shape (n, r), W being an embedding's table transposed, a convolution's kernel flattened to
(out, in * kernel), or the weight of one expert of many. Everything is looked up when asked for:
PEFT rescales, switches and merges adapters while a model trains, and other libraries replace
parameters.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .stacklevel import stacklevel_of_user

# Variants whose update is still ``s B A``, wherever and however it is used.
_PLAIN_VARIANTS = {
    "ALoraLinearVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "MiCAEmbeddingVariant",
    "MiCALinearVariant",
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# A parameter, or a method, by where it is looked up: the module and the name of its attribute.
Slot: TypeAlias = tuple[nn.Module, str]


def held(slot: Slot) -> Tensor:
    """Return the parameter itself, also while a perturbed value stands in its place."""
    module, name = slot
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, also where it is sharded, or empty between passes (ZeRO 3)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapter of one LoRA layer, or of one expert of such a layer.

    Reading the factors of an embedding whose adapter was deleted raises AttributeError.

    Attributes:
        layer: PEFT's LoRA layer.
        adapter: the adapter's name.
        layer_name: the layer's qualified name in the model.
        module_A, module_B: the modules that hold the parameters of A, B.
        key: the parameters' name in those modules.
        expert, experts: index of the expert and their number; experts share the two parameters.
    """

    layer: Any
    adapter: str
    layer_name: str
    module_A: nn.Module
    module_B: nn.Module
    key: str = "weight"
    expert: int = 0
    experts: int = 1

    @property
    def name(self) -> str:
        """Name, unique within a model: the layer's, the adapter's, the expert's number."""
        return self.group if self.experts == 1 else f"{self.group}.{self.expert}"

    @property
    def group(self) -> str:
        """Name of the pair without the expert's number."""
        return f"{self.layer_name}.{self.adapter}"

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Where the parameters of the factors "A" and "B" are looked up."""
        return {"A": (self.module_A, self.key), "B": (self.module_B, self.key)}

    @property
    def parameter_A(self) -> Tensor:
        """Parameter of A: (r, m), (r, in, kernel...), or (experts r, m)."""
        return held(self.slots["A"])

    @property
    def parameter_B(self) -> Tensor:
        """Parameter of B: (n, r), (n, r, 1...), or (n, r experts)."""
        return held(self.slots["B"])

    def parameter(self, factor: str) -> Tensor:
        """Return the parameter of factor "A" or "B"."""
        return held(self.slots[factor])

    @property
    def A(self) -> Tensor:
        """Factor A, (r, m): its parameter, or a view of it (a copy in ``channels_last``)."""
        return self.part("A", self.parameter_A).flatten(1)

    @property
    def B(self) -> Tensor:
        """Factor B, (n, r): its parameter, or a view of it."""
        return self.part("B", self.parameter_B).flatten(1)

    def part(self, factor: str, tensor: Tensor) -> Tensor:
        """Return this pair's part of a tensor shaped like the parameter of ``factor``; a view."""
        if self.experts == 1:
            return tensor
        if factor == "A":
            return tensor.unflatten(0, (self.experts, -1))[self.expert]
        return tensor.unflatten(1, (-1, self.experts))[:, :, self.expert]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(n, m, r)`` of the whole factors, also where they are sharded."""
        A, B = whole_shape(self.parameter_A), whole_shape(self.parameter_B)
        return B[0], math.prod(A[1:]), A[0] // self.experts

    @property
    def scaling(self) -> float:
        """Scaling ``s`` of the layer, rsLoRA and ``set_scale`` included; 0 without the adapter."""
        return float(self.layer.scaling.get(self.adapter, 0.0))

    @property
    def active(self) -> bool:
        """True if a forward pass adds ``s B A`` now: the adapter exists, active and unmerged."""
        layer, adapter = self.layer, self.adapter
        factors = layer.lora_B if adapter in layer.lora_B else layer.lora_embedding_B
        return (
            adapter in factors
            and (factors is self.module_B or factors[adapter] is self.module_B)
            and adapter in layer.active_adapters
            and not layer.disable_adapters
            and not layer.merged
        )


def find_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the pairs of every active adapter of a PEFT model, in module order.

    One UserWarning names the LoRA layers that are no plain pair (grouped convolutions, embeddings
    with ``max_norm``, variants with a factor between A and B, factors that share their memory with
    another parameter): they train without a perturbation.

    Args:
        model: a ``PeftModel``, or any module that holds PEFT's LoRA layers.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: no LoRA layer, or none that is a plain pair.
    """
    LoraLayer = _lora_class()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    shared = _shared_memory(model)
    pairs: list[LoraPair] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        kind = type(layer).__name__
        for adapter in layer.active_adapters:
            found = _pairs(layer, adapter, name)
            if found and (reason := _no_plain_pair(found[0], shared)):
                others.append(f"{name} ({kind}: {reason})")
            else:
                pairs += found
    if others and pairs:
        warnings.warn(
            "these LoRA layers are no plain pair of factors and train without a perturbation: "
            f"{', '.join(others)}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    if not pairs:
        rest = f", only {', '.join(others)}" if others else ""
        raise ValueError(
            "model must be a PEFT model with LoRA layers and an active adapter, got "
            f"{type(model).__name__} without any{rest}"
        )
    return pairs


def lora_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's LoRA layers of a model, in module order, those within others too."""
    return [module for module in model.modules() if isinstance(module, _lora_class())]


def _lora_class() -> type:
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("finding LoRA layers needs PEFT: pip install peft") from error
    return LoraLayer


def _pairs(layer: Any, adapter: str, name: str) -> list[LoraPair]:
    """Return the pairs that the layer holds of this adapter, plain or not."""
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A, layer.lora_embedding_B  # dictionaries of parameters
        return [LoraPair(layer, adapter, name, A, B, key=adapter)]
    if adapter in layer.lora_A and adapter in layer.lora_B:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        experts = getattr(layer, "num_experts", 1)  # of a parameter that PEFT wraps
        return [
            LoraPair(layer, adapter, name, A, B, expert=expert, experts=experts)
            for expert in range(experts)
        ]
    return []


def _no_plain_pair(pair: LoraPair, shared: set[int]) -> str:
    """Return why this adapter's factors are no plain pair; an empty string if they are one."""
    layer, A, B = pair.layer, pair.module_A, pair.module_B
    if pair.key not in A._parameters or pair.key not in B._parameters:
        return "a factor is computed from other parameters"
    plain = (nn.Linear, nn.ParameterDict, *CONVOLUTIONS)
    if not (isinstance(A, plain) and isinstance(B, plain)):
        return f"factors are {type(A).__name__} and {type(B).__name__}"
    for factor in (pair.parameter_A, pair.parameter_B):
        if type(factor) is Parameter and factor.data_ptr() in shared:
            return "factor shares its memory with another parameter"
    if isinstance(B, CONVOLUTIONS) and (B.groups != 1 or A.groups != 1):
        return f"{B.groups} groups"
    if isinstance(B, nn.ParameterDict) and layer.get_base_layer().max_norm is not None:
        return "max_norm"  # every forward pass renormalises A in place
    shape_A, shape_B = whole_shape(pair.parameter_A), whole_shape(pair.parameter_B)
    if 0 in (*shape_A, *shape_B):
        return f"shapes {shape_A} and {shape_B}, without an entry"
    if min(len(shape_A), len(shape_B)) < 2 or shape_A[0] != math.prod(shape_B[1:]):
        return f"shapes {shape_A} and {shape_B}"
    variant = type(getattr(layer, "lora_variant", {}).get(pair.adapter)).__name__
    if variant != "NoneType" and variant not in _PLAIN_VARIANTS:
        return variant
    return ""


def _shared_memory(model: nn.Module) -> set[int]:
    """Return addresses at which several parameters start (PEFT's tied embeddings are views)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parameter in model.parameters():  # a parameter used twice comes once
        if type(parameter) is not Parameter:
            continue  # tensor subclasses have no address of their own
        address = parameter.data_ptr()
        if address:  # 0: meta tensors and empty ones
            (shared if address in seen else seen).add(address)
    return shared
