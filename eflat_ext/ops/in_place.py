"""Register what autograd has to know of operators without a gradient, which write in place.

Tensors that cannot be written are refused before anything is computed. Afterwards the versions of
those that were written are raised.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .checks import named_tensors

ops = torch.ops.eflat
LAZY = (torch._C.DispatchKey.Negative, torch._C.DispatchKey.Conjugate)

_library = torch.library.Library("eflat", "FRAGMENT")
for _operator in (ops.foreach_perturb_ema_, ops.foreach_adamw_step_, ops.foreach_bound):
    _library.impl(_operator.default, torch.library.fallthrough_kernel, "Autograd")


def register(operator: torch._ops.OpOverload) -> None:
    """Register the checks and the raising of versions for an operator that writes in place."""
    written = [
        (i, argument.name)
        for i, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    no_gradient = (
        f"not require a gradient, since {operator._schema.name.removeprefix('eflat::')} writes to "
        "it: call it within torch.no_grad()"
    )

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Tensor:
        named = [(name, arguments[i]) for i, name in written]
        lists = (x if isinstance(x, (list, tuple)) else [x] for _, x in named if x is not None)
        tensors = [t for x in lists for t in x]

        def refuse(is_wrong: Callable[[Tensor], bool], says: str) -> None:
            if any(map(is_wrong, tensors)):
                name = next(name for name, t in named_tensors(named) if is_wrong(t))
                raise RuntimeError(f"{name} must {says}")

        if torch.is_grad_enabled():
            refuse(attrgetter("requires_grad"), no_gradient)
        if not torch.is_inference_mode_enabled():  # as torch's own operators do
            refuse(
                Tensor.is_inference,
                "not be an inference tensor outside InferenceMode, since it is updated in place: "
                "make a clone of it before",
            )
        # Torch's fallback resolves tensors that are read, and fails for those that are written.
        if any(map(keyset.has, LAZY)):
            refuse(
                lambda t: t.is_neg() or t.is_conj(),
                "hold its values as they are, since it is updated in place, got a view that "
                "negates or conjugates them",
            )
        norms = operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
        return norms

    _library.impl(operator, kernel, "ADInplaceOrView", with_keyset=True)


register(ops.foreach_perturb_ema_.default)
register(ops.foreach_adamw_step_.default)
