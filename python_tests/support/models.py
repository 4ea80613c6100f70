"""Small models with LoRA, data for them, and comparisons of weights bit by bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import (
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

CREATE = {
    "eflat": create_eflat_optimizer,
    "flat": create_flat_optimizer,
    "lora-sam": create_lora_sam_optimizer,
}


class Mlp(nn.Module):
    """Layers 12 -> 16 -> 10 -> 3 with tanh between; ``up`` and ``down`` are meant for LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def lora_mlp(dtype: torch.dtype = torch.float64, seed: int = 0, **config: object) -> nn.Module:
    """Return a PEFT model in training mode: rank 4 on ``up`` and ``down``, a trained head."""
    torch.manual_seed(seed)
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up", "down"],
        "modules_to_save": ["head"],
        **config,
    }
    return get_peft_model(Mlp(), LoraConfig(**config)).to(dtype).train()


def lora_gpt2(**config: object) -> nn.Module:
    """Return a random two-layer GPT-2 of width 16, LoRA on attention (a Conv1D) and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0
    )
    config = {
        "r": 4,
        "target_modules": ["c_attn", "c_proj"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
        **config,
    }
    return get_peft_model(GPT2LMHeadModel(shape), LoraConfig(**config)).train()


def lora_bert(**config: object) -> nn.Module:
    """Return a random two-layer BERT of width 16, LoRA on attention, a classifier of 3 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    config = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **config}
    return get_peft_model(BertForSequenceClassification(shape), LoraConfig(**config)).train()


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(32, 12, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (32,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).double(), batch[1])


def train_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> None:
    """Take a step with a closure for each batch."""
    for batch in data:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters' values."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def at_points(optimizer: Any) -> Iterator[None]:
    """Give the parameters the values at which the next gradients are taken, within the context."""
    points = optimizer.points()
    clean = {parameter: parameter.detach().clone() for parameter in points}
    try:
        for parameter, value in points.items():
            parameter.data.copy_(value)
        yield
    finally:
        for parameter, value in clean.items():
            parameter.data.copy_(value)


def accelerator(**kwargs: object) -> Any:
    """Return an Accelerator on the CPU without the state of the one before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in list(os.environ):  # set by transformers 4
        if name.startswith(("ACCELERATE_DYNAMO_", "ACCELERATE_MIXED_PRECISION")):
            del os.environ[name]
    return Accelerator(cpu=True, **kwargs)


def scale_gradients(engine: Any, init_scale: float) -> None:
    """Add a gradient scaler, as Accelerator does for fp16 on a GPU but not on the CPU."""
    engine.state._mixed_precision = "fp16"
    engine.native_amp = True
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)


def lora_weights(model: nn.Module, factor: str = "B") -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f"lora_{factor}." in name]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_bytes = [t.detach().reshape(-1).view(torch.uint8) for t in (a, b)]
    return bool(torch.equal(*as_bytes))


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different, f"differing: {different}"


def relative_error(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest relative difference of a parameter in the Frobenius norm."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(
        float((p - q).detach().norm() / q.detach().norm().clamp_min(1e-300)) for p, q in pairs
    )
