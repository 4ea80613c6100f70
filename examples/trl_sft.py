"""Fine-tune on movie reviews by TRL's SFTTrainer: EFlat-LoRA by a callback, Flat-LoRA by the mixin.

The sentences come from the package vaderSentiment. Without --model, the language model is small,
has random weights and a vocabulary made from the sentences, and trains in seconds.

    pip install trl datasets cyclopts
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import cyclopts
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from eflat_ext.lab.data.corpora import movie_reviews
from eflat_ext.trainer import EFlatCallback, PerturbationMixin, flat_optimizer


class FlatSft(PerturbationMixin, trl.SFTTrainer):
    """An SFTTrainer for methods with two gradients."""


def small_model(texts: list[str]) -> tuple[Any, Any]:
    """Return a random Llama of width 64 and a tokenizer of 500 pieces of these texts."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "<eos>"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(shape), tokenizer


def main(
    model: str | None = None, method: Literal["eflat", "flat"] = "eflat", steps: int = 40
) -> None:
    """Fine-tune on sentences of movie reviews.

    Args:
        model: Folder or hub name of a causal language model.
        method: EFlat-LoRA, one gradient per step, or Flat-LoRA, two.
        steps: Optimizer steps, 8 sentences each.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = movie_reviews().texts[: 8 * steps]
    if model is None:
        base, tokenizer = small_model(texts)
    else:
        base = AutoModelForCausalLM.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"] if model is None else None,  # they are random
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2 if model is None else 1e-3,
            logging_steps=steps // 2,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=64,
        )
        options = {
            "args": arguments,
            "train_dataset": Dataset.from_dict({"text": texts}),
            "processing_class": tokenizer,
        }
        if method == "eflat":
            callback = EFlatCallback(rho=0.05)
            trainer = trl.SFTTrainer(base, peft_config=lora, callbacks=[callback], **options)
        else:
            adapted = get_peft_model(base, lora)
            # transformers before 5 needs model=...; transformers 5 accepts it.
            optimizer = flat_optimizer(arguments, rho=0.05, model=adapted)
            trainer = FlatSft(adapted, optimizer_cls_and_kwargs=optimizer, **options)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"{method}: loss {losses[0]:.3f} in the first half, {losses[-1]:.3f} in the second")


if __name__ == "__main__":
    cyclopts.run(main)
