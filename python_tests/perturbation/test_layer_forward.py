"""Training passes run at perturbed factors, which only a layer's forward pass sees."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CREATE,
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    same_bits,
    train_on,
    weights,
)
from peft import LoraConfig, get_peft_model
from perturbed_case import Case, X, assert_nothing_in_place
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eflat_ext
from eflat_ext import EFlatPerturbation
from eflat_ext.lora import find_pairs

FOLDER = Path(eflat_ext.__file__).parent


# Which passes are perturbed.


def test_training_passes_are_perturbed_and_evaluations_are_not() -> None:
    case = Case()
    for _ in range(2):
        case.model.train()
        case.assert_perturbed()
        case.assert_perturbed()
        case.model.eval()
        case.assert_runs_clean()


def test_a_call_may_enter_anywhere() -> None:
    """At an inner module, as ``generate`` of a wrapped model does, or at ``layer.forward``."""
    case = Case()
    for value, mode in ((1.0, True), (0.0, False)):
        case.model.train(mode)
        plain = case.plain(value, value).eval()
        up = plain.base_model.model.up
        for call in (case.layers[0], case.layers[0].forward):
            assert torch.equal(call(X), up(X))
        for call in (case.inner, case.inner.base_model.model.forward):
            assert torch.equal(call(X), plain(X))
        case.assert_clean()


def test_each_layer_runs_by_its_own_mode() -> None:
    """Not by the mode of the model or of a wrapper."""
    case = Case()
    case.model.eval()
    for module in (case.model, case.model[0], case.inner):
        module.training = True
        case.assert_runs_clean()
    case.layers[0].train()
    case.assert_runs_at(1.0, 0.0)
    case.model.train()
    case.model.training = False
    case.layers[0].eval()
    case.assert_runs_at(0.0, 1.0)


def test_gradients_are_those_of_the_perturbed_point() -> None:
    case = Case()
    other = case.plain(1.0, 1.0)
    for model in (case.model, other):
        model(X).square().sum().backward()
    for p, q in zip(case.inner.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("ran", ["perturbed", "clean", "in the clean context"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_runs_as_it_did(reentrant: bool, ran: str) -> None:
    """By gradient checkpointing, with other modes by then and an evaluation in between."""
    case = Case()
    case.model.train(ran != "clean")
    x = X.clone().requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant).square().sum()

    if ran == "in the clean context":
        with case.perturbation.clean():
            value = loss(case.model)
    else:
        value = loss(case.model)
    case.model.train(ran == "clean")
    with torch.no_grad():
        case.model(X) if ran == "perturbed" else None
    value.backward()
    case.assert_clean()
    added = float(ran == "perturbed")
    other = case.plain(added, added)
    loss(other).backward()
    for p, q in zip(case.inner.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_an_evaluation_within_a_backward_pass_is_clean() -> None:
    """A hook may call the model without gradients; recomputation has gradients enabled."""
    case, seen = Case(), []
    output = case.model(X)
    case.model.eval()
    output.register_hook(lambda _: seen.append(case.model(X)) and None)
    output.sum().backward()
    assert torch.equal(seen[0], case.plain().eval()(X))


def test_inference_mode_in_between_changes_nothing() -> None:
    case = Case()
    for _ in range(2):
        case.model.train()(X).sum().backward()
        with torch.inference_mode():
            case.assert_perturbed()
            case.model.eval()
            case.assert_runs_clean()
    case.model.double().train()
    case.before = weights(case.inner)
    with torch.inference_mode():  # there the perturbation is created again, as an inference tensor
        case.assert_perturbed(X.double())
    case.model(X.double()).sum().backward()
    case.assert_perturbed(X.double())


def test_merged_and_disabled_adapters_run_clean() -> None:
    """A merged layer unmerges in its forward pass, with the factors that were merged."""
    case = Case()
    case.inner.merge_adapter()
    merged = case.model(X)
    torch.testing.assert_close(merged, case.plain()(X))
    case.before = weights(case.inner)
    with case.inner.disable_adapter():  # unmerges
        base = case.model(X)
    assert_nothing_in_place(case.model)
    other = Case()
    torch.testing.assert_close(weights(case.inner), other.before)
    with other.inner.disable_adapter():
        torch.testing.assert_close(base, other.model(X))
        other.assert_clean()
    other.assert_perturbed()


def test_passes_in_the_clean_context_run_clean() -> None:
    case = Case()
    with case.perturbation.clean():
        case.assert_runs_clean()
        with case.perturbation.clean():
            case.assert_runs_clean()
        case.assert_runs_clean()
    case.assert_perturbed()
    with pytest.raises(KeyError), case.perturbation.clean():
        raise KeyError
    case.assert_perturbed()


# Values of the factors.


def test_the_current_value_is_perturbed() -> None:
    """Weights may be edited at any time, and so may the perturbation."""
    case = Case()
    case.assert_perturbed()
    with torch.no_grad():
        case.B[0].mul_(2)
    case.before = weights(case.inner)
    case.assert_perturbed()
    case.put(2.0)
    case.assert_runs_at(2.0, 2.0)
    case.perturbation.put({case.B[1]: torch.full_like(case.B[1], 3.0)})
    case.assert_runs_at(0.0, 3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_changes_its_dtype_runs_in_it(dtype: torch.dtype) -> None:
    """E is float32; a pass in bfloat16 stays in bfloat16."""
    case = Case()
    case.model(X)
    case.model.to(dtype)
    case.before = {name: value.to(dtype) for name, value in case.before.items()}
    case.assert_perturbed(X.to(dtype))
    assert case.model(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_within_a_step_are_perturbed(assign: bool) -> None:
    case = Case()
    loss = case.model(X).sum()
    case.before = {name: value * 3 for name, value in case.before.items()}
    case.inner.load_state_dict(copy.deepcopy(case.before), assign=assign)
    if not assign:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # as plain LoRA's
    case.perturbation.points()  # follows parameters that were replaced
    case.assert_perturbed()


def test_a_replaced_parameter_runs_clean_until_a_step() -> None:
    """A step looks the parameters up again."""
    case = Case()
    case.model(X)
    new = torch.full_like(case.B[0], 5.0)
    case.layers[0].lora_B["default"].weight = nn.Parameter(new.clone())
    case.before["base_model.model.up.lora_B.default.weight"] = new
    case.assert_runs_at(0.0, 1.0)
    case.model(X).square().sum().backward()
    case.perturbation.update()
    case.put(1.0)
    case.assert_perturbed()


def test_a_tied_parameter_is_perturbed_under_every_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(target_modules=["one", "two"], r=2))
    base = model.base_model.model
    base.two.lora_B["default"].weight = tied = base.one.lora_B["default"].weight
    before = {k: v.clone() for k, v in model.state_dict().items()}
    perturbation = EFlatPerturbation(model)
    perturbation.put({tied: torch.ones_like(tied)})
    x = torch.randn(3, 4)
    found = model(x)
    assert_same_bits(dict(model.state_dict()), before)
    assert_nothing_in_place(model)
    found.sum().backward()
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        plain.base_model.model.one.lora_B["default"].weight.add_(1)
    plain.zero_grad()
    assert torch.equal(plain(x), found)
    plain(x).sum().backward()
    assert torch.equal(plain.base_model.model.one.lora_B["default"].weight.grad, tied.grad)


# Other callers.


def test_hooks_find_clean_parameters_and_inner_modules_perturbed_values() -> None:
    """A hook that saves the model while a layer runs saves clean values."""
    case, seen = Case(), []
    layer = case.layers[0]
    factor = layer.lora_B["default"]
    value = case.before["base_model.model.up.lora_B.default.weight"]

    def look(added: float) -> None:
        assert torch.equal(factor.weight, value + added)
        seen.append(added)
        versions = [p._version for p in case.inner.parameters()]
        assert_same_bits(weights(case.inner), case.before)
        assert_same_bits(dict(case.inner.state_dict()), case.before)
        kept = case.inner.state_dict(keep_vars=True)
        assert kept["base_model.model.up.lora_B.default.weight"] is case.B[0]
        assert [p._version for p in case.inner.parameters()] == versions

    for module, added in ((layer, 0.0), (factor, 1.0)):
        module.register_forward_pre_hook(lambda *_, added=added: look(added))
        module.register_forward_hook(lambda *_, added=added: look(added))
    case.model(X)
    assert seen == [0.0, 1.0, 1.0, 0.0]
    case.assert_clean()


def test_a_pass_within_a_pass_perturbs_once() -> None:
    """The value of the outer pass stays in place until it ends."""
    case, found = Case(), []
    layer = case.layers[0]

    def again(*_: Any) -> None:
        if not found:
            found.append(None)
            found[0] = layer(X)

    layer.lora_B["default"].register_forward_pre_hook(again)
    case.assert_perturbed()
    assert torch.equal(found[0], case.plain(1.0, 1.0).base_model.model.up(X))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("place", ["layer", "perturbation"])
def test_an_exception_in_a_pass_leaves_clean_factors(
    place: str, error: type[BaseException]
) -> None:
    """Also one while the value of the second factor is computed."""
    case = Case()

    def fail(*_: Any) -> None:
        raise error

    if place == "layer":
        handle = case.layers[0].lora_B["default"].register_forward_hook(fail)
    else:
        case.perturbation.factors[1].refresh = fail
    with pytest.raises(error):
        case.model(X)
    case.assert_clean()
    if place == "layer":
        handle.remove()
    else:
        case.perturbation.factors[1].refresh = None
    case.assert_perturbed()


def test_a_functional_call_leaves_the_callers_tensors_alone() -> None:
    case = Case()
    own = {f"0.0.{name}": p.detach() * 2 for name, p in case.inner.named_parameters()}
    before = {name: value.clone() for name, value in own.items()}
    expected = torch.func.functional_call(case.model.eval(), own, X)
    assert torch.equal(torch.func.functional_call(case.model.train(), own, X), expected)
    assert_same_bits(own, before)
    case.assert_clean()
    assert not any(factor.ran_perturbed for factor in case.perturbation.factors)
    case.assert_perturbed()


@pytest.mark.parametrize("method", CREATE)
@pytest.mark.parametrize("before", [True, False])
def test_a_functional_call_leaves_a_teachers_parameters_alone(method: str, before: bool) -> None:
    """As with a moving average of the weights; the student's own are perturbed as usual."""
    model = lora_mlp()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)
    train_on(model, optimizer, batches(2))
    teacher = {
        name: nn.Parameter(p.detach() + 0.1, requires_grad=False)
        for name, p in model.named_parameters()
    }
    held, student = {name: p.clone() for name, p in teacher.items()}, weights(model)
    x = batches(1)[0][0]
    with torch.no_grad():
        expected = torch.func.functional_call(model.eval(), teacher, (x,))
        clean = model(x)
        model.train()
        for order in ("teacher", "student") if before else ("student", "teacher"):
            if order == "student":
                assert torch.equal(model(x), clean) == (method != "eflat")
            else:
                assert torch.equal(torch.func.functional_call(model, teacher, (x,)), expected)
    assert_same_bits(teacher, held)
    assert_same_bits(weights(model), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_parallel_replicas_are_perturbed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.nn.DataParallel copies a model for each pass."""
    module = sys.modules["torch.nn.parallel.replicate"]  # a function of the same name hides it

    def broadcast(tensors: list[Tensor], devices: list[Any], detach: bool = False) -> Any:
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    case, x = Case(), X.to(dtype)
    case.model.to(dtype)
    case.before = weights(case.inner)
    other = case.plain(1.0, 1.0)
    replicas = module.replicate(case.model, [0, 0])
    for replica in replicas:
        assert torch.equal(replica(x), other(x))
        replica(x).square().sum().backward()
        other(x).square().sum().backward()
    for p, q in zip(case.inner.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad)
    assert all(factor.ran_perturbed for factor in case.perturbation.factors)
    case.assert_perturbed(x)
    case.layers[0].eval()  # before the replicas are made, as in a loop
    (replica,) = module.replicate(case.model, [0])
    assert torch.equal(replica(x), case.plain(0.0, 1.0)(x))
    assert torch.equal(replica(x), case.plain(0.0, 1.0)(x))  # nothing stays in the replica
    with case.perturbation.clean():
        assert torch.equal(replica(x), case.plain()(x))
    case.perturbation.remove()
    (replica,) = module.replicate(case.model.train(), [0])
    assert torch.equal(replica(x), case.plain()(x))


@pytest.mark.parametrize("around", ["model", "function"])
def test_compiled_whole_equals_eager(around: str) -> None:
    """With accumulation, an evaluation in between, another perturbation; one graph each."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        case = Case()
        step: Callable[[Tensor], Tensor]
        step = case.model if around == "model" else lambda x, model=case.model: model(x)
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        outputs = []

        def run(scale: int, case: Case = case, step: Any = step, outputs: Any = outputs) -> None:
            case.model.train()
            for _ in range(2):
                outputs.append(step(X * scale))
                outputs[-1].square().sum().backward()
            case.model.eval()
            outputs.append(step(X * scale))
            case.model.train()
            outputs.append(step(X * scale))
            case.assert_clean()
            case.put(scale)

        run(1)
        with torch.compiler.set_stance("fail_on_recompile"):
            for scale in (2, 3):
                run(scale)
        with case.perturbation.clean():
            outputs.append(step(X))
            case.assert_clean()
        assert torch.equal(outputs[-1], case.plain().eval()(X))
        gradients = [p.grad for p in case.inner.parameters() if p.grad is not None]
        results.append([t.detach() for t in outputs + gradients])
    for eager, traced in zip(*results, strict=True):
        assert same_bits(eager, traced)


def test_pairs_read_parameters_while_perturbed_values_stand() -> None:
    case, seen = Case(), []
    (first, _) = find_pairs(case.model)
    handle = (
        case.layers[0]
        .lora_B["default"]
        .register_forward_hook(
            lambda *_: seen.append(
                first.parameter_B is case.B[0] and torch.equal(first.B, case.B[0])
            )
        )
    )
    case.model(X)
    handle.remove()
    assert seen == [True]


def test_a_kernel_that_takes_the_factors_without_running_the_layer_is_noticed() -> None:
    """As fused LoRA kernels of other libraries do; such a gradient belongs to clean weights."""

    def kernel(layer: Any, x: Tensor) -> Tensor:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + layer.scaling["default"] * (x @ A.T) @ B.T

    found = []
    for fused in (False, True):
        model = lora_mlp(modules_to_save=None, init_lora_weights=False)
        net = model.base_model.model
        optimizer = CREATE["eflat"](model, torch.optim.SGD, lr=0.1, rho=0.5)
        if fused:
            net.forward = lambda x, net=net: net.head(
                torch.tanh(kernel(net.down, torch.tanh(kernel(net.up, x))))
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches(3):
                optimizer.zero_grad()
                with nullcontext() if fused else optimizer.clean():
                    loss_of(model, batch).backward()
                optimizer.step()
        assert sum("another library's kernel" in str(one.message) for one in caught) == 1
        found.append([*weights(model).values(), *optimizer.averages.values()])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)
