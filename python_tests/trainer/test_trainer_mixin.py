"""PerturbationMixin: two-gradient steps, interrupted and skipped steps, the log."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    assert_same_bits,
    lora_bert,
    lora_gpt2,
    same_bits,
    scale_gradients,
    weights,
    without_dropout,
)
from torch import Tensor
from trainer_case import (
    RUNS,
    PerturbingTrainer,
    Read,
    Sentences,
    arguments,
    make,
    own,
)
from transformers import Trainer, TrainerCallback

from eflat_ext import EFlatLoRA, create_flat_optimizer
from eflat_ext import trainer as ours
from eflat_ext.perturbation.base import Perturbation

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT


class Recorder(PerturbingTrainer):
    """Record the arguments of every loss in training, and the weights that it was taken at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]] = []
        self.fail_at: dict[int, BaseException] = {}
        super().__init__(*args, **kwargs)
        self.read = Read(self.model)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs  # no copy: the loss removes the labels from the batch itself

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            given = dict(copy.copy(inputs)), kwargs["num_items_in_batch"]
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.seen.append((*given, self.read.weights(model)))
            if len(self.seen) - 1 in self.fail_at:
                raise self.fail_at[len(self.seen) - 1]
            return loss
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.proves(
    "Hugging Face Trainer",
    "the mixin: all micro-batches twice, as in a plain loop with two gradients",
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("build", [lora_gpt2, lora_bert])
def test_two_gradients_equal_a_plain_loop(
    build: Callable, smoothing: float, tmp_path: Path
) -> None:
    """All micro-batches run at the clean weights, then all again at one perturbed point."""
    model, other = without_dropout(build()), without_dropout(build())
    args = arguments(
        tmp_path,
        weight_decay=0.0,
        max_grad_norm=0.05,
        label_smoothing_factor=smoothing,
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    run = make(model, args, ours.flat_optimizer, Recorder)
    run.model_accepts_loss_kwargs = build is lora_gpt2
    run.train()
    plain = create_flat_optimizer(
        other, torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.999), weight_decay=0.0, rho=0.2
    )
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(run.seen) == 5 * 4 and len(losses) == 5
    for step in range(5):
        points = [point for *_, point in run.seen[4 * step : 4 * step + 4]]
        assert_same_bits(points[0], points[1])
        assert_same_bits(points[2], points[3])
        moved = {n for n in points[0] if bool((points[0][n] != points[2][n]).any())}
        assert moved == {n for n in points[0] if "lora_B" in n}
        first, second = run.seen[4 * step : 4 * step + 2], run.seen[4 * step + 2 : 4 * step + 4]
        for (inputs, items, _), (inputs_again, items_again, _) in zip(first, second, strict=True):
            assert "labels" in inputs
            assert_same_bits(inputs, inputs_again)
            assert (items is None) == (build is lora_bert)
            assert items is None or int(items) == int(items_again)

        def closure(micro_batches: Any = first) -> float:
            plain.zero_grad()
            total = 0.0
            for inputs, items, _ in micro_batches:
                loss = Trainer.compute_loss(run, other, dict(inputs), num_items_in_batch=items)
                loss = loss / 2 if items is None else loss
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
            return total

        assert plain.step(closure) == pytest.approx(losses[step], abs=1e-4)  # logged rounded
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Clean(TrainerCallback):
    """Record the weights at the beginning of each step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights = weights(model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("hook", "at"),
    [
        (ours.flat_optimizer, 7),  # the second pass over the second micro-batch of step 1
        (ours.flat_optimizer, 5),  # the first pass
        (ours.eflat_optimizer, 3),
    ],
)
def test_errors_leave_clean_weights(
    hook: Callable, at: int, error: BaseException, tmp_path: Path
) -> None:
    """The trainer can train again."""
    model, clean = lora_gpt2(), Clean()
    run = make(model, arguments(tmp_path), hook, Recorder, [clean])
    run.fail_at = {at: error}
    with pytest.raises(type(error)):
        run.train()
    assert_same_bits(weights(model), clean.weights)
    perturbed = run.seen[-1][-1] if at != 5 else None
    assert perturbed is None or any(
        not same_bits(perturbed[name], clean.weights[name]) for name in perturbed
    )
    run.seen, run.fail_at = [], {}
    run.train()
    assert len(run.seen) == 5 * (2 if hook is ours.eflat_optimizer else 4)


@pytest.mark.parametrize("hook", [ours.eflat_optimizer, ours.flat_optimizer])
def test_a_stop_between_micro_batches_forgets_them(hook: Callable, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    model, clean = lora_gpt2(), Clean()
    run = make(model, arguments(tmp_path), hook, Recorder, [clean, Stop()])
    run.train()
    passes = 2 if hook is ours.eflat_optimizer else 4
    assert len(run.seen) == 2 * passes + 1
    assert_same_bits(weights(model), clean.weights)
    run.remove_callback(Stop)
    run.seen = []
    run.train()
    assert len(run.seen) == 5 * passes


@pytest.mark.parametrize("at", [1, 3])  # in the first pass, in the second
def test_out_of_memory_starts_anew_with_smaller_batches(at: int, tmp_path: Path) -> None:
    args = arguments(tmp_path, auto_find_batch_size=True)
    run = make(lora_gpt2(), args, ours.flat_optimizer, Recorder)
    run.fail_at = {at: RuntimeError("DefaultCPUAllocator: can't allocate memory")}
    run.train()
    sizes = [len(inputs["input_ids"]) for inputs, *_ in run.seen]
    assert len(sizes) == at + 1 + 5 * 4
    assert set(sizes[: at + 1]) == {4} and max(sizes[at + 1 :]) < 4
    assert_same_bits(run.seen[0][-1], run.seen[at + 1][-1])  # at clean weights


class Buffering(Trainer):
    """Draw the inputs of a whole step at once and count through them, as TRL's GRPOTrainer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step, self.draws, self.fail_at = 0, 0, -1
        self.used: list[tuple[int, dict[str, Tensor]]] = []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.model.training:
            return super()._prepare_inputs(inputs)
        if self._step % 2 == 0:
            self.draws += 1
            tokens = torch.randint(0, 40, (2, 4, 8))
            self.buffer = [{"input_ids": rows, "labels": rows.clone()} for rows in tokens]
        return self.buffer[self._step % 2]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step += 1
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.used.append((self._step, dict(inputs)))
            if len(self.used) - 1 == self.fail_at:
                raise KeyboardInterrupt
        return super().compute_loss(model, inputs, *args, **kwargs)


class PerturbingBuffering(ours.PerturbationMixin, Buffering):
    pass


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # removes the labels from the buffer
def test_inputs_are_drawn_once_for_both_passes(smoothing: float, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, label_smoothing_factor=smoothing, eval_strategy="steps", eval_steps=1
    )
    run = make(lora_gpt2(), args, ours.flat_optimizer, PerturbingBuffering)
    run.train()
    assert (run.draws, run._step, len(run.used)) == (5, 10, 20)
    for step in range(5):
        first, second = run.used[4 * step : 4 * step + 2], run.used[4 * step + 2 : 4 * step + 4]
        assert [count for count, _ in first] == [2 * step, 2 * step + 1]
        for (count, inputs), (count_again, inputs_again) in zip(first, second, strict=True):
            assert count == count_again and "labels" in inputs
            assert_same_bits(inputs, inputs_again)
        assert not same_bits(first[0][1]["input_ids"], first[1][1]["input_ids"])


@pytest.mark.parametrize("at", [4, 6, 7])  # in the first pass, in the second over each micro-batch
def test_an_error_puts_the_count_back(at: int, tmp_path: Path) -> None:
    run = make(lora_gpt2(), arguments(tmp_path), ours.flat_optimizer, PerturbingBuffering)
    run.fail_at = at
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run._step == (2 if at == 4 else 4)
    assert "_prepare_inputs" not in vars(run)
    run.train()
    assert len(run.used) == at + 1 + 20


class Drawing(PerturbingTrainer):
    """Draw tokens whenever inputs are prepared; the loss prepares them a second time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.used: list[tuple[Tensor, Tensor]] = []
        self.calls = [1] * 20
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        drawn = torch.randint(0, 40, inputs["labels"].shape)
        return {"labels": inputs["labels"], "drawn": ({"tokens": [drawn]},)}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        again = [self._prepare_inputs(inputs) for _ in range(self.calls[len(self.used)])]
        tokens = [batch.pop("drawn")[0].pop("tokens").pop() for batch in (inputs, *again)]
        self.used.append((tokens[0], tokens[-1]))
        return super().compute_loss(model, {"input_ids": tokens[-1], **inputs}, *args, **kwargs)


class Nested(Drawing):
    """Prepare inputs within preparing them."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "input_ids" in inputs:
            return self._prepare_inputs({"labels": inputs["labels"]})
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("cls", [Drawing, Nested])
def test_inputs_are_prepared_twice_in_a_micro_batch(cls: type, tmp_path: Path) -> None:
    run = make(lora_gpt2(), arguments(tmp_path), ours.flat_optimizer, cls)
    run.train()
    assert len(run.used) == 20
    for at in (0, 1, 4, 5, 8, 9, 12, 13, 16, 17):
        first, second = run.used[at], run.used[at + 2]
        assert not same_bits(*first)
        assert same_bits(first[0], second[0]) and same_bits(first[1], second[1])


class Direct(Trainer):
    """Take the inputs without preparing them."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class PerturbingDirect(ours.PerturbationMixin, Direct):
    pass


@pytest.mark.parametrize(
    ("cls", "calls"),
    [(PerturbingDirect, None), (Drawing, [0, 0, 1, 0]), (Drawing, [0, 1, 0, 0])],
    ids=["never", "more in the second pass", "fewer in the second pass"],
)
def test_inputs_that_may_differ_are_refused(cls: type, calls: Any, tmp_path: Path) -> None:
    model = lora_gpt2()
    before = weights(model)
    run = make(model, arguments(tmp_path), ours.flat_optimizer, cls)
    run.calls = calls
    with pytest.raises(RuntimeError, match=r"PerturbationMixin.*_prepare_inputs"):
        run.train()
    assert_same_bits(weights(model), before)
    assert run.state.global_step == 0


@pytest.mark.proves(
    "Hugging Face Trainer", "logs the perturbation's norm and how many were skipped"
)
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_log(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean norm and count of skipped perturbations are read when logged, not at each step."""
    norms: list[float] = []
    reads: list[int] = []
    original = Perturbation.norms

    class Freeze(TrainerCallback):
        """Freeze one pair in the third step, which counts as skipped."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and isinstance(own(run), EFlatLoRA):
                own(run).pairs[0].A.grad.zero_()
                own(run).pairs[0].B.grad.zero_()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            values = original.fget(own(run).perturbation).values()
            assert len(values) == len(own(run).pairs)
            norms.append(float(torch.stack(list(values)).mean()))

    def counted(self: Any) -> Any:
        reads.append(1)
        return original.fget(self)

    args = arguments(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=1)
    run = make(lora_gpt2(), args, callbacks=[Freeze()], **options)
    monkeypatch.setattr(Perturbation, "norms", property(counted))
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(reads) == len(logged) == 2
    assert [entry["perturbation_norm"] for entry in logged] == pytest.approx([norms[1], norms[3]])
    skipped = 1 if isinstance(own(run), EFlatLoRA) else 0
    assert [entry["skipped_perturbations"] for entry in logged] == [0, skipped]
    others = [entry for entry in run.state.log_history if "loss" not in entry]
    assert len(others) == 6 and not any("perturbation_norm" in entry for entry in others)


def test_mixin_leaves_other_optimizers_alone(tmp_path: Path) -> None:
    models = [lora_gpt2(), lora_gpt2()]
    for cls, model in zip((Trainer, PerturbingTrainer), models, strict=True):
        args = arguments(tmp_path, logging_steps=1)
        run = cls(model=model, args=args, train_dataset=Sentences())
        run.train()
        assert not any("skipped_perturbations" in entry for entry in run.state.log_history)
    assert_same_bits(weights(models[0]), weights(models[1]))


@pytest.mark.proves("Hugging Face Trainer", "fp16: a step that the scaler skips changes nothing")
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_fp16_overflows(options: dict[str, Any], tmp_path: Path) -> None:
    """Steps that the scaler skips change nothing, and training goes on."""

    class Overflowing(PerturbingTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.inf if self.state.global_step in (0, 3, 4) else loss

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.before = self.state()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            skipped = run.accelerator.optimizer_step_was_skipped
            assert skipped == (state.global_step - 1 in (0, 3, 4))
            if not isinstance(own(run), EFlatLoRA):
                assert all(torch.equal(*both) for both in own(run).points().items())
            if skipped:
                assert_same_bits(self.state(), self.before)

        def state(self) -> dict[str, Tensor]:
            averages = getattr(own(run), "averages", {})
            return weights(run.model) | {n: average.clone() for n, average in averages.items()}

    model = lora_gpt2()
    run = make(
        model, arguments(tmp_path, max_steps=7), cls=Overflowing, callbacks=[Look()], **options
    )
    scale_gradients(run.accelerator, init_scale=2.0**10)
    before = weights(model)
    run.train()
    assert run.accelerator.scaler.get_scale() == 2.0**7
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert any(bool((before[n] != p).any()) for n, p in model.named_parameters())
