"""Lightning's Trainer and Fabric: trajectories are those of a plain loop, and resume bit-exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CREATE, assert_same_bits, batches, lora_mlp, loss_of, trainable, weights
from torch import Tensor, nn

from eflat_ext import EFlatLoRA, EFlatPerturbation

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore", "error:.*perturb")
DATA = batches(12, torch.float32)
LR, RHO, CLIP = 0.01, 0.3, 0.5


def attached(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(trainable(model), lr=LR)
    EFlatPerturbation(model, rho=RHO).attach(optimizer)
    return optimizer


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    name: lambda model, create=create: create(model, torch.optim.AdamW, lr=LR, rho=RHO)
    for name, create in CREATE.items()
}
MAKE["attached"] = attached


class Module(lightning.LightningModule):
    """A LoRA MLP whose optimizer is made by a function."""

    def __init__(self, make: Callable[[nn.Module], Any], manual: bool = False, seed: int = 0):
        super().__init__()
        self.model, self.make = lora_mlp(torch.float32, seed=seed), make
        self.automatic_optimization = not manual
        self.evaluated: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.model)
        if not self.automatic_optimization:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Any, index: int) -> Any:
        if self.automatic_optimization:
            return loss_of(self.model, batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, batch))
        if hasattr(optimizer, "first_step"):
            optimizer.first_step()
            self.manual_backward(loss_of(self.model, batch))
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.evaluated.append(loss_of(self.model, batch))


def fit(
    module: Module, steps: int, data: Any = DATA, resume: str | None = None, **options: Any
) -> Any:
    """Train by Lightning's Trainer, evaluating after every second batch; return the trainer."""
    if module.automatic_optimization:
        options["gradient_clip_val"] = CLIP
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        **dict.fromkeys(quiet, False),
        **options,
    )
    train = torch.utils.data.DataLoader(data, batch_size=None)
    evaluation = torch.utils.data.DataLoader(DATA[:1], batch_size=None)
    trainer.fit(module, train, evaluation, ckpt_path=resume)
    return trainer


