"""Regression tests of users' loops: phases, notebook cells, closures, bad input, tracing."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import pytorch_optimizer
import torch
from eflat_case import CLOSE, LR, RHO, eflat
from models import (
    CREATE,
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    train_on,
    trainable,
    weights,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from eflat_ext import EFlatPerturbation, create_eflat_optimizer


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=LR, **options)


@pytest.mark.proves(
    "Plain loops", "a second optimizer takes over; a foreign one ends it, with a warning"
)
@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("method", CREATE)
def test_a_plain_optimizer_in_a_second_phase(method: str, options: dict[str, bool]) -> None:
    """Its steps are those without a perturbation; its first gradients were perturbed."""
    model = lora_mlp(torch.float32)
    first = CREATE[method](model, torch.optim.AdamW, lr=LR, rho=RHO)
    train_on(model, first, batches(3, torch.float32))
    other = copy.deepcopy(model)  # runs clean
    second, alone = adamw(model, **options), adamw(other, **options)
    data = batches(4, torch.float32)
    second.zero_grad()
    loss_of(model, data[0]).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    kind = pytest.warns(UserWarning, match="AdamW stepped weights that it perturbs")
    with kind as caught:
        second.step()
    assert len(caught) == 1
    alone.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on(model, second, data[1:])
    train_on(other, alone, data[1:])
    assert_same_bits(weights(model), weights(other))
    with pytest.raises(RuntimeError, match="ended: AdamW stepped"):
        first.step(lambda: loss_of(model, data[0])) if method != "eflat" else first.step()


def test_an_optimizer_of_other_parameters_ends_nothing() -> None:
    model, other = lora_mlp(), lora_mlp()
    head = [p for n, p in model.named_parameters() if "head" in n and p.requires_grad]
    trained = [p for p in trainable(model) if all(p is not q for q in head)]
    optimizer = eflat(model, params=trained)
    beside = torch.optim.SGD(head, lr=LR)
    whole = eflat(other)
    for batch in batches(4):
        for one in (optimizer, beside):
            one.zero_grad()
        loss_of(model, batch).backward()
        beside.step()
        optimizer.step()
    train_on(other, whole, batches(4))
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("old", [*CREATE, "attached"])
def test_a_newer_optimizer_takes_over(old: str) -> None:
    """As when a cell runs again, in a sweep over one model, with two Trainers, or ``fit`` twice."""
    model, other = lora_mlp(), lora_mlp()
    if old == "attached":
        base: Any = torch.optim.SGD(trainable(model), lr=LR)
        EFlatPerturbation(model, rho=RHO).attach(base)
    else:
        base = CREATE[old](model, torch.optim.SGD, lr=LR, rho=RHO)
    loss_of(model, batches(1)[0]).backward()  # interrupted here
    model.zero_grad()
    newer, alone = eflat(model), eflat(other)
    train_on(model, newer, batches(4))
    train_on(other, alone, batches(4))
    assert_same_bits(weights(model), weights(other))
    with pytest.raises(
        RuntimeError, match="a newer perturbation of the same weights has taken over"
    ):
        base.step(lambda: loss_of(model, batches(1)[0])) if old in (
            "flat",
            "lora-sam",
        ) else base.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on(model, newer, batches(1))


def test_perturbations_of_disjoint_pairs_live_side_by_side() -> None:
    model, other = lora_mlp(), lora_mlp()

    def of(name: str) -> list[nn.Parameter]:
        return [p for n, p in model.named_parameters() if p.requires_grad and name in n]

    rest = [p for n, p in model.named_parameters() if p.requires_grad and ".up." not in n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others' pairs train without a perturbation here
        up, down = eflat(model, params=of(".up.")), eflat(model, params=rest)
    assert [len(one.pairs) for one in (up, down)] == [1, 1]
    both = eflat(other)
    for batch in batches(5):
        up.zero_grad(), down.zero_grad()
        loss_of(model, batch).backward()
        up.step(), down.step()
    train_on(other, both, batches(5))
    assert_same_bits(weights(model), weights(other))


def test_an_optimizer_around_ours_ends_nothing() -> None:
    model = lora_mlp()
    inner = eflat(model)
    around = pytorch_optimizer.Lookahead(inner, k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = [(around, batch) for batch in batches(6)]
        for optimizer, batch in train:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert inner.perturbation.steps == 6 and not inner.perturbation.ended


def test_a_step_that_raised_does_not_hide_a_foreign_one() -> None:
    model = lora_mlp()
    base = torch.optim.SGD(trainable(model), lr=LR)
    perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
    loss_of(model, batches(1)[0]).backward()
    base.param_groups[0]["lr"] = "broken"
    with pytest.raises(TypeError):
        base.step()
    with pytest.warns(UserWarning, match="Adagrad stepped weights"):
        torch.optim.Adagrad(trainable(model)).step()
    assert "Adagrad" in perturbation.ended


@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_closures_that_do_not_zero_gradients(method: str) -> None:
    """The first gradients are dropped; those of other passes are refused, and nothing is lost."""
    runs = []
    for zeroes in (True, False):
        model = lora_mlp()
        optimizer = CREATE[method](model, torch.optim.SGD, lr=LR, rho=RHO)

        def closure(
            batch: Any, model: Any = model, zeroes: bool = zeroes, o: Any = optimizer
        ) -> Any:
            if zeroes:
                o.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        for batch in batches(4):
            optimizer.zero_grad()
            optimizer.step(lambda batch=batch, closure=closure: closure(batch))
        runs.append(weights(model))
    assert_same_bits(*runs)
    loss_of(model, batches(1)[0]).backward()  # another micro-batch
    with pytest.raises(RuntimeError, match="adds to gradients that were there before"):
        optimizer.step(lambda: closure(batches(1)[0]))
    assert_same_bits(weights(model), runs[1])
    optimizer.zero_grad()
    optimizer.step(lambda: closure(batches(1)[0]))


@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_second_step_drops_gradients_when_asked(method: str) -> None:
    model = lora_mlp()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=LR, rho=RHO)
    for zero_grad in (True, False):
        loss_of(model, batches(1)[0]).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batches(1)[0]).backward()
        optimizer.second_step(zero_grad=zero_grad)
        assert all((p.grad is None) == zero_grad for p in trainable(model))


def test_parameters_that_were_replaced_or_pruned_are_named() -> None:
    for change in ("assign", "prune"):
        model = lora_mlp()
        optimizer = eflat(model)
        train_on(model, optimizer, batches(2))
        if change == "assign":
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        else:
            layer = model.base_model.model.up.lora_B["default"]
            prune.l1_unstructured(layer, "weight", amount=2)
        loss_of(model, batches(1)[0]).backward()
        with pytest.raises(RuntimeError, match=r"up\.default was replaced or removed") as error:
            optimizer.step()
        assert "DeepSpeed" not in str(error.value)


def test_a_layer_without_an_entry_trains_nothing_and_stops_nothing() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.none = nn.Linear(4, 4), nn.Linear(0, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.none(x[:, :0])

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialising nothing
        model = get_peft_model(Empty(), LoraConfig(r=2, target_modules=["up", "none"])).train()
    with pytest.warns(UserWarning, match=r"none.*without an entry"):
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    assert [pair.layer_name.split(".")[-1] for pair in optimizer.pairs] == ["up"]


def test_a_name_in_place_of_a_class_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a class of optimizers"):
        create_eflat_optimizer(lora_mlp(), "adamw")


@pytest.mark.parametrize("how", ["export", "trace", "make_fx"])
def test_tracing_in_eval_mode_within_a_step_is_clean(how: str) -> None:
    model = lora_mlp()
    optimizer = eflat(model)
    train_on(model, optimizer, batches(2))
    x, y = batches(1)[0]
    loss_of(model, (x, y)).backward()
    model.eval()
    expected = functional_call(model, weights(model), (x,))
    net = model.base_model.model
    if how == "export":
        file = io.BytesIO()
        torch.export.save(torch.export.export(net, (x,)), file)
        file.seek(0)
        traced: Any = torch.export.load(file).module()
    elif how == "trace":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(net, (x,))
    else:
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(net)(x)
    torch.testing.assert_close(traced(x), expected, **CLOSE)
