"""After Ctrl-C at any moment of a step weights are clean and training goes on."""

from __future__ import annotations

import copy
import math
import random
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import interrupted, interrupted_within
from models import (
    assert_same_bits,
    at_points,
    batches,
    lora_mlp,
    loss_of,
    same_bits,
    train_on,
    weights,
)
from perturbed_case import assert_nothing_in_place
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eflat_ext import (
    EFlatLoRA,
    EFlatPerturbation,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

# Collecting an interrupted generator prints a message.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Base optimizers that write each parameter once in a step.
ADAMW = {"weight_decay": 0.0}
METHODS: dict[str, tuple[Callable, type, dict[str, Any]]] = {
    "eflat fused": (create_eflat_optimizer, torch.optim.AdamW, ADAMW),
    "eflat": (create_eflat_optimizer, torch.optim.SGD, {}),
    "eflat onto A fused": (create_eflat_optimizer, torch.optim.AdamW, {"onto": "A", **ADAMW}),
    "eflat onto A": (create_eflat_optimizer, torch.optim.SGD, {"onto": "A"}),
    "flat": (create_flat_optimizer, torch.optim.SGD, {}),
    "lora-sam": (create_lora_sam_optimizer, torch.optim.SGD, {}),
}
DATA = batches(3, torch.float32)


class Case:
    """A model after two steps, and the third step, which is interrupted."""

    def __init__(self, method: str, closure: bool) -> None:
        create, base, options = METHODS[method]
        self.model = lora_mlp(torch.float32, modules_to_save=None)
        self.optimizer = create(self.model, base, lr=0.05, rho=0.5, **options)
        self.closure = closure
        train_on(self.model, self.optimizer, DATA[:2])
        self.before, self.state = weights(self.model), copy.deepcopy(self.optimizer.state_dict())
        _, self.moments = interrupted(self.step)
        self.after = weights(self.model)
        self.state_after = copy.deepcopy(self.optimizer.state_dict())

    def step(self) -> None:
        if self.closure:
            train_on(self.model, self.optimizer, DATA[2:])
            return
        self.optimizer.zero_grad()
        loss_of(self.model, DATA[2]).backward()
        if not isinstance(self.optimizer, EFlatLoRA):
            self.optimizer.first_step()
            loss_of(self.model, DATA[2]).backward()
        self.optimizer.step()

    def rewind(self) -> None:
        self.model.load_state_dict(self.before)
        self.optimizer.load_state_dict(copy.deepcopy(self.state))
        self.optimizer.zero_grad()

    def check(self) -> None:
        """Check weights and further steps after an interrupted step."""
        model, optimizer = self.model, self.optimizer
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in saved.items():
            assert same_bits(value, self.before[name]) or same_bits(value, self.after[name]), name
        assert_nothing_in_place(model)
        if not isinstance(optimizer, EFlatLoRA) and not self.closure:
            optimizer.abandon_step()
        output = model(DATA[2][0])
        with at_points(optimizer):  # perturbed by the current average, or clean
            assert same_bits(output, model.eval()(DATA[2][0]))
        if not isinstance(optimizer, EFlatLoRA):
            assert same_bits(output, model(DATA[2][0]))
        model.train()
        assert_same_bits(weights(model), saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.step()  # goes on from here
            self.rewind()
            self.step()  # and repeats bit for bit from the state before
        assert_same_bits(weights(model), self.after)
        again = optimizer.state_dict()
        for key, entry in self.state_after["state"].items():
            assert_same_bits(*(_tensors(e) for e in (entry, again["state"][key])))


def _tensors(entry: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in entry.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("closure", [True, False], ids=["closure", "loop"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_at_any_moment_of_a_step(method: str, closure: bool) -> None:
    """At all places in this package where Python checks for signals, and some in other code."""
    case = Case(method, closure)
    own = [i for i, name in enumerate(case.moments) if name.startswith("eflat_ext.")]
    others = set(range(len(case.moments) - 2)) - set(own)  # two of ``interrupted`` itself
    draw = random.SystemRandom().sample
    chosen = [*(own if closure else draw(own, 30)), *draw(sorted(others), 15)]
    hits = 0
    for moment in chosen:
        print("moment", moment)  # the last one is shown when it fails
        case.rewind()
        hits += interrupted(case.step, moment)[0]
        case.check()
    assert hits > 0.9 * len(chosen)  # Python ignores an interrupt while it drops a generator


@pytest.mark.proves("Faults", "Ctrl-C at any moment leaves clean weights, and training goes on")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
@pytest.mark.parametrize("method", ["eflat fused", "eflat", "flat"])
def test_signals_at_random_times(method: str) -> None:
    case, armed, hits = Case(method, closure=True), False, 0

    def handler(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    seconds = math.inf  # of a step, of the fastest: others may have waited for the machine
    for _ in range(10):
        case.rewind()
        start = time.perf_counter()
        case.step()
        seconds = min(seconds, time.perf_counter() - start)
    old = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(100):
            case.rewind()
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, random.random() * seconds))
                case.step()
                armed = False
            except KeyboardInterrupt:
                hits += 1
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)  # torch's own ``no_grad`` may be cut short
            case.check()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert hits >= 20


@pytest.mark.parametrize("kind", ["line", "opcode"])
@pytest.mark.parametrize("method", ["eflat", "eflat onto A", "flat", "lora-sam"])
def test_an_interrupt_at_any_place_of_a_training_pass(method: str, kind: str) -> None:
    """Before each line and each opcode of this package, also in recomputed passes.

    No layer is left perturbed, and the next pass runs as if there had been no interrupt.
    """
    create, base, options = METHODS[method]
    model = lora_mlp(torch.float32, modules_to_save=None, target_modules=["up"])
    optimizer = create(model, base, lr=0.05, rho=0.5, **options)
    train_on(model, optimizer, DATA[:2])
    if not isinstance(optimizer, EFlatLoRA):
        loss_of(model, DATA[2]).backward()
        optimizer.first_step()
    x = DATA[2][0][:2]
    clean, perturbed = model.eval()(x), model.train()(x)
    before = weights(model)
    assert not torch.equal(clean, perturbed)

    def run() -> None:
        output = checkpoint(model, x, use_reentrant=False)
        assert same_bits(output, perturbed)
        output.sum().backward()
        with optimizer.clean():
            assert same_bits(model(x), clean)

    def prepare() -> None:
        with torch.no_grad():
            for pair in optimizer.pairs:
                pair.parameter_B.mul_(1)  # so that values that depend on it are computed again

    prepare()
    _, places = interrupted_within("eflat_ext", kind, run)
    hits = 0
    for place in range(places):
        prepare()
        hits += interrupted_within("eflat_ext", kind, run, place)[0]
        assert_nothing_in_place(model)
        assert_same_bits(weights(model), before)
        assert same_bits(model.eval()(x), clean)
        assert same_bits(model.train()(x), perturbed)
    assert hits == places > (50 if kind == "line" else 300), (hits, places)


@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_an_interrupt_in_the_pass_that_claims_a_model(onto: str) -> None:
    """The first pass of a perturbation without an optimizer, at some of its lines."""

    def fresh() -> tuple[Any, EFlatPerturbation]:
        model = lora_mlp(torch.float32, modules_to_save=None, target_modules=["up"])
        return model, EFlatPerturbation(model, rho=0.5, onto=onto)

    def trained(model: Any, perturbation: EFlatPerturbation) -> dict[str, Tensor]:
        for batch in DATA:
            model.zero_grad()
            loss_of(model, batch).backward()
            perturbation.update()
            with torch.no_grad():
                for pair in perturbation.pairs:
                    pair.parameter_B.sub_(pair.parameter_B.grad)
        return weights(model)

    expected = trained(*fresh())
    model, perturbation = fresh()  # keep a reference: without one, it perturbs nothing
    _, places = interrupted_within("eflat_ext", "line", lambda: model(DATA[0][0]))
    assert places > 200
    for place in random.SystemRandom().sample(range(places), 40):
        print("place", place)
        model, perturbation = fresh()
        assert interrupted_within("eflat_ext", "line", lambda m=model: m(DATA[0][0]), place)[0]
        assert_nothing_in_place(model)
        assert_same_bits(trained(model, perturbation), expected)
