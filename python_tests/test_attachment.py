"""What sits on a model whose weights are perturbed: on copies of it, for one owner, and removed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import assert_same_bits, weights
from perturbed_case import Case, Owner, X, add_one
from torch import nn

from eflat_ext.perturbed import PerturbedWeights


def assert_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert not {"merge", "extra_repr"} & vars(module).keys()


def copies_of(model: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]


@pytest.mark.parametrize("copied_while", ["clean", "perturbed"])
@pytest.mark.parametrize("first", ["forward", "train forward", "state_dict", "guarded", "attach"])
def test_a_copied_model_is_inert_and_clean(copied_while: str, first: str) -> None:
    case = Case()
    if copied_while == "perturbed":
        case.model(X)
    for other in copies_of(case.model):
        inner = other[0][0]
        if first == "forward":
            other.eval()(X)
        elif first == "train forward":
            other.train()(X)
        elif first == "state_dict":
            assert_same_bits(dict(inner.state_dict()), case.before)
            continue
        elif first == "guarded":
            inner.extra_repr()
        else:
            owner = Owner()
            again = PerturbedWeights(other, [(inner.up, "weight")], add_one, owner)
            assert_same_bits(weights(inner), case.before)
            other.train()(X)
            assert again.applied
            again.remove()
            assert_no_hooks(other)
        assert_same_bits(weights(inner), case.before)
    if copied_while == "perturbed":
        case.assert_perturbed()
    else:
        case.assert_clean()


def test_a_copy_made_while_perturbed_is_clean_at_once_and_keeps_what_is_written_to_it() -> None:
    case = Case()
    case.model(X)
    for other in copies_of(case.model):
        inner = other[0][0]
        assert_same_bits(weights(inner), case.before)
        with torch.no_grad():
            inner.up.weight.fill_(7.0)
        assert (other.state_dict()["0.0.up.weight"] == 7).all()
        other(X)
        assert (inner.up.weight == 7).all()
    case.assert_perturbed()


def test_copying_one_layer_does_not_drag_the_model_along() -> None:
    case = Case()
    case.model(X)
    assert len(pickle.dumps(case.inner.up)) < len(pickle.dumps(case.inner)) + 4000
    big = nn.Parameter(torch.zeros(10**6))
    case.inner.register_parameter("big", big)
    assert len(pickle.dumps(case.inner.up)) < 10**5


def test_one_owner_at_a_time() -> None:
    case = Case()
    slots = [(case.inner.up, "weight")]
    for model in (case.model, case.inner):
        with pytest.raises(RuntimeError, match="remove_hooks"):
            PerturbedWeights(model, slots, add_one, Owner())
    case.model(X)
    case.weights.remove()
    case.assert_clean()
    owner = Owner()
    second = PerturbedWeights(case.model, slots, add_one, owner)
    assert second.alive and not case.weights.alive


def test_a_dead_owner_leaves_clean_weights_and_its_place() -> None:
    case = Case()
    case.model(X)
    case.assert_perturbed()
    case.owner = None
    gc.collect()
    assert not case.weights.alive
    case.model(X)
    case.assert_clean()
    owner = Owner()
    PerturbedWeights(case.model, [(case.inner.up, "weight")], add_one, owner)


def test_owner_and_model_are_not_kept_alive() -> None:
    case = Case()
    case.model.owner = case.owner  # a cycle
    seen = [weakref.ref(case.model), weakref.ref(case.owner)]
    del case
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_removed_hooks_are_all_gone() -> None:
    case = Case()
    case.model(X)
    case.weights.remove()
    case.assert_clean()
    assert_no_hooks(case.model)
    case.model(X)
    case.assert_clean()
    case.weights.perturb()
    case.assert_perturbed()
