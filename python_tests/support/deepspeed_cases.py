"""Functions that the tests of DeepSpeed run on each rank."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.utils import groups, logger
from experts import lora_experts
from lora_layers import batch_of, lora_around
from models import assert_same_bits, batches, lora_mlp, loss_of, trainable
from sharded_cases import assert_same_on_all_ranks, own_part, relative_errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eflat_ext import EFlatLoRA, EFlatPerturbation, create_eflat_optimizer, reference
from eflat_ext.engines.deepspeed import attach
from eflat_ext.perturbation.bound import Bound

logger.setLevel(logging.ERROR)
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
OPTIONS = {"rho": 0.3, "beta": 0.9}


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function run with a DeepSpeed that has just been imported, as far as groups go."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with mock.patch("deepspeed.comm.torch.build_shm_op", lambda: None):  # needs a compiler
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        try:
            return function(*args, **kwargs)
        finally:
            comm.cdb = None
            importlib.reload(groups)

    return run


def model_of(**config: Any) -> nn.Module:
    return lora_mlp(torch.float32, **config)


def config_of(stage: int, dtype: str = "", **config: Any) -> dict[str, Any]:
    accumulation = config.get("gradient_accumulation_steps", 1)
    return {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size() // accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            **config.pop("zero", {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled
        "zero_allow_untested_optimizer": True,
        **({dtype: {"enabled": True}} if dtype else {}),
        **config,
    }


def engine_of(model: nn.Module, stage: int, optimizer: Any = None, **config: Any) -> Any:
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable(model), **ADAMW)
    config = config_of(stage, **config)
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, batch: Any, accumulation: int = 1) -> None:
    x, y = own_part(batch)
    x = x.to(next(engine.parameters()).dtype)
    for part in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
        engine.backward(loss_of(engine, part))
        engine.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters, whole."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: p.detach().clone() for name, p in trained.items()}


def one_process(data: list[Any], clipping: float, config: dict[str, Any], **options: Any) -> Any:
    model = model_of(**config)
    options = {**ADAMW, **OPTIONS, **options}
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, **options, fused_step=False)
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if clipping:
            nn.utils.clip_grad_norm_(trainable(model), clipping)
        optimizer.step()
    return model, optimizer


@case
def against_one_process(
    stage: int,
    steps: int = 8,
    accumulation: int = 1,
    made: str = "after",
    zero: dict[str, Any] | None = None,
    clipping: float = 0.0,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return errors of weights, averages and norms after some steps."""
    data = batches(steps, torch.float32)
    one, single = one_process(data, clipping, config or {}, **options)
    plain, _ = one_process(data, clipping, config or {}, **{**options, "rho": 0.0})
    model = model_of(**(config or {}))
    options = {**OPTIONS, **options}
    made_before = EFlatPerturbation(model, **options) if made == "before" else None
    if made == "after zero.Init":
        deepspeed.zero.Init(module=model, config_dict_or_path={"train_batch_size": 2})
        assert model.base_model.model.up.lora_B["default"].weight.shape == (0,)
    engine = engine_of(
        model,
        stage,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=clipping,
        zero={"stage3_param_persistence_threshold": 0} if zero is None else zero,
    )
    perturbation = made_before or EFlatPerturbation(model, **options)
    assert attach(engine, perturbation) is perturbation
    for batch in data:
        step(engine, batch, accumulation)
    assert perturbation.steps == steps
    averages = perturbation.averages
    assert_same_on_all_ranks({**averages, **perturbation.norms})
    own = weights(one)
    assert relative_errors(weights(plain), own) > 0.01
    errors = {
        "weights": relative_errors(weights(model), own),
        "averages": relative_errors(averages, single.averages),
    }
    if not clipping:  # the engine clips after the update, the loop before it
        errors["norms"] = relative_errors(perturbation.norms, single.perturbation_norms)
    return errors


