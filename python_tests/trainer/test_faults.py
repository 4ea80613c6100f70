"""After bad gradients, batches without labels and exceptions training goes on."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
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
)
from perturbed_case import assert_nothing_in_place
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from trainer_case import RUNS, PerturbingTrainer, arguments, make, own
from transformers import TrainerCallback

from eflat_ext import (
    EFlatLoRA,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

METHODS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "eflat": (create_eflat_optimizer, {}),
    "eflat unfused": (create_eflat_optimizer, {"fused_step": False}),
    "eflat onto A": (create_eflat_optimizer, {"onto": "A"}),
    "flat": (create_flat_optimizer, {}),
    "lora-sam": (create_lora_sam_optimizer, {}),
}
every_method = pytest.mark.parametrize("method", METHODS)
DATA = batches(6, torch.float32)


def trained(method: str, **options: Any) -> tuple[nn.Module, Any]:
    """Return a model after two steps, and its optimizer."""
    create, kwargs = METHODS[method]
    model = lora_mlp(torch.float32)
    optimizer = create(model, torch.optim.AdamW, lr=0.01, rho=0.5, **kwargs, **options)
    train_on(model, optimizer, DATA[:2])
    return model, optimizer


def averages(optimizer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in getattr(optimizer, "averages", {}).items()}


# Gradients.


@pytest.mark.proves("Faults", "NaN or Inf in one layer or in all never enters an average")
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_method
def test_bad_gradients_leave_the_averages(
    method: str, bad: float, norm_scope: str, everywhere: bool
) -> None:
    """They are counted, and other layers are perturbed as usual."""
    model, optimizer = trained(method, norm_scope=norm_scope)
    before, start = averages(optimizer), weights(model)
    assert int(optimizer.skipped_perturbations) == 0
    optimizer.zero_grad()
    loss_of(model, DATA[2]).backward()
    hit = optimizer.pairs if everywhere else optimizer.pairs[:1]
    for pair in hit:
        pair.B.grad[1, 2] = bad
    if not isinstance(optimizer, EFlatLoRA):
        optimizer.first_step()
        with at_points(optimizer):
            now = weights(model)
        moved = {name for name in now if not same_bits(now[name], start[name])}
        expected = {"down"} if not everywhere else set()
        assert {name.split(".")[2] for name in moved} == expected
        loss_of(model, DATA[2]).backward()
    optimizer.step()
    assert int(optimizer.skipped_perturbations) == len(hit)
    for pair, (name, value) in zip(optimizer.pairs, before.items(), strict=False):
        assert same_bits(optimizer.averages[name], value) == (pair in hit)
    norms = optimizer.perturbation_norms
    assert all(math.isfinite(norms[pair.name]) == (pair not in hit) for pair in optimizer.pairs)


@every_method
def test_a_clipped_nan(method: str) -> None:
    """Clipping spreads NaN over all gradients: every pair is counted, and AdamW steps with NaN."""
    model, optimizer = trained(method)
    before = averages(optimizer)

    def closure() -> None:
        optimizer.zero_grad()
        (loss_of(model, DATA[2]) * math.nan).backward()
        clip_grad_norm_(trainable(model), 1.0)

    optimizer.step(closure)
    assert int(optimizer.skipped_perturbations) == len(optimizer.pairs)
    assert all(bool(norm.isnan()) for norm in optimizer.perturbation_norms.values())
    assert all(bool(p.isnan().all()) for p in trainable(model))
    assert_same_bits(averages(optimizer), before)


@pytest.mark.parametrize("way", ["look at the norm", "let it raise"])
@every_method
def test_a_step_that_is_not_finite_can_be_skipped(method: str, way: str) -> None:
    """The state afterwards is that without the batch, bit for bit."""
    (model, optimizer), (other, expected) = trained(method), trained(method)
    train_on(other, expected, DATA[3:])
    for batch, factor in zip(DATA[2:], (math.nan, 1.0, 1.0, 1.0), strict=True):

        def closure(batch: Any = batch, factor: float = factor) -> None:
            optimizer.zero_grad()
            (loss_of(model, batch) * factor).backward()
            clip_grad_norm_(trainable(model), 1e9, error_if_nonfinite=True)

        if way == "let it raise":
            try:
                optimizer.step(closure)
            except RuntimeError as error:
                assert "non-finite" in str(error) and math.isnan(factor)
            continue
        optimizer.zero_grad()
        (loss_of(model, batch) * factor).backward()
        if not isinstance(optimizer, EFlatLoRA):
            if not clip_grad_norm_(trainable(model), 1e9).isfinite():
                continue
            optimizer.first_step()
            loss_of(model, batch).backward()
        if clip_grad_norm_(trainable(model), 1e9).isfinite():
            optimizer.step()
    assert_same_bits(weights(model), weights(other))
    assert_same_bits(averages(optimizer), averages(expected))


class Broken(PerturbingTrainer):
    """A trainer whose loss is NaN in the second step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * (math.nan if self.state.global_step == 1 else 1.0)


