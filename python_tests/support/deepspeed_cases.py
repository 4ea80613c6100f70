"""Functions that the tests of DeepSpeed run on each rank."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.utils import groups, logger
from models import batches, lora_mlp, loss_of, trainable
from sharded_cases import assert_same_on_all_ranks, own_part, relative_errors
from torch import Tensor, nn

from eflat_ext import EFlatPerturbation, create_eflat_optimizer
from eflat_ext.engines.deepspeed import attach

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


def engine_of(
    model: nn.Module, stage: int, optimizer: Any = None, dtype: str = "", **config: Any
) -> Any:
    if optimizer is None:
        optimizer = torch.optim.AdamW(trainable(model), **ADAMW)
    accumulation = config.get("gradient_accumulation_steps", 1)
    settings = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size() // accumulation,
        "zero_optimization": {"stage": stage, **config.pop("zero", {})},
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled
        "zero_allow_untested_optimizer": True,
        **({dtype: {"enabled": True}} if dtype else {}),
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(engine: Any, batch: Any, accumulation: int = 1) -> None:
    for part in zip(*(t.chunk(accumulation) for t in own_part(batch)), strict=True):
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