@case
def layers(kind: str, onto: str = "B", checkpointed: bool = False) -> None:
    """Check stage 3 with kinds of layers, all ranks on one batch, bit for bit."""

    def make() -> nn.Module:
        model = lora_experts() if kind == "experts" else lora_around(kind)
        if checkpointed:
            inner = model.base_model.model
            inner.layer.forward = partial(checkpoint, inner.layer.forward, use_reentrant=False)
        return model.float()

    one, model = make(), make()
    x = torch.randn(5, 7) if kind == "experts" else batch_of(one)
    dist.broadcast(x := x.float() if x.is_floating_point() else x, 0)
    options: dict[str, Any] = {**OPTIONS, "onto": onto}
    # SGD, since AdamW makes steps of rounding errors where a gradient is nearly zero.
    single = create_eflat_optimizer(one, torch.optim.SGD, lr=0.1, **options)
    sgd = torch.optim.SGD(trainable(model), lr=0.1)
    engine = engine_of(model, 3, sgd, zero={"stage3_param_persistence_threshold": 0})
    perturbation = attach(engine, EFlatPerturbation(model, **options))
    for _ in range(4):
        single.zero_grad()
        one(x).backward()
        single.step()
        engine.backward(engine(x))
        engine.step()
    assert relative_errors(weights(model), weights(one)) == 0
    assert relative_errors(perturbation.averages, single.averages) == 0
    assert all(average.any() for average in perturbation.averages.values())
    with mock.patch.object(Bound, "update", side_effect=AssertionError("gathers in a pass")):
        engine(x)


@case
def in_flight() -> None:
    """Check the error for a factor that the engine is gathering."""
    model = model_of()
    engine = engine_of(model, 3, zero={"stage3_param_persistence_threshold": 0})
    perturbation = attach(engine, EFlatPerturbation(model, onto="A"))
    B = perturbation.pairs[0].parameter_B
    step(engine, batches(1, torch.float32)[0])
    gathering = mock.patch.object(B, "ds_status", type(B.ds_status).INFLIGHT)
    with gathering, pytest.raises(RuntimeError, match="got one that is being gathered"):
        perturbation.rho = 0.1
    perturbation.rho = 0.2


@case
def first_average(stage: int, dtype: str) -> None:
    """Check the first average, in low precision, against the reference at what the engine holds."""
    model = model_of(init_lora_weights=False)
    engine = engine_of(model, stage, dtype=dtype, gradient_clipping=1e-3)
    perturbation = attach(engine, EFlatPerturbation(model, 0.1, beta=1.0))
    batch = batches(1, torch.float32)[0]
    x, y = own_part(batch)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    engine.backward(loss_of(engine, (x.to(half), y)))
    expected = {}
    for pair in perturbation.pairs:
        parameters = [pair.parameter_A, pair.parameter_B]
        with deepspeed.zero.GatheredParameters(parameters):
            factors = [p.detach().clone() for p in parameters]
        assert all(factor.dtype == half for factor in factors)
        grads = [deepspeed.utils.safe_get_full_grad(p).float() for p in parameters]
        expected[pair.name] = reference.perturb(*factors, *grads, pair.scaling, 0.1)[0]
    engine.step()
    averages = perturbation.averages
    assert all(average.dtype == torch.float32 for average in averages.values())
    assert relative_errors(averages, expected) < 1e-2  # gradients are rounded to the factors' type
    step(engine, batch)
    assert_same_on_all_ranks(averages)


@case
def gradients_that_are_not_finite() -> None:
    """Check a step that DeepSpeed skips: averages stay, and it is counted."""
    model = model_of()
    engine = engine_of(model, 2, fp16={"enabled": True, "initial_scale_power": 4})
    perturbation = attach(engine, EFlatPerturbation(model, **OPTIONS))
    data = batches(3, torch.float32)
    step(engine, data[0])
    before = {name: average.clone() for name, average in perturbation.averages.items()}
    x, y = own_part(data[1])
    engine.backward(loss_of(engine, (x.half(), y)) * (math.inf if dist.get_rank() else 1.0))
    engine.step()
    assert engine.skipped_steps == 1
    assert_same_bits(perturbation.averages, before)
    assert int(perturbation.skipped) == len(perturbation.pairs) and perturbation.steps == 2
    step(engine, data[2])
    assert_same_on_all_ranks(perturbation.averages)
    assert relative_errors(perturbation.averages, before) > 0.1


