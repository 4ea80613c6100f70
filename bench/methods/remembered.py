"""LoRA-SAM with one gradient per step, from the gradients that examples had an epoch before.

SAM perturbs the weights along the gradient of the batch that it then trains on. An average of past
batches, which costs no second gradient, finds only a part of that batch's rise, even if it is
recent (bench/experiments/batch_rise.py). Where examples come back in every epoch, their gradients
of the last epoch can replace the current ones:

"lora-sam-memory"  the factors are perturbed by rho along the sum of the gradients that the batch's
                   examples had when they were last seen; new examples add nothing.

An example is identified by its tokens. Its gradient of the factors of a linear layer is D^T Z, with
the input Z and the output gradient D of A's and B's modules from hooks, at the flops of the batch's
gradient. It takes r (n + m) numbers of memory per example and layer, so it suits few examples and
many epochs. A step is one forward and one backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.lab.data.tables import InputError
from eflat_ext.lab.finetune.comparison import adamw_settings
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lora import LoraPair, find_pairs
from eflat_ext.optim.factories import trainable_parameters
from eflat_ext.perturbation.base import Perturbation
from eflat_ext.perturbation.settings import Settings

Example = tuple[int, ...]  # its tokens


def examples_of(inputs: dict[str, Tensor]) -> list[Example]:
    """Return the tokens of every example of a batch, without padding.

    Raises:
        InputError: The batch has images, which tokens do not identify.
    """
    if "pixel_values" in inputs:
        raise InputError("lora-sam-memory knows examples by their tokens, not by images")
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    return [tuple(t for t, on in zip(*row, strict=True) if on) for row in rows]


class FactorGradients:
    """Gradients of one pair's factors by example, of the last backward pass."""

    def __init__(self, pair: LoraPair) -> None:
        self._parts: dict[str, Tensor] = {}
        for name, module in (("A", pair.module_A), ("B", pair.module_B)):
            module.register_forward_hook(functools.partial(self._watch, name))

    def rows(self) -> Tensor:
        """Return the gradients of A and of B, flattened, one row for each example."""
        return torch.cat([self._parts[name].flatten(1) for name in "AB"], dim=1)

    def _watch(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training and output.requires_grad:
            output.register_hook(functools.partial(self._keep, name, inputs[0].detach()))

    @torch.no_grad()
    def _keep(self, name: str, Z: Tensor, D: Tensor) -> None:
        dtype = torch.promote_types(Z.dtype, D.dtype)  # they differ under autocast
        Z, D = (x.reshape(len(x), -1, x.shape[-1]).to(dtype) for x in (Z, D))
        # Multiplying the thin matrix first is several times as fast.
        if name == "A":
            self._parts[name] = D.transpose(1, 2) @ Z
        else:
            self._parts[name] = (Z.transpose(1, 2) @ D).transpose(1, 2)


class Memory:
    """Gradients of a model's factors by example, from when each was last seen.

    Args:
        model: PEFT model with adapters on linear layers only.
    """

    def __init__(self, model: nn.Module) -> None:
        pairs = find_pairs(model)
        self.factors = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
        self._gradients = [FactorGradients(pair) for pair in pairs]
        self._rows: dict[Example, Tensor] = {}

    def keep(self, examples: list[Example]) -> None:
        """Store the gradients of the last backward pass in training mode, by example."""
        rows = torch.cat([gradients.rows() for gradients in self._gradients], dim=1)
        finite = rows.sum(1).isfinite().tolist()
        found = zip(examples, rows.unbind(), finite, strict=True)
        self._rows.update((example, row) for example, row, ok in found if ok)

    def recall(self, examples: list[Example]) -> Tensor | None:
        """Return the sum of these examples' stored gradients, flat; None if there is none."""
        rows = [self._rows[example] for example in examples if example in self._rows]
        return torch.stack(rows).sum(0) if rows else None


@torch.no_grad()
def moves(factors: list[Tensor], direction: Tensor, rho: float) -> dict[Tensor, Tensor]:
    """Return the perturbation of each pair's factors by rho along its part of the direction."""
    parts = direction.split([factor.numel() for factor in factors])
    norms = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)).view(-1, 2), dim=1)
    scales = torch.where(norms > 0, rho / norms, 0).repeat_interleave(2)
    scaled = torch._foreach_mul(parts, list(scales.unbind()))
    return {factor: move.view_as(factor) for factor, move in zip(factors, scaled, strict=True)}


class RememberedLoRASAM(torch.optim.AdamW):
    """AdamW at factors perturbed along the gradient that the batch's examples had an epoch before.

    Training forward passes are perturbed, evaluation is not.

    Args:
        model: a PEFT model of linear layers, called with ``input_ids`` and ``attention_mask``.
        rho: norm of a pair's perturbation of both factors.
        adamw: settings of AdamW.
    """

    def __init__(self, model: nn.Module, *, rho: float, **adamw: Any) -> None:
        super().__init__(trainable_parameters(model), **adamw)
        self._rho = rho
        self._memory = Memory(model)
        self._examples: list[Example] = []
        self._perturbation = Perturbation(model, Settings(rho=rho), ["A", "B"])
        self._perturbation.claim(self)
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step; the closure runs at perturbed factors."""
        loss = closure()
        self._memory.keep(self._examples)
        super().step()
        return loss

    def _before(self, model: nn.Module, arguments: Any, inputs: dict[str, Tensor]) -> None:
        if model.training:
            self._examples = examples_of(inputs)
            d = self._memory.recall(self._examples)
            E = {} if d is None else moves(self._memory.factors, d, self._rho)
            self._perturbation.put(E)


def lora_sam_memory(config: FinetuneConfig, model: Any, steps: int) -> RememberedLoRASAM:
    """Create the optimizer, for bench/experiment.py."""
    for pair in find_pairs(model):
        if not isinstance(pair.layer.get_base_layer(), nn.Linear):
            raise InputError(f"lora-sam-memory: {pair.layer_name} is no linear layer")
    return RememberedLoRASAM(model, rho=config.rho, **adamw_settings(config))
