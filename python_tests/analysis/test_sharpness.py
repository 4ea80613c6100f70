"""Sharpness equals brute force, on models small enough to hold the Hessian and search the ball."""

import copy
import math

import lora_layers
import pytest
import torch
from models import (
    CREATE,
    assert_same_bits,
    lora_bert,
    lora_gpt2,
    lora_mlp,
    loss_of,
    train_on,
    weights,
)
from sharpness_case import DATA, flat, gradient_of, merged, trained_mlp
from torch import nn

from eflat_ext import reference
from eflat_ext.analysis.estimate import estimate_quality
from eflat_ext.analysis.full_space import adapted_layers, gradients, mean_loss, shifted
from eflat_ext.analysis.hessian import hessian
from eflat_ext.analysis.landscape import random_direction
from eflat_ext.analysis.sharpness import average_case, transferred_direction, worst_case

# --- gradients and shifts ----------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 2**30], ids=["one layer a pass", "all in one pass"])
def test_the_gradient_equals_that_of_the_merged_weights(memory):
    model = trained_mlp()
    layers = adapted_layers(model)
    passes = []
    found, _ = gradients(
        model, loss_of, DATA, layers, memory=memory, on_pass=lambda *n: passes.append(n)
    )
    W, loss = merged(model)
    expected = torch.autograd.functional.jacobian(loss, W)
    torch.testing.assert_close(flat(found.values()), expected, rtol=1e-9, atol=1e-13)
    assert passes == ([(1, 2), (2, 2)] if memory == 1 else [(1, 1)])


@pytest.mark.parametrize("kind", lora_layers.KINDS)
def test_gradient_weight_and_shift_are_right_for_every_kind_of_layer(kind):
    model = lora_layers.lora_around(kind, seed=3)
    batch = lora_layers.batch_of(model)

    def loss_fn(model, batch):
        return model(batch)

    (layer,) = adapted_layers(model)
    gradient = gradients(model, loss_fn, [batch], [layer])[0][layer.name]
    lora = next(m for m in model.modules() if hasattr(m, "lora_A"))
    base = lora.get_base_layer()
    base.weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(model.eval()(batch), base.weight)
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(gradient, lora_layers.weight_matrix(lora, expected), **close)
    delta = lora.get_delta_weight("default")
    W = lora_layers.weight_matrix(lora, base.weight + delta)
    torch.testing.assert_close(layer.weight(), W, **close)
    # The shift changes the loss as if it had been written into the weight.
    D = torch.randn(layer.shape, dtype=torch.float64)
    if getattr(base, "padding_idx", None) is not None:
        D[:, base.padding_idx] = 0
    shifted_loss = mean_loss(model, loss_fn, [batch], [layer], {layer.name: lambda: D})
    shape = base.weight.shape
    with torch.no_grad():
        base.weight += D.T if isinstance(base, nn.Embedding) else D.view(shape)
    assert shifted_loss == pytest.approx(mean_loss(model, loss_fn, [batch]), rel=1e-9)


