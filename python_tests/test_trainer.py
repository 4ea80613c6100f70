"""Hugging Face Trainer: the one-line hook, two-gradient steps, checkpoints, the log."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    accelerator,
    assert_same_bits,
    lora_bert,
    lora_gpt2,
    same_bits,
    scale_gradients,
    trainable,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from eflat_ext import trainer as ours
from eflat_ext.optimizers import EFlatLoRA, FlatLoRA, LoRASAM, create_flat_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT

HANDS_OVER_THE_MODEL = int(transformers.__version__.split(".")[0]) >= 5


class PerturbingTrainer(ours.PerturbationMixin, Trainer):
    pass


class Sentences(torch.utils.data.Dataset):
    """Token sequences with labels for each token, or one for all; no two rows alike."""

    def __init__(self, per_token: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 40, (32, 8), generator=generator)
        self.rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]
        for index, row in enumerate(self.rows):
            if per_token:
                row["labels"][: index % 5] = -100  # micro-batches of different weights
            else:
                row["labels"] = row["input_ids"].sum() % 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 5,  # one more than an epoch
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    accelerator()  # forget the one before
    return TrainingArguments(**settings)


def make(
    model: nn.Module,
    args: TrainingArguments,
    hook: Callable = ours.eflat_optimizer,
    cls: type[Trainer] = PerturbingTrainer,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> Any:
    data = Sentences(per_token="CausalLM" in type(model).__name__)
    if not HANDS_OVER_THE_MODEL:
        options["model"] = model
    return cls(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=hook(args, **{"rho": 0.2, **options}),
    )


def own(run: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    return run.optimizer.optimizer


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_saved(folder: Path, clean: dict[str, Tensor]) -> None:
    """The file holds all trainable weights, those of ``clean`` bit for bit."""
    named = {re.sub(r"(\.modules_to_save)?\.default", "", n): value for n, value in clean.items()}
    saved = adapter(folder)
    assert any("lora_B" in name for name in saved)
    assert_same_bits(saved, {name: named[name] for name in saved})


class Watch(TrainerCallback):
    """Compares what is saved, between micro-batches too, with the weights after the last step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.saves = 0
        self.perturbed = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        now = weights(model)
        self.perturbed += any(not same_bits(now[name], self.clean[name]) for name in now)
        self.run.save_model(str(self.folder / "between"))
        assert_saved(self.folder / "between", self.clean)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saves += 1
        assert_saved(self.folder / f"checkpoint-{state.global_step}", self.clean)


RUNS: dict[str, dict[str, Any]] = {
    "eflat": {},
    "eflat unfused": {"fused_step": False},
    "eflat onto A": {"onto": "A", "norm_scope": "global"},
    "flat": {"hook": ours.flat_optimizer},
    "lora-sam": {"hook": ours.lora_sam_optimizer},
}


@pytest.mark.parametrize(("build", "evaluate"), [(lora_gpt2, True), (lora_bert, False)])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_every_save_is_clean_and_resumes(
    options: dict[str, Any], build: Callable, evaluate: bool, tmp_path: Path
) -> None:
    """Accumulation, clipping, label smoothing, dropout; saved at every step."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_grad_norm": 0.05,
        "label_smoothing_factor": 0.1,
        **({"eval_strategy": "steps", "eval_steps": 2} if evaluate else {}),
    }
    whole = build(lora_bias=True)
    watch = Watch(tmp_path)
    run = make(whole, arguments(tmp_path, **settings), callbacks=[watch], **options)
    watch.run = run
    run.train()
    assert watch.saves == 5
    # The average is 0 at the first step; for A at the second, too, since B was 0 at the first.
    first = 2 if "onto" in options else 1
    assert watch.perturbed == (5 - first if isinstance(own(run), EFlatLoRA) else 0)
    for step in (1, 4) if evaluate else (3,):
        resumed = build(lora_bias=True)
        again = make(resumed, arguments(tmp_path / "again", **settings), **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(weights(resumed), weights(whole))
        assert_same_bits(getattr(own(again), "averages", {}), getattr(own(run), "averages", {}))


def test_hook_equals_wrapping_the_optimizer_of_trainer(tmp_path: Path) -> None:
    """The arguments' optimizer, numbers and groups, bit for bit."""
    model, other = lora_gpt2(lora_bias=True), lora_gpt2(lora_bias=True)
    run = make(model, arguments(tmp_path))
    run.train()
    around = Trainer(model=other, args=arguments(tmp_path), train_dataset=Sentences())
    around.optimizer = EFlatLoRA(other, around.create_optimizer(), rho=0.2)
    around.train()
    groups = own(around).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(g["params"]) for g in own(run).param_groups] == [len(g["params"]) for g in groups]
    assert type(own(run).base) is type(own(around).base)
    assert_same_bits(weights(model), weights(other))
    assert all(bool(average.any()) for average in own(run).averages.values())


