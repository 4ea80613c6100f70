"""LoRA-SAM at one gradient a step: each example's gradient is kept until the example comes again.

SAM perturbs the weights along the gradient of the very batch that it then trains on. What one
gradient a step offers instead, an average of past batches, catches a part of that batch's rise
only, however fresh it is (bench/batch_rise.py). But where an example comes back epoch after epoch,
its own gradient of the last time can stand in for the one of now:

"lora-sam-memory"  the factors are perturbed by rho along the sum of what the batch's examples
                   left when they were last seen; examples seen for the first time add nothing.

An example is known by its tokens. Its gradient of the factors of a linear layer comes from what
the layer's hooks see, input Z and output gradient D of A's and B's small products: D^T Z per
example, the same flops as the batch's. It costs r (n + m) numbers of memory per example and layer,
so it is for few examples and many epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.config import FinetuneConfig
from eflat_ext.finetune import adamw_settings, trainable_parameters
from eflat_ext.pairs import LoraPair, find_pairs

Example = tuple[int, ...]  # its tokens


def examples_of(inputs: dict[str, Tensor]) -> list[Example]:
    """What a batch holds, without its padding."""
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    return [tuple(t for t, on in zip(*row, strict=True) if on) for row in rows]


class FactorGradients:
    """The gradients of one pair's factors, example by example, of the last backward pass."""

    def __init__(self, pair: LoraPair) -> None:
        self._parts: dict[str, Tensor] = {}
        for name, module in (("A", pair.module_A), ("B", pair.module_B)):
            module.register_forward_hook(functools.partial(self._watch, name))

    def rows(self) -> Tensor:
        """A's and B's, flattened, one row for each example."""
        return torch.cat([self._parts[name].flatten(1) for name in "AB"], dim=1)

    def _watch(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training and output.requires_grad:
            output.register_hook(functools.partial(self._keep, name, inputs[0].detach()))

    @torch.no_grad()
    def _keep(self, name: str, Z: Tensor, D: Tensor) -> None:
        # The thin matrix first: several times as fast as the other way round.
        if name == "A":
            self._parts[name] = D.transpose(1, 2) @ Z
        else:
            self._parts[name] = (Z.transpose(1, 2) @ D).transpose(1, 2)


class RememberedLoRASAM(torch.optim.AdamW):
    """AdamW with its gradient taken at factors perturbed along the batch's gradient of last time.

    Args:
        model: a PEFT model of linear layers, called with ``input_ids`` and ``attention_mask``.
        rho: norm of a pair's perturbation of both factors.
        adamw: settings of AdamW.
    """

    def __init__(self, model: nn.Module, *, rho: float, **adamw: Any) -> None:
        super().__init__(trainable_parameters(model), **adamw)
        self._rho = rho
        self._pairs = find_pairs(model)
        self._gradients = [FactorGradients(pair) for pair in self._pairs]
        self._factors = [p for pair in self._pairs for p in (pair.parameter_A, pair.parameter_B)]
        self._sizes = [factor.numel() for factor in self._factors]
        self.memory: dict[Example, Tensor] = {}
        self._examples: list[Example] = []
        self._clean: list[Tensor] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def step(self, closure: Callable[[], Any]) -> Any:
        """One step; the closure runs at perturbed factors."""
        try:
            loss = closure()
        finally:
            self._restore()
        rows = torch.cat([gradients.rows() for gradients in self._gradients], dim=1)
        self.memory.update(zip(self._examples, rows.unbind(), strict=True))
        super().step()
        return loss

    @torch.no_grad()
    def _before(self, model: nn.Module, arguments: Any, inputs: dict[str, Tensor]) -> None:
        if not model.training:
            return
        self._examples = examples_of(inputs)
        self._perturb([self.memory[e] for e in self._examples if e in self.memory])

    def _perturb(self, rows: list[Tensor]) -> None:
        self._clean = [factor.detach().clone() for factor in self._factors]
        if not rows:
            return
        parts = torch.stack(rows).sum(0).split(self._sizes)
        norms = torch.stack(torch._foreach_norm(parts)).view(-1, 2)
        norms = torch.linalg.vector_norm(norms, dim=1)
        scales = torch.where(norms > 0, self._rho / norms, 0).repeat_interleave(2)
        moves = torch._foreach_mul(parts, list(scales.unbind()))
        shaped = [move.view_as(f) for move, f in zip(moves, self._factors, strict=True)]
        torch._foreach_add_(self._factors, shaped)

    @torch.no_grad()
    def _restore(self) -> None:
        if self._clean:
            torch._foreach_copy_(self._factors, self._clean)
        self._clean = []


def lora_sam_memory(config: FinetuneConfig, model: Any, steps: int) -> RememberedLoRASAM:
    """Its builder, for bench/experiment.py."""
    return RememberedLoRASAM(model, rho=config.rho, **adamw_settings(config))
