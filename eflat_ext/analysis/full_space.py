"""The full weight space of a model's adapted layers: gradients and losses there.

A shift D of ``W = W0 + s B A`` is a term of its own that a hook adds to the layer's output: nothing
is written to a weight, so weights stay as they were bit for bit, quantised bases work like all
others, and a shift below the rounding of W is not lost. Its effect is, where the layer's output is
rounded: measure small rises in a model that computes in float32. Shifts are made one layer at a
time, when that layer runs, on its device.
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
"""The mean loss, a scalar, of a model on one batch."""
Shift = Callable[[], Tensor]
"""Makes the (n, m) shift of one layer."""

_PEFT_PREFIX = "base_model.model."
_KERNELS = ("MultiheadAttention", "ParamWrapper")  # their weights are no module's of their own
MEMORY = 2**30


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose whole weight is looked at.

    Attributes:
        name: the layer's qualified name in the model that PEFT wraps.
        module: the layer without its adapters.
        shape: (n, m) of its weight as a matrix, as LoRA sees it: an embedding's table transposed,
            a convolution's kernel flattened.
        pairs: its adapters; none in a model without PEFT.
    """

    name: str
    module: Any
    shape: tuple[int, int]
    pairs: tuple[LoraPair, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        """Of shifts and gradients: float64 in a float64 model, else float32."""
        return torch.float64 if self._like.dtype == torch.float64 else torch.float32

    @property
    def _like(self) -> Tensor:
        return self.pairs[0].parameter_B if self.pairs else self.module.weight

    def weight(self) -> Tensor:
        """``W0 + s B A``, (n, m), a copy; a quantised W0 is dequantised.

        Raises:
            NotImplementedError: W0 is quantised in a way that PEFT cannot undo.
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
        """What a shift D of the weight adds to the layer's output."""
        if isinstance(self.module, nn.Embedding):
            return functional.embedding(x, D.T, padding_idx=self.module.padding_idx)
        x = x.to(D.dtype)
        if isinstance(self.module, CONVOLUTIONS):
            kernel = (self.shape[0], -1, *self.module.kernel_size)
            return self.module._conv_forward(x, D.reshape(kernel), None)
        return functional.linear(x, D)


def adapted_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """The layers that carry an active LoRA adapter, in module order.

    Args:
        model: a PEFT model, or any other if ``names`` is given.
        names: keep the layers whose qualified name ends with one of these. In a model without
            LoRA they are linear layers.

    Raises:
        ValueError: no such layer.
        NotImplementedError: a layer's weight cannot be shifted (``nn.MultiheadAttention``, stacked
            experts); leave it out through ``names``.
    """
    if isinstance(names, str):
        raise TypeError(f"names: expected a list of names, got the string {names!r}")

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
        raise ValueError(f"layers: none ends with one of {list(names or [])}; there are {some}")
    return layers


def constant(D: Tensor) -> Shift:
    """The shift that is always D."""
    return lambda: D


def mean_loss(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    layers: Sequence[Layer] = (),
    shifts: Mapping[str, Shift] | None = None,
) -> float:
    """Mean over the batches of the loss, with the layers' weights shifted, in eval mode.

    Args:
        model: its weights, mode and gradients are the same afterwards.
        loss_fn: called with ``model`` and a batch, returns the batch's mean loss.
        batches: each counts the same; anything that can be walked through again and again.
        layers: from :func:`adapted_layers`.
        shifts: by the layer's name; the layers left out keep their weights.
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
    """Gradients of the mean loss by whole weights and by factors; ``.grad`` is left alone.

    As many layers at a time as ``memory`` allows, at least one; each group of them costs a pass
    over the batches.

    Args:
        model, loss_fn, batches: as for :func:`mean_loss`.
        layers: from :func:`adapted_layers`.
        pairs: whose factors' gradients are wanted, frozen ones too; they come with the first pass.
        memory: bytes on the model's device for shifts and gradients.
        store: the device that keeps the whole weights' gradients, 4 bytes for each weight.
        on_pass: called after every pass with the number of passes done and their total.

    Returns:
        The (n, m) gradient of every layer's weight by its name, and ``(G_A, G_B)`` of shape (r, m)
        and (n, r) for every pair.
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


# --- for a while -------------------------------------------------------------------------


@contextmanager
def shifted(layers: Sequence[Layer], shifts: Mapping[str, Shift]) -> Iterator[None]:
    """Within, the layers named in ``shifts`` compute with ``W + D``."""

    def hook(layer: Layer, shift: Shift, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        D = shift()
        if D.shape != layer.shape:
            raise ValueError(
                f"shifts: expected shape {layer.shape} for {layer.name}, got {tuple(D.shape)}"
            )
        term = layer.term(args[0], D.to(layer.device))
        return output + term.to(output.dtype)

    named = {layer.name: layer for layer in layers}
    if unknown := shifts.keys() - named.keys():
        raise ValueError(f"shifts: no such layer: {', '.join(sorted(unknown))}")
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
    """Within, the model is in eval mode; afterwards every module is in its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module in training:
        # In eval mode on a CPU bitsandbytes lays the weights out anew, for good, and rounds their
        # scales; nothing else of these layers depends on their mode. PEFT's layers around them have
        # the same name and must not be in training mode: they would run perturbed.
        if _is_linear_4bit(module):
            module.training = True
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within, these parameters require gradients."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


# --- inner parts -------------------------------------------------------------------------


def check_batches(batches: Any) -> None:
    """TypeError or ValueError unless these can be walked through more than once."""
    if not hasattr(batches, "__len__") or not hasattr(batches, "__iter__"):
        raise TypeError(
            "batches: expected a list or a loader with a length, which can be walked through "
            f"again and again, got {type(batches).__name__}"
        )
    if len(batches) == 0:
        raise ValueError("batches: expected at least one batch, got none")


def _layer_of(name: str, pairs: list[LoraPair]) -> Layer:
    pair = pairs[0]
    kind = next((k for k in _KERNELS if k in {c.__name__ for c in type(pair.layer).mro()}), None)
    if kind is not None:
        raise NotImplementedError(
            f"layers: the whole weight of {name} cannot be shifted, it is a {kind}; name the "
            "other layers"
        )
    shape = (pair.B.shape[0], pair.A.shape[1])
    return Layer(name.removeprefix(_PEFT_PREFIX), pair.layer.get_base_layer(), shape, tuple(pairs))


def _is_linear_4bit(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' layer, or of a class that is derived from it."""
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.split(".")[0] == "bitsandbytes"
        for cls in type(module).mro()
    )


def _base_weight(layer: Layer) -> Tensor:
    module = layer.module
    weight: Any = getattr(module, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return weight
    if type(weight).__name__ == "Int8Params":  # PEFT's way leaves the layer without its scales
        scale = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * (scale.view(-1, 1) / 127)
    from peft.utils.integrations import dequantize_module_weight

    try:
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes has packed it for the CPU in eval mode")
        return dequantize_module_weight(module)
    except Exception as error:  # each library has its own
        raise NotImplementedError(
            f"the weight of {layer.name} ({type(module).__name__}) cannot be dequantised, so "
            f"radius must be 'absolute': {error}"
        ) from error


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers: (in, out)


def _groups(layers: Sequence[Layer], memory: int) -> list[list[Layer]]:
    """Layers in runs whose shifts and gradients fit in ``memory`` bytes, at least one in each."""
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
