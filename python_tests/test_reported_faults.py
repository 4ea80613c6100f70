"""What users' loops do to weights and optimizers, each against a float64 loop of its own.

The judge is a loop over functional parameters: it computes the loss at ``B + E`` by
``torch.func.functional_call`` and knows nothing of hooks.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
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

from eflat_ext import EFlatLoRA, EFlatPerturbation, create_eflat_optimizer, reference
from eflat_ext.pairs import find_pairs

RHO, BETA, LR = 0.3, 0.8, 0.05
CLOSE: dict[str, float] = {"rtol": 1e-7, "atol": 1e-12}
Edit = Callable[[nn.Module], None]


def eflat(model: nn.Module, base: Any = torch.optim.SGD, **options: Any) -> Any:
    options = {"lr": LR, "rho": RHO, "beta": BETA, **options}
    return create_eflat_optimizer(model, base, **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=LR, **options)


class Judge:
    """EFlat-LoRA onto B with SGD, as a loop over functional parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.values = weights(self.model)
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.pairs = [
            (f"{pair.layer_name}.lora_A.default.weight", f"{pair.layer_name}.lora_B.default.weight")
            for pair in find_pairs(self.model)
        ]
        self.scaling = [pair.scaling for pair in find_pairs(self.model)]
        self.E = {b: torch.zeros_like(self.values[b]) for _, b in self.pairs}

    def gradients(self, loss: Callable[[Callable[..., Tensor]], Tensor]) -> dict[str, Tensor]:
        """Of ``loss(call)``, where ``call(x)`` is the model at the perturbed point."""
        leaves = {n: self.values[n].clone().requires_grad_() for n in self.trained}
        point = {n: v + self.E[n] if n in self.E else v for n, v in leaves.items()}
        found = loss(lambda x: functional_call(self.model, {**self.values, **point}, (x,)))
        made = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        return {
            n: torch.zeros_like(leaves[n]) if g is None else g
            for n, g in zip(leaves, made, strict=True)
        }

    def step(self, gradients: dict[str, Tensor]) -> None:
        for (a, b), s in zip(self.pairs, self.scaling, strict=True):
            A, B = self.values[a], self.values[b] + self.E[b]
            E, _ = reference.perturb(A, B, gradients[a], gradients[b], s, RHO, "B")
            self.E[b] = (1 - BETA) * self.E[b] + BETA * E
        for name, gradient in gradients.items():
            self.values[name] = self.values[name] - LR * gradient

    def agrees(self, model: nn.Module) -> None:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, self.values[name], **CLOSE, msg=name)


def cross_entropy(batch: Any, call: Callable[[Tensor], Tensor]) -> Tensor:
    return nn.functional.cross_entropy(call(batch[0]), batch[1])


# Weights that are edited in the middle of a step.


def _shrink(model: nn.Module) -> None:
    for parameter in trainable(model):
        parameter.copy_(0.9 * parameter)


def _shrink_foreach(model: nn.Module) -> None:
    parameters = trainable(model)
    torch._foreach_copy_(parameters, torch._foreach_mul(parameters, 0.9))


def _shrink_as_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(trainable(model))
    nn.utils.vector_to_parameters(0.9 * vector, trainable(model))


@pytest.mark.proves("Plain loops", "edited in the middle of a step: copy_, foreach, vectors, noise")
@pytest.mark.parametrize("edit", [_shrink, _shrink_foreach, _shrink_as_a_vector])
@pytest.mark.parametrize("when", ["before backward", "after backward", "between micro-batches"])
def test_edits_in_the_middle_of_a_step_stay(edit: Edit, when: str) -> None:
    """Also an EMA that is swapped in after an epoch's last, incomplete accumulation."""
    model = lora_mlp()
    optimizer, judge = eflat(model), Judge(model)
    data = batches(8)
    for one, two in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        loss = loss_of(model, one)
        expected = judge.gradients(lambda call, one=one: cross_entropy(one, call))
        if when == "before backward":  # autograd keeps what the pass has saved
            with torch.no_grad():
                saved = [p.detach().clone() for p in trainable(model)]
            loss.backward()
            assert_same_bits(
                dict(enumerate(saved)), dict(enumerate(p.detach() for p in trainable(model)))
            )
        else:
            loss.backward()
        if when == "between micro-batches":
            with torch.no_grad():
                edit(model)
            judge.values |= {n: 0.9 * judge.values[n] for n in judge.trained}
        loss_of(model, two).backward()
        second = judge.gradients(lambda call, two=two: cross_entropy(two, call))
        expected = {n: g + second[n] for n, g in expected.items()}
        if when != "between micro-batches":
            with torch.no_grad():
                edit(model)
            judge.values |= {n: 0.9 * judge.values[n] for n in judge.trained}
        optimizer.step()
        judge.step(expected)
    judge.agrees(model)


