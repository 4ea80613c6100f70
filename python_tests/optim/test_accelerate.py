"""The optimizers in Accelerate's loop: accumulation, clipping, mixed precision, saved states."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CREATE,
    accelerator,
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    scale_gradients,
    train_on,
    trainable,
    weights,
)
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer

CLIP = 0.5
DATA = batches(24, torch.float32)  # two micro-batches per step
OVERFLOWING = (0, 3, 7)


def adapted(seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    model = lora_mlp(torch.float32, seed=seed)
    return model, create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=0.1, **options)


def plain_loop(
    model: nn.Module, optimizer: Any, steps: Iterable[int], context: Any = nullcontext
) -> None:
    for step in steps:
        for batch in DATA[2 * step : 2 * step + 2]:
            with context():
                loss = loss_of(model, batch)
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(trainable(model), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def accelerated_loop(engine: Any, model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
    """Train; with a scaler, the loss of some steps is too large for fp16."""
    for step in steps:
        overflows = engine.scaler is not None and step in OVERFLOWING
        before = everything(model, optimizer) if overflows else {}
        for batch in DATA[2 * step : 2 * step + 2]:
            with engine.accumulate(model):
                engine.backward(loss_of(model, batch) * (1e9 if overflows else 1))
                if engine.sync_gradients:
                    engine.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        assert engine.optimizer_step_was_skipped == overflows
        if overflows:
            assert_same_bits(everything(model, optimizer), before)


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return copies of the clean weights, the averages and the counter."""
    own = optimizer.optimizer
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    saved |= {f"average {name}": value.clone() for name, value in own.averages.items()}
    return saved | {"skipped": own.skipped_perturbations.clone()}


def prepared(precision: str, seed: int = 0, **options: Any) -> tuple[Any, nn.Module, Any]:
    engine = accelerator(gradient_accumulation_steps=2, mixed_precision=precision)
    if precision == "fp16":
        scale_gradients(engine, init_scale=2.0**12)
    return engine, *engine.prepare(*adapted(seed, **options))


