"""Save a perturbation with an optimizer's state, and update it before the optimizer's steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Perturbation
from .dtensors import is_dtensor, local
from .settings import RHO
from .steps import stepping
from .targets import parameters_of

AVERAGE = "perturbation_ema"  # the name of an average, beside its parameter's own entries
# Names of the counters in each group; of the whole, where a base has a format of its own.
_STEPS, _SKIPPED, _OWN = "perturbation_steps", "perturbation_skipped", "perturbation"


def pack(
    perturbation: Perturbation, optimizer: Optimizer, packed: dict[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's state dict with the averages and the counters in it.

    ``state`` holds each average as ``"perturbation_ema"`` beside its factor's own entries; each
    group ``"perturbation_steps"`` and ``"perturbation_skipped"``, two ints. A state of another form
    gets one entry, ``"perturbation"``.
    """
    averages = perturbation.saved_averages()
    counters = {_STEPS: perturbation.steps, _SKIPPED: int(perturbation.skipped)}
    if not _is_plain(packed):
        return {**packed, _OWN: {"averages": averages, **counters}}
    packed = {**packed, "state": dict(packed["state"])}
    groups = [{k: v for k, v in group.items() if k != RHO} for group in packed["param_groups"]]
    packed["param_groups"] = [{**group, **counters} for group in groups]
    for key, average in zip(_keys(perturbation, optimizer, groups), averages, strict=False):
        if key is not None:  # else the optimizer no longer trains it
            packed["state"][key] = {**packed["state"].get(key, {}), AVERAGE: average}
    return packed


