"""DeepSpeed: EFlat-LoRA at ZeRO 0 to 3, whoever steps the engine.

The engine's optimizer steps copies of the parameters that the engine owns, and gradients are spread
over the ranks. So the perturbation rides on the engine, not on an optimizer: each optimizer step
begins with an update from whole gradients, those of ``deepspeed.utils.safe_get_full_grad``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from eflat_ext.lora import whole_shape
from eflat_ext.perturbation import EFlatPerturbation
from eflat_ext.perturbation.checkpoint import Around
from eflat_ext.stacklevel import stacklevel_of_user

__all__ = ["CLIENT_STATE", "attach"]

CLIENT_STATE = "eflat_perturbation"  # name of the perturbation's entry in a client state


def attach(engine: Any, perturbation: EFlatPerturbation) -> EFlatPerturbation:
    """Update a perturbation before each optimizer step of a DeepSpeed engine, which keeps it alive.

    Each optimizer step of the engine, the last one of an accumulation, begins with
    :meth:`eflat_ext.EFlatPerturbation.update` from the gradients of all micro-batches and ranks,
    whoever steps the engine: a loop, accelerate, Trainer. ``engine.save_checkpoint`` saves the
    averages and counters in the client state; ``engine.load_checkpoint`` loads them, or warns and
    lets them start at zero where the checkpoint has none. Every rank has to call this.

    Args:
        engine: a DeepSpeedEngine, as ``deepspeed.initialize`` returns it, of any ZeRO stage.
        perturbation: of the engine's model; made before or after ``deepspeed.initialize``.

    Returns:
        The perturbation.

    Raises:
        ImportError: DeepSpeed is not installed.
        TypeError: ``engine`` is no engine, or ``perturbation`` no EFlatPerturbation; factors A and
            B of a pair have different dtypes.
        ValueError: the engine has no optimizer; the perturbation is of another model.
        NotImplementedError: pipeline or tensor parallelism, which divide the layers among ranks;
            ``round_robin_gradients`` at stages 1 and 2; ZenFlow.
        RuntimeError: the perturbation is attached already, or has ended; or the engine has another
            one.
    """
    _check(engine, perturbation)
    perturbation.claim()
    perturbation.optimizers.update((engine.optimizer, engine.basic_optimizer))

    def take_step(engine: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        perturbation.update(_gradients(perturbation))
        result = step(*args, **kwargs)
        perturbation.finish_step()
        return result

    def save(engine: Any, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(save).bind(*args, **kwargs)
        given = call.arguments.get("client_state") or {}
        call.arguments["client_state"] = {**given, CLIENT_STATE: _copied_state(perturbation)}
        return save(*call.args, **call.kwargs)

    def load(engine: Any, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(load).bind(*args, **kwargs)
        call.apply_defaults()
        path, client_state = load(*call.args, **call.kwargs)
        wanted = call.arguments
        if path is not None and wanted["load_optimizer_states"] and not wanted["load_module_only"]:
            _load_state(perturbation, client_state.pop(CLIENT_STATE, None), path)
        return path, client_state

    around = {"_take_model_step": take_step, "save_checkpoint": save, "load_checkpoint": load}
    perturbation.hold([Around(engine, name, method) for name, method in around.items()])
    perturbation.finish_step()
    return perturbation


def _check(engine: Any, perturbation: Any) -> None:
    """Raise an error, see :func:`attach`, unless they go together."""
    try:
        from deepspeed import DeepSpeedEngine, PipelineEngine
    except ImportError as error:
        raise ImportError(
            "attaching to a DeepSpeed engine needs DeepSpeed: pip install deepspeed"
        ) from error
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            "engine must be a DeepSpeedEngine, as deepspeed.initialize returns it, got "
            f"{type(engine).__name__}"
        )
    if not isinstance(perturbation, EFlatPerturbation):
        raise TypeError(
            f"perturbation must be an EFlatPerturbation, got {type(perturbation).__name__}"
        )
    perturbation.check_free()
    if perturbation.attached:
        raise RuntimeError("attach: this perturbation belongs to an optimizer already")
    if engine.optimizer is None or engine.basic_optimizer is None:
        raise ValueError("engine must have an optimizer, got one for inference alone")
    if isinstance(engine, PipelineEngine) or engine.mp_world_size > 1:
        raise NotImplementedError(
            "engine must have whole layers on every rank, or partitioned by ZeRO, got pipeline or "
            "tensor parallelism"
        )
    if engine.zero_round_robin_gradients() and 0 < engine.zero_optimization_stage() < 3:
        raise NotImplementedError(
            "engine must have round_robin_gradients false, got true: DeepSpeed's own "
            "safe_get_full_grad fails with it"
        )
    if getattr(engine, "zenflow", False):
        raise NotImplementedError("engine must step all parameters at once, got ZenFlow")
    own = set(map(id, engine.module.parameters()))
    for pair in perturbation.pairs:
        if id(pair.parameter_A) not in own or id(pair.parameter_B) not in own:
            raise ValueError(
                f"perturbation must be of the engine's model, got one of {pair.name}, whose "
                "factors are not in it"
            )
    for other in perturbation.others():
        if engine.optimizer in other.optimizers:
            raise RuntimeError(
                "attach: the engine has a perturbation already; call its remove() before"
            )
    if engine.loaded_checkpoint_dp_world_size is not None and not perturbation.steps:
        _warn(
            "the engine has loaded a checkpoint before a perturbation was attached: the averages "
            "start at zero; attach first, or give perturbation.load_state_dict the client state's "
            f"entry {CLIENT_STATE!r}"
        )


def _gradients(perturbation: EFlatPerturbation) -> dict[Tensor, Tensor]:
    """Return the whole gradients of the pairs' parameters, the same on all ranks."""
    from deepspeed.utils import safe_get_full_grad

    gradients: dict[Tensor, Tensor] = {}
    pairs = [pair for pair in perturbation.pairs if pair.scaling != 0]
    for parameter in dict.fromkeys(pair.parameter(f) for pair in pairs for f in "AB"):
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is not None:
            gradients[parameter] = gradient.view(whole_shape(parameter))
    return gradients


def _copied_state(perturbation: EFlatPerturbation) -> dict[str, Any]:
    """Return the state, with copies: some checkpoint engines write while training goes on."""
    state = perturbation.state_dict()
    averages = {name: average.clone() for name, average in state["averages"].items()}
    return {**state, "averages": averages}


def _load_state(perturbation: EFlatPerturbation, state: dict[str, Any] | None, path: str) -> None:
    if state is not None:
        perturbation.load_state_dict(state)
        return
    _warn(f"the checkpoint {path} has no perturbation: the averages start at zero")
    perturbation.load_averages([None for _ in perturbation.saved_averages()])
    perturbation.load_counters(0, 0)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=stacklevel_of_user())
