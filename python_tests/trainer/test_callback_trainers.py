"""EFlatCallback in trainers that derive from Trainer: TRL's, sentence-transformers', SetFit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, same_bits, weights
from peft import LoraConfig
from torch import Tensor, nn
from trainer_case import Averages, arguments, own, word_tokenizer

from eflat_ext import EFlatLoRA
from eflat_ext import trainer as ours

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers and PEFT
ROWS = 32


def words(start: int, count: int) -> str:
    return " ".join(f"w{2 + (start + 5 * k) % 38}" for k in range(count))


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


PROMPTS = [{"prompt": words(i, 2)} for i in range(ROWS)]
PREFERENCES = [
    {"prompt": words(i, 2), "chosen": " " + words(3 * i, 4), "rejected": " " + words(7 * i + 1, 3)}
    for i in range(ROWS)
]
GENERATING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "SFT": ([{"text": words(i, 6)} for i in range(ROWS)], {}),
    "DPO": (PREFERENCES, {}),
    "KTO": (
        [
            {"prompt": words(i, 2), "completion": " " + words(3 * i, 4), "label": bool(i % 2)}
            for i in range(ROWS)
        ],
        {},
    ),
    "Reward": ([{k: row[k] for k in ("chosen", "rejected")} for row in PREFERENCES], {}),
    "GRPO": (PROMPTS, GENERATING),
    "RLOO": (PROMPTS, GENERATING),
}


def llama(method: str) -> nn.Module:
    """Return a random two-layer Llama of width 16 without adapters and without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        num_labels=1,
    )
    return LlamaForSequenceClassification(shape) if method == "Reward" else LlamaForCausalLM(shape)


def make(method: str, folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    """Return a trainer of TRL that makes the PEFT model itself."""
    rows, own_settings = CASES[method]
    config = getattr(trl, f"{method}Config")
    args = arguments(
        folder, config, **{"max_steps": 3, "logging_steps": 1, **own_settings, **settings}
    )
    task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
    options = {"reward_funcs": rewards} if method in ("GRPO", "RLOO") else {}
    return getattr(trl, f"{method}Trainer")(
        model=llama(method),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task),
        callbacks=callbacks,
        **options,
    )


def trained(run: Any, resume: str | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    run.train(resume_from_checkpoint=resume)
    return weights(run.model)


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback in SFT, DPO, KTO, Reward, GRPO and RLOO, with `peft_config=`: the steps of "
    "EFlatLoRA, resumed bit-exact",
)
@pytest.mark.parametrize("method", CASES)
def test_trainers_of_trl(method: str, tmp_path: Path) -> None:
    callback = ours.EFlatCallback(rho=0.2)
    record = Averages(callback)
    run = make(method, tmp_path, [callback, record], save_strategy="steps", save_steps=2)
    perturbed = trained(run)
    around = make(method, tmp_path, [])
    around.optimizer_cls_and_kwargs = ours.eflat_optimizer(
        around.args, rho=0.2, fused_step=False, model=around.model
    )
    assert_same_bits(perturbed, trained(around))
    assert isinstance(own(around), EFlatLoRA)
    plain = trained(make(method, tmp_path, []))
    assert any(not same_bits(perturbed[name], plain[name]) for name in plain)
    assert len(record.averages[3]) == 4
    assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[3].values())
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all("perturbation_norm" in entry for entry in logged)
    again = make(method, tmp_path / "again", [ours.EFlatCallback(rho=0.2)])
    assert_same_bits(trained(again, str(tmp_path / "checkpoint-2")), perturbed)


class Passes:
    """Record inputs and hidden states of the decoder's passes, with adapters and without."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self.layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        self.with_adapters: list[tuple[dict[str, Any], Tensor]] = []
        self.without: list[tuple[dict[str, Any], Tensor]] = []
        self.decoder = model.get_base_model().model
        self.handle = self.decoder.register_forward_hook(self.note, with_kwargs=True)

    def note(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert decoder.training
        inputs = {name: kwargs[name].clone() for name in ("input_ids", "attention_mask")}
        kind = self.without if self.layer.disable_adapters else self.with_adapters
        kind.append((inputs, output.last_hidden_state.detach().clone()))

    def again(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden states of the clean model."""
        with torch.no_grad():
            return self.decoder(**inputs).last_hidden_state


@pytest.mark.proves(
    "Hugging Face Trainer", "EFlatCallback: the reference model of DPO and KTO is not perturbed"
)
@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_reference_passes_are_clean(method: str, tmp_path: Path) -> None:
    """The reference is the model with its adapters disabled, in training mode."""
    run = make(method, tmp_path, [ours.EFlatCallback(rho=0.2)], bf16=False, learning_rate=1e-9)
    passes = Passes(run.model)
    trained(run)
    passes.handle.remove()
    assert passes.without and passes.with_adapters
    for inputs, states in passes.without:
        with run.model.disable_adapter():
            assert torch.equal(passes.again(inputs), states)
    moved = [
        float((passes.again(inputs) - states).norm() / states.norm())
        for inputs, states in passes.with_adapters
    ]
    assert min(moved[-2:]) > 1e-3  # B is all but 0: it was the perturbation
    assert max(moved[:2]) < 1e-6  # there is none at the first step
