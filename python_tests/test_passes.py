"""Which passes through a model find its weights perturbed, and where they may enter."""

from __future__ import annotations

import pytest
import torch
from models import CREATE, Mlp, assert_same_bits, batches, lora_mlp, train_on
from perturbed_case import Case, Owner, X, add_one
from torch import Tensor, nn

from eflat_ext.perturbed import PerturbedWeights


def test_training_forward_perturbs_and_evaluation_restores() -> None:
    case = Case()
    expected = case.model.eval()(X)
    case.assert_clean()
    perturbed_output = case.model.train()(X)
    case.assert_perturbed()
    assert not torch.equal(perturbed_output, expected)
    assert torch.equal(case.model(X), perturbed_output)
    assert torch.equal(case.model.eval()(X), expected)
    case.assert_clean()


def test_a_call_may_enter_at_an_inner_module() -> None:
    """As ``generate`` of a wrapped model does."""
    case = Case()
    case.inner(X)
    case.assert_perturbed()
    case.model.eval()
    case.inner(X)
    case.assert_clean()


def test_a_layer_that_a_backward_pass_runs_again_restores_nothing() -> None:
    """As gradient checkpointing does, whatever the mode is then."""
    model, owner, applied = Mlp(), Owner(), []
    held = PerturbedWeights(model, [(model.up, "weight")], add_one, owner)
    outputs = model(X)
    model.eval()

    def again(_: Tensor) -> None:
        with torch.enable_grad():
            model.up(X)
        applied.append(held.applied)

    outputs.register_hook(again)
    outputs.sum().backward()
    assert applied == [True]
    model.up(X)  # but an evaluation of the layer alone does
    assert not held.applied


def test_hooks_of_others_find_the_perturbation_in_place() -> None:
    """Sharding gathers in such hooks what the forward pass will use."""
    model, owner, seen = Mlp(), Owner(), []
    model.register_forward_pre_hook(lambda *_: seen.append(held.applied))
    held = PerturbedWeights(model, [(model.up, "weight")], add_one, owner)
    model(X)
    assert seen == [True]


def test_data_parallel_replicas_are_refused() -> None:
    case = Case()
    replica = case.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(X)
    case.weights.perturb()
    replica(X)


def test_the_mode_of_the_layers_decides_whatever_is_called() -> None:
    """A wrapper made anew is in training mode, and stays so when what it wraps is put in eval()."""
    case = Case()
    case.model[0].eval()
    assert case.model.training
    for entry in (case.model, case.model[0], case.inner):
        entry(X)
        case.assert_clean()
    case.inner.up.train()
    case.model.training = False
    for entry in (case.model, case.model[0], case.inner):
        entry(X)
        case.assert_perturbed()
        case.weights.restore()


def test_a_functional_call_leaves_the_callers_tensors_alone() -> None:
    case = Case()
    own = {name: value.detach().clone() for name, value in case.model.named_parameters()}
    before = {name: value.clone() for name, value in own.items()}
    expected = torch.func.functional_call(case.model.eval(), own, X)
    assert torch.equal(torch.func.functional_call(case.model.train(), own, X), expected)
    assert_same_bits(own, before)
    case.assert_clean()
    assert not case.weights.visited
    case.model(X)
    case.assert_perturbed()


@pytest.mark.parametrize("method", CREATE)
@pytest.mark.parametrize("before", [True, False])
def test_a_functional_call_leaves_a_teachers_parameters_alone(method: str, before: bool) -> None:
    """Those of a moving average of the weights, say; the student's own are perturbed as ever."""
    model = lora_mlp()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)
    train_on(model, optimizer, batches(2))
    teacher = {
        name: nn.Parameter(p.detach() + 0.1, requires_grad=False)
        for name, p in model.named_parameters()
    }
    held = {name: p.clone() for name, p in teacher.items()}
    x = batches(1)[0][0]
    with torch.no_grad():
        expected = torch.func.functional_call(model.eval(), teacher, (x,))
        model.train()
        clean = optimizer.base.param_groups[0]["params"][1].clone()
        for order in ("teacher", "student") if before else ("student", "teacher"):
            if order == "student":
                model(x)
            else:
                assert torch.equal(torch.func.functional_call(model, teacher, (x,)), expected)
    assert_same_bits(teacher, held)
    assert optimizer._weights.applied == (method == "eflat")
    moved = not torch.equal(optimizer.base.param_groups[0]["params"][1], clean)
    assert moved == (method == "eflat")
