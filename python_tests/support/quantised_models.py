"""A small random Llama, quantised by each library, and steps compared with the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layers import factors, gradient_matrices
from models import assert_same_bits, at_points, same_bits, trainable, weights
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from eflat_ext import EFlatLoRA, reference

RHO, BETA, LR = 0.3, 0.6, 0.02
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.randint(0, 96, (3, 2, 12), generator=torch.Generator().manual_seed(5))


def four_bits(quant_type: str = "nf4", double: bool = False, compute: Any = torch.float32) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def eight_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao(name: str, **kwargs: Any) -> Any:
    import torchao.quantization as configs
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(configs, name)(**kwargs))


FOUR_BITS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: four_bits("nf4"),
    "nf4, double quantisation": lambda: four_bits("nf4", double=True),
    "fp4": lambda: four_bits("fp4"),
    "nf4, bfloat16 compute": lambda: four_bits("nf4", double=True, compute=torch.bfloat16),
}
EIGHT_BITS = {"int8": eight_bits}
TORCHAO: dict[str, Callable[[], Any]] = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}
BASES: dict[str, Callable[[], Any]] = {
    **FOUR_BITS,
    **EIGHT_BITS,
    **TORCHAO,
    "torchao int8, dynamic activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
}


def needs(*packages: str) -> pytest.MarkDecorator:
    """Return a mark that skips tests if a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def save_llama(folder: Path) -> Path:
    """Save a one-layer Llama of width 64 in ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def quantised_lora(
    folder: Path,
    base: str,
    dtype: torch.dtype = torch.float32,
    checkpointing: dict[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
    **config: Any,
) -> nn.Module:
    """Load the model quantised by ``BASES[base]``, with rank 4 on three layers, in training mode.

    Args:
        checkpointing: arguments of gradient checkpointing, which is off without them.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BASES[base](), dtype=dtype
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # an inexact forward pass for some CPUs
            module.support_avx512bf16_for_cpu = False
    if dtype == torch.float32:  # it would convert bfloat16 to float32
        model = prepare_model_for_kbit_training(
            model, checkpointing is not None, gradient_checkpointing_kwargs=checkpointing
        )
    torch.manual_seed(0)
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        **config,
    }
    lora = LoraConfig(**config)
    model = get_peft_model(model, lora, autocast_adapter_dtype=autocast_adapter_dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=TOKENS[step % 3], labels=TOKENS[step % 3]).loss


def lora_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def base_state(model: nn.Module) -> dict[str, Any]:
    """Return copies of the quantised base's state, scales included; torchao's dequantised."""
    from torchao.utils import TorchAOBaseTensor

    return {
        name: value.dequantize()
        if isinstance(value, TorchAOBaseTensor)
        else value.detach().as_subclass(Tensor).clone()
        for name, value in model.state_dict().items()
        if "lora_" not in name and isinstance(value, Tensor)
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = (tensor.detach().double().flatten() for tensor in (value, expected))
    return float((value - expected).norm() / expected.norm())


def perturbations(optimizer: Any) -> dict[tuple[str, str], Tensor]:
    """Return the reference's perturbations for the current gradients, by pair and factor."""
    found = {}
    with at_points(optimizer):
        points = [factors(pair) for pair in optimizer.pairs]
    for pair, (A, B) in zip(optimizer.pairs, points, strict=True):
        gradients = gradient_matrices(pair)
        if hasattr(optimizer, "onto"):
            E, norm = reference.perturb(A, B, *gradients, pair.scaling, RHO, optimizer.onto)
            assert norm > 0
            found[pair.name, optimizer.onto] = E
        else:
            square = sum(gradient.double().square().sum() for gradient in gradients)
            for factor, gradient in zip("AB", gradients, strict=True):
                found[pair.name, factor] = RHO * gradient.double() / square.sqrt()
    return found


def assert_points(optimizer: Any, expected: dict, limit: float) -> None:
    """Assert that points are the factors plus these perturbations, and other weights unchanged."""
    points = optimizer.points()
    for pair in optimizer.pairs:
        for factor, parameter in (("A", pair.parameter_A), ("B", pair.parameter_B)):
            E = expected.get((pair.name, factor))
            if E is None:
                assert same_bits(points[parameter], parameter)
            else:
                point = parameter.detach().double() + E.view_as(parameter)
                assert relative_error(points[parameter], point) < limit


def assert_taken_at_the_points(model: nn.Module, optimizer: Any, loss: Callable[..., Any]) -> None:
    """Assert that the current gradients have the bits of those of a copy at the points."""
    with at_points(optimizer):
        other = copy.deepcopy(model)  # runs unperturbed
    other.zero_grad()
    loss(other).backward()
    for parameter, copied in zip(trainable(model), trainable(other), strict=True):
        assert same_bits(parameter.grad, copied.grad)


def steps_as_the_reference(
    model: nn.Module,
    optimizer: Any,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int = 3,
    limit: float = 1e-5,
) -> None:
    """Take steps; assert the reference's perturbations, AdamW's updates and an unchanged base.

    Args:
        optimizer: of radius ``RHO``, around an AdamW of learning rate ``LR``.
        loss: returns the loss of the model in a step, by its number.
        limit: bound on relative errors.
    """
    base = base_state(model)
    parameters = trainable(model)
    shadow = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    plain = torch.optim.AdamW(shadow, lr=LR)
    average = {}
    eflat = isinstance(optimizer, EFlatLoRA)
    for step in range(steps):
        saved = lora_only(weights(model))
        optimizer.zero_grad()
        loss(model, step).backward()
        new = perturbations(optimizer)
        if not eflat:
            assert_points(optimizer, {}, 0)
            optimizer.first_step()
            loss(model, step).backward()
            assert_points(optimizer, new, limit)
        elif optimizer.onto == "B":  # averages onto A are bounded when they are applied
            assert_points(optimizer, average, limit)
        assert_taken_at_the_points(model, optimizer, lambda other, step=step: loss(other, step))
        assert_same_bits(lora_only(weights(model)), saved)
        for parameter, copied in zip(parameters, shadow, strict=True):
            copied.grad = parameter.grad.clone()
        plain.step()
        optimizer.step()
        for key, E in new.items() if eflat else ():
            average[key] = (1 - BETA) * average.get(key, 0) + BETA * E
            assert relative_error(optimizer.averages[key[0]], average[key]) < limit
        for parameter, copied in zip(parameters, shadow, strict=True):
            assert relative_error(parameter, copied) < limit
    assert_same_bits(base_state(model), base)
