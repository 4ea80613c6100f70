"""What people do next with trained adapters equals what they would do with clean weights.

Everything happens while the perturbation is alive, in the middle of a step, in training mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import CREATE, assert_same_bits, weights
from peft import LoraConfig, get_peft_model
from quantised_models import BASES, TARGETS, base_state, loss_of, needs, save_llama
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, torchao and bitsandbytes
METHODS: dict[str, dict[str, Any]] = {
    "eflat onto B": {"method": "eflat"},
    "eflat onto A": {"method": "eflat", "onto": "A"},
    "flat": {"method": "flat"},
    "lora-sam": {"method": "lora-sam"},
}
every_method = pytest.mark.parametrize("method", METHODS)
# Options of add_weighted_adapter.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def adapted(folder: Path) -> Any:
    """Return a Llama with two adapters, both active and trained."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    return model.train()


def within_a_step(folder: Path, method: str) -> tuple[Any, Any, Any, Any]:
    """Return a model after two steps and a half, its optimizer, and plain copies.

    The first copy has its clean weights, the second those at which its gradients are taken.
    """
    model = adapted(folder)
    options = {"lr": 0.02, "rho": 1.0, **METHODS[method]}
    create = CREATE[options.pop("method")]
    optimizer = create(model, torch.optim.AdamW, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    clean = weights(model)
    closure()
    if create is not CREATE["eflat"]:
        optimizer.first_step()
        loss_of(model, 1).backward()
    assert all(factor.ran_perturbed for factor in optimizer.perturbation.factors)
    assert len(optimizer.pairs) == 2 * len(TARGETS)
    points = optimizer.points()
    moved = {name: points.get(p, p).detach() for name, p in model.named_parameters()}
    copies = [adapted(folder), adapted(folder)]
    for copy, values in zip(copies, (clean, moved), strict=True):
        copy.load_state_dict(values, strict=False)
    return model, optimizer, *copies


def combined(model: Any, kind: str) -> dict[str, Tensor]:
    torch.manual_seed(3)  # DARE drops at random
    model.base_model.add_weighted_adapter(
        ["first", "second"], [0.7, 0.5], "merged", combination_type=kind, **COMBINATIONS[kind]
    )
    made = {name: value for name, value in weights(model).items() if ".merged." in name}
    assert len(made) == 2 * len(TARGETS)
    return made


@pytest.mark.proves(
    "Plain loops",
    "nothing to remember: adapters combined by PEFT (TIES, DARE, SVD and others) are combined of "
    "clean weights, and training goes on",
)
@every_method
def test_combined_adapters_are_those_of_clean_weights(folder: Path, method: str) -> None:
    model, optimizer, clean, moved = within_a_step(folder, method)
    for kind in COMBINATIONS:
        found = combined(model, kind)
        assert_same_bits(found, combined(clean, kind))
        wrong = combined(moved, kind)
        assert not all(torch.equal(found[name], wrong[name]) for name in found)
        for one in (model, clean, moved):
            one.delete_adapter("merged")
    other, alone, *_ = within_a_step(folder, method)
    for one, its in ((model, optimizer), (other, alone)):
        loss_of(one, 2).backward()
        its.step()
    assert_same_bits(weights(model), weights(other))


@torch.no_grad()
def quantised(model: Any, base: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge both adapters, save the model, load it quantised; return its state and logits."""
    from transformers import AutoModelForCausalLM

    merged = model.merge_and_unload(adapter_names=["first", "second"])
    merged.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BASES[base](), dtype=torch.float32
    )
    tokens = torch.arange(12).reshape(1, 12)
    return base_state(loaded), {"logits": loaded.eval()(input_ids=tokens).logits}


@pytest.mark.proves(
    "Quantised bases", "an adapter merged within a step and quantised: the clean weights' bits"
)
@needs("bitsandbytes", "torchao")
@pytest.mark.parametrize("base", ["torchao int8", "torchao int4", "int8", "nf4"])
@every_method
def test_merged_and_quantised_weights_are_those_of_clean_weights(
    folder: Path, base: str, method: str, tmp_path: Path
) -> None:
    model, _, clean, moved = within_a_step(folder, method)
    found, expected, wrong = (
        quantised(one, base, tmp_path / str(i)) for i, one in enumerate((model, clean, moved))
    )
    for mine, plain in zip(found, expected, strict=True):
        assert_same_bits(mine, plain)
    assert not torch.equal(found[1]["logits"], wrong[1]["logits"])


@needs("torchao")
@every_method
def test_a_merged_model_quantised_in_place_is_that_of_clean_weights(
    folder: Path, method: str
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, _, clean, _ = within_a_step(folder, method)
    states = []
    for one in (model, clean):
        merged: nn.Module = one.merge_and_unload(adapter_names=["first", "second"])
        quantize_(merged, Int8WeightOnlyConfig())
        states.append(base_state(merged))
    assert_same_bits(*states)
