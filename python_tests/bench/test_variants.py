"""bench.methods.variants: perturbations of the full weight, computed here independently."""

import copy
from functools import partial

import pytest
import torch
from models import lora_mlp
from torch.nn.functional import cross_entropy

from bench.methods.variants import (
    VARIANTS,
    AveragedLoRASAM,
    FullCarrier,
    FullSAM,
    FullSpaceEFlat,
    RestoredCarrier,
    SketchCarrier,
    TrueCarrier,
)
from eflat_ext import reference
from eflat_ext.lora import find_pairs

LR = {"lr": 0.05, "weight_decay": 0.0}


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (32,), generator=generator)


def make(carrier, seed, **options):
    """Return a model whose base weights have gradients, too, and its optimizer."""
    model = lora_mlp(seed=seed)
    options = {"rho": 0.3, "norm_scope": "layer", **LR, **options}
    optimizer = FullSpaceEFlat(model, carrier, **options)
    for pair in find_pairs(model):
        pair.layer.get_base_layer().weight.requires_grad_()
    return model, optimizer


def step(model, optimizer, seed):
    """Step; return factors, their gradients and the true gradients of the weights at the point."""
    seen = []

    def closure():
        model.zero_grad()
        loss = cross_entropy(model(batch(seed)[0]), batch(seed)[1])
        loss.backward()
        for pair in find_pairs(model):
            G = pair.layer.get_base_layer().weight.grad.clone()
            A, B = (f.detach().clone() for f in (pair.A, pair.B))
            seen.append((A, B, pair.A.grad.clone(), pair.B.grad.clone(), pair.scaling, G))
        return loss

    optimizer.step(closure)
    return seen


def gradients_of(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def perturbations(optimizer):
    return [carrier.U @ carrier.V for carrier in optimizer.carriers]


def unit(X):
    return X / X.norm()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"lora-sam-ema", "full-sam"}))
def test_training_alone_sees_a_perturbation_of_norm_rho(name, scope):
    from eflat_ext.lab.finetune.config import FinetuneConfig

    model = lora_mlp(seed=1)
    config = FinetuneConfig(rho=0.3, norm_scope=scope, lr=0.05)
    optimizer = VARIANTS[name](config, model, 4)
    for seed in range(4):
        step_of = partial(cross_entropy, target=batch(seed)[1])

        def closure(seed=seed, loss_of=step_of):
            optimizer.zero_grad()
            loss = loss_of(model(batch(seed)[0]))
            loss.backward()
            return loss

        optimizer.step(closure)
        E = perturbations(optimizer)
        sizes = torch.stack([e.norm() for e in E])
        if scope == "layer":
            torch.testing.assert_close(sizes, torch.full_like(sizes, 0.3))
        else:
            torch.testing.assert_close(float(sizes.norm()), 0.3)
    x = batch(9)[0]
    clean, perturbed = model.eval()(x), model.train()(x)
    assert (clean - perturbed).abs().max() > 1e-4
    for pair, e in zip(find_pairs(model), E, strict=True):
        pair.layer.get_base_layer().weight.data += e
    torch.testing.assert_close(model.eval()(x), perturbed)


@pytest.mark.parametrize("tangent", [False, True])
def test_full_is_equation_1_and_tangent_the_projection(tangent):
    model, optimizer = make(partial(FullCarrier, beta=0.9, tangent=tangent), 2)
    for seed in range(3):
        for (A, B, grad_A, grad_B, s, G), E in zip(
            step(model, optimizer, seed), perturbations(optimizer), strict=True
        ):
            if tangent:
                rows = torch.linalg.pinv(A) @ A
                columns = B @ torch.linalg.pinv(B)
                expected = G @ rows + columns @ G - columns @ G @ rows
            else:
                expected = reference.full_space_gradient(A, B, grad_A, grad_B, s)
            torch.testing.assert_close(unit(E), unit(expected))


def test_restored_is_the_average_of_equation_3():
    model, optimizer = make(partial(RestoredCarrier, beta=0.4), 3)
    averages = [0.0] * len(optimizer.carriers)
    for seed in range(3):
        seen = step(model, optimizer, seed)
        for k, (A, B, grad_A, grad_B, s, _) in enumerate(seen):
            E, _ = reference.perturb(A, B, grad_A, grad_B, s, 1.0)
            averages[k] = 0.6 * averages[k] + 0.4 * E
            torch.testing.assert_close(unit(perturbations(optimizer)[k]), unit(averages[k] @ A))


