"""LoRA on bases quantised by bitsandbytes and torchao: the methods never read the base."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layers import Calls, factors
from models import assert_same_bits, at_points, same_bits, trainable, weights
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from quantised_models import (
    BETA,
    EIGHT_BITS,
    FOUR_BITS,
    LR,
    RHO,
    TOKENS,
    TORCHAO,
    base_state,
    lora_only,
    loss_of,
    needs,
    quantised_lora,
    save_llama,
    steps_as_the_reference,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer_case import RUNS, arguments, make, own

from eflat_ext import (
    EFlatLoRA,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)
from eflat_ext.analysis.estimate import estimate_quality
from eflat_ext.analysis.full_space import adapted_layers, evaluating, mean_loss
from eflat_ext.analysis.hessian import hessian
from eflat_ext.analysis.landscape import random_direction, slice_1d
from eflat_ext.analysis.sharpness import average_case, worst_case

pytestmark = [
    needs("bitsandbytes", "torchao"),
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module"),
]

METHODS: dict[str, Callable[..., Any]] = {
    "eflat fused": lambda *a, **k: create_eflat_optimizer(*a, rho=RHO, beta=BETA, **k),
    "eflat": lambda *a, **k: create_eflat_optimizer(*a, rho=RHO, beta=BETA, fused_step=False, **k),
    "eflat onto A": lambda *a, **k: create_eflat_optimizer(*a, rho=RHO, beta=BETA, onto="A", **k),
    "flat": lambda *a, **k: create_flat_optimizer(*a, rho=RHO, **k),
    "lora-sam": lambda *a, **k: create_lora_sam_optimizer(*a, rho=RHO, **k),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def check(folder: Path, base: str, method: str, **config: Any) -> None:
    model = quantised_lora(folder, base, **config)
    optimizer = METHODS[method](model, torch.optim.AdamW, lr=LR)
    assert len(optimizer.pairs) == 3
    with Calls() as calls:
        steps_as_the_reference(model, optimizer, loss_of)
    assert ("foreach_adamw_step_" in calls.names) == (method in ("eflat fused", "eflat onto A"))


@pytest.mark.proves(
    "Quantised bases", "bitsandbytes 4 bits (nf4, fp4, double quantisation) as the reference"
)
@pytest.mark.parametrize("base", FOUR_BITS)
@every_method
def test_four_bits(folder: Path, base: str, method: str) -> None:
    check(folder, base, method)


@pytest.mark.proves("Quantised bases", "bitsandbytes 8 bits (LLM.int8) as the reference")
@pytest.mark.parametrize("base", EIGHT_BITS)
@every_method
def test_eight_bits(folder: Path, base: str, method: str) -> None:
    check(folder, base, method)


@pytest.mark.proves("Quantised bases", "torchao int8, int4 and float8 weights as the reference")
@pytest.mark.parametrize("base", TORCHAO)
@every_method
def test_torchao(folder: Path, base: str, method: str) -> None:
    check(folder, base, method)


def test_pairs_that_get_no_gradient_from_torchao_are_not_perturbed(folder: Path) -> None:
    """Dynamic activations pass no gradient to the layers below."""
    model = quantised_lora(folder, "torchao int8, dynamic activations")
    optimizer = METHODS["eflat fused"](model, torch.optim.AdamW, lr=LR)
    before = [factors(pair) for pair in optimizer.pairs]
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    moved = []
    for pair, (A, B) in zip(optimizer.pairs, before, strict=True):
        if pair.parameter_B.grad is None:
            assert same_bits(pair.A, A) and same_bits(pair.B, B)
            assert not optimizer.averages[pair.name].any()
        else:
            moved.append(pair.layer_name.rpartition(".")[2])
            assert optimizer.averages[pair.name].any()
    assert moved == ["down_proj"]


def test_dora_on_four_bits_equals_the_reference(folder: Path) -> None:
    check(folder, "nf4", "eflat", use_dora=True)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@every_method
def test_bfloat16_adapters_have_float32_averages(
    folder: Path, adapter: torch.dtype, method: str
) -> None:
    """All but the 4-bit weights is bfloat16; the adapter is bfloat16, too, or as PEFT creates it.

    Averages are as exact as in float32; point and step are rounded to the adapter's dtype.
    """
    model = quantised_lora(
        folder,
        "nf4, bfloat16 compute",
        dtype=torch.bfloat16,
        autocast_adapter_dtype=adapter == torch.float32,
    )
    optimizer = METHODS[method](model, torch.optim.AdamW, lr=LR)
    assert {p.dtype for p in trainable(model)} == {adapter}
    if adapter == torch.float32:
        steps_as_the_reference(model, optimizer, loss_of)
    else:
        steps_as_the_reference(model, optimizer, loss_of, limit=0.01)
    if isinstance(optimizer, EFlatLoRA):
        assert {average.dtype for average in optimizer.averages.values()} == {torch.float32}


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if not isinstance(optimizer, EFlatLoRA):
            optimizer.first_step()
            loss_of(model, step).backward()
        optimizer.step()


def points(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the LoRA weights at which the next gradients will be taken."""
    with at_points(optimizer):
        return lora_only(weights(model))


