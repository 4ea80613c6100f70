"""Every pair of PEFT's layers is found, with its current values; other layers are named."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from models import at_points, batches, lora_gpt2, lora_mlp, loss_of, same_bits, weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer, reference
from eflat_ext.lora import LoraPair, find_pairs

UP, DOWN = "base_model.model.up", "base_model.model.down"


class Zoo(nn.Module):
    """Layers whose LoRA is not a plain pair, and one whose LoRA is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8, max_norm=1.0)
        self.convolution = nn.Conv2d(4, 4, 3, groups=2)
        self.linear = nn.Linear(8, 6)


def zoo(*targets: str) -> nn.Module:
    return get_peft_model(Zoo(), LoraConfig(r=2, target_modules=list(targets)))


def names(pairs: list[LoraPair]) -> list[str]:
    return [pair.name for pair in pairs]


def step_twice(model: nn.Module, onto: str = "B") -> tuple[object, dict[str, Tensor]]:
    """Take two EFlat-LoRA steps; return the reference's averages for the same gradients."""
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=0.1, beta=0.5, onto=onto)
    expected = {name: torch.zeros_like(a) for name, a in optimizer.averages.items()}
    for batch in batches(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for pair in optimizer.pairs:
            if pair.A.grad is None and pair.B.grad is None:
                continue
            with at_points(optimizer):
                factors = [pair.A.detach().clone(), pair.B.detach().clone()]
            gradients = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in (pair.A, pair.B)
            ]
            E, _ = reference.perturb(*factors, *gradients, pair.scaling, 0.1, onto)
            expected[pair.name] = expected[pair.name] * 0.5 + E * 0.5
        optimizer.step()
    return optimizer, expected


def test_pairs_are_in_module_order() -> None:
    up, down = find_pairs(lora_mlp())
    assert (up.layer_name, up.adapter, up.name) == (UP, "default", f"{UP}.default")
    assert (up.A.shape, up.B.shape, up.scaling) == ((4, 12), (16, 4), 2.0)
    assert (down.layer_name, down.A.shape, down.B.shape) == (DOWN, (4, 16), (10, 4))
    assert up.A is up.layer.lora_A["default"].weight and up.active


@pytest.mark.proves(
    "LoRA layers",
    "options on linear layers: DoRA, rsLoRA, LoRA bias, `rank_pattern`, `alpha_pattern`, dropout",
)
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 32}},
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"lora_dropout": 0.3},
        {"r": 32},
    ],
    ids=str,
)
def test_kinds_of_linear_lora(config: dict[str, object]) -> None:
    model = lora_mlp(**config)
    pairs = find_pairs(model)
    assert names(pairs) == [f"{UP}.default", f"{DOWN}.default"]
    if config.get("use_rslora"):
        assert pairs[0].scaling == 8 / math.sqrt(4)
    if "rank_pattern" in config:
        assert [pair.A.shape[0] for pair in pairs] == [2, 4]
        assert [pair.scaling for pair in pairs] == [4.0, 8.0]
    optimizer, expected = step_twice(model)
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-9)
        assert average.any()


def test_scaling_is_live() -> None:
    model = lora_mlp()
    pairs = find_pairs(model)
    for pair in pairs:
        pair.layer.set_scale("default", 3.0)
    assert [pair.scaling for pair in pairs] == [6.0, 6.0]
    optimizer, expected = step_twice(model)
    for pair in optimizer.pairs:
        pair.layer.scale_layer(0.5)
    assert [pair.scaling for pair in optimizer.pairs] == [3.0, 3.0]
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("onto", ["A", "B"])
def test_a_layer_scaled_by_zero_is_left_out(onto: str) -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, onto=onto)
    for scale in (1.0, 0.0, 1.0):
        optimizer.pairs[0].layer.set_scale("default", scale)
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()
        assert (f"{UP}.default" in optimizer.perturbation_norms) == (scale == 1.0)
    assert int(optimizer.skipped_perturbations) == 0


@pytest.mark.parametrize("onto", ["A", "B"])
def test_a_frozen_factor_leaves_the_other_term(onto: str) -> None:
    """As with LoRA-FA, for A and for B."""
    model = lora_mlp()
    torch.manual_seed(3)
    for pair in find_pairs(model):
        nn.init.normal_(pair.B, std=0.3)
        (pair.A if onto == "B" else pair.B).requires_grad_(False)
    optimizer, expected = step_twice(model, onto)
    assert len(optimizer.pairs) == 2
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-9)
        assert average.any()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_onto_both_takes_pairs_that_have_both(frozen: str) -> None:
    """A pair with a frozen factor, or with one of another pair, is not perturbed."""
    model = lora_mlp()
    first, second = find_pairs(model)
    second.parameter(frozen).requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"factor A or B .*: {second.name}$"):
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, onto="both")
    assert names(optimizer.pairs) == [first.name]
    assert list(optimizer.averages) == [f"{first.name}.A", f"{first.name}.B"]
    optimizer.remove_hooks()
    first.parameter(frozen).requires_grad_(False)
    with pytest.raises(ValueError, match='both factors of no pair, as onto="both" needs'):
        create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, onto="both")

    model = lora_mlp()
    first, second = find_pairs(model)
    other = lora_mlp(target_modules=["up"], modules_to_save=None, seed=1).base_model.model.up
    model.base_model.model.register_module("other", other)
    other.lora_A["default"].weight = first.A
    with pytest.warns(
        UserWarning, match=r"tied to another's.*: base_model\.model\.other\.default$"
    ):
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, onto="both")
    assert names(optimizer.pairs) == [first.name, second.name]