def unpack(
    perturbation: Perturbation, optimizer: Optimizer, state_dict: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Return a state dict without what :func:`pack` adds, and what loads that.

    Raises:
        ValueError: the parameters that have an average, or their shapes, do not match; or an
            average is not finite.
    """
    perturbation.follow_parameters()
    averages = perturbation.saved_averages()
    if not _is_plain(state_dict):
        own = {_STEPS: 0, _SKIPPED: 0, "averages": [], **state_dict.get(_OWN, {})}
        rest = {key: value for key, value in state_dict.items() if key != _OWN}
        keys, saved = list(range(len(averages))), dict(enumerate(own["averages"]))
    else:
        groups = [dict(group) for group in state_dict["param_groups"]]
        own = {
            key: next((group[key] for group in groups if key in group), 0)
            for key in (_STEPS, _SKIPPED)
        }
        if not perturbation.shares(optimizer):  # else the others ask for these, too
            for group in groups:
                for key in (_STEPS, _SKIPPED, RHO):
                    group.pop(key, None)
        keys = _keys(perturbation, optimizer, groups)[: len(averages)]
        shared = perturbation.shares(optimizer)
        state, saved = {}, {}
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict) and AVERAGE in entry and (key in keys or not shared):
                saved[key] = entry[AVERAGE]
                entry = {name: value for name, value in entry.items() if name != AVERAGE}
                if not entry:  # many optimizers take any entry for their own, complete state
                    continue
            state[key] = entry
        rest = {**state_dict, "state": state, "param_groups": groups}
    wanted = {k: average for k, average in zip(keys, averages, strict=True) if k is not None}
    if averages and saved:
        check_saved_averages(saved, wanted)

    def load() -> None:
        perturbation.load_averages([saved.get(key) for key in keys])
        perturbation.load_counters(own[_STEPS], own[_SKIPPED])

    return rest, load


def check_saved_averages(saved: dict[Any, Tensor], wanted: dict[Any, Tensor]) -> None:
    """Raise ValueError unless there is a finite value for each average, and none besides."""
    found = wanted.keys() & saved.keys()
    if len(found) < max(len(wanted), len(saved)):
        reason = "other layers were perturbed" if found else "perhaps by another onto"
        raise ValueError(
            f"state_dict must have a {AVERAGE} for each of the {len(wanted)} perturbed factors, "
            f"got {len(saved)}, {len(found)} of them of these: {reason}"
        )
    for key, average in wanted.items():
        value = saved[key]
        if value.shape != average.shape:
            raise ValueError(
                f"state_dict must have a {AVERAGE} of shape {tuple(average.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if not bool(torch.linalg.vector_norm(value).isfinite()):
            raise ValueError(
                f"state_dict must have a finite {AVERAGE}, got one of shape "
                f"{tuple(value.shape)} that holds NaN or infinity"
            )


def _is_plain(state_dict: dict[str, Any]) -> bool:
    return "state" in state_dict and "param_groups" in state_dict


def _keys(
    perturbation: Perturbation, optimizer: Optimizer, groups: Sequence[dict[str, Any]]
) -> list[Any]:
    """Return the factors' keys in the groups of a state; None where they have no such parameter."""
    trained = parameters_of(optimizer.param_groups)
    keys = dict(zip(map(id, trained), parameters_of(groups), strict=False))
    return [keys.get(id(factor.parameter)) for factor in perturbation.factors]


def attach_hooks(perturbation: Any, optimizer: Optimizer, save_state: bool) -> list[Any]:
    """Register hooks that update a perturbation before each step of an optimizer.

    Args:
        perturbation: an ``EFlatPerturbation``.
        optimizer: any torch optimizer.
        save_state: let its ``state_dict`` and ``load_state_dict`` save and load the averages.

    Returns:
        Handles with a ``remove`` method. The optimizer keeps the perturbation alive; nothing here
        keeps the optimizer alive.
    """

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if sum(one is optimizer for one in stepping()) > 1:
            return None  # within its own step, by a call of super().step()
        perturbation.check()
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        found_inf = getattr(optimizer, "found_inf", None)  # of a gradient scaler
        if found_inf is not None and bool(found_inf):
            return None  # the optimizer will not step
        if closure is None:
            if not initialises_state(optimizer):
                perturbation.update()
            return None

        def updating() -> Any:
            with torch.enable_grad():
                loss = closure()
            perturbation.update()
            return loss

        if len(args) > 1:
            return (args[0], updating, *args[2:]), kwargs
        return args, {**kwargs, "closure": updating}

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        perturbation.finish_step()

    def save(optimizer: Optimizer, state_dict: Callable[[], Any]) -> dict[str, Any]:
        return pack(perturbation, optimizer, state_dict())

    def load(optimizer: Optimizer, load_state_dict: Callable[..., Any], state: Any) -> None:
        rest, load = unpack(perturbation, optimizer, state)
        load_state_dict(rest)
        load()

    handles: list[Any] = [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(after_step),
    ]
    if save_state:
        handles.append(Around(optimizer, "state_dict", save))
        handles.append(Around(optimizer, "load_state_dict", load))
    return handles


class Around:
    """Wrap a method of one instance, an optimizer's or an engine's.

    torch's hooks for state dicts would do, but that bitsandbytes and others override the methods
    that run them.

    Args:
        owner: the instance, which keeps ``around`` alive.
        name: of the method.
        around: called with the owner, the method, and its arguments.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self.owner, self.name = weakref.ref(owner), name
        self.before = vars(owner).get(name)
        method = _Method(self.owner, name, self.before, around)
        self.method = weakref.ref(method)  # which holds the perturbation
        setattr(owner, name, method)

    def remove(self) -> None:
        own, method = self.owner(), self.method()
        if own is None or method is None:
            return
        method.around = None  # it may lie below another one
        if vars(own).get(self.name) is method:
            if self.before is None:
                delattr(own, self.name)
            else:
                setattr(own, self.name, self.before)


class _Method:
    """A method of one instance with something around it; copies of the instance have it plain."""

    def __init__(
        self, owner: Any, name: str, before: Any, around: Callable[..., Any] | None
    ) -> None:
        self.owner, self.name, self.before, self.around = owner, name, before, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.owner()
        inner = self.before or partial(getattr(type(own), self.name), own)
        return (
            inner(*args, **kwargs)
            if self.around is None
            else self.around(own, inner, *args, **kwargs)
        )

    def __reduce__(self) -> Any:
        return getattr, (self.owner(), self.name)


def initialises_state(optimizer: Optimizer) -> bool:
    """Return whether a step only initialises the state, as torch.distributed.checkpoint's does.

    It has zeros for gradients, a learning rate of zero, and an optimizer without state.
    """
    if optimizer.state or any(group.get("lr", 1.0) != 0 for group in optimizer.param_groups):
        return False
    trained = [p for p in parameters_of(optimizer.param_groups) if p.requires_grad]
    training = not trained or any(p.grad is None or bool(local(p.grad).any()) for p in trained)
    sharded: Any = next((parameter for parameter in trained if is_dtensor(parameter)), None)
    if sharded is not None:  # all ranks decide alike, also where some lack a gradient
        found = torch.tensor(int(training), device=local(sharded).device)
        for group in sharded.device_mesh.get_all_groups():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        training = bool(found)
    return not training
