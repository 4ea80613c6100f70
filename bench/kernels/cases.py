"""LoRA pairs of common models, and contenders of the kernels in plain torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RHO, SCALING = 0.05, 2.0
BETA, LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 1e-4, 0.9, 0.999, 1e-8, 0.01


class Case(NamedTuple):
    name: str
    rank: int
    layers: list[tuple[int, int, int]]  # number of layers, outputs n, inputs m

    @property
    def count(self) -> int:
        return sum(count for count, _, _ in self.layers)

    def bytes(self, dtype: torch.dtype) -> int:
        """Return the device memory traffic onto B: factors and gradients read, E written, once."""
        elements = sum(c * self.rank * (3 * n + 2 * m) for c, n, m in self.layers)
        return elements * dtype.itemsize


# 32 layers: query, key, value and output; gate and up; down.
LLAMA_2_7B = [(4 * 32, 4096, 4096), (2 * 32, 11008, 4096), (32, 4096, 11008)]
# 28 layers: query and output; key and value (4 of 28 heads); gate and up; down. Then 32 vision
# blocks: query, key and value in one; output; gate and up; down. Sizes of the published
# configuration (3420, where the report says 3456).
QWEN_2_5_VL_7B = [
    *[(2 * 28, 3584, 3584), (2 * 28, 512, 3584), (2 * 28, 18944, 3584), (28, 3584, 18944)],
    *[(32, 3840, 1280), (32, 1280, 1280), (2 * 32, 3420, 1280), (32, 1280, 3420)],
]
CASES = [
    Case("one 4096x4096", 16, [(1, 4096, 4096)]),
    Case("RoBERTa-large q, v", 8, [(48, 1024, 1024)]),
    Case("Llama-2-7B, all linear", 16, LLAMA_2_7B),
    Case("Llama-2-7B, all linear", 64, LLAMA_2_7B),
    Case("Qwen2.5-VL-7B, all linear", 16, QWEN_2_5_VL_7B),
]
TINY = [Case("one 40x30", 4, [(1, 40, 30)]), Case("mixed", 2, [(2, 20, 30), (1, 30, 20)])]


class Pair(NamedTuple):
    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


def random_pairs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Pair]:
    def normal(rows, columns, size):
        return (size * torch.randn(rows, columns, device=device)).to(dtype)

    r = case.rank
    return [
        Pair(normal(r, m, m**-0.5), normal(n, r, 1e-2), normal(r, m, 1e-3), normal(n, r, 1e-3))
        for count, n, m in case.layers
        for _ in range(count)
    ]


def columns(pairs: list[Pair]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*pairs, strict=True)]


def shapes(pairs: list[Pair]) -> list[tuple[Pair, int]]:
    """Return one pair of each shape with the number of pairs of that shape."""
    counts = Counter((p.A.shape, p.B.shape) for p in pairs)
    first = {(p.A.shape, p.B.shape): p for p in reversed(pairs)}
    return [(first[shape], count) for shape, count in counts.items()]


# Contenders for one pair.


def pinv_form(*pair: Tensor) -> Tensor:
    """Compute equations (1)-(3) in float32."""
    A, B, grad_A, grad_B = (t.float() for t in pair)
    gradient = grad_B @ torch.linalg.pinv(A.T) + torch.linalg.pinv(B.T) @ grad_A
    gradient /= 2 * SCALING
    E_W = RHO * gradient / gradient.norm()
    return (E_W @ torch.linalg.pinv(A) / SCALING).to(pair[0].dtype)


def gram_in(dtype: torch.dtype, rtol: float | None = None) -> Callable[..., Tensor]:
    """Return the Gram form in plain torch, computed in ``dtype``, by default at the pair's rtol."""
    from eflat_ext.ops.autograd import gram_form
    from eflat_ext.reference import default_rtol

    def gram(*pair: Tensor) -> Tensor:
        A, B, grad_A, grad_B = (t.to(dtype) for t in pair)
        cutoff = default_rtol(*pair[:2]) if rtol is None else rtol
        U, _, c = gram_form(A, B, grad_A, grad_B, SCALING, RHO, rtol=cutoff)
        return (c * U).to(pair[0].dtype)

    return gram


# Contenders for lists.


def sam(pairs: list[Pair]) -> Callable[[], object]:
    """Return SAM's perturbation of both factors with one norm, in its fastest form."""
    gradients = [p.grad_A for p in pairs] + [p.grad_B for p in pairs]

    def run():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return torch._foreach_mul(gradients, RHO / norm)

    return run


def adamw(pairs: list[Pair]) -> Callable[[], object]:
    """Return a step of torch's fused AdamW on copies of the factors."""
    parameters = []
    for p in pairs:
        for factor, gradient in ((p.A, p.grad_A), (p.B, p.grad_B)):
            parameters.append(torch.nn.Parameter(factor.clone()))
            parameters[-1].grad = gradient
    options = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    return torch.optim.AdamW(parameters, fused=True, **options).step


def fused_step(pairs: list[Pair]) -> Callable[[], object]:
    """Return perturbation, average and AdamW in one operator, on copies of the factors.

    The forward pass is taken to have added the averages.
    """
    A, B, grad_A, grad_B = columns(pairs)
    A, B = [t.clone() for t in A], [t.clone() for t in B]
    device, each = A[0].device, 2 * len(A)
    wide = torch.promote_types(B[0].dtype, torch.float32)
    numbers = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    averages = [torch.zeros_like(t, dtype=wide) for t in B]
    values = {
        **{"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B},
        **{"E": averages, "ema": averages},
        "exp_avg": [torch.zeros_like(t) for t in A + B],
        "exp_avg_sq": [torch.zeros_like(t) for t in A + B],
        "step": [torch.ones((), device=device) for _ in A + B],
        "skipped": torch.zeros((), dtype=torch.int64, device=device),
        **{"scaling": [SCALING] * len(A), "rho": RHO, "beta": BETA},
        **{name: [number] * each for name, number in numbers.items()},
    }
    return lambda: torch.ops.eflat.foreach_adamw_step_(**values)