def test_a_sketch_of_full_rank_is_the_average_of_the_true_gradient():
    model, optimizer = make(partial(SketchCarrier, beta=0.4, rank=12), 4)
    averages = None
    for seed in range(4):
        gradients = [seen[-1] for seen in step(model, optimizer, seed)]
        if averages is None:
            averages = gradients
        else:
            averages = [0.6 * a + 0.4 * g for a, g in zip(averages, gradients, strict=True)]
        for E, average in zip(perturbations(optimizer), averages, strict=True):
            torch.testing.assert_close(unit(E), unit(average))


def test_a_sketch_follows_the_leading_direction():
    model, optimizer = make(partial(SketchCarrier, beta=1.0, rank=1), 5, lr=0.0)
    for _ in range(60):
        gradients = [seen[-1] for seen in step(model, optimizer, 0)]
    for E, G in zip(perturbations(optimizer), gradients, strict=True):
        U, _, Vh = torch.linalg.svd(G)
        torch.testing.assert_close(unit(E), torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-2)


def test_lora_sam_ema_takes_its_gradient_at_the_average_of_lora_sams_perturbation():
    model = lora_mlp(seed=6)
    optimizer = AveragedLoRASAM(model, rho=0.3, beta=0.4, **LR)
    pairs = find_pairs(model)
    averages = [[torch.zeros_like(f) for f in (p.A, p.B)] for p in pairs]
    for seed in range(3):
        before = [[f.detach().clone() for f in (p.A, p.B)] for p in pairs]
        moved = copy.deepcopy(model)
        for pair, average in zip(find_pairs(moved), averages, strict=True):
            pair.A.data += average[0]
            pair.B.data += average[1]

        def closure(model=model, seed=seed):
            model.zero_grad()
            loss = cross_entropy(model(batch(seed)[0]), batch(seed)[1])
            loss.backward()
            return loss

        expected = closure(moved)
        torch.testing.assert_close(optimizer.step(closure), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients_of(model), gradients_of(moved))
        for pair, old, average in zip(pairs, before, averages, strict=True):
            size = (pair.A.grad.norm() ** 2 + pair.B.grad.norm() ** 2).sqrt()
            E_A, E_B = (0.3 * f.grad / size for f in (pair.A, pair.B))
            for mean, newest in zip(average, (E_A, E_B), strict=True):
                mean.copy_(0.6 * mean + 0.4 * newest)
            # AdamW stepped from the clean factors, by at most its learning rate.
            assert all(
                (f - o).abs().max() < 0.06 for f, o in zip((pair.A, pair.B), old, strict=True)
            )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_full_sam_steps_with_the_gradient_at_the_worst_point_of_its_batch(scope):
    model = lora_mlp(seed=7)
    optimizer = FullSAM(model, TrueCarrier, rho=0.3, norm_scope=scope, **LR)
    weights = [pair.layer.get_base_layer().weight for pair in find_pairs(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for seed in range(3):
        clean = [w.detach().clone() for w in weights]

        def loss_of(seed=seed):
            return cross_entropy(model(batch(seed)[0]), batch(seed)[1])

        for w in weights:
            w.requires_grad_()
        true = torch.autograd.grad(loss_of(), weights)
        sizes = [g.norm() for g in true]
        if scope == "global":
            sizes = [torch.stack(sizes).norm()] * len(sizes)
        for w, g, size in zip(weights, true, sizes, strict=True):
            w.requires_grad_(False)
            w += 0.3 * g / size
        expected = torch.autograd.grad(loss_of(), trained)
        for w, old in zip(weights, clean, strict=True):
            w.copy_(old)
        # The reference's passes went through the hooks, too.
        for carrier in optimizer.carriers:
            carrier.clear()
        calls = []

        def closure(calls=calls, loss_of=loss_of):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            calls.append([p.grad.clone() for p in trained])
            return loss

        optimizer.step(closure)
        assert len(calls) == 2
        torch.testing.assert_close(calls[1], list(expected))
