"""Copies of a perturbed model are clean, and removing a perturbation leaves nothing on it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from models import assert_same_bits, lora_weights, weights
from perturbed_case import Case, X, assert_nothing_in_place
from torch import nn

from eflat_ext import EFlatPerturbation


def assert_nothing_attached(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
        assert not {"forward", "_replicate_for_data_parallel"} & vars(module).keys()
    assert_nothing_in_place(model)


def copies_of(model: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]


@pytest.mark.parametrize("moment", ["before a pass", "after a pass", "after a backward pass"])
def test_a_copied_model_is_clean_and_inert(moment: str) -> None:
    """The copy takes a perturbation of its own."""
    case = Case()
    if moment != "before a pass":
        output = case.model(X)
        if moment == "after a backward pass":
            output.sum().backward()
    for other in copies_of(case.model):
        inner = other[0][0]
        assert_same_bits(weights(inner), case.before)
        assert_same_bits(dict(inner.state_dict()), case.before)
        for mode in (True, False):
            assert torch.equal(other.train(mode)(X), case.plain()(X))
        again = EFlatPerturbation(other)
        again.put({B: torch.ones_like(B) for B in lora_weights(inner)})
        assert torch.equal(other.train()(X), case.plain(1.0, 1.0)(X))
        again.remove()
        assert torch.equal(other(X), case.plain()(X))
        assert_same_bits(weights(inner), case.before)
        with torch.no_grad():  # memory of its own
            lora_weights(inner)[0].fill_(7.0)
    case.assert_perturbed()


def test_copying_one_layer_does_not_drag_the_model_along() -> None:
    case = Case()
    case.model(X)
    case.inner.register_parameter("big", nn.Parameter(torch.zeros(10**6)))
    for layer in case.layers:
        assert len(pickle.dumps(layer)) < 10**5
        assert copy.deepcopy(layer).forward.__self__ is not layer


def test_a_perturbation_that_is_gone_leaves_the_model() -> None:
    case = Case()
    case.assert_perturbed()
    case.perturbation = None
    gc.collect()
    assert_nothing_attached(case.model)
    case.assert_runs_clean()


def test_a_perturbation_that_is_gone_before_its_first_pass_leaves_the_model() -> None:
    case = Case()
    case.perturbation.remove()
    waiting = EFlatPerturbation(case.model)
    assert "forward" in vars(case.layers[0])
    del waiting
    gc.collect()
    assert_nothing_attached(case.model)


def test_perturbation_and_model_are_not_kept_alive() -> None:
    case = Case()
    case.model.perturbation = case.perturbation  # a cycle
    case.model(X)
    seen = [weakref.ref(case.model), weakref.ref(case.perturbation), weakref.ref(case.layers[0])]
    del case
    for _ in range(2):  # layers are held until the perturbation is gone
        gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_a_removed_perturbation_leaves_nothing() -> None:
    case = Case()
    case.model(X)
    case.perturbation.remove()
    assert_nothing_attached(case.model)
    case.assert_runs_clean()


def test_forward_methods_that_another_library_patches() -> None:
    """Accelerate patches before or after this package, and restores what it found."""
    case = Case()
    layer, seen = case.layers[0], []
    case.perturbation.remove()

    def patch(name: str) -> None:
        inner = layer.forward

        def forward(*args: object, **kwargs: object) -> object:
            seen.append(name)
            return inner(*args, **kwargs)

        forward.__wrapped__ = inner
        layer.forward = forward

    patch("under")
    under = layer.forward
    case.perturbation = EFlatPerturbation(case.model)
    case.put(1.0)
    assert inspect.signature(layer.forward) == inspect.signature(type(layer).forward).replace(
        parameters=list(inspect.signature(type(layer).forward).parameters.values())[1:]
    )
    case.assert_perturbed()
    patch("over")
    case.assert_perturbed()
    assert seen == ["under", "over", "under"]
    case.perturbation.remove()  # the outer patch keeps it, without effect
    case.assert_runs_clean()
    layer.forward = under
    case.perturbation = EFlatPerturbation(case.model)
    case.put(1.0)
    case.assert_perturbed()
    case.perturbation.remove()
    assert layer.forward is under
    case.assert_runs_clean()


def test_a_replaced_forward_method_runs_clean_until_the_next_step() -> None:
    """At the next step it is patched again."""
    case = Case()
    layer = case.layers[0]
    layer.forward = type(layer).forward.__get__(layer)
    case.assert_runs_at(0.0, 1.0)
    case.model(X).square().sum().backward()
    case.perturbation.update()
    case.put(1.0)
    case.assert_perturbed()