def accumulated(
    folder: Path, base: str, method: str, **config: Any
) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """Return model, optimizer and LoRA weights in the middle of the third step."""
    model = quantised_lora(folder, base, **config)
    optimizer = METHODS[method](model, torch.optim.AdamW, lr=LR)
    train(model, optimizer, range(2))
    clean = lora_only(weights(model))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    if not isinstance(optimizer, EFlatLoRA):
        optimizer.first_step()
    point = points(model, optimizer)
    assert sum(not same_bits(point[name], clean[name]) for name in clean) >= 3
    return model, optimizer, clean


def with_lora(folder: Path, base: str, lora: dict[str, Tensor]) -> nn.Module:
    """Return a new model on the same base, without an optimizer."""
    model = quantised_lora(folder, base)
    model.load_state_dict(lora, strict=False)
    assert_same_bits(lora_only(weights(model)), lora)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> dict[str, Tensor]:
    return {"logits": model.eval()(input_ids=TOKENS[0]).logits}


@pytest.mark.proves("Quantised bases", "saved adapters are clean at any moment, bit for bit")
@pytest.mark.parametrize("base", ["nf4, double quantisation", "int8", "torchao int8"])
@every_method
def test_saved_adapters_are_clean(folder: Path, base: str, method: str, tmp_path: Path) -> None:
    model, optimizer, clean = accumulated(folder, base, method)
    point = points(model, optimizer)
    by_name = {name.replace(".default", ""): value for name, value in clean.items()}
    assert_same_bits(lora_only(model.state_dict()), clean)
    assert_same_bits(get_peft_model_state_dict(model), by_name)
    model.save_pretrained(tmp_path)
    assert_same_bits(load_file(tmp_path / "adapter_model.safetensors"), by_name)
    copied = copy.deepcopy(model)
    assert_same_bits(lora_only(copied.state_dict()), clean)
    assert_same_bits(logits(copied), logits(with_lora(folder, base, clean)))
    assert_same_bits(points(model, optimizer), point)  # saving changed nothing in the model


@pytest.mark.proves("Quantised bases", "evaluates and generates clean in the middle of a step")
@pytest.mark.parametrize("base", [*FOUR_BITS, *EIGHT_BITS, *TORCHAO])
@pytest.mark.parametrize("method", ["eflat fused", "flat"])
def test_evaluation_between_micro_batches(folder: Path, base: str, method: str) -> None:
    """The second half of the accumulated gradient belongs to the point of the first."""
    results = []
    for evaluated in (False, True):
        model, optimizer, clean = accumulated(folder, base, method)
        point = points(model, optimizer)
        if evaluated:
            plain = with_lora(folder, base, clean).eval()
            assert_same_bits(logits(model), logits(plain))
            tokens = [
                one.generate(input_ids=TOKENS[0][:, :3], max_new_tokens=4, do_sample=False)
                for one in (model, plain)
            ]
            assert torch.equal(*tokens)
            assert_same_bits(lora_only(weights(model)), clean)
        loss_of(model.train(), 1).backward()
        assert_same_bits(points(model, optimizer), point)
        optimizer.step()
        results.append(lora_only(weights(model)))
    assert_same_bits(*results)


@pytest.mark.proves("Quantised bases", "merging while perturbed gives the clean model's merge")
@pytest.mark.parametrize("base", [*FOUR_BITS, *EIGHT_BITS, *TORCHAO])
@pytest.mark.parametrize("method", ["eflat fused", "flat"])
def test_merged_weights_are_clean(folder: Path, base: str, method: str) -> None:
    model, optimizer, clean = accumulated(folder, base, method)
    point = points(model, optimizer)
    plain = with_lora(folder, base, clean)

    for one in (model, plain):
        one.merge_adapter()
    assert_same_bits(base_state(model), base_state(plain))
    loss_of(model, 0)  # of a merged layer in training mode
    for one in (model, plain):
        one.unmerge_adapter()
    assert_same_bits(lora_only(weights(model)), clean)
    assert_same_bits(base_state(model), base_state(plain))
    assert_same_bits(logits(model), logits(plain))

    model, optimizer, clean = accumulated(folder, base, method)
    merged = logits(model.merge_and_unload())
    assert_same_bits(merged, logits(with_lora(folder, base, clean).merge_and_unload()))
    wrong = logits(with_lora(folder, base, point).merge_and_unload())
    assert not torch.equal(merged["logits"], wrong["logits"])