def autocast() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.proves(
    "Accelerate", "`prepare`, `accumulate`, `clip_grad_norm_`, bf16: the bits of a plain loop"
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equals_the_plain_loop(precision: str) -> None:
    """With accumulate and clip_grad_norm_, under autocast too, the bits are the same."""
    plain, own = adapted()
    plain_loop(plain, own, range(6), autocast if precision == "bf16" else nullcontext)
    engine, model, optimizer = prepared(precision)
    accelerated_loop(engine, model, optimizer, range(6))
    assert_same_bits(weights(model), weights(plain))
    averages = optimizer.optimizer.averages
    assert_same_bits(averages, own.averages)
    assert all(a.dtype == torch.float32 and bool(a.any()) for a in averages.values())


@pytest.mark.proves("Accelerate", "two gradients, with a closure")
@pytest.mark.parametrize("create", [CREATE["flat"], CREATE["lora-sam"]])
def test_two_gradients_with_a_closure(create: Any) -> None:
    plain, model = lora_mlp(torch.float32), lora_mlp(torch.float32)
    train_on(plain, create(plain, torch.optim.AdamW, lr=1e-2), DATA[:4])
    engine = accelerator()
    model, optimizer = engine.prepare(model, create(model, torch.optim.AdamW, lr=1e-2))
    for batch in DATA[:4]:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> None:
            optimizer.zero_grad()
            engine.backward(loss_of(model, batch))

        optimizer.step(closure)
    assert_same_bits(weights(model), weights(plain))


@pytest.mark.proves(
    "Accelerate", "fp16 with GradScaler: overflowed steps touch nothing, the rest as in float32"
)
@pytest.mark.parametrize("fused", [True, False])
def test_fp16_with_overflows(fused: bool) -> None:
    """Skipped steps change nothing; the others are the float32 run's, up to fp16 rounding."""
    engine, model, optimizer = prepared("fp16", fused_step=fused)
    start = weights(model)
    accelerated_loop(engine, model, optimizer, range(10))  # looks at the skipped steps
    plain, own = adapted(fused_step=fused)
    plain_loop(plain, own, [step for step in range(10) if step not in OVERFLOWING])
    assert int(own.skipped_perturbations) == int(optimizer.optimizer.skipped_perturbations) == 0
    assert engine.scaler.get_scale() == 2.0 ** (12 - len(OVERFLOWING))
    ends, expected = weights(model), weights(plain)
    errors = {
        name: float((ends[name] - expected[name]).norm() / (expected[name] - start[name]).norm())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, average in optimizer.optimizer.averages.items():
        reference = own.averages[name]
        errors[f"average {name}"] = float((average - reference).norm() / reference.norm())
    # Rounding to fp16 is 2^-11, relative; to bfloat16 it would be 2^-8.
    assert min(errors.values()) > 0 and max(errors.values()) < 8 * 2**-11, errors


@pytest.mark.proves("Accelerate", "two gradients in fp16, with overflowed steps")
@pytest.mark.parametrize("create", [CREATE["flat"], CREATE["lora-sam"]])
def test_two_gradients_in_fp16(create: Any) -> None:
    engine = accelerator(mixed_precision="fp16")
    scale_gradients(engine, init_scale=2.0**12)
    model = lora_mlp(torch.float32)
    start = weights(model)
    model, optimizer = engine.prepare(model, create(model, torch.optim.AdamW, lr=1e-2))
    for step in range(10):
        before = dict(model.state_dict())
        before = {name: value.clone() for name, value in before.items()}
        optimizer.zero_grad()
        engine.backward(loss_of(model, DATA[step]))
        optimizer.optimizer.first_step()
        engine.backward(loss_of(model, DATA[step]) * (1e9 if step in OVERFLOWING else 1))
        optimizer.step()
        assert engine.optimizer_step_was_skipped == (step in OVERFLOWING)
        if step in OVERFLOWING:
            assert_same_bits(dict(model.state_dict()), before)
    optimizer.zero_grad()  # of a step that may have been skipped
    plain = lora_mlp(torch.float32)
    kept = [DATA[step] for step in range(10) if step not in OVERFLOWING]
    train_on(plain, create(plain, torch.optim.AdamW, lr=1e-2), kept)
    ends, expected = weights(model), weights(plain)
    errors = [
        float((ends[name] - expected[name]).norm() / (expected[name] - start[name]).norm())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    assert min(errors) > 0 and max(errors) < 8 * 2**-11, errors


@pytest.mark.proves(
    "Accelerate", "`save_state`, `load_state`: resumes bit-exact in float32, bf16 and fp16"
)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_saved_state_resumes_bit_exact(precision: str, fused: bool, tmp_path: Path) -> None:
    engine, whole, uninterrupted = prepared(precision, fused_step=fused)
    accelerated_loop(engine, whole, uninterrupted, range(10))

    engine, model, optimizer = prepared(precision, fused_step=fused)
    accelerated_loop(engine, model, optimizer, range(5))
    clean = weights(model)
    perturbed = model(DATA[0][0])  # saved in the middle of a step
    engine.save_state(str(tmp_path))
    with optimizer.optimizer.clean():
        assert not torch.equal(perturbed, model(DATA[0][0]))
    engine, other, resumed = prepared(precision, seed=5, fused_step=fused)
    engine.load_state(str(tmp_path))
    assert_same_bits(weights(other), clean)
    accelerated_loop(engine, other, resumed, range(5, 10))
    assert_same_bits(everything(other, resumed), everything(whole, uninterrupted))


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_a_base_that_was_prepared_already_is_refused(create: Any) -> None:
    """It would skip the steps of micro-batches without the wrapper around it."""
    model = lora_mlp(torch.float32)
    base = accelerator().prepare(torch.optim.SGD(trainable(model), lr=0.1))
    with pytest.raises(
        TypeError, match=r"base must .* before accelerator\.prepare, got .*Accelerated"
    ):
        type(create(model, torch.optim.SGD, lr=0.1))(model, base)
