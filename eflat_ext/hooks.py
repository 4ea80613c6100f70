"""Hooks and guarded methods on a model's modules, by the object that they belong to."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .guards import RestoreFirst

T = TypeVar("T")


def belongs_to(hook: Any) -> Any:
    """The object whose method a hook is, None if it is none's."""
    hook = getattr(hook, "hook", hook)  # torch wraps hooks on loading
    hook = getattr(hook, "func", hook)  # partial
    return getattr(hook, "__self__", None)


def attached_to(model: nn.Module, kind: type[T]) -> list[T]:
    """The objects of a class that clean what the model saves, each once."""
    hooks = [hook for module in model.modules() for hook in module._state_dict_hooks.values()]
    owners = [owner for hook in hooks if isinstance(owner := belongs_to(hook), kind)]
    return list({id(owner): owner for owner in owners}.values())


def detach(model: nn.Module, owner: object) -> None:
    """Take every hook and guarded method of an object off a model."""
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
        ):
            for key in [key for key, hook in hooks.items() if belongs_to(hook) is owner]:
                del hooks[key]
        for value in list(vars(module).values()):
            if isinstance(value, RestoreFirst) and value.weights is owner:
                value.uninstall()
