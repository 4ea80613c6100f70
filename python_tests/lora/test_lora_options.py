"""PEFT's initialisations, LoRA+ parameter groups and other options work with EFlat-LoRA."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lora_layers import BETA, RHO, batch_of, lora_around, step_as_the_reference
from models import Mlp, at_points, batches, lora_mlp, loss_of, trainable
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from eflat_ext import EFlatLoRA, create_eflat_optimizer


@pytest.mark.proves("LoRA layers", "LoRA+ parameter groups")
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_groups(ratio: float) -> None:
    """A and B are in groups of different learning rates; each moves by its own."""
    model, plain = lora_mlp(), lora_mlp()
    optimizer, unperturbed = (
        create_loraplus_optimizer(
            each, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, weight_decay=0.0
        )
        for each in (model, plain)
    )
    optimizer = EFlatLoRA(model, optimizer, rho=RHO, beta=BETA)
    rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
    assert len(rates) == (1 if ratio == 1 else 2)
    data = batches(3)
    step_as_the_reference(optimizer, lambda step: loss_of(model, data[step]))
    still = EFlatLoRA(plain, unperturbed, rho=0.0)
    before = [p.detach().clone() for p in trainable(plain)]
    loss_of(plain, data[0]).backward()
    still.step()
    for (name, p), old in zip(
        ((n, p) for n, p in plain.named_parameters() if p.requires_grad), before, strict=True
    ):
        moved = float((p.detach() - old).abs().max())
        if "lora_A" in name:
            assert moved == 0  # B is zero at the start
        else:
            expected = 1e-3 * (ratio if "lora_B" in name or p.dim() == 1 else 1.0)
            assert moved == pytest.approx(expected, rel=1e-3)


@pytest.mark.proves("LoRA layers", "initialisations: PiSSA, OLoRA, Gaussian, orthogonal, MiCA")
@pytest.mark.parametrize("onto", ["A", "B", "both"])
@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "mica", False]
)
def test_initialisations(init: Any, onto: str) -> None:
    if onto != "A" and init == "mica":
        pytest.skip("MiCA freezes B")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Mlp(), config).double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and not p.any():
                p.normal_(std=0.1)  # onto A, B must not be zero
    optimizer = create_eflat_optimizer(
        model, torch.optim.AdamW, lr=1e-3, rho=RHO, beta=BETA, onto=onto
    )
    assert len(optimizer.pairs) == 2
    data = batches(3)
    step_as_the_reference(optimizer, lambda step: loss_of(model, data[step]))


@pytest.mark.proves("LoRA layers", "initialisation by EVA")
def test_eva() -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["up", "down"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    model = get_peft_model(Mlp(), config)
    data = batches(6, torch.float32)
    initialize_lora_eva_weights(
        model,
        [{"x": x} for x, _ in data],
        forward_fn=lambda model, batch: model(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    model = model.double().train()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=RHO, beta=BETA)
    assert len(optimizer.pairs) == 2
    data = batches(3)
    step_as_the_reference(optimizer, lambda step: loss_of(model, data[step]))


def test_mica_on_an_embedding_perturbs_a() -> None:
    """B is frozen and holds singular vectors, A starts at zero and has the average."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora_around("embedding", init_lora_weights="mica")
    optimizer = create_eflat_optimizer(
        model, torch.optim.AdamW, lr=0.05, rho=RHO, beta=BETA, onto="A"
    )
    assert not optimizer.pairs[0].B.requires_grad
    step_as_the_reference(optimizer, lambda _: model(batch_of(model)))


@pytest.mark.proves("LoRA layers", "LoRA-FA (A frozen)")
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_lora_fa(kind: str) -> None:
    """PEFT's LoRA-FA freezes A and projects B's gradient in its step."""
    from peft.optimizers import create_lorafa_optimizer

    model = lora_around(kind)
    if kind != "linear":  # its optimizer handles linear factors alone
        for name, p in model.named_parameters():
            p.requires_grad_("lora_B" in name or "embedding_B" in name)
        base: torch.optim.Optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    else:
        base = create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.05)
    optimizer = EFlatLoRA(model, base, rho=RHO, beta=BETA)
    A = [pair.A.detach().clone() for pair in optimizer.pairs]
    step_as_the_reference(optimizer, lambda _: model(batch_of(model)))
    for pair, before in zip(optimizer.pairs, A, strict=True):
        assert torch.equal(pair.A, before)


@pytest.mark.proves("LoRA layers", "LoRA bias: trained, not perturbed")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_lora_bias_is_trained_unperturbed(kind: str) -> None:
    model = lora_around(kind, lora_bias=True)
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=RHO, beta=BETA)
    (pair,) = optimizer.pairs
    bias: Tensor = pair.module_B.bias
    x = batch_of(model)
    model(x).backward()
    optimizer.step()
    assert isinstance(bias, nn.Parameter) and bias.any() and bias not in optimizer.points()
    with at_points(optimizer):
        other = copy.deepcopy(model)  # runs unperturbed, with this bias
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), copy.deepcopy(model)(x))
    again = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=RHO, beta=BETA)
    step_as_the_reference(again, lambda _: model(batch_of(model)), steps=2)
