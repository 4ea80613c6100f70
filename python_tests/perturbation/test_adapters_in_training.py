"""Adapters that are frozen, added, disabled, merged or deleted during training; tied weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_layers import BETA, RHO, as_matrix, step_as_the_reference
from models import (
    CREATE,
    assert_same_bits,
    at_points,
    batches,
    lora_gpt2,
    lora_mlp,
    loss_of,
    same_bits,
    trainable,
    weights,
    without_dropout,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import EFlatLoRA, create_eflat_optimizer

DATA = batches(8)
both_sides = pytest.mark.parametrize("onto", ["A", "B", "both"])


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in float64 with random factors."""
    model = model.double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.any():
                parameter.normal_(std=0.3)
    return model


def adapted(onto: str) -> tuple[nn.Module, EFlatLoRA]:
    torch.manual_seed(0)
    model = randomised(lora_mlp())
    return model, optimizer_of(model, onto)


def optimizer_of(model: nn.Module, onto: str) -> EFlatLoRA:
    return create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01, rho=RHO, beta=BETA, onto=onto)


def train(model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def averages_of(optimizer: EFlatLoRA) -> dict[str, Tensor]:
    return {name: average.clone() for name, average in optimizer.averages.items()}


def perturbed(model: nn.Module, optimizer: EFlatLoRA) -> set[str]:
    """Return the names of the parameters that passes perturb now."""
    points = optimizer.points()
    named = [(name, p) for name, p in model.named_parameters() if p in points]
    return {name for name, p in named if not same_bits(points[p], p)}


def assert_runs_at_the_points(model: nn.Module, optimizer: EFlatLoRA, batch: Any) -> None:
    with at_points(optimizer):
        other = copy.deepcopy(model)  # runs unperturbed
    assert torch.equal(loss_of(model, batch), loss_of(other, batch))


@pytest.mark.proves("LoRA layers", "layers that are frozen during training are not perturbed")
@both_sides
def test_layers_that_are_frozen_meanwhile_are_not_perturbed(onto: str) -> None:
    """Their averages would otherwise stay constant."""
    model, optimizer = adapted(onto)
    train(model, optimizer, DATA[:3])
    frozen = optimizer.pairs[0]
    for parameter in (frozen.parameter_A, frozen.parameter_B):
        parameter.requires_grad_(False)
    optimizer.zero_grad()
    averages, names = averages_of(optimizer), perturbed(model, optimizer)
    assert names and all(name.startswith(optimizer.pairs[1].layer_name) for name in names)
    assert_runs_at_the_points(model, optimizer, DATA[3])
    loss_of(model, DATA[3]).backward()
    optimizer.step()
    moved = {n for n, a in averages_of(optimizer).items() if not same_bits(a, averages[n])}
    assert moved and all(name.startswith(optimizer.pairs[1].name) for name in moved)
    for parameter in (frozen.parameter_A, frozen.parameter_B):
        parameter.requires_grad_(True)
    names = perturbed(model, optimizer)
    assert any(name.startswith(frozen.layer_name) for name in names)
    assert_runs_at_the_points(model, optimizer, DATA[4])


def test_a_factor_that_is_frozen_meanwhile_is_not_perturbed_onto_both() -> None:
    model, optimizer = adapted("both")
    train(model, optimizer, DATA[:3])
    for pair in optimizer.pairs:
        pair.parameter_A.requires_grad_(False)
    assert perturbed(model, optimizer) == {n for n in weights(model) if "lora_B" in n}
    assert_runs_at_the_points(model, optimizer, DATA[3])


@pytest.mark.proves(
    "LoRA layers",
    "an adapter added during training: trained as a group, perturbed by a new optimizer",
)
@both_sides
def test_an_adapter_is_added(onto: str) -> None:
    model, optimizer = adapted(onto)
    step_as_the_reference(optimizer, lambda step: loss_of(model, DATA[step]))
    model(DATA[0][0])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down"]))
    model.base_model.set_adapter(["default", "second"])
    randomised(model)
    second = [p for n, p in model.named_parameters() if ".second." in n]
    optimizer.add_param_group({"params": second})
    before = [p.detach().clone() for p in second]
    assert not any(".second." in name for name in perturbed(model, optimizer))
    assert_runs_at_the_points(model, optimizer, DATA[3])
    train(model, optimizer, DATA[3:5])
    assert not any(same_bits(p, old) for p, old in zip(second, before, strict=True))
    assert len(optimizer.pairs) == 2

    anew = optimizer_of(model, onto)  # takes over
    assert len(anew.pairs) == 3
    step_as_the_reference(anew, lambda step: loss_of(model, DATA[5 + step]))


@pytest.mark.proves("LoRA layers", "adapters disabled during training keep weights and averages")
@both_sides
def test_layers_are_disabled_for_a_step(onto: str) -> None:
    model, optimizer = adapted(onto)
    train(model, optimizer, DATA[:3])
    averages, before = averages_of(optimizer), weights(model)
    for pair in optimizer.pairs:
        pair.layer.enable_adapters(False)
    train(model, optimizer, DATA[3:4])  # the head alone
    after = weights(model)
    changed = {name for name in after if not same_bits(after[name], before[name])}
    assert changed == {name for name in after if "modules_to_save" in name}
    assert_same_bits(averages_of(optimizer), averages)
    assert int(optimizer.skipped_perturbations) == 0 and not optimizer.perturbation_norms
    for pair in optimizer.pairs:
        pair.layer.enable_adapters(True)
    train(model, optimizer, DATA[4:5])
    assert all(not same_bits(averages[n], average) for n, average in optimizer.averages.items())


@pytest.mark.proves(
    "LoRA layers", "`disable_adapter()` gives the base model before a pass or between two"
)
@pytest.mark.parametrize("first", [True, False])
@both_sides
def test_a_pass_of_the_base_model_in_every_step(onto: str, first: bool) -> None:
    """As in DPO and distillation; PEFT freezes the adapters meanwhile."""
    runs = []
    for disabled in (False, True):
        model, optimizer = adapted(onto)
        base = copy.deepcopy(model).eval()
        for x, y in DATA[:4]:
            optimizer.zero_grad()
            if not first:
                loss = nn.functional.cross_entropy(model(x), y)
            with torch.no_grad():
                if disabled:
                    with model.disable_adapter():
                        target = model(x)
                else:
                    with base.disable_adapter():
                        target = base(x)
            if first:
                loss = nn.functional.cross_entropy(model(x), y)
            (loss + (model(x) - target).square().mean()).backward()
            optimizer.step()
        runs.append((weights(model), averages_of(optimizer)))
    for one, other in zip(*runs, strict=True):
        assert_same_bits(one, other)


@both_sides
def test_two_adapters_take_turns_within_a_step(onto: str) -> None:
    """PEFT freezes the one that is not in use; each is perturbed while it is used."""
    model = lora_mlp(modules_to_save=None)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    optimizer = optimizer_of(randomised(model), onto)
    assert len(optimizer.pairs) == 4
    for batch in DATA[:3]:
        optimizer.zero_grad()
        moved = set()
        for adapter in ("default", "second"):
            model.base_model.set_adapter(adapter)
            names = perturbed(model, optimizer)
            assert all(f".{adapter}." in name for name in names)
            moved |= names
            assert_runs_at_the_points(model, optimizer, batch)
            loss_of(model, batch).backward()
        model.base_model.set_adapter(["default", "second"])
        optimizer.step()
    for pair in optimizer.pairs:
        factors = ("lora_A", "lora_B") if onto == "both" else (f"lora_{onto}",)
        for factor in factors:
            assert f"{pair.layer_name}.{factor}.{pair.adapter}.weight" in moved


@pytest.mark.proves("LoRA layers", "merged and unmerged during training, as if nothing had been")
@both_sides
def test_adapters_are_merged_for_a_while(onto: str) -> None:
    """Merged after a step, or between the micro-batches of one."""
    runs = []
    for merged in (False, True):
        model, optimizer = adapted(onto)
        train(model, optimizer, DATA[:2])
        evaluations = []
        for middle in (False, True):
            optimizer.zero_grad()
            if middle:
                loss_of(model, DATA[2]).backward()
            x = DATA[3][0]
            if merged:
                model.merge_adapter()
                evaluations.append(model.eval()(x).detach())
                model.train().unmerge_adapter()
            else:
                evaluations.append(copy.deepcopy(model).eval()(x).detach())
            loss_of(model, DATA[4]).backward()
            optimizer.step()
        runs.append((evaluations, weights(model), averages_of(optimizer)))
    (plain, *ends), (found, *ends_again) = runs
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for one, other in zip(ends, ends_again, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-10)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).sum()


