"""A small run to be measured, for the tests of ``eflat sharpness`` and ``eflat landscape``."""

import csv

from tiny_model import make_rows, save_tiny_model, write_csv

from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig

SMALL = ["--examples", "40", "--batch-size", "16", "--device", "cpu"]


def make_run(folder):
    """A folder with a small model, data, and a run of three methods."""
    config = FinetuneConfig(
        model=save_tiny_model(folder / "model"),
        data=write_csv(folder / "data.csv", make_rows(300)),
        method=["lora", "eflat", "full"],
        max_length=32,
        steps=10,
        rank=4,
        lr=5e-3,
        device="cpu",
        output_dir=folder / "run",
    )
    comparison.run(config)
    return folder


def make_language_model(folder):
    """A folder with a small language model that PEFT saved an adapter of; the adapter's folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder / "base"))
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(folder / "gpt")
    tokenizer.save_pretrained(folder / "gpt")
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt")
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
