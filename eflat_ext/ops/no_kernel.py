"""Answer the calls that no device's kernel takes: of empty lists, and of tensors to be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fake
from .checks import named_tensors

_library = torch.library.Library("eflat", "FRAGMENT")


def refuse(name: str, t: Tensor | None, operator: str) -> None:
    """Raise RuntimeError if there are no kernels for the device or layout of a tensor."""
    if t is None:
        raise RuntimeError(f"{name} must be a tensor, got None")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = [key for key in ("CPU", "CUDA") if has_kernel(operator, key)]
    dense = t.layout == torch.strided and not t.is_quantized
    if dense and t.device.type.upper() in devices:
        return
    kind = "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
    raise RuntimeError(
        f"{name} must be a dense tensor on {' or '.join(devices)}, got a {kind} one on {t.device}: "
        "this build of eflat_ext has no kernels for the device or layout of it, and CUDA tensors "
        "need one with EFLAT_CUDA=1"
    )


def register(operator: torch._ops.OpOverload, empty: Callable[..., Any]) -> None:
    """Register what an operator does where no kernel takes its tensors.

    Args:
        empty: gives the result for lists without entries, from the operator's arguments.
    """
    schema = operator._schema
    tensors = [(i, a.name) for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)]

    def kernel(*arguments: Any) -> Any:
        for name, t in named_tensors((name, arguments[i]) for i, name in tensors):
            refuse(name, t, schema.name)
        try:
            return empty(*arguments)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from None  # as kernels do

    _library.impl(operator, kernel, "CompositeExplicitAutograd")


for _name, _empty in fake.KERNELS.items():
    register(getattr(torch.ops.eflat, _name).default, _empty)