@pytest.mark.proves("LoRA layers", "several active adapters, each its own pair")
def test_two_active_adapters_are_two_pairs_each() -> None:
    model = lora_mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down"]))
    assert names(find_pairs(model)) == [f"{UP}.default", f"{DOWN}.default"]
    model.set_adapter("second")
    assert names(find_pairs(model)) == [f"{DOWN}.second"]
    model.base_model.set_adapter(["default", "second"])
    model.double()
    assert names(find_pairs(model)) == [f"{UP}.default", f"{DOWN}.default", f"{DOWN}.second"]
    optimizer, expected = step_twice(model)
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-9)
        assert average.any()


@pytest.mark.proves("LoRA layers", "an adapter switched off during training")
def test_an_adapter_switched_off_keeps_its_average() -> None:
    model = lora_mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down"]))
    model.base_model.set_adapter(["default", "second"])
    model.double()
    optimizer, _ = step_twice(model)
    before = {name: average.clone() for name, average in optimizer.averages.items()}
    clean = weights(model)
    model.base_model.set_adapter("default")
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert list(optimizer.perturbation_norms) == [f"{UP}.default", f"{DOWN}.default"]
    assert same_bits(optimizer.averages[f"{DOWN}.second"], before[f"{DOWN}.second"])
    assert not same_bits(optimizer.averages[f"{DOWN}.default"], before[f"{DOWN}.default"])
    assert same_bits(
        model.get_parameter(f"{DOWN}.lora_B.second.weight"), clean[f"{DOWN}.lora_B.second.weight"]
    )
    model.delete_adapter("second")
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()


def test_active_follows_the_layer() -> None:
    model = lora_mlp()
    pair = find_pairs(model)[0]
    assert pair.active
    model.merge_adapter()
    assert not pair.active
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not pair.active
    assert pair.active
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"]))
    model.set_adapter("second")
    assert not pair.active
    model.set_adapter("default")
    model.delete_adapter("default")
    assert not pair.active and pair.scaling == 0.0


@pytest.mark.proves(
    "LoRA layers",
    "grouped convolutions and other layers without a plain pair are named in a warning",
)
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["embedding", "linear"], ["embedding (Embedding: max_norm)"]),
        (["convolution", "linear"], ["convolution (Conv2d: 2 groups)"]),
        (["embedding", "convolution", "linear"], ["embedding (E", "convolution (C"]),
    ],
    ids=str,
)
def test_other_layers_are_named_in_one_warning(targets: list[str], named: list[str]) -> None:
    model = zoo(*targets)
    with pytest.warns(UserWarning, match="train without a perturbation") as caught:
        pairs = find_pairs(model)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in named)
    assert [pair.layer_name.rsplit(".", 1)[-1] for pair in pairs] == ["linear"]
    others = [target for target in targets if target != "linear"]
    with pytest.raises(ValueError, match=rf"only .*{others[0]}"):
        find_pairs(zoo(*others))


def test_a_variant_with_a_factor_between_is_named() -> None:
    """KaSA: W0 + s B diag(d) A."""
    from peft import KasaConfig

    with pytest.raises(ValueError, match="KasaLinearVariant"):
        find_pairs(lora_mlp(kasa_config=KasaConfig()))


@pytest.mark.proves("LoRA layers", "factors that share memory are named in a warning")
def test_tied_factors_that_are_views_are_named() -> None:
    model = lora_gpt2(target_modules=["c_attn", "wte", "lm_head"], ensure_weight_tying=True)
    with pytest.warns(
        UserWarning, match=r"wte \(Embedding: factor shares.*lm_head .*shares its memory"
    ):
        pairs = find_pairs(model)
    assert {pair.layer_name.rsplit(".", 1)[-1] for pair in pairs} == {"c_attn"}


def test_a_shared_factor_is_perturbed_once() -> None:
    model = lora_mlp(target_modules=["up"], modules_to_save=None)
    (first,) = find_pairs(model)
    twin = lora_mlp(target_modules=["up"], modules_to_save=None, seed=1).base_model.model.up
    model.base_model.model.register_module("twin", twin)
    twin.lora_B["default"].weight = first.B
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=1.0, beta=1.0)
    assert names(optimizer.pairs) == [first.name]
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    average, point = optimizer.averages[first.name], optimizer.points()[first.B]
    assert average.any() and same_bits(point, first.B.detach() + average)
    with at_points(optimizer):
        others = copy.deepcopy([model.base_model.model.up, twin])  # run unperturbed
    x = batches(1)[0][0]
    for layer, other in zip((model.base_model.model.up, twin), others, strict=True):
        assert same_bits(layer(x), other(x))


def test_factors_of_a_fan_in_fan_out_layer_are_not_transposed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = find_pairs(lora_gpt2(target_modules=["c_attn"]))
    assert {(pair.A.shape, pair.B.shape) for pair in pairs} == {((4, 16), (48, 4))}


def test_models_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be a PEFT model .* got Linear"):
        find_pairs(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        find_pairs([])


def test_finding_pairs_without_peft_says_so() -> None:
    code = "import sys; sys.modules['peft'] = None; from eflat_ext.lora import *; find_pairs(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: finding LoRA layers needs PEFT" in done.stderr
