"""Tiny models around each kind of layer with LoRA, and their weights as matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import at_points
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eflat_ext import EFlatLoRA, reference
from eflat_ext.lora import LoraPair

RHO, BETA = 0.1, 0.6
CLOSE = {"rtol": 1e-8, "atol": 1e-11}


class Around(nn.Module):
    """One layer, then tanh and a fixed linear readout, so that gradients depend on the weights."""

    def __init__(self, layer: nn.Module, inputs: Callable[[], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).sum() / len(x)


class Calls(TorchDispatchMode):
    """Record the names of the package's operators that are called within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "eflat":
            self.names.append(func._schema.name.removeprefix("eflat::"))
        return func(*args, **(kwargs or {}))


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


KINDS: dict[str, Callable[[], Around]] = {
    "linear": lambda: Around(nn.Linear(7, 5), _normal(9, 7)),
    "conv1d": lambda: Around(nn.Conv1d(3, 6, 4, stride=2), _normal(4, 3, 11)),
    "conv2d": lambda: Around(nn.Conv2d(3, 5, (2, 3), padding=1), _normal(4, 3, 5, 6)),
    "conv2d 1x1": lambda: Around(nn.Conv2d(4, 5, 1, bias=False), _normal(4, 4, 3, 2)),
    "conv3d": lambda: Around(nn.Conv3d(2, 5, (1, 2, 3)), _normal(3, 2, 3, 4, 4)),
    "embedding": lambda: Around(nn.Embedding(11, 6), lambda: torch.randint(0, 8, (4, 7))),
    "embedding with padding": lambda: Around(
        nn.Embedding(11, 6, padding_idx=2), lambda: torch.randint(0, 8, (4, 7))
    ),
}


def lora_around(kind: str, seed: int = 0, **config: Any) -> nn.Module:
    """Return a float64 PEFT model in training mode, of rank 2, with random factors."""
    torch.manual_seed(seed)
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["layer"], **config}
    model = get_peft_model(KINDS[kind](), LoraConfig(**config)).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.3)
    return model


def batch_of(model: nn.Module) -> Tensor:
    return model.base_model.model.inputs()


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a copy of shape (rows, everything else)."""
    return tensor.detach().reshape(len(tensor), -1).clone()


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a tensor of the base weight's shape as the W of ``W = W0 + s B A``."""
    return as_matrix(weight.T if isinstance(layer.get_base_layer(), nn.Embedding) else weight)


def factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    return as_matrix(pair.parameter_A), as_matrix(pair.parameter_B)


def gradient_matrices(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B; zeros for a frozen one."""
    A, B = (
        as_matrix(torch.zeros_like(p) if p.grad is None else p.grad)
        for p in (pair.parameter_A, pair.parameter_B)
    )
    return A, B


def step_as_the_reference(
    optimizer: EFlatLoRA, loss: Callable[[int], Tensor], steps: int = 3
) -> None:
    """Take steps and compare the averages with the reference's at the gradients' points.

    Args:
        optimizer: of radius ``RHO`` and weight ``BETA``, its averages zero.
        loss: returns the loss of a step by its number; draws new random numbers in each call.
    """
    expected = {name: 0.0 for name in optimizer.averages}
    for step in range(steps):
        optimizer.zero_grad()
        state = torch.get_rng_state()
        value = loss(step)
        value.backward()
        with at_points(optimizer):
            rows = [(*factors(p), *gradient_matrices(p), p.scaling) for p in optimizer.pairs]
            with optimizer.clean(), torch.no_grad(), torch.random.fork_rng():
                torch.set_rng_state(state)
                torch.testing.assert_close(loss(step), value, **CLOSE)
        for pair, row in zip(optimizer.pairs, rows, strict=True):
            E, norm = reference.foreach_perturb(*[[x] for x in row], RHO, optimizer.onto)
            assert norm > 0
            for name, e in zip(average_names(optimizer, pair), E, strict=True):
                expected[name] = (1 - BETA) * expected[name] + BETA * e
        optimizer.step()
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(as_matrix(average), expected[name], **CLOSE)
        # Onto both, B alone may be perturbed.
        assert average.any() or (optimizer.onto == "both" and name.endswith(".A"))


def average_names(optimizer: EFlatLoRA, pair: LoraPair) -> list[str]:
    """Return the names of a pair's averages."""
    return [f"{pair.name}.{f}" for f in "AB"] if optimizer.onto == "both" else [pair.name]


def step_beside(
    plain: torch.optim.Optimizer,
    shadow: list[Tensor],
    optimizer: EFlatLoRA,
    parameters: list[Tensor],
    averages: list[Tensor],
) -> None:
    """Step ``plain`` on copies of the parameters and ``optimizer``, with the same gradients.

    The weights must be the same afterwards, and the averages those given.
    """
    for parameter, copy in zip(parameters, shadow, strict=True):
        copy.grad = parameter.grad.clone()
    plain.step()
    optimizer.step()
    for parameter, copy in zip(parameters, shadow, strict=True):
        torch.testing.assert_close(parameter, copy, **CLOSE)
    for live, average in zip(optimizer.averages.values(), averages, strict=True):
        torch.testing.assert_close(live, average, **CLOSE)
        assert average.any()
