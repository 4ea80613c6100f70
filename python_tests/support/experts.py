"""Models of experts that share one parameter, under LoRA."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

RANK, EXPERTS = 2, 3


class Experts(nn.Module):
    """Two linear maps per expert, tanh between; every input goes through all experts."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((7, 5), (5, 6)) if transposed else ((5, 7), (6, 5))
        self.up = nn.Parameter(torch.randn(EXPERTS, *up))
        self.down = nn.Parameter(torch.randn(EXPERTS, *down))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return torch.tanh(x @ up) @ down


class Mixture(nn.Module):
    """A linear layer, experts, and a readout that gives each expert another weight."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.experts(torch.tanh(self.linear(x))))
        return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() / len(x)


def lora_experts(transposed: bool = False, seed: int = 0, linear: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=["linear"] if linear else [],
        target_parameters=["experts.up", "experts.down"],
    )
    model = get_peft_model(Mixture(transposed), config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model
