"""Compute in plain torch what has no kernels: devices and ranks, chosen at every call.

The dispatcher comes here for each device that a build has no kernels for, so that a build for the
CPU alone serves a model on any device. Where a device has no float64, the CPU's operator computes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eflat_ext.stacklevel import stacklevel_of_user

from . import fake, plain_torch
from .checks import named_tensors
from .schemas import SCHEMAS

_library = torch.library.Library("eflat", "FRAGMENT")
_plain = torch.library.Library("eflat_plain_torch", "DEF")  # for kernels, beyond their ranks
_warned: set[str] = set()


def has_kernel(operator: str, device: torch.device) -> bool:
    """Return whether this build has a kernel of an operator, such as "perturb", for a device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    return key is not None and found(f"eflat::{operator}", key)


@functools.cache
def has_float64(device_type: str) -> bool:
    """Return whether a type of device computes in float64; Apple's MPS does not."""
    try:
        one = torch.ones((1, 1), dtype=torch.float64, device=device_type)
        return (one @ one).dtype == torch.float64
    except (RuntimeError, TypeError):
        return False


def register(operator: torch._ops.OpOverload) -> None:
    """Register what an operator does where no kernel takes its tensors."""
    name = operator._schema.name.removeprefix("eflat::")
    empty: Callable[..., Any] = fake.KERNELS[name]
    compute: Callable[..., Any] = getattr(plain_torch, name)
    ofs = [(i, a.name) for i, a in enumerate(operator._schema.arguments) if "Tensor" in str(a.type)]

    @torch.no_grad()
    def kernel(*arguments: Any) -> Any:
        tensors = list(named_tensors((name, arguments[i]) for i, name in ofs))
        for argument, t in tensors:
            _check_dense(argument, t)
        try:
            results = empty(*arguments)  # checks all arguments
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from None  # as kernels do
        lists = [x for x in arguments if isinstance(x, (list, tuple))]
        if lists and not lists[0]:
            return results
        device = tensors[0][1].device
        on_cpu = not has_float64(device.type)
        if not has_kernel(name, device):  # else the rank is beyond the kernels'
            _warn_once(
                device, "on the CPU, since it has no float64" if on_cpu else "in plain torch"
            )
        return _on_cpu(operator, arguments) if on_cpu else compute(*arguments)

    _library.impl(operator, kernel, "CompositeExplicitAutograd")
    _plain.define(name + SCHEMAS[name])
    _plain.impl(name, kernel, "CompositeExplicitAutograd")


def _check_dense(name: str, t: Tensor | None) -> None:
    if t is None:
        raise RuntimeError(f"{name} must be a tensor, got None")
    if t.layout != torch.strided or t.is_quantized:
        kind = "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
        raise RuntimeError(f"{name} must be a dense tensor, got a {kind} one on {t.device}")


def _warn_once(device: torch.device, how: str) -> None:
    # On the CPU, the import of a package without kernels has warned.
    if device.type in _warned or device.type in ("cpu", "meta"):
        return
    _warned.add(device.type)
    needs = "there are kernels for CPUs and NVIDIA GPUs alone"
    if device.type == "cuda" and torch.version.cuda is not None:
        needs = "for kernels, build it with nvcc, see eflat_ext.build_info()"
    warnings.warn(
        f"eflat_ext has no kernels for {device.type} and computes its perturbations {how}; {needs}",
        UserWarning,
        stacklevel=stacklevel_of_user(),
    )


def _on_cpu(operator: torch._ops.OpOverload, arguments: Sequence[Any]) -> Any:
    """Call an operator with copies of all tensors on the CPU, and copy back what it wrote."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id: what is given twice stays the same

    def to_cpu(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [to_cpu(entry) for entry in x]
        return copies.setdefault(id(x), (x, x.cpu()))[1] if isinstance(x, Tensor) else x

    def back(x: Any) -> Any:
        return [t.to(device) for t in x] if isinstance(x, (list, tuple)) else x.to(device)

    moved = [to_cpu(x) for x in arguments]
    device = next(t.device for t, copy in copies.values() if t is not copy)
    results = operator(*moved)
    for argument, given in zip(operator._schema.arguments, arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for _, t in named_tensors([("", given)]):
                t.copy_(copies[id(t)][1])
    return tuple(map(back, results)) if isinstance(results, tuple) else back(results)


for _name in SCHEMAS:
    register(getattr(torch.ops.eflat, _name).default)