def table_without_its_first_adapter(method: str) -> tuple[nn.Module, Any]:
    """Return an embedding with two adapters, the first of which is deleted after a step."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["layer"])
    model = get_peft_model(Table(), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    model = randomised(model)
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1)

    def closure() -> None:
        optimizer.zero_grad()
        model(torch.arange(8)).backward()

    optimizer.step(closure)
    model.delete_adapter("default")
    model.base_model.set_adapter("second")
    return model, optimizer


def test_a_clean_gradient_after_an_embeddings_adapter_was_deleted() -> None:
    model, optimizer = table_without_its_first_adapter("eflat")
    optimizer.zero_grad()
    model.eval()(torch.arange(8)).backward()
    with pytest.warns(UserWarning, match="without the perturbation"):
        optimizer.step()
    assert list(optimizer.perturbation_norms) == [optimizer.pairs[1].name]


@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_an_abandoned_step_after_an_embeddings_adapter_was_deleted(method: str) -> None:
    model, optimizer = table_without_its_first_adapter(method)
    optimizer.zero_grad()
    x = torch.arange(8)
    clean = copy.deepcopy(model)(x)
    for call, same in ((optimizer.first_step, False), (optimizer.zero_grad, True)):
        model(x).backward()
        call()
        assert torch.equal(model(x), clean) == same
    model(x).backward()
    optimizer.first_step()


@pytest.mark.proves("LoRA layers", "tied base weights: the adapter of each use is a pair")
@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=str)
@both_sides
def test_tied_base_weights(targets: list[str], onto: str) -> None:
    torch.manual_seed(0)
    model = randomised(without_dropout(lora_gpt2(target_modules=targets, fan_in_fan_out=False)))
    base = model.base_model.model
    tied = [getattr(m, "base_layer", m) for m in (base.transformer.wte, base.lm_head)]
    assert tied[0].weight is tied[1].weight
    optimizer = optimizer_of(model, onto)
    assert len(optimizer.pairs) == len(targets)
    tokens = torch.arange(16).reshape(2, 8)
    before = tied[0].weight.detach().clone()
    step_as_the_reference(optimizer, lambda _: model(input_ids=tokens, labels=tokens).loss)
    assert same_bits(tied[0].weight, before)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.plain = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.grouped(x))).mean((2, 3))


@pytest.mark.proves("LoRA layers", "grouped convolutions train, unperturbed")
@both_sides
def test_grouped_convolutions_train_unperturbed(onto: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["grouped", "plain"])
    model = randomised(get_peft_model(Convolutions(), config))
    with pytest.warns(UserWarning, match=r"grouped \(Conv2d: 2 groups\)"):
        optimizer = optimizer_of(model, onto)
    assert [pair.layer_name.rsplit(".", 1)[1] for pair in optimizer.pairs] == ["plain"]
    x, y = torch.randn(5, 4, 6, 6, dtype=torch.float64), torch.randint(0, 3, (5,))
    shadow = [p.detach().clone().requires_grad_() for p in trainable(model)]
    plain = torch.optim.AdamW(shadow, lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        moved = perturbed(model, optimizer)
        assert_runs_at_the_points(model, optimizer, (x, y))
        loss_of(model, (x, y)).backward()
        factors = ("A", "B") if onto == "both" else (onto,)
        targets = {f"base_model.model.plain.lora_{f}.default.weight" for f in factors}
        if onto == "both" and step:  # B may carry it alone
            targets &= moved | {name for name in targets if "lora_B" in name}
        assert moved == (targets if step else set())
        for p, q in zip(trainable(model), shadow, strict=True):
            q.grad = p.grad.clone()
        plain.step()
        optimizer.step()
        for p, q in zip(trainable(model), shadow, strict=True):
            torch.testing.assert_close(as_matrix(p), as_matrix(q), rtol=1e-8, atol=1e-11)
