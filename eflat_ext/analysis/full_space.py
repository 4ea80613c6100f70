"""Compute losses and gradients in the full weight space of a model's adapted layers.

The effect of a shift D of ``W = W0 + s B A`` is added to the layer's output by a forward hook. No
weight is written, so weights keep their bits, quantised bases need no special treatment, and a
shift smaller than the rounding of W still counts. The layer's output is rounded to its own dtype:
measure small rises of the loss in a model that computes in float32. Each shift is created when its
layer runs, on the layer's device, so that one shift exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eflat_ext.lora import CONVOLUTIONS, LoraPair, find_pairs

LossFn = Callable[[nn.Module, Any], Tensor]
"""Returns the mean loss of a model on one batch, a scalar tensor."""
Shift = Callable[[], Tensor]
"""Returns the shift of one layer's weight, a tensor of shape (n, m)."""

_PEFT_PREFIX = "base_model.model."
# Layers whose LoRA weight belongs to no submodule, so that no hook can add a term for it.
_WITHOUT_MODULE = ("MultiheadAttention", "ParamWrapper")
MEMORY = 2**30


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer and the whole weight ``W = W0 + s B A`` that it computes with.

    Attributes:
        name: Qualified name of the layer in the model that PEFT wraps.
        module: The layer without its adapters.
        shape: (n, m), the shape of the weight as LoRA sees it: the table of an embedding is
            transposed, the kernel of a convolution flattened to (out, in * kernel size).
        pairs: LoRA pairs of the layer; empty in a model without PEFT.
    """

    name: str
    module: Any
    shape: tuple[int, int]
    pairs: tuple[LoraPair, ...] = ()

    @property
    def device(self) -> torch.device:
        """Return the device that the layer computes on."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of shifts and gradients: float64 in a float64 model, else float32."""
        return torch.float64 if self._like.dtype == torch.float64 else torch.float32

    @property
    def _like(self) -> Tensor:
        return self.pairs[0].parameter_B if self.pairs else self.module.weight

    def weight(self) -> Tensor:
        """Return a copy of ``W0 + s B A`` of shape (n, m); a quantised W0 is dequantised.

        Raises:
            NotImplementedError: PEFT cannot dequantise W0.
        """
        W = _base_weight(self).detach().to(self.device, self.dtype)
        if isinstance(self.module, nn.Embedding) or _is_transposed(self.module):
            W = W.T
        W = W.flatten(1).clone()
        for pair in self.pairs:
            if pair.active:
                W += pair.scaling * (pair.B.detach().to(W) @ pair.A.detach().to(W))
        return W

    def term(self, x: Tensor, D: Tensor) -> Tensor:
        """Return the term that a shift D of the weight, (n, m), adds to the layer's output."""
        if isinstance(self.module, nn.Embedding):
            return functional.embedding(x, D.T, padding_idx=self.module.padding_idx)
        x = x.to(D.dtype)
        if isinstance(self.module, CONVOLUTIONS):
            kernel = (self.shape[0], -1, *self.module.kernel_size)
            return self.module._conv_forward(x, D.reshape(kernel), None)
        return functional.linear(x, D)


def adapted_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """Return the layers with an active LoRA adapter, in module order.

    Args:
        model: A PEFT model; any other model if ``names`` is given.
        names: Keep the layers whose qualified name ends with one of these, None for all. In a
            model without LoRA, linear layers are searched.

    Raises:
        TypeError: ``names`` is a string.
        ValueError: No layer is left.
        NotImplementedError: The weight of a layer cannot be shifted (``nn.MultiheadAttention``,
            stacked experts); leave such layers out by ``names``.
    """
    if isinstance(names, str):
        raise TypeError(f"layers must be a list of names, got the string {names!r}")

    def wanted(name: str) -> bool:
        return names is None or any(f".{name}".endswith(f".{end}") for end in names)

    if names is not None and not any(hasattr(module, "lora_A") for module in model.modules()):
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        there = list(linear)
        layers = [
            Layer(name, module, (module.weight.shape[0], module.weight.shape[1]))
            for name, module in linear.items()
            if wanted(name)
        ]
    else:
        groups: dict[str, list[LoraPair]] = {}
        for pair in find_pairs(model):
            groups.setdefault(pair.layer_name, []).append(pair)
        there = [name.removeprefix(_PEFT_PREFIX) for name in groups]
        layers = [_layer_of(name, pairs) for name, pairs in groups.items() if wanted(name)]
    if not layers:
        some = ", ".join(there[:4]) + (", ..." if len(there) > 4 else "")
        raise ValueError(f"layers must name layers of the model ({some}), got {list(names or [])}")
    return layers


