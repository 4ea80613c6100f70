"""The optimizers with accumulation, gradient scaler, clipping, compile and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    assert_same_bits,
    at_points,
    batches,
    lora_gpt2,
    lora_mlp,
    loss_of,
    same_bits,
    train_on,
    trainable,
    weights,
    without_dropout,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eflat_ext import (
    EFlatLoRA,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

TWO_GRADIENTS = [create_flat_optimizer, create_lora_sam_optimizer]


@pytest.mark.proves("Plain loops", "accumulated gradients belong to one perturbed point")
def test_accumulated_gradients_belong_to_one_point() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=0.5)
    points, sums = [], []
    for start in (0, 3):
        clean = weights(model)
        optimizer.zero_grad()
        for batch in batches(6)[start : start + 3]:
            loss_of(model, batch).backward()
            with at_points(optimizer):
                points.append(weights(model))
        sums.append([p.grad.clone() for p in trainable(model)])
        optimizer.step()
    for start in (0, 3):
        assert_same_bits(points[start], points[start + 1])
        assert_same_bits(points[start], points[start + 2])
    assert not all(same_bits(points[3][name], clean[name]) for name in clean)
    # The same gradient from a plain copy of the perturbed model.
    other = lora_mlp()
    other.load_state_dict(points[3], strict=False)
    for batch in batches(6)[3:]:
        loss_of(other, batch).backward()
    for p, total in zip(trainable(other), sums[1], strict=True):
        assert same_bits(p.grad, total)


def overflowing(step: int) -> bool:
    return step in (0, 3, 4)


def scaled_run(create: Callable, steps: int = 8) -> tuple[nn.Module, Any, list[int]]:
    """Train with a gradient scaler; the gradients of some steps overflow."""
    model = lora_mlp(torch.float32)
    optimizer = create(model, torch.optim.AdamW, lr=1e-2, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    skipped = []
    for step, batch in enumerate(batches(steps, torch.float32)):
        optimizer.zero_grad()
        if not isinstance(optimizer, EFlatLoRA):
            scaler.scale(loss_of(model, batch)).backward()
            optimizer.first_step()
        scaler.scale(loss_of(model, batch)).backward()
        averages = getattr(optimizer, "averages", {})
        before = weights(model) | {name: average.clone() for name, average in averages.items()}
        if overflowing(step):
            trainable(model)[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        after = weights(model) | averages
        if all(same_bits(after[name], before[name]) for name in after):
            skipped.append(step)
    return model, optimizer, skipped


@pytest.mark.parametrize("create", [create_eflat_optimizer, *TWO_GRADIENTS])
def test_steps_that_overflow_are_as_if_left_out(create: Callable) -> None:
    """The other steps equal a run without scaler over their batches alone."""
    model, optimizer, skipped = scaled_run(create)
    assert skipped == [0, 3, 4]
    assert int(optimizer.skipped_perturbations) == 0
    other = lora_mlp(torch.float32)
    plain = create(other, torch.optim.AdamW, lr=1e-2, rho=0.1)
    kept = [b for step, b in enumerate(batches(8, torch.float32)) if not overflowing(step)]
    train_on(other, plain, kept)
    # Scaling by powers of two is exact, up to the rounding of E for the scaled gradient.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("Plain loops", "clipping does not change the perturbation")
def test_gradient_clipping_leaves_the_perturbation_alone() -> None:
    averages = []
    for clip in (None, 1e-3):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.0)
        loss_of(model, batches(1)[0]).backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        averages.append(optimizer.averages)
    for name in averages[0]:
        torch.testing.assert_close(averages[0][name], averages[1][name], rtol=1e-10, atol=0)


@pytest.mark.proves("Plain loops", "`torch.compile` of the model, in one graph")
@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_compiled_model_equals_eager(onto: str) -> None:
    """With a radius schedule, accumulation and evaluation; no graph break, no recompilation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=1e-2, onto=onto, rho=lambda step: 0.05 + 0.01 * step
        )
        run = model
        if compiled:
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
        outputs = []
        for first, second in zip(batches(12)[::2], batches(12)[1::2], strict=True):
            optimizer.zero_grad()
            for batch in (first, second):
                outputs.append(loss_of(run, batch))
                outputs[-1].backward()
            optimizer.step()
            model.eval()
            outputs.append(run(first[0]))
            model.train()
        results.append([t.detach() for t in outputs] + list(weights(model).values()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-9, atol=1e-12)
    # Training passes and evaluations.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Blocks(nn.Module):
    """Two blocks of one layer each, whose activations are kept or recomputed."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if self.checkpointing:
                x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
            else:
                x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.proves(
    "Plain loops", "`torch.compile` of a model with gradient checkpointing, in one graph"
)
@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_compiled_model_with_gradient_checkpointing(onto: str) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["first", "second"], modules_to_save=["head"])
        model = get_peft_model(Blocks(compiled), config).double().train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=0.5, onto=onto)
        for first, second in zip(batches(6)[::2], batches(6)[1::2], strict=True):
            optimizer.zero_grad()
            for batch in (first, second):
                loss_of(run, batch).backward()
            optimizer.step()
        assert all(bool(average.any()) for average in optimizer.averages.values())
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.proves("Plain loops", "`torch.compile` of the optimizer's step")
@pytest.mark.parametrize(
    ("create", "options"),
    [
        (create_eflat_optimizer, {}),
        (create_eflat_optimizer, {"fused_step": False, "onto": "A"}),
        (create_flat_optimizer, {}),
    ],
)
def test_compiled_step_equals_eager(create: Callable, options: dict[str, Any]) -> None:
    """With torch's own graph breaks; the radius and the learning rate follow their schedules."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = lora_mlp()
        optimizer = create(
            model, torch.optim.AdamW, lr=1e-2, rho=lambda s: 0.1 + 0.01 * s, **options
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for batch in batches(4):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if create is not create_eflat_optimizer:
                optimizer.first_step()
                loss_of(model, batch).backward()
            step()
            schedule.step()
        # Two gradients leave passes clean between steps.
        x = batches(1)[0][0]
        assert torch.equal(model(x), model.eval()(x)) == (create is create_flat_optimizer)
        assert int(optimizer.skipped_perturbations) == 0
        results.append(weights(model) | getattr(optimizer, "averages", {}))
    for name, value in results[0].items():
        # torch takes AdamW's bias correction in float32 when it compiles it.
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.proves(
    "Plain loops", "gradient checkpointing computes again at the same perturbed weights"
)
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_gradient_checkpointing(onto: str, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = without_dropout(lora_gpt2())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=0.01, rho=0.5, onto=onto, norm_scope="global"
        )
        pair, points = optimizer.pairs[0], []

        def read(*_: Any, pair: Any = pair, points: Any = points) -> None:
            factors = {"A": pair.module_A.weight, "B": pair.module_B.weight}
            points.append({name: value.detach().clone() for name, value in factors.items()})

        pair.module_B.register_forward_pre_hook(read)
        tokens = torch.arange(16).reshape(2, 8)
        for step in range(4):
            clean = {"A": pair.A.detach().clone(), "B": pair.B.detach().clone()}
            optimizer.zero_grad()
            points.clear()
            for _ in range(2):
                model(input_ids=tokens, labels=tokens).loss.backward()
            assert len(points) == (4 if checkpointing else 2)
            for point in points[1:]:
                assert_same_bits(point, points[0])
            moved = any(not same_bits(points[0][n], clean[n]) for n in clean)
            assert moved == (step > (1 if onto == "A" else 0))  # B is zero at the first step
            optimizer.step()
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)