def documented_callback() -> TrainerCallback:
    """Return the callback of docs/faults.md."""
    page = Path(__file__).parents[2] / "docs" / "faults.md"
    (code,) = re.findall(r"```python\n(class SkipNotFinite.*?)```", page.read_text("utf-8"), re.S)
    names: dict[str, Any] = {"torch": torch, "TrainerCallback": TrainerCallback}
    exec(code, names)
    return names["SkipNotFinite"]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.proves("Faults", "a step whose gradients are NaN can be skipped, in Trainer, too")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_trainer_skips_a_step(options: dict[str, Any], skip: bool, tmp_path: Path) -> None:
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            states.append((weights(model), averages(own(run))))

    callbacks = [Look(), *([documented_callback()] if skip else [])]
    run = make(
        lora_gpt2(),
        arguments(tmp_path, logging_steps=1),
        cls=Broken,
        callbacks=callbacks,
        **options,
    )
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [math.isfinite(entry["grad_norm"]) for entry in logged] == [
        step != 1 and (skip or step < 1) for step in range(5)
    ]
    assert_same_bits(states[1][1], states[0][1])
    finite = all(bool(p.isfinite().all()) for p in run.model.parameters())
    assert finite == skip
    if skip:
        assert_same_bits(states[1][0], states[0][0])
        assert any(not same_bits(states[2][0][n], p) for n, p in states[1][0].items())
    else:  # told in the log: every pair at every step from then on
        pairs = len(own(run).pairs)
        assert [entry["skipped_perturbations"] for entry in logged] == [
            0,
            *(pairs * step for step in range(1, 5)),
        ]
        assert math.isnan(logged[-1]["perturbation_norm"])


# Batches.


@pytest.mark.proves("Faults", "a batch without labels changes no average")
@pytest.mark.parametrize("rows", [0, 32], ids=["empty", "no labels"])
@every_method
def test_a_batch_without_anything_to_learn(method: str, rows: int) -> None:
    """The loss is NaN, the gradients are zero: only momentum changes the weights."""
    model, optimizer = trained(method)
    before = averages(optimizer)
    x, labels = DATA[2][0][:rows], torch.full((rows,), -100)
    train_on(model, optimizer, [(x, labels)])
    assert int(optimizer.skipped_perturbations) == len(optimizer.pairs)
    assert_same_bits(averages(optimizer), before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    train_on(model, optimizer, DATA[3:])
    assert int(optimizer.skipped_perturbations) == len(optimizer.pairs)


# Exceptions.


class FailBackward(torch.autograd.Function):
    error: BaseException

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise FailBackward.error


def fail_in(place: str, model: nn.Module, error: BaseException) -> Callable[[Any], Tensor]:
    """Return a loss that fails at that place."""
    FailBackward.error = error

    def fail(*_: Any) -> None:
        raise error

    def loss(batch: Any) -> Tensor:
        inner = model.get_base_model()
        handles = []
        if place == "forward":
            handles.append(inner.down.register_forward_pre_hook(fail))
        elif place == "hook":
            handles.append(inner.register_forward_hook(fail))
        elif place == "gradient hook":
            handles.append(trainable(model)[0].register_post_accumulate_grad_hook(fail))
        try:
            value = loss_of(model, batch)
            if place == "loss":
                raise error
            if place == "backward":
                value = FailBackward.apply(value)
            value.backward()
        finally:
            for handle in handles:
                handle.remove()
        return value

    return loss


@pytest.mark.proves("Faults", "out of memory or any exception: restored, raised, and it goes on")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["forward", "hook", "loss", "backward", "gradient hook", "base"])
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "loop"])
@every_method
def test_an_exception_anywhere(
    method: str,
    closure: bool,
    place: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two gradients the exception comes in the second pass, at the perturbed weights."""
    model, optimizer = trained(method)
    clean, state = weights(model), copy.deepcopy(optimizer.state_dict())
    smaller = tuple(part[:16] for part in DATA[2])

    def step(failing: Callable[[Any], Tensor] | None, batch: Any) -> None:
        calls = []

        def loss(batch: Any) -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            if failing and len(calls) == (1 if isinstance(optimizer, EFlatLoRA) else 2):
                return failing(batch)
            value = loss_of(model, batch)
            value.backward()
            return value

        if closure:
            optimizer.step(lambda: loss(batch))
            return
        optimizer.zero_grad()
        loss(batch)
        if not isinstance(optimizer, EFlatLoRA):
            optimizer.first_step()
            loss(batch)
        optimizer.step()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    failing = fail_in(place, model, error) if place != "base" else None
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        if place == "base":
            patch.setattr(torch.optim.AdamW, "step", fail)
        step(failing, DATA[2])
    if place == "base" and method in ("eflat", "eflat onto A"):
        model.load_state_dict(clean)  # the pairs have taken their step, as documented
    assert_same_bits(dict(model.state_dict()), clean)
    assert_nothing_in_place(model)
    if not closure and not isinstance(optimizer, EFlatLoRA):
        optimizer.abandon_step()
    output = model.eval()(DATA[0][0])
    model.train()
    if place == "base":
        optimizer.load_state_dict(state)
    step(None, smaller)
    other, expected = trained(method)
    assert same_bits(output, other.eval()(DATA[0][0]))
    other.train()
    train_on(other, expected, [smaller])
    assert_same_bits(weights(model), weights(other))
    assert_same_bits(averages(optimizer), averages(expected))
