"""Ctrl-C at any moment of a step: clean weights, and training goes on as if nothing had been."""

from __future__ import annotations

import copy
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import perturbed_case
import pytest
import torch
from interrupts import interrupted
from models import assert_same_bits, batches, lora_mlp, loss_of, same_bits, train_on, weights
from torch import Tensor

from eflat_ext import perturbed
from eflat_ext.optimizers import (
    EFlatLoRA,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

# An interrupted generator is collected with a message.
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
    """A model after two steps, and the third step, of which an interrupted one is a part."""

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
        """After an interrupted step."""
        model, optimizer = self.model, self.optimizer
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in saved.items():
            assert same_bits(value, self.before[name]) or same_bits(value, self.after[name]), name
        loss_of(model, DATA[2])
        point = weights(model)
        if isinstance(optimizer, EFlatLoRA):  # perturbed by the average there is now
            optimizer.eval()
            optimizer.train()
            assert_same_bits(point, weights(model))
        elif self.closure:
            assert_same_bits(point, saved)
        else:
            optimizer.abandon_step()
        optimizer.eval()
        assert_same_bits(weights(model), saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.step()  # goes on from here
            self.rewind()
            self.step()  # and repeats bit for bit from before
        assert_same_bits(weights(model), self.after)
        again = optimizer.state_dict()
        for key, entry in self.state_after["state"].items():
            assert_same_bits(*(_tensors(e) for e in (entry, again["state"][key])))


def _tensors(entry: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in entry.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("closure", [True, False], ids=["closure", "loop"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_at_any_moment_of_a_step(method: str, closure: bool) -> None:
    """At all moments in this package where Python looks for signals, and some in other code."""
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

    start = time.perf_counter()
    for _ in range(10):
        case.rewind()
        case.step()
    seconds = (time.perf_counter() - start) / 10
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


@pytest.mark.parametrize(
    "action", ["perturb", "restore", "forward", "clean", "load", "restored_by"]
)
def test_an_interrupt_at_any_line_loses_nothing(action: str) -> None:
    """KeyboardInterrupt before every single line of the module that the action runs through."""
    source = Path(perturbed.__file__).resolve()

    def act(case: perturbed_case.Case) -> None:
        if action == "forward":
            case.model(perturbed_case.X)
            case.model.eval()(perturbed_case.X)
            case.model.train()(perturbed_case.X)
        elif action == "clean":
            with case.weights.clean():
                case.assert_clean()
        elif action == "load":
            case.inner.load_state_dict(case.before)
        elif action == "restored_by":
            with case.weights.restored_by([1]) as clean, torch.no_grad():
                case.inner.down.weight.copy_(clean[0])
        else:
            getattr(case.weights, action)()

    interrupted = 0
    for line in range(1, 1000):
        case, count = perturbed_case.Case(), 0
        if action in ("restore", "clean", "load", "restored_by"):
            case.weights.perturb()

        def trace(frame, event, _, line=line):  # type: ignore[no-untyped-def]
            nonlocal count
            if Path(frame.f_code.co_filename) != source:
                return None
            if event == "line":
                count += 1
                if count == line:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            act(case)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an interrupted ``with`` may not have left its block
        assert_same_bits(dict(case.inner.state_dict()), case.before)
        case.weights._suspended = 0
        case.model.train()(perturbed_case.X)
        case.assert_perturbed()
        case.model.eval()(perturbed_case.X)
        case.assert_clean()
        if count < line:
            break
    assert interrupted >= 5 and count < line