@case
def a_layer_that_reads_its_weight() -> None:
    """Check the warning for a layer that does not run the module that owns its factor."""
    model = model_of()
    layer = model.base_model.model.up
    inner = layer.forward

    def forward(x: Tensor) -> Tensor:
        B = layer.lora_B["default"]
        with mock.patch.object(B, "forward", lambda x: x @ B._parameters["weight"].T):
            return inner(x)

    layer.forward = forward
    engine = engine_of(model, 3, zero={"stage3_param_persistence_threshold": 0})
    attach(engine, EFlatPerturbation(model, **OPTIONS))
    data = batches(2, torch.float32)
    step(engine, data[0])
    with pytest.warns(UserWarning, match="up.default was taken without the perturbation"):
        step(engine, data[1])


@case
def resumed(stage: int, folder: str, dtype: str, onto: str) -> None:
    """Check that a run that was saved and loaded continues bit for bit, on all ranks."""
    data = batches(6, torch.float32)

    def start() -> tuple[nn.Module, Any, EFlatPerturbation]:
        model = model_of()
        engine = engine_of(model, stage, dtype=dtype)
        return model, engine, attach(engine, EFlatPerturbation(model, **OPTIONS, onto=onto))

    model, engine, perturbation = start()
    for batch in data[:3]:
        step(engine, batch)
    engine.save_checkpoint(folder, client_state={"epoch": 7})
    for batch in data[3:]:
        step(engine, batch)
    finished = weights(model), perturbation.state_dict()

    model, engine, perturbation = start()
    path, client_state = engine.load_checkpoint(folder)
    assert path and client_state["epoch"] == 7 and "eflat_perturbation" not in client_state
    assert perturbation.steps == 3
    for batch in data[3:]:
        step(engine, batch)
    assert_same_bits(weights(model), finished[0])
    state = perturbation.state_dict()
    assert_same_bits(state.pop("averages"), finished[1].pop("averages"))
    assert state == finished[1] == {"steps": 6, "skipped": 0}
    assert all(average.any() for average in perturbation.averages.values())
    assert_same_on_all_ranks(perturbation.averages)


@case
def loaded_without_a_perturbation(folder: str) -> None:
    """Check what a checkpoint of plain LoRA gives, and what a perturbation that comes late gets."""
    data = batches(2, torch.float32)
    plain = engine_of(model_of(), 2)
    step(plain, data[0])
    plain.save_checkpoint(folder)
    model = model_of()
    engine = engine_of(model, 2)
    perturbation = attach(engine, EFlatPerturbation(model, **OPTIONS))
    step(engine, data[0])
    with pytest.warns(UserWarning, match="has no perturbation: the averages start at zero"):
        engine.load_checkpoint(folder)
    assert perturbation.steps == 0 and not any(a.any() for a in perturbation.averages.values())
    step(engine, data[1])
    assert perturbation.steps == 1

    model = model_of()
    engine = engine_of(model, 2)
    engine.load_checkpoint(folder)
    with pytest.warns(UserWarning, match="before a perturbation was attached"):
        attach(engine, EFlatPerturbation(model))
    engine.load_checkpoint(folder, load_optimizer_states=False)  # says that it wants weights alone


