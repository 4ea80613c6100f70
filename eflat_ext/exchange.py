"""What ranks that hold parts of the same factors send each other, in one collective operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .pairs import LoraPair

# A torch without torch.distributed has neither name.
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or getattr(
    torch.distributed, "all_gather_into_tensor", None
)


class Exchange:
    """Tensors that all ranks send to all in one go; each has the same shape on every rank."""

    def __init__(self, group: Any, rank: int, world: int) -> None:
        self._group, self._world = group, world
        self.rank = rank
        self._sent: list[Tensor] = []
        self._received: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> int:
        """Send a tensor; returns the index under which it comes back."""
        self._sent.append(tensor)
        return len(self._sent) - 1

    def run(self) -> None:
        """Exchange everything."""
        group, world = self._group, self._world
        if group is None:
            self._received = {i: tensor[None] for i, tensor in enumerate(self._sent)}
            return
        # As bytes, the widest types first, so that each type finds itself aligned.
        order = sorted(range(len(self._sent)), key=lambda i: -self._sent[i].element_size())
        pieces = [self._sent[i].contiguous().reshape(-1).view(torch.uint8) for i in order]
        pieces.append(pieces[0].new_zeros(-sum(map(len, pieces)) % 8))
        sent = torch.cat(pieces)
        received = sent.new_empty(world * len(sent))
        _all_gather(received, sent, group=group)
        columns = received.view(world, -1).split([len(piece) for piece in pieces], 1)[:-1]
        for i, piece in zip(order, columns, strict=True):
            own = self._sent[i]
            self._received[i] = piece.contiguous().view(own.dtype).view(world, *own.shape)

    def __getitem__(self, index: int) -> Tensor:
        """What came back: (ranks, ...)."""
        return self._received[index]


class Side:
    """One factor of a pair, maybe with its gradient beside it: a matrix, the long side down."""

    def stack(self) -> Tensor:
        """The matrix, or one with the same Gram matrix; float64, the same on all ranks."""
        raise NotImplementedError  # abstract

    def own(self, result: Tensor) -> Tensor:
        """What this rank holds of a result that belongs to the rows of the stack, (n, r)/(r, m)."""
        raise NotImplementedError  # abstract


class Own(Side):
    """A factor that is whole on every rank."""

    def __init__(self, block: Tensor, transposed: bool = False) -> None:
        self.block, self.transposed = block, transposed

    def stack(self) -> Tensor:
        return self.block

    def own(self, result: Tensor) -> Tensor:
        return result.T if self.transposed else result


class Rows(Side):
    """An A that is sharded by its rows, and gathered."""

    def __init__(self, exchange: Exchange, pair: LoraPair, *columns: Tensor) -> None:
        self.exchange, self.pair = exchange, pair
        self.indices = [exchange.add(column) for column in columns]

    def of(self, pair: LoraPair) -> Rows:
        """The side of another pair with the same parameter."""
        other = Rows(self.exchange, pair)
        other.indices = self.indices
        return other

    def stack(self) -> Tensor:
        rows = self.pair.parameter_A.shape[0]
        whole = [self.exchange[i].flatten(0, 1)[:rows] for i in self.indices]
        parts = [self.pair.part("A", column).flatten(1) for column in whole]
        return torch.cat([part.T for part in parts], 1).double()

    def own(self, result: Tensor) -> Tensor:
        return result.T


class Compressed(Side):
    """A factor of which each rank holds a part of the long side, as ``R = Q^T part``."""

    def __init__(
        self, exchange: Exchange, Q: Tensor | None, R: Tensor, rows: int, transposed: bool
    ) -> None:
        self.exchange, self.Q, self.transposed = exchange, Q, transposed
        self.start, self.count = exchange.rank * rows, R.shape[0]
        self.index = exchange.add(torch.cat([R, R.new_zeros(rows - R.shape[0], R.shape[1])]))

    def stack(self) -> Tensor:
        return self.exchange[self.index].flatten(0, 1)

    def own(self, result: Tensor) -> Tensor:
        rows = result[self.start : self.start + self.count]
        rows = rows if self.Q is None else self.Q @ rows
        return rows.T if self.transposed else rows


def compress(blocks: Iterable[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """Q and R of each block, those of one shape together; blocks that are short stay whole."""
    made: dict[int, tuple[Tensor | None, Tensor]] = {}
    alike: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i, block in enumerate(blocks):
        made[i] = None, block
        if block.shape[0] > block.shape[1]:
            alike.setdefault(block.shape, []).append((i, block))
    for same in alike.values():
        Q, R = torch.linalg.qr(torch.stack([block for _, block in same]))
        made.update({i: pair for (i, _), pair in zip(same, zip(Q, R, strict=True), strict=True)})
    return [made[i] for i in range(len(made))]
