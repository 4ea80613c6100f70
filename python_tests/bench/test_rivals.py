"""bench.methods.rivals take the steps of their papers, computed here independently."""

import csv
import math

import pytest
import torch
import yaml
from models import lora_mlp
from tiny_model import make_rows, save_tiny_model, write_csv
from torch.nn.functional import cross_entropy

from bench.methods.rivals import RIVALS, BiLoRA, RandomFlatLoRA, deviation
from eflat_ext.lab.experiment import runner
from eflat_ext.lora import find_pairs

LR = {"lr": 0.05, "weight_decay": 0.0}


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def closure_of(optimizer, model, x, y, seen=None):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if seen is not None:
            seen.append([base_weight(pair).clone() for pair in find_pairs(model)])
        return loss

    return closure


def base_weight(pair):
    return pair.layer.get_base_layer().weight.detach()


def flat(pairs):
    return [factor for pair in pairs for factor in pair]


def mlp(weights, biases, head, x):
    """Run the forward pass of models.Mlp with these full weights of its first two layers."""
    hidden = torch.tanh(x @ weights[0].T + biases[0])
    hidden = torch.tanh(hidden @ weights[1].T + biases[1])
    return hidden @ head[0].T + head[1]


def parts_of(model):
    """Return copies that require gradients: factors by pair, the head, and the biases."""
    pairs = find_pairs(model)
    factors = [[f.detach().clone().requires_grad_() for f in (p.A, p.B)] for p in pairs]
    head = [p.detach().clone().requires_grad_() for n, p in model.named_parameters() if "head" in n]
    head = head[-2:]  # the trained copy, not the original
    biases = [pair.layer.get_base_layer().bias.detach() for pair in pairs]
    return pairs, factors, head, biases


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_random_flat_takes_its_gradient_at_noisy_weights(rho):
    steps = 6
    model = lora_mlp(seed=1)
    torch.manual_seed(5)
    optimizer = RandomFlatLoRA(model, rho=rho, steps=steps, **LR)
    pairs, factors, head, biases = parts_of(model)
    clean = [base_weight(pair).clone() for pair in pairs]
    expected = torch.optim.AdamW([*flat(factors), *head], **LR)
    for step in range(steps):
        x, y = batch(step)
        scale = [deviation(pair) for pair in pairs]
        seen = []
        loss = optimizer.step(closure_of(optimizer, model, x, y, seen))
        noise = [noisy - weight for noisy, weight in zip(seen[0], clean, strict=True)]
        rise = rho * (1 - math.cos(math.pi * step / steps)) / 2
        for n, own in zip(noise, scale, strict=True):
            if step == 0:
                assert n.norm() == 0
            else:
                assert 0.7 < (n / (rise * own)).std() < 1.3
        weights = [
            w + n + pair.scaling * B @ A
            for w, n, pair, (A, B) in zip(clean, noise, pairs, factors, strict=True)
        ]
        expected.zero_grad()
        reference = cross_entropy(mlp(weights, biases, head, x), y)
        reference.backward()
        expected.step()
        torch.testing.assert_close(loss.detach(), reference.detach())
    for pair, weight, (A, B) in zip(pairs, clean, factors, strict=True):
        torch.testing.assert_close(pair.A, A)
        torch.testing.assert_close(pair.B, B)
        assert torch.equal(base_weight(pair), weight)


def test_noise_writes_no_weight_and_an_error_takes_it_away():
    model = lora_mlp(seed=1)
    optimizer = RandomFlatLoRA(model, rho=1.0, steps=2, **LR)
    optimizer.step(closure_of(optimizer, model, *batch(0)))
    layers = [pair.layer.get_base_layer() for pair in find_pairs(model)]
    clean = [layer.weight.clone() for layer in layers]

    def fails():
        for layer, weight in zip(layers, clean, strict=True):
            assert (layer.weight - weight).norm() > 0.1
            assert torch.equal(layer._parameters["weight"], weight)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert all(torch.equal(*both) for both in zip((x.weight for x in layers), clean, strict=True))


def test_the_noise_of_each_row_follows_its_norm():
    model = lora_mlp(seed=2)
    for pair in find_pairs(model):
        pair.parameter_B.data.normal_()
        W = base_weight(pair) + pair.scaling * pair.B.detach() @ pair.A.detach()
        expected = torch.stack([row.norm() / math.sqrt(len(row)) for row in W])
        torch.testing.assert_close(deviation(pair).detach()[:, 0], expected)