def constant(D: Tensor) -> Shift:
    """Return a shift that always returns D."""
    return lambda: D


def mean_loss(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    layers: Sequence[Layer] = (),
    shifts: Mapping[str, Shift] | None = None,
) -> float:
    """Return the mean loss over the batches, in eval mode, with the layers' weights shifted.

    Args:
        model: The model. Its weights, modes and gradients are left as they were.
        loss_fn: Called with ``model`` and a batch; returns the mean loss of the batch, a scalar.
        batches: Batches of equal weight, a list or a loader with a length.
        layers: From :func:`adapted_layers`.
        shifts: Shifts by the name of the layer. Layers without one keep their weights.

    Raises:
        TypeError: ``batches`` has no length.
        ValueError: ``batches`` is empty, or ``shifts`` names a layer that is not in ``layers`` or
            returns another shape than the layer's.
    """
    check_batches(batches)
    with torch.no_grad(), evaluating(model), shifted(layers, shifts or {}):
        losses = [loss_fn(model, batch).double() for batch in batches]
    return float(torch.stack(losses).mean())


def gradients(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    layers: Sequence[Layer] = (),
    pairs: Sequence[LoraPair] = (),
    *,
    memory: int = MEMORY,
    store: torch.device | str = "cpu",
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Compute the gradients of the mean loss by whole weights and by factors.

    The layers are taken in groups that fit in ``memory``, at least one layer in each; every group
    costs a pass over the batches. ``parameter.grad`` is neither read nor written.

    Args:
        model, loss_fn, batches: As for :func:`mean_loss`.
        layers: From :func:`adapted_layers`.
        pairs: Pairs whose factors' gradients to return too, frozen factors included. They are
            computed in the first pass.
        memory: Bytes on the model's device for shifts and gradients of whole weights.
        store: Device for the gradients of whole weights, which take 4 bytes for each weight (8 in
            a float64 model).
        on_pass: Called after every pass with the number of passes done and their total.

    Returns:
        The gradients of the layers' weights, (n, m), by the name of the layer; and
        ``(G_A, G_B)``, of shapes (r, m) and (n, r), for every pair.

    Raises:
        TypeError: ``batches`` has no length.
        ValueError: ``batches`` is empty.
    """
    check_batches(batches)
    factors = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
    groups = _groups(layers, memory) or [[]]
    whole: dict[str, Tensor] = {}
    of_factors: list[Tensor] = []
    for index, group in enumerate(groups):
        zeros = {
            layer.name: torch.zeros(
                layer.shape, dtype=layer.dtype, device=layer.device, requires_grad=True
            )
            for layer in group
        }
        wanted = [*zeros.values(), *(factors if index == 0 else [])]
        sums = [
            torch.zeros_like(zero, device=store, requires_grad=False) for zero in zeros.values()
        ]
        sums += [torch.zeros_like(p, requires_grad=False) for p in wanted[len(zeros) :]]
        shifts = {name: constant(zero) for name, zero in zeros.items()}
        with (
            torch.enable_grad(),
            evaluating(model),
            requiring_gradients(wanted),
            shifted(group, shifts),
        ):
            for batch in batches:
                parts = torch.autograd.grad(loss_fn(model, batch), wanted, allow_unused=True)
                for total, part in zip(sums, parts, strict=True):
                    if part is not None:
                        total.add_(part.to(total.device), alpha=1 / len(batches))
        whole |= dict(zip(zeros, sums, strict=False))
        of_factors += sums[len(zeros) :]
        on_pass(index + 1, len(groups))
    both = zip(pairs, of_factors[::2], of_factors[1::2], strict=True)
    return whole, [
        (pair.part("A", grad_A).flatten(1), pair.part("B", grad_B).flatten(1))
        for pair, grad_A, grad_B in both
    ]


# --- context managers --------------------------------------------------------------------


@contextmanager
def shifted(layers: Sequence[Layer], shifts: Mapping[str, Shift]) -> Iterator[None]:
    """Let the layers named in ``shifts`` compute with ``W + D`` within the context."""

    def hook(layer: Layer, shift: Shift, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        D = shift()
        if D.shape != layer.shape:
            raise ValueError(
                f"shifts must return shape {layer.shape} for {layer.name}, got {tuple(D.shape)}"
            )
        term = layer.term(args[0], D.to(layer.device))
        return output + term.to(output.dtype)

    named = {layer.name: layer for layer in layers}
    if unknown := shifts.keys() - named.keys():
        raise ValueError(f"shifts must name some of the layers, got {', '.join(sorted(unknown))}")
    handles = [
        named[name].module.register_forward_hook(partial(hook, named[name], shift))
        for name, shift in shifts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the context, then every module back in its own mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module in training:
        # In eval mode on a CPU, bitsandbytes repacks the weights permanently and rounds their
        # scales; nothing else in these layers depends on the mode. PEFT's wrappers of the same
        # class name must stay in eval mode: in training mode they run perturbed.
        if _is_linear_4bit(module):
            module.training = True
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let these parameters require gradients within the context."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


# --- helpers -----------------------------------------------------------------------------


def check_batches(batches: Any) -> None:
    """Raise TypeError or ValueError unless ``batches`` can be iterated over more than once."""
    if not hasattr(batches, "__len__") or not hasattr(batches, "__iter__"):
        raise TypeError(
            "batches must be a list or a loader with a length, to be iterated over more than "
            f"once, got {type(batches).__name__}"
        )
    if len(batches) == 0:
        raise ValueError("batches must hold at least one batch, got none")


def _layer_of(name: str, pairs: list[LoraPair]) -> Layer:
    pair = pairs[0]
    classes = {cls.__name__ for cls in type(pair.layer).mro()}
    kind = next((name for name in _WITHOUT_MODULE if name in classes), None)
    if kind is not None:
        raise NotImplementedError(
            f"the whole weight of {name}, a {kind}, cannot be shifted: name the other layers in "
            "`layers`"
        )
    shape = (pair.B.shape[0], pair.A.shape[1])
    return Layer(name.removeprefix(_PEFT_PREFIX), pair.layer.get_base_layer(), shape, tuple(pairs))


def _is_linear_4bit(module: nn.Module) -> bool:
    """Return True for instances of bitsandbytes' Linear4bit and of its subclasses."""
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.split(".")[0] == "bitsandbytes"
        for cls in type(module).mro()
    )


def _base_weight(layer: Layer) -> Tensor:
    module = layer.module
    weight: Any = getattr(module, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return weight
    if type(weight).__name__ == "Int8Params":  # PEFT's function removes the scales of the layer
        scale = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * (scale.view(-1, 1) / 127)
    from peft.utils.integrations import dequantize_module_weight

    try:
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes has repacked it for the CPU in eval mode")
        return dequantize_module_weight(module)
    except Exception as error:  # every library raises its own type
        raise NotImplementedError(
            f"the weight of {layer.name} ({type(module).__name__}) cannot be dequantised, so "
            f"radius must be 'absolute': {error}"
        ) from error


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers: (in, out)


def _groups(layers: Sequence[Layer], memory: int) -> list[list[Layer]]:
    """Split the layers into groups whose shifts and gradients fit in ``memory`` bytes."""
    groups: list[list[Layer]] = []
    used = 0
    for layer in layers:
        size = 2 * layer.shape[0] * layer.shape[1] * layer.dtype.itemsize
        if not groups or used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return groups
