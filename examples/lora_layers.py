"""List the LoRA pairs of a model with several kinds of layers, one of them unsupported.

The model is small, its weights and its task are random: only the pairs are of interest.
"""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer


class Experts(nn.Module):
    """Average over four experts, each a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight) / len(self.weight)


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 24)
        self.conv1d = nn.Conv1d(24, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.experts = Experts()
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = torch.tanh(self.linear(x + self.attention(x, x, x, need_weights=False)[0]))
        x = torch.tanh(self.grouped(torch.tanh(self.conv1d(x.mT)))).mean(-1)
        return self.head(self.experts(x))


def main() -> None:
    torch.manual_seed(0)
    layers = ["embedding", "attention", "linear", "conv1d", "grouped"]
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=layers,
        target_parameters=["experts.weight"],
        rank_pattern={"linear": 2},
        modules_to_save=["head"],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(Zoo(), lora)
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=0.05)
    tokens, labels = torch.randint(0, 50, (16, 8)), torch.randint(0, 3, (16,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    print(f"{'pair':40}  {'A':>9}  {'B':>9}  scaling  norm of its average")
    for pair in optimizer.pairs:
        name = pair.name.removeprefix("base_model.model.")
        shapes = ["x".join(map(str, factor.shape)) for factor in (pair.A, pair.B)]
        norm = optimizer.averages[pair.name].norm()
        print(f"{name:40}  {shapes[0]:>9}  {shapes[1]:>9}  {pair.scaling:7.1f}  {norm:.3f}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for warning in caught:
        if "plain pair" in str(warning.message):
            print(f"warned: {warning.message}")


if __name__ == "__main__":
    main()
