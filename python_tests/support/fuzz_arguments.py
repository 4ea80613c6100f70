"""Wrong and odd values for the arguments of operators."""

from __future__ import annotations

import mmap
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
]
NUMBERS = [
    *(float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e-320, 5e-8, 1e-7, 1e-3, 0.5),
    *(1.0, 1.0 + 1e-15, 2.0, 1e30, 1e308, -1e308, 3, -2, 10**30, 10**400, True, False),
]
NO_NUMBERS = [None, "", "0.1", "x", 1j, [], [0.1], {}, (0.1,), b"1", object]
STRINGS = ["A", "B", "layer", "global"]
NO_STRINGS = [
    *("", "b", "A ", " B", "AB", "C", "\uff22", "B\0", "\0", "\ud800", "β" * 1000, "x" * 100_000),
    *("Layer", "GLOBAL", None, 3, 1.5, True, ["B"], ("layer",)),
]


class Subclass(Tensor):
    """A subclass without behaviour of its own."""


def number(rng: random.Random) -> tuple[Any, bool]:
    """Return a value in place of a number, and whether its legality is left open."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(NUMBERS), False
    if kind < 0.9:
        return rng.choice(NO_NUMBERS), False
    odd = [
        Fraction(1, 3),
        Decimal("0.1"),
        np.float32(0.25),
        np.float64("nan"),
        np.int64(1),
        torch.tensor(0.5),
    ]
    odd += [
        torch.tensor(0.5),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, device="meta"),
    ]
    odd += [torch.tensor([0.5]), torch.ones(2), np.ones(1), np.ones(3)]
    return rng.choice(odd), True


def string(rng: random.Random) -> Any:
    return rng.choice(STRINGS if rng.random() < 0.3 else NO_STRINGS)


def no_tensor(rng: random.Random) -> Any:
    return rng.choice(
        [None, 0, 1.5, "A", b"", [], [1.0], (), {}, object(), torch.float32, nn.Linear, np.ones(2)]
    )


def filled(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(rng.getrandbits(32))
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    return values.abs().mul(4).to(dtype) if dtype == torch.bool else values.mul(2).to(dtype)


# Changes of one tensor: to other shapes, types, memory, values, kinds. Each takes the generator and
# a valid tensor.


def other_shape(rng: random.Random, t: Tensor) -> Tensor:
    sizes = list(t.shape) or [1]
    at = rng.randrange(len(sizes))
    change = rng.randrange(8)
    if change == 0:
        sizes[at] = rng.choice([0, 1, sizes[at] + 1, max(sizes[at] - 1, 0), 257, 700])
    elif change == 1:
        sizes.reverse()
    elif change == 2:
        sizes.insert(at, rng.choice([0, 1, 1, 2]))
    elif change == 3:
        sizes.pop(at)
    elif change == 4:
        sizes = [int(torch.Size(sizes).numel())]
    elif change == 5:
        sizes = [0] * len(sizes)
    elif change == 6:
        return filled(rng, (*sizes, 1, 1)[:4], t.dtype).to(
            memory_format=torch.channels_last if len(sizes) >= 2 else torch.contiguous_format
        )
    else:
        sizes = [rng.randrange(5) for _ in range(rng.randrange(6))]
    return filled(rng, tuple(sizes), t.dtype)


def other_dtype(rng: random.Random, t: Tensor) -> Tensor:
    return t.to(rng.choice(DTYPES))


def other_strides(rng: random.Random, t: Tensor) -> Tensor:
    """The same values, or repeated ones, in other strides."""
    if t.dim() == 0:
        return t.new_zeros(3)[1:2].squeeze(0).copy_(t)
    kind = rng.randrange(6)
    if kind == 0:
        return t.mT.contiguous().mT if t.dim() >= 2 else t.repeat(2)[: len(t)]
    if kind == 1:  # every other element of something larger
        wide = t.new_full([2 * n + 3 for n in t.shape], torch.nan if t.is_floating_point() else 1)
        view = wide[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)]
        return view.copy_(t)
    if kind == 2:
        return t[:1].expand(t.shape)
    if kind == 3:
        return t[..., :1].expand(t.shape)
    if kind == 4:  # an offset, not aligned to more than the element
        at = rng.randrange(1, 9)
        return torch.cat([t.new_zeros(at), t.reshape(-1)])[at:].view(t.shape)
    flat = t.reshape(-1).repeat(2)
    return flat.as_strided(t.shape, [1] * t.dim())  # rows overlap


def other_values(rng: random.Random, t: Tensor) -> Tensor:
    if t.numel() == 0 or not t.is_floating_point():
        return t
    t = t.clone()
    wrong = rng.choice([*NUMBERS[:5], 0.0, 1e-320, 1e-30, 1e30, 1e308, 65504.0])
    kind = rng.randrange(4)
    if kind == 0:
        t.view(-1)[rng.randrange(t.numel())] = wrong
    elif kind == 1:
        t.fill_(wrong)
    elif kind == 2:
        t.mul_(rng.choice([1e-30, 1e-8, 1e8, 1e30, -1.0, 0.0]))
    elif t.dim() == 2:
        t[:, rng.randrange(t.shape[1])] = t[:, 0]  # rank-deficient
    return t


def other_layout(rng: random.Random, t: Tensor) -> Tensor:
    kind = rng.randrange(8)
    matrix = t if t.dim() == 2 else t.reshape(1, -1)
    if kind == 0:
        return t.to_sparse()
    if kind == 1:
        return matrix.to_sparse_csr()
    if kind == 2:
        return matrix.to_sparse_csc()
    if kind == 3:
        return matrix.to_sparse_bsr((1, 1))
    if kind == 4:
        return matrix.float().to_mkldnn()
    if kind == 5:
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    if kind == 6:
        return torch.nested.nested_tensor([matrix, matrix[:1]])
    return torch.nested.nested_tensor([matrix, matrix[:1]], layout=torch.jagged)


def other_device(rng: random.Random, t: Tensor) -> Tensor:
    return t.to("meta")


def bad_storage(rng: random.Random, t: Tensor) -> Tensor:
    """A tensor whose storage was freed, as FSDP does, or cut."""
    t = other_strides(rng, t) if rng.random() < 0.3 else t.clone()
    storage = t.untyped_storage()
    whole = t.storage_offset() + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
    storage.resize_(rng.choice([0, 0, whole * t.element_size()]))
    return t


def read_only(rng: random.Random, t: Tensor) -> Tensor:
    """Memory that cannot be written: who writes there ends the process."""
    values = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if not values or t.is_quantized:
        return t
    memory = mmap.mmap(-1, len(values), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(values)
    make_read_only(memory)
    KEPT.append(memory)
    array = np.frombuffer(memory, dtype=np.uint8)
    return torch.from_numpy(array).view(t.dtype).view(t.shape)


KEPT: list[mmap.mmap] = []  # of the current call


def make_read_only(memory: mmap.mmap) -> None:
    import ctypes

    size = -(-len(memory) // mmap.PAGESIZE) * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), size, mmap.PROT_READ) == 0


def flagged_read_only(rng: random.Random, t: Tensor) -> Tensor:
    if t.dtype == torch.bfloat16:
        return t
    array = t.numpy(force=True).copy()
    array.flags.writeable = False
    return torch.from_numpy(array)


def needs_grad(rng: random.Random, t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    t = t.clone().requires_grad_()
    kind = rng.randrange(3)
    return t if kind == 0 else nn.Parameter(t.detach()) if kind == 1 else t * 1


def subclass(rng: random.Random, t: Tensor) -> Tensor:
    return t.clone().as_subclass(Subclass)


def negated(rng: random.Random, t: Tensor) -> Tensor:
    t.neg()  # or torch cannot
    return torch._neg_view(t.clone())


def conjugated(rng: random.Random, t: Tensor) -> Tensor:
    wide = t.to(torch.complex64).conj()
    return wide if rng.random() < 0.5 else wide.imag  # has the negative bit


def of_inference(rng: random.Random, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def fake(rng: random.Random, t: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(t)


# Those whose legality depends on more than shape, type, device, memory and value of the tensor.
UNSURE = (of_inference, fake, subclass)
CHANGES = (
    *(other_shape, other_dtype, other_strides, other_values) * 3,
    *(other_layout, other_device, bad_storage, read_only, flagged_read_only, needs_grad) * 2,
    *(negated, conjugated, *UNSURE),
)


def no_list(rng: random.Random, values: list[Any]) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return set(range(len(values)))
    if kind == 1:
        return iter(values)
    if kind == 2:
        return dict(enumerate(values))
    if kind == 3 and all(isinstance(v, Tensor) for v in values) and values:
        return values[0].unsqueeze(0)
    if kind == 4:
        return [values]
    return rng.choice([None, 3, 1.5, "AB", b"", object(), {1.0}])