def test_noise_differs_by_step_and_by_seed():
    drawn = []
    for seed in (1, 2):
        model = lora_mlp(seed=3)
        torch.manual_seed(seed)
        optimizer = RandomFlatLoRA(model, rho=1.0, steps=4, **LR)
        seen = []
        for step in range(4):
            optimizer.step(closure_of(optimizer, model, *batch(step), seen))
        drawn += [weights[0] for weights in seen[1:]]
    for i, a in enumerate(drawn):
        assert all((a - b).norm() > 0.1 for b in drawn[:i])


@pytest.mark.parametrize("rho", [0.05, 100.0])
def test_bi_lora_descends_and_ascends_on_one_gradient(rho):
    model = lora_mlp(seed=4)
    optimizer = BiLoRA(model, rho=rho, **LR)
    pairs, factors, head, biases = parts_of(model)
    auxiliary = [
        [f.detach().clone().requires_grad_() for f in (a.A, a.B)] for a in optimizer.auxiliary
    ]
    descending = torch.optim.AdamW([*flat(factors), *head], **LR)
    ascending = torch.optim.AdamW(flat(auxiliary), **LR)
    clipped = 0
    for step in range(8):
        x, y = batch(step)
        loss = optimizer.step(closure_of(optimizer, model, x, y))
        weights = [
            base_weight(pair) + pair.scaling * (B1 @ A1 + B2 @ A2)
            for pair, (A1, B1), (A2, B2) in zip(pairs, factors, auxiliary, strict=True)
        ]
        descending.zero_grad()
        ascending.zero_grad()
        reference = cross_entropy(mlp(weights, biases, head, x), y)
        reference.backward()
        for factor in flat(auxiliary):
            factor.grad.neg_()
        descending.step()
        ascending.step()
        with torch.no_grad():
            products = [
                pair.scaling * B2 @ A2 for pair, (A2, B2) in zip(pairs, auxiliary, strict=True)
            ]
            norm = math.sqrt(sum(float(product.square().sum()) for product in products))
            if norm > rho:
                clipped += 1
                for factor in flat(auxiliary):
                    factor.mul_(math.sqrt(rho / norm))
        torch.testing.assert_close(loss.detach(), reference.detach())
    assert (clipped > 0) == (rho < 1)
    for pair, (A, B), own, (A2, B2) in zip(
        pairs, factors, optimizer.auxiliary, auxiliary, strict=True
    ):
        for actual, wanted in ((pair.A, A), (pair.B, B), (own.A, A2), (own.B, B2)):
            torch.testing.assert_close(actual, wanted)
    total = math.sqrt(sum(float(own.squared_norm().detach()) for own in optimizer.auxiliary))
    assert total <= rho * (1 + 1e-12) and total > 0


def test_bi_loras_auxiliary_adapter_is_no_part_of_the_model():
    model = lora_mlp(seed=5)
    x, _ = batch(0)
    before = {name: value.shape for name, value in model.state_dict().items()}
    optimizer = BiLoRA(model, rho=10.0, **LR)
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, *batch(step)))
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    pairs, factors, head, biases = parts_of(model)
    weights = [
        base_weight(pair) + pair.scaling * B @ A
        for pair, (A, B) in zip(pairs, factors, strict=True)
    ]
    torch.testing.assert_close(model.eval()(x), mlp(weights, biases, head, x))
    assert (model.train()(x) - mlp(weights, biases, head, x)).abs().max() > 1e-3


def test_rivals_run_as_methods_of_an_experiment(tmp_path):
    content = {
        "settings": {
            "model": save_tiny_model(tmp_path / "model"),
            "data": write_csv(tmp_path / "data.csv", make_rows(200)),
            "max_length": 32,
            "steps": 12,
            "lr": 0.03,
            "device": "cpu",
        },
        "tasks": {"words": {"train_size": 32}},
        "methods": {"lora": {}, "random-flat": {"rho": 0.5}, "bi-lora": {"rho": 0.5}},
        "seeds": [0],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with runner.run(path, methods=RIVALS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    assert len({row["loss"] for row in rows}) == 3
