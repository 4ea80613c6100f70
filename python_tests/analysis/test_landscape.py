"""Slices equal the losses of a model with the shifts written into its weights; figures."""

import copy
import math

import pytest
import torch
from models import (
    Mlp,
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    train_on,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from eflat_ext import create_eflat_optimizer
from eflat_ext.analysis.full_space import adapted_layers, mean_loss
from eflat_ext.analysis.landscape import (
    hessian_directions,
    line,
    random_direction,
    slice_1d,
    slice_2d,
)
from eflat_ext.lab.measure.landscape_figure import LandscapeConfig, draw
from eflat_ext.lab.measure.trained_models import Trained

DATA = batches(2)


def random_model(seed, rank=4):
    """Return a model with random factors and its own head, on the base weights of seed 0."""
    model = lora_mlp(r=rank, lora_alpha=2 * rank)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "base_layer" not in name:
                p.normal_(std=0.3)
    return model


def loss_at(model, shifts):
    """Return the loss of a copy with the shifts written into its base weights."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, D in shifts.items():
            getattr(moved.base_model.model, name).base_layer.weight.add_(D)
    return mean_loss(moved, loss_of, DATA)


def test_slices_equal_losses_at_written_weights():
    model = random_model(1)
    layers = adapted_layers(model)
    first, second = random_direction(layers, 3), random_direction(layers, 4)
    before = weights(model)
    xs, ys = [-0.7, 0.0, 0.4], [0.0, 0.6]
    points = []
    grid = slice_2d(
        model, loss_of, DATA, (first, second), xs, ys, on_point=lambda: points.append(1)
    )
    for y, row in zip(ys, grid, strict=True):
        for x, value in zip(xs, row, strict=True):
            shifts = {name: x * first[name]() + y * second[name]() for name in first}
            assert value == pytest.approx(loss_at(model, shifts), rel=1e-10)
    assert len(points) == 6
    assert slice_1d(model, loss_of, DATA, first, xs) == grid[0]
    assert grid[0][1] == pytest.approx(mean_loss(model, loss_of, DATA), rel=1e-14)
    assert_same_bits(weights(model), before)


def test_random_directions_have_the_norms_of_rows_and_follow_the_seed():
    model = random_model(1)
    layers = adapted_layers(model)
    one, same, other = (random_direction(layers, seed) for seed in (5, 5, 6))
    for layer in layers:
        D = one[layer.name]()
        torch.testing.assert_close(D.norm(dim=1), layer.weight().norm(dim=1))
        assert torch.equal(D, same[layer.name]())
        assert not torch.equal(D, other[layer.name]())


def test_the_loss_along_an_eigenvector_rises_by_its_eigenvalue():
    hessian = pytest.importorskip("eflat_ext.hessian")
    pytest.importorskip("hessian_eigenthings")
    model = random_model(2)
    first, second = hessian_directions(model, loss_of, DATA, 2)
    inner = sum(float((first[name]() * second[name]()).sum()) for name in first)
    norm = math.sqrt(sum(float(first[name]().square().sum()) for name in first))
    assert norm == pytest.approx(1) and abs(inner) < 1e-6
    x = 1e-2
    low, middle, high = slice_1d(model, loss_of, DATA, first, [-x, 0.0, x])
    options = {"eigenvalues": 2, "trace_products": 0}
    value = hessian.hessian(model, loss_of, DATA, **options).eigenvalues[0]
    assert (low + high - 2 * middle) / x**2 == pytest.approx(value, rel=1e-3)


def test_a_line_joins_models_that_differ_in_rank_and_head():
    model, other = random_model(1), random_model(2, rank=3)
    before, theirs = weights(model), weights(other)
    ends = line(model, other, loss_of, DATA, [0.0, 1.0])
    assert ends[0] == pytest.approx(mean_loss(model, loss_of, DATA), rel=1e-10)
    assert ends[1] == pytest.approx(mean_loss(other, loss_of, DATA), rel=1e-10)
    assert ends[0] != pytest.approx(ends[1], rel=1e-3)
    assert_same_bits(weights(model), before)
    assert_same_bits(weights(other), theirs)
    # At x = 0.5 everything that was trained is halfway between the models.
    plain, goal = (copy.deepcopy(m).merge_and_unload() for m in (model, other))
    with torch.no_grad():
        for p, q in zip(plain.parameters(), goal.parameters(), strict=True):
            p.lerp_(q, 0.5)
    half = line(model, other, loss_of, DATA, [0.5])
    assert half == pytest.approx([mean_loss(plain, loss_of, DATA)], rel=1e-10)


def test_a_line_interpolates_the_statistics_of_batch_norm():
    class Normed(Mlp):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 3))

    torch.manual_seed(0)
    base = Normed()
    lora = LoraConfig(r=4, target_modules=["up", "down"])
    model, other = (get_peft_model(copy.deepcopy(base), lora).double() for _ in range(2))
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    train_on(other, optimizer, DATA)
    before, theirs = copy.deepcopy((model.state_dict(), other.state_dict()))
    ends = line(model, other, loss_of, DATA, [0.0, 1.0])
    assert ends[0] == pytest.approx(mean_loss(model, loss_of, DATA), rel=1e-10)
    assert ends[1] == pytest.approx(mean_loss(other, loss_of, DATA), rel=1e-10)
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(other.state_dict(), theirs)


def test_a_line_in_the_middle_of_an_optimizer_step_joins_clean_weights():
    """The weights are clean afterwards, too, also those of layers that the line leaves out."""
    models = [random_model(seed) for seed in (1, 2)]
    optimizers = [create_eflat_optimizer(m, torch.optim.SGD, lr=0.1, rho=0.5) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_on(model, optimizer, DATA)
    before = [weights(model) for model in models]
    expected = line(*models, loss_of, DATA, [0.3], layers=["up"])
    for model in models:
        loss = loss_of(model, DATA[0])
        loss.backward()
        assert abs(float(loss.detach()) - mean_loss(model, loss_of, DATA[:1])) > 1e-3
    assert line(*models, loss_of, DATA, [0.3], layers=["up"]) == expected
    for model, clean in zip(models, before, strict=True):
        assert_same_bits(weights(model), clean)


def with_classes(count):
    class Other(Mlp):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, count)

    lora = LoraConfig(r=4, target_modules=["up", "down"], modules_to_save=["head"])
    return get_peft_model(Other(), lora).double()


def test_models_that_differ_otherwise_are_refused():
    with pytest.raises(ValueError, match="same layers"):
        line(lora_mlp(), lora_mlp(target_modules=["up"]), loss_of, DATA, [0.0])
    # A head with one class would be broadcast.
    for count in (1, 2, 5):
        model, other = lora_mlp(), with_classes(count)
        before = weights(model)
        shapes = rf"head.*weight of other must have shape \(3, 10\), got \({count}, 10\)"
        with pytest.raises(ValueError, match=shapes):
            line(model, other, loss_of, DATA, [0.0])
        assert_same_bits(weights(model), before)
    with pytest.raises(
        ValueError, match=r".*down\.lora_A.* of other must have shape \(4, 16\), got \(3, 16\)"
    ):
        line(lora_mlp(), lora_mlp(r=3), loss_of, DATA, [0.0], layers=["up"])
    odd = lora_mlp()
    odd.register_buffer("statistics", torch.zeros(2))
    with pytest.raises(ValueError, match="same parameters and buffers"):
        line(lora_mlp(), odd, loss_of, DATA, [0.0])


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize(
    ("directions", "dimensions"),
    [("random", 1), ("random", 2), ("hessian", 1), ("hessian", 2), ("line", 1)],
)
def test_figures_are_named_and_svg_has_the_same_bytes(tmp_path, directions, dimensions, suffix):
    path = tmp_path / f"figure.{suffix}"
    config = LandscapeConfig(directions=directions, dimensions=dimensions, output=path)
    xs = [-1.0, 0.0, 1.0]
    rows = [
        {"run": f"{method}, seed {seed}", "method": method, "seed": seed, "sample": 0}
        | {"x": x, "y": y, "loss": seed + x**2 + y**2 if x < 1 else math.nan}
        for method in ("eflat", "adapter")
        for seed in (0, 1)
        for y in (xs if dimensions == 2 else [0.0])
        for x in xs
    ]
    origin = Trained(tmp_path, "lora, seed 0", "lora", 0)
    draw(rows, config, origin)
    assert path.stat().st_size > 5000
    if suffix == "svg":
        text = path.read_text()
        assert "EFlat-LoRA" in text and "training loss (nats)" in text
        if directions == "line":
            assert "from LoRA to" in text
        first = path.read_bytes()
        draw(rows, config, origin)
        assert path.read_bytes() == first


def test_a_rise_starts_at_zero(tmp_path):
    path = tmp_path / "figure.svg"
    rows = [
        {"run": run, "method": "adapter", "seed": None, "sample": 0, "y": 0.0, "x": x}
        | {"loss": base + 0.5 * x**2}
        for run, base in (("one", 3.0), ("two", 5.0))
        for x in (-1.0, 0.0, 1.0)
    ]
    origin = Trained(tmp_path, "one", "adapter")
    ticks = {}
    for rise in (False, True):
        draw(rows, LandscapeConfig(output=path, points=3, rise=rise), origin)
        ticks[rise] = path.read_text()
    assert ">rise of the training loss (nats)<" in ticks[True]
    assert ">5.0<" in ticks[False] and ">5.0<" not in ticks[True]