def loop(
    model: nn.Module,
    optimizer: Any,
    data: Iterable[Any],
    *,
    accumulate: int = 1,
    schedule: bool = True,
    context: Callable[[], Any] = nullcontext,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    """Train in a plain loop, which Fabric's is, too."""
    gamma = 0.9 if schedule else 1.0
    rates = torch.optim.lr_scheduler.ExponentialLR(
        getattr(optimizer, "optimizer", optimizer), gamma
    )
    for index, batch in enumerate(data):
        if index % accumulate == 0:
            optimizer.zero_grad()
        with context():
            loss = loss_of(model, batch) / accumulate
        backward(loss)
        if hasattr(optimizer, "first_step"):
            optimizer.first_step()
            with context():
                loss = loss_of(model, batch)
            backward(loss)
        if (index + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(trainable(model), CLIP)
            optimizer.step()
            rates.step()


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.proves(
    "Lightning", "one line in `configure_optimizers`: the bits of a plain loop, bf16 too"
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("way", MAKE)
def test_trainer_trains_as_a_plain_loop(way: str, precision: Any) -> None:
    """Steps with a closure; with clipping, a schedule and evaluations, which are clean."""
    module, model = Module(MAKE[way]), lora_mlp(torch.float32)
    fit(module, 6, precision=precision)
    context = bfloat16 if "bf16" in precision else nullcontext
    loop(model, MAKE[way](model), DATA[:6], context=context)
    assert_same_bits(weights(module.model), weights(model))
    with torch.no_grad(), context():
        expected = loss_of(model.eval(), DATA[0])
    assert len(module.evaluated) == 3 and torch.equal(module.evaluated[-1], expected)


@pytest.mark.proves("Lightning", "manual optimization, with two gradients too")
@pytest.mark.parametrize("way", MAKE)
def test_manual_optimization_trains_as_a_plain_loop(way: str) -> None:
    module, model = Module(MAKE[way], manual=True), lora_mlp(torch.float32)
    trainer = fit(module, 6)
    assert trainer.global_step == 6
    loop(model, MAKE[way](model), DATA[:6], schedule=False)
    assert_same_bits(weights(module.model), weights(model))


@pytest.mark.parametrize("way", ["eflat", "attached"])
def test_accumulated_gradients_belong_to_one_point(way: str) -> None:
    module, model = Module(MAKE[way]), lora_mlp(torch.float32)
    fit(module, 4, accumulate_grad_batches=3)
    loop(model, MAKE[way](model), DATA, accumulate=3)
    assert_same_bits(weights(module.model), weights(model))


@pytest.mark.proves("Lightning", "`fit(ckpt_path=...)` resumes bit-exact")
@pytest.mark.parametrize("way", MAKE)
def test_a_run_resumes_bit_exact(way: str, tmp_path: Path) -> None:
    whole, first, second = (Module(MAKE[way], seed=seed) for seed in (0, 0, 1))
    path = str(tmp_path / "half.ckpt")
    expected = fit(whole, 8, DATA[:4])
    fit(first, 4, DATA[:4]).save_checkpoint(path)
    found = fit(second, 8, DATA[:4], resume=path)
    assert_same_bits(weights(second.model), weights(whole.model))
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (expected, found)]
    averages = [
        {str(key): entry["perturbation_ema"] for key, entry in state.items() if len(entry) > 3}
        for state in states
    ]
    assert len(averages[0]) == (2 if way in ("eflat", "attached") else 0)
    assert_same_bits(*averages)


def fabric(precision: Any = "32-true") -> Any:
    return lightning.Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.proves("Fabric", "`setup(model, optimizer)`: the bits of a plain loop, bf16 too")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("way", MAKE)
def test_fabric_trains_as_a_plain_loop(way: str, precision: Any) -> None:
    engine, inner, other = fabric(precision), lora_mlp(torch.float32), lora_mlp(torch.float32)
    model, optimizer = engine.setup(inner, MAKE[way](inner))
    loop(model, optimizer, DATA[:6], backward=engine.backward)
    context = bfloat16 if "bf16" in precision else nullcontext
    loop(other, MAKE[way](other), DATA[:6], context=context)
    assert_same_bits(weights(inner), weights(other))
    if way != "attached":
        optimizer.rho = 0.1
        assert optimizer.rho == optimizer.optimizer.rho == 0.1


@pytest.mark.proves("Fabric", "`save` and `load` resume bit-exact")
@pytest.mark.parametrize("way", ["eflat", "attached"])
def test_fabric_saves_and_resumes(way: str, tmp_path: Path) -> None:
    path, found = tmp_path / "state.ckpt", []
    for seed in (0, 1):
        engine, inner = fabric(), lora_mlp(torch.float32, seed=seed)
        model, optimizer = engine.setup(inner, MAKE[way](inner))
        state = {"model": model, "optimizer": optimizer}
        if seed == 0:
            loop(model, optimizer, DATA[:3], schedule=False)
            engine.save(path, state)
        else:
            engine.load(path, state)
        loop(model, optimizer, DATA[3:6], schedule=False)
        found.append(weights(inner))
    assert_same_bits(*found)


def test_a_wrapper_is_no_base_and_what_it_wraps_is_one() -> None:
    """The wrapper saves what it wraps, which would know nothing of the averages."""
    engine, inner, other = fabric(), lora_mlp(torch.float32), lora_mlp(torch.float32)
    model, optimizer = engine.setup(inner, torch.optim.AdamW(trainable(inner), lr=LR))
    for make in (
        lambda: EFlatPerturbation(inner).attach(optimizer),
        lambda: EFlatLoRA(inner, optimizer),
    ):
        with pytest.raises(TypeError, match=r"inside the wrapper .*got FabricAdamW"):
            make()
    EFlatPerturbation(inner, rho=RHO).attach(optimizer.optimizer)
    loop(model, optimizer, DATA[:6], backward=engine.backward)
    loop(other, attached(other), DATA[:6])
    assert_same_bits(weights(inner), weights(other))
    assert "perturbation_ema" in str(optimizer.state_dict())
