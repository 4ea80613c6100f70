"""Every kind of LoRA layer equals the reference: gradients, perturbation, life cycle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_layers import (
    BETA,
    CLOSE,
    KINDS,
    RHO,
    Calls,
    as_matrix,
    average_names,
    batch_of,
    factors,
    gradient_matrices,
    lora_around,
    step_as_the_reference,
    weight_matrix,
)
from models import CREATE, assert_same_bits, at_points, same_bits, trainable, weights
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer, reference
from eflat_ext.lora import find_pairs


def target(pair: Any, onto: str) -> Tensor:
    return pair.parameter_A if onto == "A" else pair.parameter_B


def delta(pair: Any) -> Tensor:
    """Return PEFT's delta of the layer's weight for the adapter, as a matrix."""
    with torch.no_grad():
        return weight_matrix(pair.layer, pair.layer.get_delta_weight(pair.adapter))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "padding" not in kind]
)  # cuts G, not G A^T
def test_factors_are_those_of_the_weight(kind: str) -> None:
    """``s B A`` is PEFT's own delta weight, and the gradients are ``s B^T G`` and ``s G A^T``."""
    model = lora_around(kind)
    (pair,) = find_pairs(model)
    A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
    assert (A.shape[0], B.shape[1], s) == (2, 2, 3.0)
    torch.testing.assert_close(s * B @ A, delta(pair), **CLOSE)
    base = pair.layer.get_base_layer().weight.requires_grad_(True)
    model(batch_of(model)).backward()
    G = weight_matrix(pair.layer, base.grad)
    grad_A, grad_B = gradient_matrices(pair)
    assert grad_A.any() and grad_B.any()
    torch.testing.assert_close(grad_A, s * B.T @ G, **CLOSE)
    torch.testing.assert_close(grad_B, s * G @ A.T, **CLOSE)