@pytest.mark.proves("Quantised bases", "QLoRA in Hugging Face Trainer resumes bit-exact")
@pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_trainer(folder: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """With 4 bits, a paged 8-bit optimizer, gradient checkpointing, accumulation and clipping."""
    settings = {
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_grad_norm": 0.05,
    }
    models = [quantised_lora(folder, "nf4, double quantisation") for _ in range(2)]
    runs = [make(model, arguments(tmp_path, **settings), **options) for model in models]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert type(own(runs[0]).base).__module__.startswith("bitsandbytes")
    assert_same_bits(*(lora_only(weights(model)) for model in models))
    assert_same_bits(*(getattr(own(run), "averages", {}) for run in runs))


@pytest.mark.proves("Quantised bases", "gradient checkpointing changes no bit")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["eflat fused", "flat"])
def test_gradient_checkpointing(folder: Path, reentrant: bool, method: str) -> None:
    results = []
    for checkpointing in (None, {"use_reentrant": reentrant}):
        model, optimizer, clean = accumulated(folder, "nf4", method, checkpointing=checkpointing)
        results.append((clean, points(model, optimizer)))
        inner = model.get_base_model().model
        assert inner.gradient_checkpointing == (checkpointing is not None)
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.proves(
    "Quantised bases", "8-bit and paged optimizers of bitsandbytes, resumed bit-exact"
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizers_of_bitsandbytes(folder: Path, name: str, method: str) -> None:
    import bitsandbytes

    cls = getattr(bitsandbytes.optim, name)
    options = {"lr": LR, "min_8bit_size": 64}

    model = quantised_lora(folder, "nf4")
    optimizer = METHODS[method](model, cls, **options)
    train(model, optimizer, range(2))
    eight = [p for p in trainable(model) if optimizer.state[p]["state1"].dtype == torch.uint8]
    assert len(eight) == (6 if name.endswith("8bit") else 0)

    buffer = io.BytesIO()
    torch.save([lora_only(model.state_dict()), optimizer.state_dict()], buffer)
    buffer.seek(0)
    lora, state = torch.load(buffer, weights_only=True)
    resumed = with_lora(folder, "nf4", lora)
    other = METHODS[method](resumed, cls, **options)
    other.load_state_dict(state)
    train(resumed, other, range(2, 4))

    # The step is the base optimizer's own, at the clean weights.
    parameters = trainable(model)
    shadow = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    plain = cls(shadow, **options)
    plain.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    train(model, optimizer, range(2, 3))
    for parameter, copied in zip(parameters, shadow, strict=True):
        copied.grad = parameter.grad.clone()
    plain.step()
    for parameter, copied in zip(parameters, shadow, strict=True):
        assert same_bits(parameter, copied)

    train(model, optimizer, range(3, 4))
    assert_same_bits(lora_only(weights(resumed)), lora_only(weights(model)))


INSTRUMENTS: dict[str, Callable[..., Any]] = {
    "loss": mean_loss,
    "worst case": lambda *given: worst_case(*given, 0.1, radius="filter"),
    "average case": lambda *given: average_case(*given, 0.1, samples=2),
    "estimate": estimate_quality,
    "slice": lambda *given: slice_1d(*given, random_direction(adapted_layers(given[0])), [0.5]),
    "hessian": lambda *given: (
        hessian(*given, eigenvalues=1, iterations=2, trace_products=0, space="lora").eigenvalues
    ),
}


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_instruments_measure_the_clean_model(folder: Path, base: str, instrument: str) -> None:
    """Within a step and after it, while the optimizer exists."""
    if instrument == "hessian":
        pytest.importorskip("hessian_eigenthings")

    def measured(one: nn.Module) -> Any:
        batches = list(TOKENS)
        return INSTRUMENTS[instrument](one, lambda m, x: m(input_ids=x, labels=x).loss, batches)

    model, optimizer, clean = accumulated(folder, base, "eflat fused")
    assert measured(model) == measured(with_lora(folder, base, clean))
    assert_same_bits(lora_only(weights(model)), clean)
    optimizer.step()
    clean = lora_only(weights(model))
    assert measured(model) == measured(with_lora(folder, base, clean))
    assert_same_bits(lora_only(weights(model)), clean)


@pytest.mark.parametrize("name", ["Linear4bit", "LinearNF4", "LinearFP4"])
def test_only_four_bit_layers_stay_in_training_mode(name: str) -> None:
    """This keeps bitsandbytes from repacking weights; PEFT's layers have the same class name."""
    import bitsandbytes

    layer = getattr(bitsandbytes.nn, name)(64, 32).to("cpu")
    base = nn.Sequential(layer, nn.Tanh())
    base.is_loaded_in_4bit = True  # which PEFT goes by
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5)).train()
    assert type(model.base_model.model[0]).__name__ == "Linear4bit"
    with evaluating(model):
        assert [module for module in model.modules() if module.training] == [layer]
    assert all(module.training for module in model.modules())


def test_an_adapter_loaded_within_a_step_is_perturbed_from_then_on(folder: Path) -> None:
    """Passes are perturbed around the loaded weights."""
    model, optimizer, clean = accumulated(folder, "nf4", "eflat fused")
    new = {name: value + 1 for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, new)
    loss_of(model, 0).backward()
    assert_same_bits(get_peft_model_state_dict(model), new)
    for name, point in points(model, optimizer).items():
        pair = name.replace(".lora_B", "").removesuffix(".weight")
        added = optimizer.averages[pair] if "lora_B" in name else 0
        assert torch.equal(point, clean[name] + 1 + added)
