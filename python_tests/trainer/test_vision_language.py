"""A Qwen2-VL on image-question pairs: LoRA on both towers, Trainer, parts of the example."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import assert_same_bits, same_bits, weights
from torch import Tensor
from trainer_case import Read, adapter, arguments, assert_saved, own
from transformers import TrainerCallback, set_seed

from eflat_ext import reference
from eflat_ext.lora import find_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT

SCRIPT = Path(__file__).parents[2] / "examples" / "vision_language.py"
RHO, BETA = 0.05, 0.9
TOWERS = ("visual.blocks", "language_model.layers")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vision_language", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(example: ModuleType) -> tuple[Any, Any]:
    return example.Questions("train", 160), example.Questions("test", 48)


@pytest.fixture(scope="module")
def processor(example: ModuleType, data: tuple[Any, Any]) -> Any:
    return example.small_processor([r[k] for r in data[0].rows for k in ("question", "answer")])


def trainer(
    example: ModuleType,
    data: tuple[Any, Any],
    processor: Any,
    folder: Path,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Any:
    set_seed(0)
    model = example.load(checkpoint, processor, torch.bfloat16)
    args = arguments(folder, remove_unused_columns=False, weight_decay=0.0, **settings)
    return example.make_trainer(model, processor, *data, args, RHO)


class Averages(TrainerCallback):
    """Moving averages that the reference computes from the model's gradients.

    Also record how far the values that forward passes read are from weights plus averages.
    """

    def __init__(self, model: Any) -> None:
        self.pairs, self.read = find_pairs(model), Read(model)
        self.means = {p.name: torch.zeros(p.B.shape, dtype=torch.float64) for p in self.pairs}
        self.errors: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        errors = {}
        for pair in self.pairs:
            mean, B = self.means[pair.name], self.read[pair.parameter_B]
            errors[pair.name] = float((B.double() - pair.B - mean).norm() / mean.norm())
            gradients = (pair.parameter_A.grad, pair.parameter_B.grad)
            E, _norm = reference.perturb(pair.A, B, *gradients, pair.scaling, RHO)
            mean.mul_(1 - BETA).add_(E, alpha=BETA)
        self.errors.append(errors)


@pytest.mark.proves(
    "Vision-language", "perturbs the layers of both towers of a Qwen2-VL as the reference does"
)
@pytest.mark.parametrize("bf16", [False, True])
def test_perturbations(
    example: ModuleType, data: tuple[Any, Any], processor: Any, tmp_path: Path, bf16: bool
) -> None:
    """A random model, and a checkpoint in bfloat16 under autocast as the example uses on CUDA."""
    checkpoint = None
    if bf16:
        checkpoint = tmp_path / "model"
        example.small_model(processor.tokenizer).save_pretrained(checkpoint)
    settings = {"max_steps": 5, "learning_rate": 3e-3, "bf16": bf16}
    run = trainer(example, data, processor, tmp_path, checkpoint, **settings)
    callback = Averages(run.model)
    run.add_callback(callback)
    run.train()
    names = [pair.name for pair in callback.pairs]
    # Two blocks of qkv, proj, fc1, fc2; two layers of q, k, v, o, gate, up, down.
    assert [sum(tower in name for name in names) for tower in TOWERS] == [2 * 4, 2 * 7]
    assert len(names) == 2 * 4 + 2 * 7
    assert [pair.name for pair in own(run).pairs] == names
    assert len(callback.errors) == 5
    assert int(own(run).skipped_perturbations) == 0
    assert {pair.B.dtype for pair in callback.pairs} == {torch.float32}
    frozen = run.model.get_base_model().model.visual.patch_embed.proj.weight
    assert frozen.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for errors in callback.errors[1:]:  # at first the averages are zero
        assert max(errors.values()) <= 1e-5, errors


class Saves(TrainerCallback):
    """Save between two micro-batches, whose passes are perturbed."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.read = folder, Read(model)
        self.clean: dict[str, Tensor] = {}
        self.saved: list[Path] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 20:
            read = self.read.weights(model)
            differing = {n for n, w in read.items() if not same_bits(w, self.clean[n])}
            assert differing and all("lora_B" in name for name in differing)
            assert all(any(tower in name for name in differing) for tower in TOWERS)
            self.check(model, self.folder / "between")

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        assert_saved(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.clean)

    def check(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        assert_saved(folder, self.clean)
        self.saved.append(folder)


@pytest.mark.proves("Vision-language", "learns in Trainer, and saves clean adapters at any moment")
def test_training(
    example: ModuleType, data: tuple[Any, Any], processor: Any, tmp_path: Path
) -> None:
    run = trainer(
        example,
        data,
        processor,
        tmp_path,
        max_steps=40,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=40,
        logging_steps=10,
    )
    saves = Saves(tmp_path, run.model)
    run.add_callback(saves)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert after < before / 2 and losses[-1] < losses[0] / 2
    assert saves.saved and (tmp_path / "checkpoint-40").is_dir()
    assert_same_bits(weights(run.model), saves.clean)
    compare_with_generation(run, processor)


def compare_with_generation(run: Any, processor: Any) -> None:
    """Assert that the example's exact matches are those of greedy decoding."""
    rows = run.eval_dataset.rows[:16]
    counted, decoded = [], []
    for row in rows:
        batch = run.data_collator([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            tokens = run.model(**batch).logits.argmax(-1)
        mask = labels[0, 1:] != -100
        counted.append(bool((tokens[0, :-1] == labels[0, 1:])[mask].all()))
        start = int(mask.nonzero()[0]) + 1
        prompt = {
            key: value[:, :start] if value.shape[:2] == labels.shape else value
            for key, value in batch.items()
        }
        tokens = run.model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, start:]
        decoded.append(processor.decode(tokens, skip_special_tokens=True) == row["answer"])
    assert counted == decoded


def test_labels_are_the_answers(
    example: ModuleType, data: tuple[Any, Any], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [dict(row) for row in data[0].rows[:8]]
    rows[0]["question"] *= 3  # longer than the others
    monkeypatch.setattr(processor.tokenizer, "padding_side", "left")  # as checkpoints have it
    batch = example.Collator(processor)(rows)
    assert batch["pixel_values"].shape[0] == 16 * len(rows)  # 64 x 64 pixels to 4 x 4 patches
    text = processor.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    images = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    assert f"<|im_start|>user\n{images}{rows[0]['question']}<|im_end|>\n" in text
    for row, labels in zip(rows, batch["labels"], strict=True):
        assert processor.decode(labels[labels != -100]) == f"{row['answer']}<|im_end|>"


@pytest.mark.proves("Vision-language", "the example takes a checkpoint of Qwen2-VL from a folder")
def test_checkpoint_from_a_folder(
    example: ModuleType,
    data: tuple[Any, Any],
    processor: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    model = example.small_model(processor.tokenizer).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # As the full processor saves it.
    config = json.loads((folder / "processor_config.json").read_text())
    config["processor_class"] = "Qwen2VLProcessor"
    config["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", "min_frames": 4}
    (folder / "processor_config.json").write_text(json.dumps(config))
    example.main(
        str(folder), steps=3, batch_size=4, train_questions=12, test_questions=6, output=tmp_path
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].startswith("6 held-out questions")
    for method, line in zip(("LoRA", "EFlat-LoRA"), printed[-2:], strict=True):
        name, _, loss, _, accuracy = line.split()
        assert name == method and 0 < float(loss) < 20 and 0 <= float(accuracy[:-1]) <= 100
        saved = example.PeftModel.from_pretrained(
            example.Qwen2VLForConditionalGeneration.from_pretrained(folder), tmp_path / method
        )
        for tower in TOWERS:
            trained = [w for n, w in weights(saved).items() if "lora_B" in n and tower in n]
            assert trained and all(w.any() for w in trained), tower
    one, other = (adapter(tmp_path / method) for method in ("LoRA", "EFlat-LoRA"))
    assert one.keys() == other.keys() and not any(same_bits(one[n], other[n]) for n in one)
    # The processor that was loaded is the one that was saved.
    again = example.Processor.from_pretrained(folder)
    rows = data[0].rows[:3]
    assert_same_bits(example.Collator(processor)(rows), example.Collator(again)(rows))
