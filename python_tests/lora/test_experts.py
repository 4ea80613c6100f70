"""Experts that share one parameter (PEFT's target_parameters): each is a pair of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from experts import EXPERTS, Experts, lora_experts
from lora_layers import BETA, CLOSE, RHO, Calls, average_names, step_beside
from models import CREATE, assert_same_bits, at_points, trainable, weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer, reference
from eflat_ext.lora import find_pairs


def batch() -> Tensor:
    return torch.randn(4, 7, dtype=torch.float64)


def slices(layer: Any, A: Tensor, B: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Return one expert's part of two tensors with the parameters' shapes, in PEFT's layout."""
    return (
        A.detach().reshape(layer.num_experts, -1, A.shape[1])[expert].clone(),
        B.detach().reshape(len(B), -1, layer.num_experts)[:, :, expert].clone(),
    )


def factors_and_gradients(pair: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B = pair.parameter_A, pair.parameter_B
    if pair.experts == 1:
        return A.detach().clone(), B.detach().clone(), A.grad, B.grad
    layer, expert = pair.layer, pair.expert
    return slices(layer, A, B, expert) + slices(layer, A.grad, B.grad, expert)


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_a_pair(transposed: bool) -> None:
    model = lora_experts(transposed, linear=False)
    pairs = find_pairs(model)
    assert [pair.expert for pair in pairs] == [0, 1, 2] * 2
    assert len({pair.name for pair in pairs}) == 6
    assert {pair.group for pair in pairs} == {pair.name[:-2] for pair in pairs}
    x = batch()
    for pair in pairs:
        A, B = slices(pair.layer, pair.parameter_A, pair.parameter_B, pair.expert)
        assert torch.equal(pair.A, A) and torch.equal(pair.B, B)
        change = pair.layer.get_delta_weight("default")[pair.expert].detach()
        change = change.T if transposed else change
        torch.testing.assert_close(pair.scaling * B @ A, change, **CLOSE)
    for pair in pairs:
        base = pair.layer.get_param()
        base.requires_grad_(True)
    model(x).backward()
    for pair in pairs:
        A, B, grad_A, grad_B = factors_and_gradients(pair)
        G = pair.layer.get_param().grad[pair.expert]
        G = G.T if transposed else G
        torch.testing.assert_close(grad_A, pair.scaling * B.T @ G, **CLOSE)
        torch.testing.assert_close(grad_B, pair.scaling * G @ A.T, **CLOSE)


@pytest.mark.proves("LoRA layers", "expert layers (`target_parameters`), each expert a pair")
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("onto", ["A", "B"])
def test_eflat_lora(onto: str, base: type[torch.optim.Optimizer], norm_scope: str) -> None:
    model = lora_experts()
    optimizer = create_eflat_optimizer(
        model, base, lr=0.02, rho=RHO, beta=BETA, onto=onto, norm_scope=norm_scope
    )
    pairs = optimizer.pairs
    assert len(pairs) == 1 + 2 * EXPERTS
    shadow = [p.detach().clone().requires_grad_() for p in trainable(model)]
    plain = base(shadow, lr=0.02)
    averages = [torch.zeros_like(average) for average in optimizer.averages.values()]
    which = 0 if onto == "A" else 1
    for step in range(3):
        optimizer.zero_grad()
        x, before = batch(), weights(model)
        live = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
        applied = averages
        if onto == "A":
            scaled = [(*f, pair.scaling) for f, pair in zip(live, pairs, strict=True)]
            applied = reference.bounded(scaled, averages, RHO, norm_scope)
        clean_loss = copy.deepcopy(model)(x)
        loss = model(x)
        assert step == 0 or not torch.isclose(loss, clean_loss, rtol=1e-6, atol=0)
        loss.backward()
        with at_points(optimizer):
            rows = [factors_and_gradients(pair) for pair in pairs]
            torch.testing.assert_close(copy.deepcopy(model)(x), loss, **CLOSE)
        for row, clean, average in zip(rows, live, applied, strict=True):
            torch.testing.assert_close(row[which], clean[which] + average, **CLOSE)
        assert_same_bits(weights(model), before)
        E, _ = reference.foreach_perturb(
            *zip(*rows, strict=True), [pair.scaling for pair in pairs], RHO, onto, norm_scope
        )
        averages = [(1 - BETA) * old + BETA * new for old, new in zip(averages, E, strict=True)]
        step_beside(plain, shadow, optimizer, trainable(model), averages)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_two_gradients_of_experts_equal_the_reference(onto: str) -> None:
    model = lora_experts()
    method, options = ("lora-sam", {}) if onto == "both" else ("flat", {"onto": onto})
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=RHO, **options)
    x = batch()
    clean_loss = model(x)
    clean_loss.backward()
    rows = [factors_and_gradients(pair) for pair in optimizer.pairs]
    optimizer.first_step()
    for pair, (A, B, grad_A, grad_B) in zip(optimizer.pairs, rows, strict=True):
        if onto == "both":
            norm = torch.hypot(grad_A.norm(), grad_B.norm())
            expected = A + RHO * grad_A / norm, B + RHO * grad_B / norm
        else:
            E, _ = reference.perturb(A, B, grad_A, grad_B, pair.scaling, RHO, onto)
            expected = (A + E, B) if onto == "A" else (A, B + E)
        with at_points(optimizer):
            torch.testing.assert_close((pair.A.detach(), pair.B.detach()), expected, **CLOSE)
    with at_points(optimizer):
        loss = copy.deepcopy(model)(x)
    torch.testing.assert_close(model(x), loss, **CLOSE)
    optimizer.abandon_step()
    assert torch.equal(model(x), clean_loss)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_experts_resume_and_merge_clean(onto: str) -> None:
    options = {"lr": 0.05, "rho": RHO, "beta": BETA, "onto": onto}
    model = lora_experts()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, **options)
    data = [batch() for _ in range(4)]

    def train(model: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
        for x in data:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

    train(model, optimizer, data[:2])
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data[2:])
    resumed = lora_experts(seed=1)
    again = create_eflat_optimizer(resumed, torch.optim.AdamW, **options)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, data[2:])
    assert_same_bits(weights(resumed), weights(model))
    for name, average in optimizer.averages.items():
        assert torch.equal(average, again.averages[name])
    y = model.eval()(data[0])
    model.train()(data[0])  # perturbed
    torch.testing.assert_close(model.merge_and_unload().eval()(data[0]), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_an_expert_without_gradient_keeps_its_average(onto: str) -> None:
    model = lora_experts(linear=False)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.05, rho=RHO, onto=onto)
    model(batch()).backward()
    optimizer.step()
    before = {name: average.clone() for name, average in optimizer.averages.items()}
    optimizer.zero_grad()
    model(batch()).backward()
    with torch.no_grad():
        for pair in optimizer.pairs:
            if pair.expert == 1:
                for factor in ("A", "B"):
                    pair.part(factor, getattr(pair, f"parameter_{factor}").grad).zero_()
    optimizer.step()
    assert int(optimizer.skipped_perturbations) == 2
    for pair in optimizer.pairs:
        name = average_names(optimizer, pair)[-1]
        assert torch.equal(optimizer.averages[name], before[name]) == (pair.expert == 1)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_fused_steps_of_the_linear_layers_alone(onto: str) -> None:
    """If no expert has a gradient, the other layers' step is fused."""
    runs = []
    for fused_step in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.ModuleDict({"experts": Experts(False), "linear": nn.Linear(7, 5)}),
            LoraConfig(r=2, target_modules=["linear"], target_parameters=["experts.up"]),
        ).double()
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=0.05, rho=RHO, onto=onto, fused_step=fused_step
        )
        assert [pair.experts for pair in optimizer.pairs] == [3, 3, 3, 1]
        for x in (batch(), batch(), batch()):
            optimizer.zero_grad()
            torch.tanh(model.base_model.model["linear"](x)).sum().backward()
            with Calls() as calls:
                optimizer.step()
        assert ("foreach_adamw_step_" in calls.names) == fused_step
        runs.append((weights(model), optimizer.averages))
    for one, other in zip(*runs, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], **CLOSE)
    names = [average_names(optimizer, pair)[-1] for pair in optimizer.pairs]
    trained = [bool(runs[0][1][name].any()) for name in names]
    assert trained == [False, False, False, True]


@pytest.mark.proves("LoRA layers", "a mixture of experts of transformers")
@pytest.mark.parametrize("method", CREATE)
def test_a_mixture_of_experts_of_transformers(method: str) -> None:
    """Experts without tokens are skipped, the others move, and the model learns."""
    from transformers import MixtralConfig, MixtralForCausalLM

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("its experts are lists of linear layers")
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(MixtralForCausalLM(shape), config).train()
    optimizer = CREATE[method](model, torch.optim.AdamW, lr=1e-2, rho=RHO)
    assert [pair.experts for pair in optimizer.pairs] == [1, *[4] * 8] * 2
    tokens = torch.randint(0, 40, (1, 2)).repeat(2, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert int(optimizer.skipped_perturbations) > 0
    before = weights(model)
    loss = model(tokens, labels=tokens).loss
    assert torch.equal(loss, model.eval()(tokens, labels=tokens).loss) == (method != "eflat")
    assert_same_bits(weights(model), before)