def test_factor_gradients_are_projections_of_the_gradient():
    """G_A = s B^T G_W and G_B = s G_W A^T, also with attention and transposed weights."""
    tokens = torch.randint(1, 40, (6, 9))
    cases = [
        (lora_bert(), lambda model, x: model(x).logits.square().mean()),
        (lora_gpt2(), lambda model, x: model(x, labels=x).loss),
    ]
    for model, loss_fn in cases:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3)
        layers = adapted_layers(model.double())
        pairs = [layer.pairs[0] for layer in layers]
        whole, factors = gradients(model, loss_fn, [tokens], layers, pairs)
        for layer, pair, (grad_A, grad_B) in zip(layers, pairs, factors, strict=True):
            G, s = whole[layer.name], pair.scaling
            assert G.any()
            torch.testing.assert_close(grad_A, s * pair.B.T @ G, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(grad_B, s * G @ pair.A.T, rtol=1e-7, atol=1e-12)


def test_shifts_are_not_rounded_to_bfloat16_weights():
    model = lora_mlp().to(torch.bfloat16)
    layers = adapted_layers(model)
    layer = layers[0]
    W = layer.weight()
    D = 1e-4 * W
    assert torch.equal((W.bfloat16() + D.bfloat16()).float(), W.bfloat16().float())
    x = torch.ones(1, 12, dtype=torch.float32)
    assert torch.allclose(layer.term(x, D), 1e-4 * x @ W.T)


# --- worst and average case --------------------------------------------------------------


def ascent(loss, W, rho, steps=400):
    """Return the largest loss in the ball by projected gradient ascent from several starts."""
    best = -math.inf
    gradient = torch.autograd.functional.jacobian(loss, W)
    for start in (gradient, -gradient, *torch.randn(3, *W.shape, dtype=W.dtype)):
        E = rho * start / start.norm()
        for _ in range(steps):
            g = torch.autograd.functional.jacobian(loss, W + E)
            # The fixed point of this step is where the gradient is normal to the sphere.
            step = E + rho * g / g.norm()
            E = rho * step / step.norm()
        best = max(best, float(loss(W + E) - loss(W)))
    return best


@pytest.mark.parametrize("rho", [0.01, 0.1])
def test_worst_case_is_within_its_bound_of_a_search_of_the_ball(rho):
    model = trained_mlp()
    W, loss = merged(model)
    found = worst_case(model, loss_of, DATA, rho, norm_scope="global")
    best = ascent(loss, W, rho, steps=60)
    H = torch.autograd.functional.hessian(loss, W)
    values = torch.linalg.eigvalsh(H)
    stated = rho**2 * float(values[-1] - values[0]) / 2
    assert 0 < found <= best * (1 + 1e-6)
    assert best - found <= stated * 1.1
    # It is the rise at exactly that point.
    g = torch.autograd.functional.jacobian(loss, W)
    assert found == pytest.approx(float(loss(W + rho * g / g.norm()) - loss(W)), rel=1e-8)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("radius", ["absolute", "layer", "filter"])
def test_no_point_of_a_ball_is_worse_to_first_order_for_any_radius(scope, radius):
    """For every unit of the radius and both norm scopes."""
    model = trained_mlp()
    layers, gradient = gradient_of(model)
    rho = 1e-4
    found = worst_case(model, loss_of, DATA, rho, norm_scope=scope, radius=radius)
    rows = [
        (g, w) if radius == "filter" else (g.flatten(), w.flatten())
        for g, w in zip(gradient.values(), [x.weight() for x in layers], strict=True)
    ]
    # The largest inner product of G with a point of the ball: norms of G times the radii.
    parts = flat(
        [
            (g.norm(dim=-1) * (w.norm(dim=-1) if radius != "absolute" else 1.0)).view(-1)
            for g, w in rows
        ]
    )
    first_order = rho * float(parts.norm() if scope == "global" else parts.sum())
    assert found == pytest.approx(first_order, rel=1e-2)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ["A", "B"])
def test_the_transfer_equals_the_papers(scope, onto):
    model = trained_mlp()
    layers, gradient = gradient_of(model)
    pairs = [layer.pairs[0] for layer in layers]
    A, B, s = [p.A for p in pairs], [p.B for p in pairs], [p.scaling for p in pairs]
    grad_A = [p.scaling * p.B.T @ g for p, g in zip(pairs, gradient.values(), strict=True)]
    grad_B = [p.scaling * g @ p.A.T for p, g in zip(pairs, gradient.values(), strict=True)]
    E, _ = reference.foreach_perturb(A, B, grad_A, grad_B, s, 0.3, onto, scope)
    clean = mean_loss(model, loss_of, DATA)
    before = weights(model)
    found = worst_case(model, loss_of, DATA, 0.3, norm_scope=scope, transfer=onto)
    assert_same_bits(weights(model), before)
    with torch.no_grad():
        for pair, e in zip(pairs, E, strict=True):
            (pair.parameter_B if onto == "B" else pair.parameter_A).add_(e)
    assert found == pytest.approx(mean_loss(model, loss_of, DATA) - clean, rel=1e-6)


def test_the_transfer_scales_with_layer_radii():
    model = trained_mlp()
    layers = adapted_layers(model)
    plain = transferred_direction(model, loss_of, DATA, layers)
    scaled = transferred_direction(model, loss_of, DATA, layers, radius="layer")
    for layer in layers:
        expected = plain[layer.name]() * layer.weight().norm()
        torch.testing.assert_close(scaled[layer.name](), expected, rtol=1e-9, atol=1e-12)


