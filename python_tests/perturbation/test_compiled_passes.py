"""torch.compile: perturbed passes are one graph, which is kept as E and rho change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CREATE, batches, lora_mlp, relative_error, train_on
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from eflat_ext import EFlatPerturbation

OPTIONS = {"lr": 0.05, "rho": 0.3}


class Checkpointed(nn.Module):
    """The model with its middle recomputed in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        net = self.model.base_model.model
        hidden = checkpoint(
            lambda h: torch.tanh(net.down(torch.tanh(net.up(h)))), x, use_reentrant=False
        )
        return net.head(hidden)


def trained(method: str, compiled: bool, wrap: Any, **options: Any) -> tuple[nn.Module, Any]:
    torch._dynamo.reset()
    model = lora_mlp()
    optimizer = CREATE[method](model, torch.optim.AdamW, **OPTIONS, **options)
    counter = CompileCounterWithBackend("aot_eager")
    net = wrap(model)
    if compiled:
        net = torch.compile(net, fullgraph=True, backend=counter)
    for i, batch in enumerate(batches(6)):
        optimizer.rho = 0.3 / (1 + i)
        train_on(net, optimizer, [batch])
    return model, counter


@pytest.mark.proves("Plain loops", "`torch.compile(fullgraph=True)`, with checkpointing inside")
@pytest.mark.parametrize("wrap", [lambda model: model, Checkpointed], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_one_graph_for_all_steps(onto: str, wrap: Any) -> None:
    model, counter = trained("eflat", True, wrap, onto=onto)
    expected, _ = trained("eflat", False, wrap, onto=onto)
    assert counter.frame_count == 1
    assert relative_error(model, expected) < 1e-12


@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_two_graphs_for_two_gradients(method: str) -> None:
    """One graph of the clean pass, one of the perturbed pass."""
    model, counter = trained(method, True, lambda model: model)
    expected, _ = trained(method, False, lambda model: model)
    assert counter.frame_count == 2
    assert relative_error(model, expected) < 1e-12


def test_a_compiled_model_of_an_attached_optimizer_equals_eager() -> None:
    runs = []
    for compiled in (True, False):
        torch._dynamo.reset()
        model = lora_mlp()
        parameters = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.SGD(parameters, lr=0.05)
        EFlatPerturbation(model, rho=0.3, onto="A").attach(base)
        net = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        train_on(net, base, batches(5))
        runs.append(model)
    assert relative_error(*runs) < 1e-12


def test_evaluation_of_a_compiled_model_is_clean() -> None:
    model = lora_mlp()
    optimizer = CREATE["eflat"](model, torch.optim.AdamW, **OPTIONS)
    train_on(model, optimizer, batches(3))
    net = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batches(1)[0][0]
    perturbed = net(x)
    net.eval()
    torch.testing.assert_close(net(x), model(x), rtol=1e-12, atol=0)
    assert not torch.allclose(net(x), perturbed)
