"""Other methods with one gradient per step, implemented from their papers.

Both wrap the step of AdamW and find the factors of a model by eflat_ext.lora.

Flat-LoRA by random perturbation (Li et al., arXiv 2409.14396), here "random-flat": the gradient is
taken at ``W + noise``, W = W0 + s B A, the noise of row i drawn from a normal distribution of
standard deviation ``rho f(t) ||W_i|| / sqrt(m)``, m the row's length, with f(t) rising from 0 to 1
as half a cosine over the training. As in the authors' code, only layers with an adapter are
perturbed. Deviations: seeds come from the run's seed, not from the clock; ``W0 + noise`` replaces
W0 for a step, where the authors add the noise to W0, draw it again from its seed and subtract it,
which needs no matrix but changes W0 by rounding.

Bi-LoRA (Liu et al., arXiv 2508.19564), here "bi-lora": beside the adapter (B1, A1), which descends,
an auxiliary adapter (B2, A2) of the same rank ascends on the same gradient, taken at ``W0 + s B1 A1
+ s B2 A2``. After each step, where ``c = sqrt(sum_l ||s B2 A2||^2)`` over all layers exceeds rho,
every B2 and A2 is multiplied by ``sqrt(rho / c)``. The auxiliary adapter starts as LoRA does (A2
random, B2 zero), has the learning rate of the main one (the paper's best) and is dropped at the
end. Deviations: the paper gives no adapter scaling s, so both adapters have the same; gradients of
the main adapter alone are clipped, since AdamW is nearly invariant to a common factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.lab.finetune.comparison import adamw_settings
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lora import LoraPair, find_pairs
from eflat_ext.optim.factories import trainable_parameters


class RandomFlatLoRA(torch.optim.AdamW):
    """AdamW at randomly perturbed weights.

    Args:
        model: a PEFT model whose adapters are on linear layers.
        rho: the paper's sigma, standard deviation of the noise relative to the weights.
        steps: number of steps of the training, for the schedule of the noise.
        adamw: settings of AdamW.
    """

    def __init__(self, model: nn.Module, *, rho: float, steps: int, **adamw: Any) -> None:
        super().__init__(trainable_parameters(model), **adamw)
        self._pairs, self._rho, self._steps = find_pairs(model), rho, steps
        self._seed, self._step = torch.initial_seed(), 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step; the closure runs at perturbed weights."""
        strength = self._rho * (1 - math.cos(math.pi * self._step / self._steps)) / 2
        with self._noise(strength), torch.enable_grad():
            loss = closure()
        super().step()
        self._step += 1
        return loss

    @contextmanager
    def _noise(self, strength: float) -> Iterator[None]:
        """Replace W0 by ``W0 + noise`` within the context; no weight is written."""
        layers = [pair.layer.get_base_layer() for pair in self._pairs]
        device = layers[0].weight.device
        generator = torch.Generator(device).manual_seed((self._seed << 20) + self._step)
        try:
            for layer, pair in zip(layers, self._pairs, strict=True):
                weight, scale = layer.weight, strength * deviation(pair)
                noise = torch.randn(weight.shape, generator=generator, device=device)
                layer.__dict__["weight"] = (weight + scale * noise).to(weight.dtype)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("weight", None)


def deviation(pair: LoraPair) -> Tensor:
    """Return the standard deviation of the noise in each row of a layer for rho 1, (n, 1)."""
    weight = pair.layer.get_base_layer().weight + pair.scaling * pair.B @ pair.A
    return weight.norm(dim=1, keepdim=True) / math.sqrt(weight.shape[1])


class BiLoRA(torch.optim.AdamW):
    """AdamW that descends on the model's adapter and ascends on an auxiliary one.

    Training forward passes use both adapters, evaluation only the model's own.

    Args:
        model: a PEFT model whose adapters are on linear layers.
        rho: bound on the norm of the auxiliary adapters of all layers together.
        adamw: settings of AdamW, for both.
    """

    def __init__(self, model: nn.Module, *, rho: float, **adamw: Any) -> None:
        self._rho = rho
        self.auxiliary = [_Auxiliary(pair) for pair in find_pairs(model)]
        ascending = [factor for pair in self.auxiliary for factor in (pair.A, pair.B)]
        groups = [
            {"params": trainable_parameters(model)},
            {"params": ascending, "maximize": True},
        ]
        super().__init__(groups, **adamw)

    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step of both adapters on one gradient."""
        loss = closure()
        super().step()
        self._clip()
        return loss

    @torch.no_grad()
    def _clip(self) -> None:
        norm = math.sqrt(sum(float(pair.squared_norm()) for pair in self.auxiliary))
        if norm > self._rho:
            for pair in self.auxiliary:
                pair.A.mul_(math.sqrt(self._rho / norm))
                pair.B.mul_(math.sqrt(self._rho / norm))


class _Auxiliary:
    """An adapter (B2, A2) beside a layer's own."""

    def __init__(self, pair: LoraPair) -> None:
        self._scaling = pair.scaling
        self.A = nn.Parameter(torch.empty_like(pair.A))
        self.B = nn.Parameter(torch.zeros_like(pair.B))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as PEFT does
        pair.layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not layer.training:
            return output
        return output + self._scaling * (inputs[0] @ self.A.T) @ self.B.T

    def squared_norm(self) -> Tensor:
        """Return ``||s B2 A2||^2``."""
        return self._scaling**2 * ((self.B.T @ self.B) * (self.A @ self.A.T)).sum()


def random_flat(config: FinetuneConfig, model: Any, steps: int) -> RandomFlatLoRA:
    return RandomFlatLoRA(model, rho=config.rho, steps=steps, **adamw_settings(config))


def bi_lora(config: FinetuneConfig, model: Any, steps: int) -> BiLoRA:
    return BiLoRA(model, rho=config.rho, **adamw_settings(config))


RIVALS = {"random-flat": random_flat, "bi-lora": bi_lora}