@pytest.mark.proves("LoRA layers", "Linear, Embedding, Conv1d, Conv2d, Conv3d")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("onto", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_eflat_lora(kind: str, onto: str, base: type[torch.optim.Optimizer]) -> None:
    """Weights, averages and saved files over three steps."""
    model = lora_around(kind)
    optimizer = create_eflat_optimizer(model, base, lr=0.05, rho=RHO, beta=BETA, onto=onto)
    (pair,) = optimizer.pairs
    shadow = [p.detach().clone().requires_grad_() for p in trainable(model)]
    plain = base(shadow, lr=0.05)
    average = torch.zeros_like(as_matrix(target(pair, onto)))
    for step in range(3):
        optimizer.zero_grad()
        x, before = batch_of(model), weights(model)
        clean = as_matrix(target(pair, onto))
        applied = average
        if onto == "A":
            (applied,) = reference.bounded(
                [(*factors(pair), pair.scaling)], [average], RHO, "layer"
            )
        unperturbed = copy.deepcopy(model)(x)
        loss = model(x)
        if step:
            assert not torch.isclose(loss, unperturbed, rtol=1e-6, atol=0)
        assert_same_bits(weights(model), before)
        loss.backward()
        with at_points(optimizer):
            torch.testing.assert_close(as_matrix(target(pair, onto)), clean + applied, **CLOSE)
            torch.testing.assert_close(copy.deepcopy(model)(x), loss, **CLOSE)
            point = factors(pair)
        gradients = gradient_matrices(pair)
        E, _ = reference.perturb(*point, *gradients, pair.scaling, RHO, onto)
        average = (1 - BETA) * average + BETA * E
        for p, q in zip(trainable(model), shadow, strict=True):
            q.grad = p.grad.clone()
        plain.step()
        with Calls() as calls:
            optimizer.step()
        fused = step > 0 and base is torch.optim.AdamW
        assert ("foreach_adamw_step_" if fused else "foreach_perturb_ema_") in calls.names
        for p, q in zip(trainable(model), shadow, strict=True):
            torch.testing.assert_close(p, q, **CLOSE)
        (live,) = optimizer.averages.values()
        assert live.shape == target(pair, onto).shape
        torch.testing.assert_close(as_matrix(live), average, **CLOSE)
    assert average.any()


@pytest.mark.parametrize("onto", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_lora_moves_the_weight_by_rho(kind: str, onto: str) -> None:
    model = lora_around(kind)
    optimizer = CREATE["flat"](model, torch.optim.SGD, lr=0.1, rho=RHO, onto=onto)
    (pair,) = optimizer.pairs
    x, clean, before = batch_of(model), weights(model), delta(pair)
    model(x).backward()
    (A, B), s = factors(pair), pair.scaling
    G = reference.full_space_gradient(A, B, *gradient_matrices(pair), s)
    E_W = RHO * G / G.norm()
    moved = E_W @ torch.linalg.pinv(A) @ A if onto == "B" else B @ torch.linalg.pinv(B) @ E_W
    optimizer.first_step()
    loss = model(x)
    loss.backward()
    assert torch.equal(delta(pair), before)
    with at_points(optimizer):
        torch.testing.assert_close(delta(pair) - before, moved, **CLOSE)
        torch.testing.assert_close(copy.deepcopy(model)(x), loss, **CLOSE)
    assert 0.3 * RHO < float(moved.norm()) <= RHO * (1 + 1e-9)
    gradients = [p.grad.clone() for p in trainable(model)]
    optimizer.second_step()
    for (name, value), grad in zip(clean.items(), _in_order(model, gradients), strict=True):
        expected = value if grad is None else value - 0.1 * grad
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, **CLOSE)


def _in_order(model: nn.Module, gradients: list[Tensor]) -> list[Tensor | None]:
    left = iter(gradients)
    return [next(left) if p.requires_grad else None for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_sam_moves_both_factors(kind: str) -> None:
    model = lora_around(kind)
    optimizer = CREATE["lora-sam"](model, torch.optim.SGD, lr=0.1, rho=RHO)
    (pair,) = optimizer.pairs
    before, x = factors(pair), batch_of(model)
    clean_loss = model(x)
    clean_loss.backward()
    gradients = gradient_matrices(pair)
    norm = torch.hypot(*(grad.norm() for grad in gradients))
    optimizer.first_step()
    with at_points(optimizer):
        for now, value, grad in zip(factors(pair), before, gradients, strict=True):
            torch.testing.assert_close(now, value + RHO * grad / norm, **CLOSE)
        loss = copy.deepcopy(model)(x)
    torch.testing.assert_close(model(x), loss, **CLOSE)
    optimizer.abandon_step()
    assert same_bits(model(x), clean_loss)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_merge_and_resume(kind: str, onto: str) -> None:
    """The state has the parameters' shapes and resumes bit for bit; merging finds clean weights."""
    options = {"lr": 0.05, "rho": RHO, "beta": BETA, "onto": onto}
    model = lora_around(kind)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, **options)
    data = [batch_of(model) for _ in range(4)]
    for step, x in enumerate(data):
        if step == 2:
            saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    for entry, parameter in zip(saved[1]["state"].values(), trainable(model), strict=True):
        assert entry["exp_avg"].shape == parameter.shape
        if "perturbation_ema" in entry:
            assert entry["perturbation_ema"].shape == parameter.shape
    resumed = lora_around(kind, seed=1)
    again = create_eflat_optimizer(resumed, torch.optim.AdamW, **options)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for x in data[2:]:
        again.zero_grad()
        resumed(x).backward()
        again.step()
    assert_same_bits(weights(resumed), weights(model))
    assert_same_bits(again.averages, optimizer.averages)

    model.eval()
    y = model(data[0])
    adapter = copy.deepcopy(get_peft_model_state_dict(model))
    model.train()(data[0]).backward()  # perturbed
    assert_same_bits(get_peft_model_state_dict(model), adapter)
    torch.testing.assert_close(model.merge_and_unload().eval()(data[0]), y, rtol=1e-9, atol=1e-12)


@pytest.mark.proves(
    "LoRA layers",
    "options on convolutions and embeddings: DoRA, rsLoRA, LoRA bias, patterns, dropout",
)
@pytest.mark.parametrize("onto", ["A", "B", "both"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("conv1d", {"use_dora": True}),
        ("conv2d", {"use_dora": True}),
        ("conv3d", {"use_dora": True}),
        ("embedding", {"use_dora": True}),
        ("conv2d", {"use_rslora": True, "lora_bias": True}),
        ("embedding", {"use_rslora": True}),
        ("conv2d", {"rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 5}}),
        ("embedding", {"rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 5}}),
        ("conv2d", {"lora_dropout": 0.3}),
    ],
    ids=str,
)
def test_options_of_other_layers(kind: str, config: dict[str, Any], onto: str) -> None:
    _step_as_the_reference(lora_around(kind, **config), onto)


def _step_as_the_reference(model: nn.Module, onto: str) -> Any:
    """Take AdamW steps, fused after the first, and compare with the reference."""
    optimizer = create_eflat_optimizer(
        model, torch.optim.AdamW, lr=0.05, rho=RHO, beta=BETA, onto=onto
    )
    step_as_the_reference(optimizer, lambda _: model(batch_of(model)))
    return optimizer


@pytest.mark.parametrize("frozen", ["A", "B"])
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_a_frozen_factor_of_another_layer_leaves_the_other_term(kind: str, frozen: str) -> None:
    model = lora_around(kind)
    (pair,) = find_pairs(model)
    target(pair, frozen).requires_grad_(False)
    _step_as_the_reference(model, "B" if frozen == "A" else "A")


@pytest.mark.proves("LoRA layers", "an adapter deleted during training")
@pytest.mark.parametrize("onto", ["A", "B", "both"])
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_two_adapters_and_one_deleted(kind: str, onto: str) -> None:
    model = lora_around(kind)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    optimizer = _step_as_the_reference(model.double(), onto)
    assert [pair.name.rsplit(".", 1)[1] for pair in optimizer.pairs] == ["default", "second"]
    default, second = optimizer.pairs
    assert default.active and second.active
    before = {name: average.clone() for name, average in optimizer.averages.items()}
    model.delete_adapter("second")
    assert default.active and not second.active
    clean = weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch_of(model)).backward()
        assert_same_bits(weights(model), clean)
        optimizer.step()
        assert list(optimizer.perturbation_norms) == [default.name]
        clean = weights(model)
    of_second, of_default = (average_names(optimizer, pair) for pair in (second, default))
    assert all(same_bits(optimizer.averages[name], before[name]) for name in of_second)
    assert not any(same_bits(optimizer.averages[name], before[name]) for name in of_default[-1:])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.remove_hooks()
    assert "forward" not in vars(default.layer)


@pytest.mark.parametrize("method", CREATE)
@pytest.mark.parametrize("kind", ["conv2d", "conv3d"])
def test_channels_last_kernels_give_the_same_steps(kind: str, method: str) -> None:
    """Kernels whose memory is in another order."""
    formats = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}
    models = [lora_around(kind), lora_around(kind).to(memory_format=formats[kind])]
    assert not find_pairs(models[1])[0].parameter_A.is_contiguous()
    data = [batch_of(models[0]) for _ in range(3)]
    for onto in ("A", "B") if method != "lora-sam" else ("both",):
        options = {} if onto == "both" else {"onto": onto}
        for model in models:
            optimizer = CREATE[method](model, torch.optim.AdamW, lr=0.05, rho=RHO, **options)
            for x in data:

                def closure(model: nn.Module = model, x: Tensor = x, optimizer: Any = optimizer):
                    optimizer.zero_grad()
                    loss = model(x)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            optimizer.remove_hooks()
        for p, q in zip(*(trainable(model) for model in models), strict=True):
            torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_layers_of_other_dtypes_equal_the_reference(kind: str, dtype: torch.dtype) -> None:
    model, exact = lora_around(kind).to(dtype), lora_around(kind)
    exact.load_state_dict(model.state_dict())
    x = batch_of(model)
    averages = []
    for each in (model, exact):
        optimizer = create_eflat_optimizer(each, torch.optim.AdamW, lr=0.05, rho=RHO)
        for _ in range(2):
            optimizer.zero_grad()
            each(x.to(next(each.parameters()).dtype) if x.is_floating_point() else x).backward()
            optimizer.step()
        averages.append(next(iter(optimizer.averages.values())))
    assert averages[0].dtype == torch.float32
    error = (averages[0] - averages[1]).norm() / averages[1].norm()
    assert float(error) < (1e-4 if dtype == torch.float32 else 0.1)