def test_the_average_case_rises_by_the_trace():
    model = trained_mlp()
    W, loss = merged(model)
    trace = float(torch.autograd.functional.hessian(loss, W).trace())
    rho = 0.01  # so small that without opposite pairs the slope would hide the curvature
    found = average_case(model, loss_of, DATA, rho, samples=100, norm_scope="global", seed=5)
    expected = rho**2 * trace / (2 * W.numel())
    assert abs(found.mean - expected) < 4 * found.standard_error + 0.02 * abs(expected)
    assert 0 < found.standard_error < 0.3 * abs(expected)
    again = average_case(model, loss_of, DATA, rho, samples=100, norm_scope="global", seed=5)
    assert again == found
    assert average_case(model, loss_of, DATA, rho, samples=2, seed=6) != average_case(
        model, loss_of, DATA, rho, samples=2, seed=7
    )


def test_weights_modes_gradients_and_hooks_are_left_as_they_were():
    model = trained_mlp()
    model.train()
    model.base_model.model.head.eval()
    next(model.parameters()).requires_grad_(False)
    before, modes = weights(model), [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    worst_case(model, loss_of, DATA, 0.1)
    worst_case(model, loss_of, DATA, 0.1, transfer="B")
    average_case(model, loss_of, DATA, 0.1, samples=2, radius="filter")
    estimate_quality(model, loss_of, DATA)

    def fails(model, batch):
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        worst_case(model, fails, DATA, 0.1)
    assert_same_bits(weights(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


INSTRUMENTS = {
    "weights": lambda m: [layer.weight().tolist() for layer in adapted_layers(m)],
    "worst case": lambda m: worst_case(m, loss_of, DATA, 0.3, radius="filter"),
    "transfer": lambda m: worst_case(m, loss_of, DATA, 0.3, radius="layer", transfer="B"),
    "average case": lambda m: average_case(
        m, loss_of, DATA, 0.3, samples=2, radius="filter", clean_loss=1.0
    ),
    "estimate": lambda m: estimate_quality(m, loss_of, DATA),
    "random direction": lambda m: [
        shift().tolist() for shift in random_direction(adapted_layers(m)).values()
    ],
}


@pytest.mark.parametrize("instrument", INSTRUMENTS.values(), ids=INSTRUMENTS)
@pytest.mark.parametrize("method", CREATE)
def test_clean_weights_are_measured_in_the_middle_of_a_step(method, instrument):
    """The step afterwards has the same bits as without measuring."""

    def trained(measuring):
        model = lora_mlp()
        optimizer = CREATE[method](model, torch.optim.AdamW, lr=0.03, rho=0.3)
        train_on(model, optimizer, DATA)
        clean, expected = weights(model), instrument(model)
        optimizer.zero_grad()
        loss_of(model, DATA[0]).backward()
        if method != "eflat":
            optimizer.first_step()
            loss_of(model, DATA[0]).backward()
        assert_same_bits(weights(model), clean)
        # The model is in training mode: its own passes are perturbed.
        assert abs(float(loss_of(model, DATA[0])) - mean_loss(model, loss_of, DATA[:1])) > 1e-3
        if measuring:
            assert instrument(model) == expected
        optimizer.step()
        return weights(model)

    assert_same_bits(trained(True), trained(False))


def test_zero_gradients_rise_by_nothing_and_nan_losses_give_nan():
    model = trained_mlp()

    def constant(model, batch):
        return 0 * loss_of(model, batch)

    def broken(model, batch):
        return math.nan * loss_of(model, batch)

    for radius in ("absolute", "layer", "filter"):
        assert worst_case(model, constant, DATA, 0.1, radius=radius) == 0
    assert worst_case(model, constant, DATA, 0.1, transfer="B") == 0
    assert math.isnan(worst_case(model, broken, DATA, 0.1))
    for value in (math.nan, math.inf):
        assert all(map(math.isnan, average_case(model, broken, DATA, 0.1, clean_loss=value)))
    for loss_fn in (constant, broken):
        assert all(math.isnan(row.cosine) for row in estimate_quality(model, loss_fn, DATA))


def test_layers_of_a_model_without_lora_are_found_by_name():
    model = trained_mlp()
    plain = copy.deepcopy(model).merge_and_unload()
    whole = worst_case(plain, loss_of, DATA, 0.1, layers=["up", "down"])
    assert whole == pytest.approx(worst_case(model, loss_of, DATA, 0.1), rel=1e-8)
    assert worst_case(model, loss_of, DATA, 0.1, layers=["up"]) < whole


# --- errors ------------------------------------------------------------------------------

WRONG = [
    ({"rho": -0.1}, ValueError, "rho"),
    ({"rho": math.nan}, ValueError, "rho"),
    ({"rho": "much"}, TypeError, "rho"),
    ({"norm_scope": "all"}, ValueError, "norm_scope"),
    ({"radius": "relative"}, ValueError, "radius"),
    ({"layers": ["sideways"]}, ValueError, r"layers must .* \(up, down\), got \['sideways'\]"),
    ({"layers": "up"}, TypeError, "layers must be a list"),
    ({"batches": []}, ValueError, "batches"),
    ({"batches": iter(DATA)}, TypeError, "batches"),
    ({"transfer": "C"}, ValueError, "onto"),
    ({"transfer": "B", "radius": "filter"}, ValueError, "filter"),
    ({"transfer": "B", "rtol": 2.0}, ValueError, "rtol"),
]


@pytest.mark.parametrize(("given", "error", "word"), WRONG)
def test_wrong_arguments_are_named(given, error, word):
    arguments = {"model": lora_mlp(), "loss_fn": loss_of, "batches": DATA, "rho": 0.1} | given
    with pytest.raises(error, match=word):
        worst_case(**arguments)


def test_other_wrong_arguments_are_named():
    model = lora_mlp()
    with pytest.raises(ValueError, match="samples"):
        average_case(model, loss_of, DATA, 0.1, samples=1)
    with pytest.raises(ValueError, match="space"):
        hessian(model, loss_of, DATA, space="half")
    with pytest.raises(ValueError, match="product"):
        hessian(model, loss_of, DATA, product="rough")
    with pytest.raises(ValueError, match="eigenvalues"):
        hessian(model, loss_of, DATA, eigenvalues=0)
    with pytest.raises(ValueError, match="LoRA layers"):
        worst_case(nn.Linear(3, 2), loss_of, DATA, 0.1)
    with pytest.raises(ValueError, match=r"must return shape \(16, 12\)"):
        layers = adapted_layers(model)
        with shifted(layers, {"up": lambda: torch.zeros(3, 3)}):
            loss_of(model, DATA[0])
    attention = lora_layers.get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2)),
        lora_layers.LoraConfig(r=2, target_modules=["0"]),
    )
    with pytest.raises(NotImplementedError, match="MultiheadAttention"):
        adapted_layers(attention)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_bases_are_measured_as_their_dequantised_copies(kind):
    """A shift has the effect that it has on the dequantised copy."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    options = {"Linear4bit": {"quant_type": "nf4"}, "Linear8bitLt": {"has_fp16_weights": False}}
    plain = nn.Linear(64, 32)
    layer = getattr(bnb.nn, kind)(64, 32, **options[kind])
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    if kind == "Linear4bit":
        W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        W = bnb.functional.int8_vectorwise_dequant(
            *bnb.functional.int8_vectorwise_quant(plain.weight.detach().half())[:2]
        ).float()
    assert W.shape == (32, 64) and not torch.equal(W, plain.weight)
    x = torch.randn(8, 64)
    config = lora_layers.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = lora_layers.get_peft_model(nn.Sequential(layer, nn.Tanh(), nn.Linear(32, 3)), config)
    data = [(x, torch.randint(0, 3, (8,)))]
    model.eval()
    before = weights(model)
    found = worst_case(model, loss_of, data, 0.5, radius="filter")
    assert_same_bits(weights(model), before)
    (one,) = adapted_layers(model)
    delta = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(one.weight(), (W + delta).detach(), rtol=1e-3, atol=1e-3)

    # The same weights, unquantised.
    twin = lora_layers.get_peft_model(nn.Sequential(plain, nn.Tanh(), nn.Linear(32, 3)), config)
    state = {name: p for name, p in model.state_dict().items() if "base_layer.weight" not in name}
    twin.load_state_dict(state, strict=False)
    with torch.no_grad():
        twin.base_model.model[0].base_layer.weight.copy_(W)
    # bitsandbytes rounds activations too, to 8 bits for Linear8bitLt.
    expected = worst_case(twin, loss_of, data, 0.5, radius="filter")
    assert found == pytest.approx(expected, rel=0.05)
    assert expected > 0.01