@pytest.mark.parametrize("lr", [0.0, LR])
def test_weight_noise_added_before_the_pass_and_subtracted_before_the_step(lr: float) -> None:
    model = lora_mlp()
    optimizer, start = eflat(model, lr=lr), weights(model)
    for batch in batches(5):
        noise = [0.1 * torch.randn_like(p) for p in trainable(model)]
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(trainable(model), noise)
        loss_of(model, batch).backward()
        with torch.no_grad():
            torch._foreach_sub_(trainable(model), noise)
        before = weights(model)
        optimizer.step()
        for name, parameter in model.named_parameters():
            step = lr * parameter.grad if parameter.requires_grad else 0
            torch.testing.assert_close(parameter.detach(), before[name] - step, **CLOSE)
    if lr == 0:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["before the pass", "after the pass"])
def test_a_penalty_on_weights_is_of_the_clean_ones(where: str) -> None:
    model = lora_mlp()
    optimizer, judge = eflat(model), Judge(model)

    def penalty(parameters: Any) -> Tensor:
        return 0.1 * sum(p.square().sum() for p in parameters)

    for batch in batches(4):
        optimizer.zero_grad()
        if where == "before the pass":
            extra = penalty(trainable(model))
            loss = loss_of(model, batch) + extra
        else:
            loss = loss_of(model, batch) + penalty(trainable(model))
        loss.backward()
        gradients = judge.gradients(lambda call, batch=batch: cross_entropy(batch, call))
        gradients = {n: g + 0.2 * judge.values[n] for n, g in gradients.items()}
        optimizer.step()
        judge.step(gradients)
    judge.agrees(model)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_an_evaluation_between_forward_and_backward(rho: float) -> None:
    model, other = lora_mlp(), lora_mlp()
    optimizer, plain = eflat(model, rho=rho), eflat(other, rho=rho)
    for batch in batches(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        model.eval()
        with torch.no_grad():
            clean = functional_call(model, weights(model), (batch[0],))
            assert torch.equal(model(batch[0]), clean)
        model.train()
        loss.backward()
        optimizer.step()
    train_on(other, plain, batches(4))
    assert_same_bits(weights(model), weights(other))


def test_averages_of_weights_updated_between_backward_and_step_are_of_the_clean_ones() -> None:
    model = lora_mlp()
    optimizer = eflat(model)
    train_on(model, optimizer, batches(3))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loss_of(model, batches(1)[0]).backward()
    before = weights(model)
    averaged.update_parameters(model)
    assert_same_bits(weights(averaged.module), before)
    assert torch.equal(
        averaged.module.train()(batches(1)[0][0]), copy.deepcopy(model)(batches(1)[0][0])
    )


# Who steps.


@pytest.mark.proves(
    "Plain loops", "a second optimizer takes over; a foreign one ends it, with a warning"
)
@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("method", CREATE)
def test_a_plain_optimizer_in_a_second_phase(method: str, options: dict[str, bool]) -> None:
    """Its steps move B as without any perturbation; its first gradients were perturbed ones."""
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
    """A cell run again, a sweep over one model, two Trainers, ``fit`` twice."""
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


def test_an_optimizer_around_ours_is_no_foreign_one() -> None:
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


# Bases.


@pytest.mark.proves("Plain loops", "schedule-free bases")
@pytest.mark.parametrize("rho", [0.0, RHO])
@pytest.mark.parametrize("package", ["schedulefree", "pytorch_optimizer"])
def test_schedule_free_bases(package: str, rho: float) -> None:
    """At rho 0 as the base alone, bit for bit; else the gradients are those at the point."""
    name = "AdamWScheduleFree" if package == "schedulefree" else "ScheduleFreeAdamW"
    base = getattr(importlib.import_module(package), name)
    model, other = lora_mlp(), lora_mlp()
    optimizer = create_eflat_optimizer(model, base, lr=LR, rho=rho)
    plain = base(trainable(other), lr=LR)
    for batch in batches(5):
        for one in (optimizer, plain):
            one.train()
            one.zero_grad()
        point = optimizer.points()
        values = {n: point.get(p, p).detach() for n, p in model.named_parameters()}
        leaves = {n: values[n].clone().requires_grad_() for n, p in model.named_parameters()}
        loss_of(model, batch).backward()
        expected = functional_call(model, leaves, (batch[0],))
        nn.functional.cross_entropy(expected, batch[1]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, leaves[name].grad, **CLOSE)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()  # schedulefree's writes to gradients
        plain.step()
        optimizer.eval(), plain.eval()
        assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM"])
def test_sam_classes_are_refused_by_name(name: str) -> None:
    cls = getattr(pytorch_optimizer.optimizer.sam, name)
    model = lora_mlp()
    base = cls.__new__(cls)  # each has another constructor
    base.param_groups = [{"params": trainable(model)}]
    create = [lambda: EFlatLoRA(model, base)]
    create += [lambda: EFlatPerturbation(model).attach(base)]
    for make in create:
        with pytest.raises(TypeError, match=f"{name} perturbs the weights itself"):
            make()


@pytest.mark.parametrize("wrapper", ["Lookahead", "Magma"])
def test_bases_with_a_state_dict_of_their_own(wrapper: str) -> None:
    cls = getattr(pytorch_optimizer, wrapper)

    def make(model: nn.Module) -> Any:
        base = cls(torch.optim.AdamW(trainable(model), lr=LR))
        return EFlatLoRA(model, base, rho=RHO)

    model = lora_mlp()
    optimizer, data = make(model), batches(6)
    train_on(model, optimizer, data[:3])
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(1)
    train_on(model, optimizer, data[3:])
    other = lora_mlp(seed=1)
    again = make(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.manual_seed(1)
    train_on(other, again, data[3:])
    assert_same_bits(weights(other), weights(model))
    assert_same_bits(again.averages, optimizer.averages)
    assert again.perturbation.steps == 6


def test_what_others_look_up_on_the_base_is_found() -> None:
    from transformers.optimization import Adafactor, AdafactorSchedule

    model = lora_mlp(torch.float32)
    optimizer = create_eflat_optimizer(model, Adafactor, rho=RHO)
    train_on(model, optimizer, batches(1, torch.float32))
    assert all(rate > 0 for rate in AdafactorSchedule(optimizer).get_lr())
    with pytest.raises(AttributeError, match="nonsense"):
        optimizer.nonsense  # noqa: B018


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_all_optimizers_run_once_a_step(fused: bool) -> None:
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    model, seen = lora_mlp(), []
    optimizer = eflat(model, torch.optim.AdamW, fused_step=fused)
    optimizer.base.register_step_pre_hook(lambda *a: seen.append("base")) if not fused else None
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o))),
    ]
    try:
        train_on(model, optimizer, batches(1))
        base = [] if fused else ["base"]
        assert seen == [("before", optimizer), *base, ("after", optimizer)]
        from lora_layers import Calls

        with Calls() as calls:
            train_on(model, optimizer, batches(1))
        assert ("foreach_adamw_step_" in calls.names) == fused
    finally:
        for handle in handles:
            handle.remove()


