"""When perturbed weights are in a model, and that clean ones come out of it, bit for bit."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from models import Mlp, assert_same_bits, same_bits, weights
from perturbed_case import NAMES, Case, Owner, X, add_one
from torch import Tensor, nn

from eflat_ext import perturbed
from eflat_ext.perturbed import PerturbedWeights

FOLDER = Path(perturbed.__file__).parent


def test_perturb_and_restore_are_idempotent() -> None:
    case = Case()
    case.assert_clean()
    for _ in range(2):
        case.weights.perturb()
        case.assert_perturbed()
    for _ in range(2):
        case.weights.restore()
        case.assert_clean()


def test_gradients_are_those_of_the_perturbed_point() -> None:
    case = Case()
    case.model(X).square().sum().backward()
    other = Mlp()
    other.load_state_dict({k: v + 1 if k in NAMES else v for k, v in case.before.items()})
    other(X).square().sum().backward()
    for p, q in zip(case.inner.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_parameter_replaced_while_perturbed() -> None:
    case = Case()
    case.model(X)
    case.inner.up.weight = nn.Parameter(torch.full((16, 12), 5.0))
    case.before["up.weight"] = torch.full((16, 12), 5.0)
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    case.weights.restore()
    case.assert_clean()
    case.model(X)
    case.assert_perturbed()


def test_inference_mode_in_between() -> None:
    case = Case()
    for _ in range(2):
        case.model.train()(X).sum().backward()
        with torch.inference_mode():
            case.model.eval()(X)
        case.assert_clean()
    case.model.double().train()
    with torch.inference_mode():
        case.model(X.double())  # the buffers are made anew, of another type
    case.weights.restore()
    case.model(X.double()).sum().backward()


def test_the_value_found_is_the_one_perturbed() -> None:
    case = Case()
    case.model(X)
    case.weights.restore()
    with torch.no_grad():
        case.inner.up.weight.mul_(2)
    case.before = weights(case.inner)
    case.model(X)
    case.assert_perturbed()


@pytest.mark.parametrize("moved_while", ["clean", "perturbed"])
def test_a_model_that_changes_its_type(moved_while: str) -> None:
    case = Case()
    if moved_while == "perturbed":
        case.model(X)
    case.model.double()
    case.before = {name: value.double() for name, value in case.before.items()}
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    case.weights.restore()
    case.assert_clean()
    case.model(X.double())
    case.assert_perturbed()


def test_state_dict_is_clean_and_leaves_the_model_alone() -> None:
    case = Case()
    case.model(X)
    versions = [p._version for p in case.inner.parameters()]
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    kept = case.inner.state_dict(keep_vars=True)
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in kept.values())
    assert_same_bits(dict(kept), case.before)
    assert_same_bits(
        dict(case.inner.up.state_dict(prefix="up.")),
        {name: value for name, value in case.before.items() if name.startswith("up.")},
    )
    case.assert_perturbed()
    assert [p._version for p in case.inner.parameters()] == versions
    # What was saved does not change when the weights do.
    saved = case.inner.state_dict()
    case.weights.restore()
    case.weights.perturb()
    assert_same_bits(dict(saved), case.before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_replaces_the_clean_values(assign: bool) -> None:
    case = Case()
    case.model(X)
    case.before = {name: value * 3 for name, value in case.before.items()}
    case.inner.load_state_dict(copy.deepcopy(case.before), assign=assign)
    case.assert_clean()
    case.model(X)
    case.assert_perturbed()
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    case.weights.restore()
    case.assert_clean()


def test_a_tied_parameter_is_saved_clean_under_every_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    model, owner = Tied(), Owner()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    held = PerturbedWeights(model, [(model.one, "weight")], add_one, owner)
    held.perturb()
    assert not torch.equal(model.two.weight, before["two.weight"])
    assert_same_bits(dict(model.state_dict()), before)


def test_clean_context() -> None:
    case = Case()
    case.model(X)
    with case.weights.clean():
        case.assert_clean()
        with case.weights.clean():
            case.model(X)
            case.weights.perturb()
            case.assert_clean()
    case.assert_perturbed()
    with pytest.raises(KeyError), case.weights.clean():
        raise KeyError
    case.assert_perturbed()
    case.weights.restore()
    with case.weights.clean():
        pass
    case.assert_clean()


def test_guarded_methods_find_clean_weights() -> None:
    class Merging(Mlp):
        def merge(self, factor: float, *, plus: float) -> Tensor:
            return self.up.weight.detach() * factor + plus

    torch.manual_seed(0)
    model, owner = Merging(), Owner()
    before = model.up.weight.detach().clone()
    model.patched = lambda: model.up.weight.detach().clone()
    patched = model.patched
    guarded = [(model, "merge"), (model, "patched")]
    held = PerturbedWeights(model, [(model.up, "weight")], add_one, owner, guarded)
    model(X)
    assert torch.equal(model.merge(2.0, plus=0.0), before * 2)
    model(X)
    assert torch.equal(model.patched(), before)
    held.perturb()
    held.remove()
    assert "merge" not in vars(model) and model.patched is patched
    assert torch.equal(model.merge(1.0, plus=0.0), before)


def test_targets_outside_the_model() -> None:
    stranger = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="targets"):
        PerturbedWeights(Mlp(), [(stranger, "weight")], add_one, Owner())


def test_an_exception_in_the_perturbation_loses_nothing() -> None:
    case = Case()

    def half(targets: list[Tensor]) -> None:
        targets[0].add_(1)
        raise MemoryError

    case.weights._perturbation = half
    with pytest.raises(MemoryError):
        case.model(X)
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    case.model.eval()(X)
    case.assert_clean()


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("stepped", [[], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("perturbed_first", [True, False])
def test_code_that_restores_and_goes_on(
    perturbed_first: bool, stepped: list[int], replaced: bool
) -> None:
    case = Case()
    if perturbed_first:
        case.weights.perturb()
    held = case.inner.down.weight
    if replaced:  # by another library, after the perturbation
        case.inner.down.weight = nn.Parameter(torch.full_like(held, 7.0))
        case.before["down.weight"] = torch.full_like(held, 7.0)
    expected = dict(case.before)
    targets = [getattr(case.inner, name.split(".")[0]).weight for name in NAMES]
    with case.weights.restored_by(stepped) as clean, torch.no_grad():
        assert len(clean) == len(stepped)
        for i, value in zip(stepped, clean, strict=True):
            assert same_bits(value, case.before[NAMES[i]])
            targets[i].copy_(value).mul_(2)
            expected[NAMES[i]] = case.before[NAMES[i]] * 2
    assert_same_bits(weights(case.inner), expected)
    assert not case.weights.applied
    case.weights.restore()
    assert_same_bits(weights(case.inner), expected)
    if replaced and perturbed_first:  # the old one is clean, too
        assert same_bits(held, Case().before["down.weight"])


def test_code_that_fails_to_restore() -> None:
    case = Case()
    case.weights.perturb()
    with pytest.raises(MemoryError), case.weights.restored_by([1]), torch.no_grad():
        case.inner.down.weight.zero_()
        raise MemoryError
    assert_same_bits(dict(case.inner.state_dict()), case.before)
    case.weights.restore()
    case.assert_clean()


@pytest.mark.parametrize("around", ["model", "function"])
def test_compiled_whole_equals_eager(around: str) -> None:
    """Accumulation, evaluation between, restoring by hand: no graph break, the eager numbers."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        case = Case()
        step = case.model if around == "model" else lambda x, model=case.model: model(x)
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        outputs = []
        for scale in range(1, 4):
            case.model.train()
            for _ in range(2):
                outputs.append(step(X * scale))
                outputs[-1].square().sum().backward()
                case.assert_perturbed()
            case.model.eval()
            outputs.append(step(X * scale))
            case.assert_clean()
            case.model.train()
            outputs.append(step(X * scale))
            case.weights.restore()
        with case.weights.clean():
            outputs.append(step(X))
            case.assert_clean()
        gradients = [p.grad for p in case.inner.parameters()]
        results.append([t.detach() for t in outputs + gradients])
    for eager, traced in zip(*results, strict=True):
        assert same_bits(eager, traced)


def test_lower_modules_do_not_import_the_life_cycle() -> None:
    """Pairs and targets know nothing of perturbed weights."""

    def imported(module: str) -> set[str]:
        found, left = set(), [module]
        while left:
            tree = ast.parse((FOLDER / f"{left.pop()}.py").read_text(encoding="utf-8"))
            nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
            new = {node.module for node in nodes if node.module} - found
            found |= new
            left += new
        return found

    assert "perturbed" in imported("optimizer_base")
    for module in ("pairs", "targets", "engines"):
        assert "perturbed" not in imported(module)
