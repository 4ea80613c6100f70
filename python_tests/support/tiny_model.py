"""Models that train in no time: random weights, a hundred words, a made-up task."""

import csv
import json
import random

WORDS = [f"word{k}" for k in range(90)]


def save_tiny_model(folder):
    """Save a two-layer BERT of width 32 and its tokenizer; return the folder as a string."""
    import torch
    from transformers import BertConfig, BertModel

    size = _save_tokenizer(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def save_tiny_language_model(folder):
    """Save a two-layer Llama of width 32 and its tokenizer; return the folder as a string."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # The end of a text has a number of its own: 0 is the padding's.
    size = _save_tokenizer(folder, "[EOS]", padding_side="left")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=size - 1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _save_tokenizer(folder, eos_token=None, **options):
    """Whole words, and no tokens around a text; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", *WORDS, *([eos_token] if eos_token else [])]
    words = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if eos_token:
        options["eos_token"] = eos_token
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
        **options,
    ).save_pretrained(folder)
    return len(vocabulary)


def make_rows(count, classes=2, seed=0):
    """Texts of 3 to 12 words with labels "0", "1", …; the first word gives the label away."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        rows.append((" ".join(words), str(WORDS.index(words[0]) % classes)))
    return rows


def write_csv(path, rows, columns=("text", "label")):
    """Write rows as CSV; return the path as a string."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def write_jsonl(path, rows, columns=("text", "label")):
    """Write rows as JSON lines; return the path as a string."""
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
