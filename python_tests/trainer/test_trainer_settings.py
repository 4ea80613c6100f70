"""Other settings of Trainer: checkpointing, bf16, compile, arguments of steps, no mixin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, lora_gpt2, same_bits, weights, without_dropout
from trainer_case import RUNS, PerturbingTrainer, arguments, make, own
from transformers import Trainer

from eflat_ext import trainer as ours
from eflat_ext.lora import find_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT


@pytest.mark.proves("Hugging Face Trainer", "two gradients without the mixin: told what to use")
@pytest.mark.parametrize("hook", [ours.flat_optimizer, ours.lora_sam_optimizer])
def test_two_gradients_need_the_mixin(hook: Callable, tmp_path: Path) -> None:
    model = lora_gpt2()
    before = weights(model)
    run = make(model, arguments(tmp_path), hook, Trainer)
    with pytest.raises(RuntimeError, match=r"eflat_ext\.trainer\.PerturbationMixin"):
        run.train()
    assert_same_bits(weights(model), before)


@pytest.mark.proves("Hugging Face Trainer", "the mixin keeps every argument of `training_step`")
def test_both_passes_have_the_same_arguments(tmp_path: Path) -> None:
    """Including arguments that a later Trainer or a subclass may add."""
    given: list[tuple[Any, ...]] = []

    class Inner(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            given.append((model, dict(inputs), args, kwargs))
            return super().training_step(model, inputs, *args)

    class Outer(ours.PerturbationMixin, Inner):
        pass

    class Calling(Outer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, number=len(given), **kwargs)

    make(lora_gpt2(), arguments(tmp_path, max_steps=2), ours.flat_optimizer, Calling).train()
    assert len(given) == 2 * 4
    for step in (0, 4):
        for first, second in zip(given[step : step + 2], given[step + 2 : step + 4], strict=True):
            assert first[0] is second[0]
            assert_same_bits(first[1], second[1])
            assert len(first[2]) == 1 and int(first[2][0]) == int(second[2][0])
            assert first[3] == second[3]
        assert given[step][3] != given[step + 1][3]


class Points(PerturbingTrainer):
    """Record B of the first LoRA layer as every pass reads it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.points: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        find_pairs(self.model)[0].module_B.register_forward_pre_hook(
            lambda module, _: self.points.append(module.weight.detach().clone())
        )


SETTINGS = {
    "gradient checkpointing": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        2,
    ),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        2,
    ),
    "bf16": ({"bf16": True}, 1),
}


@pytest.mark.proves("Hugging Face Trainer", "gradient checkpointing and bf16")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", ["eflat", "flat"])
def test_checkpointing_and_bf16(
    method: str, settings: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    runs = []
    for given, passes in (({}, 1), settings):
        model = without_dropout(lora_gpt2())
        model.enable_input_require_grads()  # transformers 5 does it by itself
        args = arguments(tmp_path, max_steps=3, learning_rate=1e-3, **given)
        start = weights(model)
        run = make(model, args, cls=Points, **RUNS[method])
        run.train()
        per_gradient = 2 * passes  # two micro-batches
        gradients = len(run.points) // per_gradient
        assert (len(run.points), gradients) == (
            gradients * per_gradient,
            3 if method == "eflat" else 6,
        )
        for at in range(0, len(run.points), per_gradient):
            for point in run.points[at : at + per_gradient]:
                assert same_bits(point, run.points[at])
        assert not any(same_bits(*b) for b in pairwise(run.points[::per_gradient]))
        runs.append(weights(model))
    tolerance = 0.2 if "bf16" in settings[0] else 1e-3  # of the distance that the weights moved
    for name, value in runs[0].items():
        went = (value - start[name]).norm()
        assert float((runs[1][name] - value).norm()) <= tolerance * float(went), name


@pytest.mark.proves("Hugging Face Trainer", "`torch_compile`")
def test_compiled_by_trainer(tmp_path: Path) -> None:
    runs = []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        model = without_dropout(lora_gpt2())
        args = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2, **given)
        run = make(model, args)
        run.train()
        assert all(bool(average.any()) for average in own(run).averages.values())
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        runs.append((weights(model), losses))
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, rtol=1e-4, atol=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5) and runs[0][1]