@case
def refused_arguments() -> None:
    """Check errors of ``attach``."""
    model, other = model_of(), model_of()
    engine = engine_of(model, 1)
    with pytest.raises(TypeError, match=r"engine must be a DeepSpeedEngine, .* got PeftModel"):
        attach(model, EFlatPerturbation(model))
    with pytest.raises(TypeError, match="must be an EFlatPerturbation, got AdamW"):
        attach(engine, engine.basic_optimizer)
    with pytest.raises(ValueError, match=r"of the engine's model, got one of .*up\.default"):
        attach(engine, EFlatPerturbation(other))
    belonging = create_eflat_optimizer(model, torch.optim.AdamW).perturbation
    with pytest.raises(RuntimeError, match="belongs to an optimizer already"):
        attach(engine, belonging)
    perturbation = attach(engine, EFlatPerturbation(model))
    with pytest.raises(RuntimeError, match="attached to an optimizer already, or to an engine"):
        attach(engine, perturbation)
    with pytest.raises(RuntimeError, match="has a perturbation already; call its remove"):
        attach(engine, EFlatPerturbation(model))
    perturbation.remove()
    assert not {"_take_model_step", "save_checkpoint", "load_checkpoint"} & vars(engine).keys()
    with pytest.raises(RuntimeError, match="has ended: it was removed"):
        attach(engine, perturbation)
    data = batches(1, torch.float32)[0]
    step(engine, data)
    newer = attach(engine, EFlatPerturbation(model))
    step(engine, data)
    assert newer.steps == 1 and perturbation.steps == 0
    engine.optimizer, optimizer = None, engine.optimizer
    with pytest.raises(ValueError, match="engine must have an optimizer"):
        attach(engine, EFlatPerturbation(model))
    engine.optimizer, engine.mp_world_size = optimizer, 2
    with pytest.raises(NotImplementedError, match="pipeline or tensor parallelism"):
        attach(engine, EFlatPerturbation(model))
    engine.mp_world_size, engine.zenflow = 1, True
    with pytest.raises(NotImplementedError, match="ZenFlow"):
        attach(engine, EFlatPerturbation(model))
    model = model_of()
    engine = engine_of(model, 2, zero={"round_robin_gradients": True})
    with pytest.raises(NotImplementedError, match="round_robin_gradients false, got true"):
        attach(engine, EFlatPerturbation(model))


@case
def steps_without_attach(stage: int, kind: str) -> None:
    """Check that the first step of an engine says what is missing."""
    model = model_of()
    adamw = torch.optim.AdamW(trainable(model), **ADAMW)
    given: Any = adamw
    if kind == "alone":
        perturbation = EFlatPerturbation(model)
    elif kind == "attached to the optimizer":
        perturbation = EFlatPerturbation(model).attach(adamw)
    else:
        given = EFlatLoRA(model, adamw)
        perturbation = given.perturbation
    with pytest.raises(RuntimeError, match=r"eflat_ext\.engines\.deepspeed\.attach"):
        step(engine_of(model, stage, given), batches(1, torch.float32)[0])
    assert perturbation.steps == 0


@case
def optimizer_of_this_package() -> None:
    """Check that stage 0, which leaves gradients and parameters alone, steps EFlatLoRA itself."""
    data = batches(4, torch.float32)
    one, _ = one_process(data, 0.0, {})
    model = model_of()
    options = {**ADAMW, **OPTIONS}
    engine = engine_of(model, 0, create_eflat_optimizer(model, torch.optim.AdamW, **options))
    for batch in data:
        step(engine, batch)
    assert relative_errors(weights(model), weights(one)) < 2e-6


@case
def updated_by_hand() -> None:
    """Check that an engine whose perturbation is updated before each step needs nothing more."""
    model = model_of()
    engine = engine_of(model, 2)
    perturbation = EFlatPerturbation(model, **OPTIONS)
    for batch in batches(2, torch.float32):
        engine.backward(loss_of(engine, own_part(batch)))
        full = {p: deepspeed.utils.safe_get_full_grad(p) for p in trainable(model)}
        perturbation.update(full)
        engine.step()
    assert perturbation.steps == 2
    engine.backward(loss_of(engine, own_part(batch)))
    with pytest.raises(RuntimeError, match=r"attach\(engine, perturbation\)"):
        engine.step()