# Wrappers that copy an optimizer's attributes, as those of Lightning and Fabric.


def wrapped(optimizer: Any) -> Any:
    """Reads are forwarded, since attributes are copied; writes are not."""

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            own = {k: v for k, v in vars(inner).items() if k not in ("step", "zero_grad")}
            self.__dict__.update(own)
            name = f"Wrapped{type(inner).__name__}"
            self.__class__ = type(name, (Wrapper, type(inner)), {})
            self._inner = inner

        def step(self, closure: Any = None) -> Any:
            return self._inner.step(closure)

    return Wrapper(optimizer)


@pytest.mark.parametrize("method", CREATE)
def test_wrappers_that_forward_reads_and_not_writes(method: str) -> None:
    runs = []
    for wrap in (lambda o: o, wrapped):
        model = lora_mlp()
        optimizer = wrap(CREATE[method](model, torch.optim.SGD, lr=LR, rho=0.1))
        optimizer.rho = RHO
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in batches(4):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                if method == "eflat":
                    optimizer.step()
                else:
                    optimizer.first_step(zero_grad=True)
                    loss_of(model, batch).backward()
                    optimizer.second_step()
        assert optimizer.rho == RHO == optimizer.param_groups[0]["perturbation_rho"]
        runs.append(weights(model))
    assert_same_bits(*runs)


# Two gradients.


@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_closures_that_do_not_zero(method: str) -> None:
    """The first gradients are dropped; ones of other passes are refused, with nothing lost."""
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


# Bad input.


def test_parameters_that_were_replaced_or_pruned() -> None:
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


def test_a_name_in_place_of_a_class() -> None:
    with pytest.raises(TypeError, match="expected a class of optimizers"):
        create_eflat_optimizer(lora_mlp(), "adamw")


# Tracing in eval mode after an unfinished step.


@pytest.mark.parametrize("how", ["export", "trace", "make_fx"])
def test_tracing_in_eval_mode_in_the_middle_of_a_step(how: str) -> None:
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