def test_hook_with_a_class_or_other_numbers(tmp_path: Path) -> None:
    cases = [
        (torch.optim.AdamW, {"lr": 0.3}, (0.3, 0.01, 0.9)),
        (torch.optim.AdamW, {"lr": 0.3, "weight_decay": 0.7}, (0.3, 0.7, 0.9)),
        (arguments(tmp_path), {}, (1e-2, 0.1, 0.8)),
        (arguments(tmp_path), {"lr": 0.3, "weight_decay": 0.7}, (0.3, 0.7, 0.8)),
    ]
    for base, options, (lr, decay, beta1) in cases:
        model = lora_gpt2(lora_bias=True)
        factory, kwargs = ours.eflat_optimizer(base, rho=0.3, beta=0.5, **options)
        optimizer = factory()(model, **kwargs)
        assert (optimizer.rho, optimizer.beta) == (0.3, 0.5)
        decayed, others = optimizer.param_groups
        assert (decayed["lr"], others["lr"]) == (lr, lr)
        assert (decayed["weight_decay"], others["weight_decay"]) == (decay, 0.0)
        assert decayed["betas"][0] == beta1
        biases = {id(p) for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        assert biases and {id(p) for p in others["params"]} == biases
        assert len(decayed["params"]) + len(biases) == len(trainable(model))


@pytest.mark.parametrize(
    ("hook", "cls"),
    [
        (ours.eflat_optimizer, EFlatLoRA),
        (ours.flat_optimizer, FlatLoRA),
        (ours.lora_sam_optimizer, LoRASAM),
    ],
)
def test_hook_called_with_groups(hook: Callable, cls: type) -> None:
    """As transformers 4 does."""
    model = lora_gpt2()
    groups = [{"params": trainable(model)}]
    factory, kwargs = hook(torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="pass model="):
        factory(groups, **kwargs)
    factory, kwargs = hook(torch.optim.SGD, lr=0.1, model=model)
    assert type(factory(groups, **kwargs)) is cls


def test_hook_errors(tmp_path: Path) -> None:
    for base in (lora_gpt2(), "adamw", nn.Linear, None):
        with pytest.raises(TypeError, match="base: expected a subclass of torch"):
            ours.eflat_optimizer(base)
    layerwise = arguments(tmp_path, gradient_accumulation_steps=1)
    layerwise.optim = "sgd"
    factory, _ = ours.eflat_optimizer(layerwise)
    assert isinstance(factory()(lora_gpt2()).base, torch.optim.SGD)
    with pytest.raises(ValueError, match="rho: expected"):
        make(lora_gpt2(), arguments(tmp_path), rho=-1.0).train()


def test_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "eflat_ext.trainer")
    with pytest.raises(ImportError, match="pip install transformers"):
        importlib.import_module("eflat_ext.trainer")


