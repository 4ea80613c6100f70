"""A second device for the tests, "second": its tensors stand for CPU tensors, which compute for it.

Made of torch's backend for Python, PrivateUse1. To autograd and the dispatcher it is a device of
its own, on which operators without a kernel do what they do on any such device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
# Operators with code for any device that copies a tensor's C++ object alone, or changes its size.
_OWN = [
    *("view", "_unsafe_view", "_reshape_alias"),
    *("eye", "eye.m", "arange", "arange.start", "arange.start_step", "nan_to_num", "abs"),
]
# The CPU tensors by their storage's address: tensors that autograd makes share it.
_values: dict[int, Tensor] = {}
# Operations that a host waits for, in order.
reads: list[str] = []
_libraries: list[torch.library.Library] = []


def register() -> str:
    """Register the device, once a process; return its name."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME)
        _libraries.append(torch.library.Library("_", "IMPL"))
        _libraries[0].fallback(_on_cpu, "PrivateUse1")
        _libraries.append(torch.library.Library("aten", "IMPL"))
        _libraries[1].impl("copy_", _copy_, "PrivateUse1")
        for name in _OWN:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            _libraries[1].impl(name, functools.partial(_on_cpu, operator), "PrivateUse1")
    return NAME


def _tensor(values: Tensor) -> Tensor:
    """Return a tensor on the device that stands for a CPU tensor, or for a copy of a view.

    Tensors of the device are contiguous from the start of their memory, so other views are copies:
    writing to them does not write to what they are views of.
    """
    if values.storage_offset() or not values.is_contiguous():
        values = values.clone(memory_format=torch.contiguous_format)
    found = torch._C._acc.create_empty_tensor(list(values.shape), values.dtype)
    _values[found.untyped_storage()._cdata] = values
    return found


def _value(x: Any) -> Any:
    if isinstance(x, Tensor) and x.device.type == NAME:
        return _values[x.untyped_storage()._cdata]
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _on_cpu(operator: Any, *args: Any, **kwargs: Any) -> Any:
    given = {}
    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.device.type == NAME:
            given[id(_value(t))] = t
            assert _value(t).shape == t.shape, f"an operator before {operator} is missing in _OWN"
    if str(operator).split(".")[1] in ("_local_scalar_dense", "equal", "nonzero"):
        reads.append(str(operator))
    results = operator(*tree_map(_value, args), **tree_map(_value, kwargs))

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        t = given.get(id(x))
        assert t is None or t.shape == x.shape, f"the operator behind {operator} is missing in _OWN"
        return _tensor(x) if t is None else t

    return tree_map(wrapped, results)


def _copy_(to: Tensor, of: Tensor, non_blocking: bool = False) -> Tensor:
    if to.device.type != NAME:
        reads.append("copy_")
    _value(to).copy_(_value(of))
    return to
