"""Saved, merged and copied weights are clean at every moment."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import assert_same_bits, lora_gpt2, weights, without_dropout
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from torch import Tensor, nn

from eflat_ext import (
    EFlatLoRA,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
    reference,
)

TOKENS = torch.arange(2 * 8).reshape(2, 8)
METHODS = {
    "eflat B": (create_eflat_optimizer, {"onto": "B"}),
    "eflat A": (create_eflat_optimizer, {"onto": "A"}),
    "flat": (create_flat_optimizer, {}),
    "lora-sam": (create_lora_sam_optimizer, {}),
}


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def trained(method: str) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """Return a GPT-2 after two steps with a large perturbation, its optimizer and clean weights."""
    model = lora_gpt2()
    create, kwargs = METHODS[method]
    optimizer = create(model, torch.optim.AdamW, lr=1e-2, rho=1.0, **kwargs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
    return model, optimizer, weights(model)


def ran_perturbed(optimizer: Any) -> bool:
    return any(factor.ran_perturbed for factor in optimizer.perturbation.factors)


def after_step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()


def mid_accumulation(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    if not isinstance(optimizer, EFlatLoRA):
        optimizer.first_step()
        loss(model).backward()


def skipped_step(model: nn.Module, optimizer: Any) -> None:
    """Overflow the gradients and do not step, as a gradient scaler does."""
    mid_accumulation(model, optimizer)
    for pair in optimizer.pairs:
        pair.B.grad.fill_(torch.inf)


def failed_forward(model: nn.Module, optimizer: Any) -> None:
    mid_accumulation(model, optimizer)
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model)
    handle.remove()


def saved_adapter(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def saved_by_torch(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


WAYS: dict[str, Callable[[nn.Module, Path], dict[str, Tensor]]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "peft": lambda model, _: get_peft_model_state_dict(model),
    "save_pretrained": saved_adapter,
    "torch.save": saved_by_torch,
    "deepcopy": lambda model, _: copy.deepcopy(model).state_dict(),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)).state_dict(),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_moment = pytest.mark.parametrize(
    "moment", [after_step, mid_accumulation, skipped_step, failed_forward]
)


@pytest.mark.proves(
    "Plain loops", "nothing to remember: whatever saves the model at any moment gets clean weights"
)
@every_moment
@every_method
def test_saved_weights_are_clean(method: str, moment: Callable, tmp_path: Path) -> None:
    model, optimizer, clean = trained(method)
    moment(model, optimizer)
    assert ran_perturbed(optimizer) == (moment is not after_step)
    held = weights(model)
    for name, way in WAYS.items():
        saved = way(model, tmp_path / name)
        lora = {key: value for key, value in saved.items() if "lora_" in key}
        assert len(lora) == 2 * len(optimizer.pairs)
        for key, value in lora.items():
            found = clean[key if key in clean else key.replace(".weight", ".default.weight")]
            assert_same_bits({key: value}, {key: found})
    assert_same_bits(weights(model), held)  # saving changed nothing in the model


def low_rank(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    peft.save_as_lora(folder, model, rank=2)
    return load_file(folder / "adapter_model.safetensors")


def fewer_intruders(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    reduce_intruder_dimension(model, "default", "reduced", logging_sink=lambda *_: None)
    return {name: value for name, value in weights(model).items() if "reduced" in name}


@pytest.mark.parametrize("make", [low_rank, fewer_intruders])
@every_method
def test_functions_of_peft_that_use_a_layers_delta_use_clean_weights(
    method: str, make: Callable, tmp_path: Path
) -> None:
    found = []
    for perturbed in (True, False):
        model, optimizer, _ = trained(method)
        if perturbed:
            mid_accumulation(model, optimizer)
        assert ran_perturbed(optimizer) == perturbed
        torch.manual_seed(0)
        found.append(make(model, tmp_path / str(perturbed)))
    assert found[0]
    assert_same_bits(*found)


@every_method
def test_a_loss_may_hold_a_layers_delta(method: str) -> None:
    """The delta is that of the clean weights."""
    model, optimizer, _ = trained(method)
    mid_accumulation(model, optimizer)
    total = loss(model)
    for pair in optimizer.pairs:
        delta = pair.layer.get_delta_weight("default")
        expected = pair.scaling * (pair.B @ pair.A)
        torch.testing.assert_close(delta, expected.T if pair.layer.fan_in_fan_out else expected)
        total = total + delta.square().sum()
    total.backward()
    assert ran_perturbed(optimizer)


def merged_reference(clean: dict[str, Tensor]) -> dict[str, Tensor]:
    other = lora_gpt2()
    other.load_state_dict(clean, strict=False)
    return weights(other.merge_and_unload())


@pytest.mark.proves(
    "Plain loops", "nothing to remember: merging at any moment merges clean weights"
)
@every_moment
@every_method
def test_merged_weights_are_clean(method: str, moment: Callable) -> None:
    model, optimizer, clean = trained(method)
    moment(model, optimizer)
    expected = merged_reference(clean)

    model.merge_adapter()
    merged = weights(model)
    assert_same_bits(
        {n.replace(".base_layer", ""): p for n, p in merged.items() if ".base_layer" in n},
        {f"base_model.model.{n}": p for n, p in expected.items() if "c_attn" in n or "c_proj" in n},
    )
    model(input_ids=TOKENS)  # perturbed again: unmerging must subtract what was added
    model.unmerge_adapter()
    now = weights(model)
    for name, value in clean.items():
        if "lora_" in name:
            assert_same_bits({name: now[name]}, {name: value})
        else:
            torch.testing.assert_close(now[name], value, rtol=0, atol=1e-6)

    model, optimizer, clean = trained(method)
    moment(model, optimizer)
    assert_same_bits(weights(model.merge_and_unload()), expected)


@every_method
def test_training_goes_on_after_merging_within_a_step(method: str) -> None:
    """The second half of an accumulated gradient is taken at the same point as the first."""
    results = []
    for interrupted in (False, True):
        model, optimizer, _ = trained(method)
        mid_accumulation(model, optimizer)
        with torch.no_grad():  # so that merging and unmerging does not round
            for pair in optimizer.pairs:
                pair.layer.get_base_layer().weight.zero_()
        if interrupted:
            model.merge_adapter()
            model.unmerge_adapter()
        loss(model).backward()
        optimizer.step()
        results.append(weights(model))
    assert_same_bits(*results)


@every_method
def test_an_adapter_loaded_within_a_step_is_perturbed_from_then_on(method: str) -> None:
    model, optimizer, _ = trained(method)
    mid_accumulation(model, optimizer)
    new = {k: v + 1 for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, new)
    assert_same_bits(dict(get_peft_model_state_dict(model)), new)
    loss(model)
    assert_same_bits(dict(get_peft_model_state_dict(model)), new)


@every_method
def test_generation_within_a_step_is_clean(method: str) -> None:
    model, optimizer, clean = trained(method)
    other = lora_gpt2().eval()
    other.load_state_dict(clean, strict=False)
    expected = other.generate(input_ids=TOKENS[:, :2], max_new_tokens=8, do_sample=False)
    mid_accumulation(model, optimizer)
    found = model.eval().generate(input_ids=TOKENS[:, :2], max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)
    assert_same_bits(weights(model), clean)


@every_method
def test_a_copied_model_is_clean_and_takes_a_new_optimizer(method: str) -> None:
    model, optimizer, clean = trained(method)
    mid_accumulation(model, optimizer)
    held, plain = weights(model), without_dropout(lora_gpt2())
    plain.load_state_dict(clean, strict=False)
    other = without_dropout(copy.deepcopy(model))
    assert torch.equal(loss(other), loss(plain))
    assert_same_bits(weights(other), clean)
    other = copy.deepcopy(model)
    assert_same_bits(weights(other.merge_and_unload()), merged_reference(clean))
    other = copy.deepcopy(model)
    create, kwargs = METHODS[method]
    again = create(other, torch.optim.SGD, lr=0.1, **kwargs)
    assert_same_bits(weights(other), clean)
    mid_accumulation(other, again)
    again.step()
    assert_same_bits(weights(model), held)


@every_method
def test_passes_in_the_clean_context_are_clean(method: str) -> None:
    model, optimizer, clean = trained(method)
    without_dropout(model)
    mid_accumulation(model, optimizer)
    perturbed = loss(model)
    expected = loss(copy.deepcopy(model))
    assert not torch.equal(perturbed, expected)
    with optimizer.clean():
        assert torch.equal(loss(model), expected)
    assert torch.equal(loss(model), perturbed)
    assert_same_bits(weights(model), clean)


def test_a_gradient_taken_in_the_clean_context_belongs_to_clean_weights() -> None:
    model, optimizer, _ = trained("eflat B")
    optimizer.zero_grad()
    with optimizer.clean():
        loss(model).backward()
    expected = {}
    for pair in optimizer.pairs:
        arguments = [t.detach() for t in (pair.A, pair.B, pair.A.grad, pair.B.grad)]
        E, _ = reference.perturb(*arguments, pair.scaling, 1.0)
        expected[pair.name] = optimizer.averages[pair.name] * 0.1 + E * 0.9
    with pytest.warns(UserWarning, match="without the perturbation"):
        optimizer.step()
    for name, average in optimizer.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_closure_leaves_clean_weights(
    method: str, error: type[BaseException]
) -> None:
    model, optimizer, clean = trained(method)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(loss(model))
        calls[-1].backward()
        if len(calls) == (1 if isinstance(optimizer, EFlatLoRA) else 2):
            assert ran_perturbed(optimizer)
            raise error("in the closure")
        return calls[-1]

    with pytest.raises(error, match="in the closure"):
        optimizer.step(closure)
    assert_same_bits(weights(model), clean)
    optimizer.zero_grad()
    optimizer.step(lambda: loss(model).backward())  # training goes on


@every_method
def test_an_exception_in_the_base_optimizer_leaves_clean_weights(method: str) -> None:
    model, optimizer, clean = trained(method)
    mid_accumulation(model, optimizer)
    handle = optimizer.base.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert_same_bits(weights(model), clean)
    handle.remove()


def test_a_step_without_gradients_or_a_learning_rate_leaves_clean_weights() -> None:
    """It looks like the step by which torch.distributed.checkpoint creates state."""
    model = lora_gpt2()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=1e-2, rho=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    clean = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.zero_grad()
    (0 * loss(model)).backward()
    assert ran_perturbed(optimizer)
    optimizer.step()
    assert_same_bits(weights(model), clean)