class Recorder(PerturbingTrainer):
    """Notes the arguments and the weights of every loss in training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]] = []
        self.fail_at: dict[int, BaseException] = {}
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs  # no copy, so the loss takes the labels out of the batch itself

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            given = dict(copy.copy(inputs)), kwargs["num_items_in_batch"]
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.seen.append((*given, weights(model)))
            if len(self.seen) - 1 in self.fail_at:
                raise self.fail_at[len(self.seen) - 1]
            return loss
        return super().compute_loss(model, inputs, *args, **kwargs)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("build", [lora_gpt2, lora_bert])
def test_two_gradients_equal_a_plain_loop(
    build: Callable, smoothing: float, tmp_path: Path
) -> None:
    """All micro-batches of a step at the clean weights, then all again at one perturbed point."""
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

        assert plain.step(closure) == pytest.approx(losses[step], abs=2e-3)  # logged rounded
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Clean(TrainerCallback):
    """The weights at the beginning of each step."""

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
    """And the trainer trains again."""
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


@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("hook", [ours.eflat_optimizer, ours.flat_optimizer])
def test_best_model_at_the_end(hook: Callable, highest: bool, tmp_path: Path) -> None:
    """Evaluated at clean weights, the loss is that of the adapter in the checkpoint."""
    from peft import set_peft_model_state_dict

    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": highest,
    }
    model = lora_gpt2()
    run = make(model, arguments(tmp_path, **settings), hook)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index((max if highest else min)(losses)) + 1
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_saved(tmp_path / f"checkpoint-{best}", weights(model))
    assert len(set(losses)) == 5
    other = lora_gpt2()
    plain = Trainer(model=other, args=arguments(tmp_path), eval_dataset=Sentences())
    for step, loss in enumerate(losses, 1):
        set_peft_model_state_dict(other, adapter(tmp_path / f"checkpoint-{step}"))
        assert plain.evaluate()["eval_loss"] == loss
    model.train()(**{n: v[None] for n, v in Sentences()[0].items()})  # and may train on
    assert own(run)._weights.applied == (hook is ours.eflat_optimizer)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_log(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean norm and the count of skipped perturbations; read when logged, not at every step."""
    norms: list[float] = []
    reads: list[int] = []
    original = ours.PerturbingOptimizer.perturbation_norms

    class Freeze(TrainerCallback):
        """One pair without a gradient at the third step, which counts as skipped."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and isinstance(own(run), EFlatLoRA):
                own(run).pairs[0].A.grad.zero_()
                own(run).pairs[0].B.grad.zero_()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            values = original.fget(own(run)).values()
            assert len(values) == len(own(run).pairs)
            norms.append(float(torch.stack(list(values)).mean()))

    def counted(self: Any) -> Any:
        reads.append(1)
        return original.fget(self)

    args = arguments(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=1)
    run = make(lora_gpt2(), args, callbacks=[Freeze()], **options)
    monkeypatch.setattr(ours.PerturbingOptimizer, "perturbation_norms", property(counted))
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


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_fp16_overflows(options: dict[str, Any], tmp_path: Path) -> None:
    """Steps that the scaler skips change nothing, and the next ones go on."""

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
            assert not own(run)._weights.applied
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


@pytest.mark.parametrize("hook", [ours.eflat_optimizer, ours.flat_optimizer])
def test_trl_sft_trainer(hook: Callable, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class Sft(ours.PerturbationMixin, trl.SFTTrainer):
        pass

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 40)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = trl.SFTConfig(
            **{
                **arguments(tmp_path, save_strategy="steps", save_steps=1).to_dict(),
                "logging_steps": 1,
            }
        )
        model = lora_gpt2()
        run = Sft(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist()} for row in Sentences()]
            ),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=hook(
                args, rho=0.2, model=None if HANDS_OVER_THE_MODEL else model
            ),
        )
        run.train(resume_from_checkpoint=resume)
        logged = [entry for entry in run.state.log_history if "loss" in entry]
        assert logged and all("perturbation_norm" in entry for entry in logged)
        results.append(weights(model))
    assert_same_bits(*results)
