"""The operators for pairs whose factors are sharded among ranks, as FSDP2's ``fully_shard`` does.

With a factor and its gradient seen as columns, Z = [B | G_B] of shape (n, 2r), all that the
perturbation takes from Z is its Gram matrix, and what it gives is a linear map of Z's rows. So a
rank that holds some rows replaces them by the R of their QR decomposition, at most 2r rows with the
same Gram matrix; all ranks exchange these, stack them in the order of ranks and call the operator
for one device on the stack. The rows of the result that belong to a rank, times its Q, are the
perturbation of its own rows. A Gram matrix would be as short, but has the square of the
condition number: Q and R keep the accuracy that the operator has.

The stack is the same on all ranks, bit for bit, and so are norms and what is skipped. Whether it is
B that is sharded by rows or A by columns makes no difference. An A sharded by rows, which is what
FSDP2 does unless told otherwise, has to be gathered whole. Everything, for all pairs, is exchanged
by one collective operation, in which every rank takes part whatever its gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import perturbed
from .dtensors import is_dtensor, local, same_layout
from .exchange import Compressed, Exchange, Own, Rows, Side, compress
from .pairs import LoraPair
from .reference import default_rtol

SUPPORTED = (
    "Shard(0) for B and Shard(0) or Shard(1) for A on one dimension of one mesh, Replicate() on "
    "its others, for all pairs alike (torch.distributed.fsdp.fully_shard, applied to the root, too)"
)


class Perturbation(NamedTuple):
    """What a rank adds to its shard of one target.

    Attributes:
        value: shaped like the shard.
        usable: where it counts: bool, without dimensions or for broadcasting.
    """

    value: Tensor
    usable: Tensor


class Norms(NamedTuple):
    """Norms of some pairs, on all ranks alike.

    Attributes:
        values: one per pair: float64 where all are, else float32.
        usable: which are neither zero nor infinite nor NaN.
        skipped: how many are not, of the pairs that have a gradient; without dimensions.
    """

    values: Tensor
    usable: Tensor
    skipped: Tensor


class Sharding:
    """How the factors of some pairs are sharded, and the operators for them.

    Raises:
        NotImplementedError: factors in another layout than ``SUPPORTED``.
    """

    def __init__(self, pairs: Sequence[LoraPair]) -> None:
        first: Any = pairs[0].parameter_A
        self.mesh = getattr(first, "device_mesh", None)
        self.axis: int | None = None  # of the mesh, along which factors are sharded
        for pair in pairs:
            for factor in ("A", "B"):
                self._check(pair, factor)
        self.group = None if self.axis is None else self.mesh.get_group(self.axis)
        self.rank, self.world = 0, 1
        if self.group is not None:
            self.rank = torch.distributed.get_rank(self.group)
            self.world = torch.distributed.get_world_size(self.group)

    @staticmethod
    def of(pairs: Sequence[LoraPair]) -> Sharding | None:
        """The sharding of the pairs, None where no factor is a DTensor."""
        if any(is_dtensor(p.parameter_A) or is_dtensor(p.parameter_B) for p in pairs):
            return Sharding(pairs)
        return None

    def _check(self, pair: LoraPair, factor: str) -> None:
        parameter: Any = pair.parameter(factor)
        name = f"factor {factor} of {pair.name}"
        if not is_dtensor(parameter):
            self._refuse(f"{name} is no DTensor while others are")
        if parameter.device_mesh != self.mesh:
            self._refuse(f"{name} is on {parameter.device_mesh}, others are on {self.mesh}")
        for axis, placement in enumerate(parameter.placements):
            if type(placement).__name__ == "Replicate":
                continue
            known = type(placement).__name__ == "Shard" and self.axis in (None, axis)
            if not known or placement.dim not in ((0, 1) if factor == "A" else (0,)):
                self._refuse(f"{name} has the placements {tuple(parameter.placements)}")
            self.axis = axis

    @staticmethod
    def _refuse(what: str) -> None:
        raise NotImplementedError(f"sharded model: {what}; supported are {SUPPORTED}")

    @torch.no_grad()
    def perturb(
        self,
        pairs: Sequence[LoraPair],
        target_of: Sequence[dict[str, int]],
        rho: float,
        onto: str,
        norm_scope: str,
        rtol: float | None,
        dtype_of: Callable[[torch.dtype], torch.dtype],
    ) -> tuple[dict[int, Perturbation], Norms]:
        """As ``torch.ops.eflat.foreach_perturb``, from the parameters' gradients.

        Args:
            target_of: for each pair, the keys of its targets by factor, shared by the experts of a
                layer.
            dtype_of: gives the type of the perturbation for that of a factor.
        """
        exchange = Exchange(self.group, self.rank, self.world)
        sides = [self._sides(exchange, pairs, factor, _with_gradient) for factor in "AB"]
        traced = exchange.add(_has_gradient(pairs))
        exchange.run()
        A, B = ([side.stack() for side in of_factor] for of_factor in sides)
        kinds = [p.parameter_B.dtype for p in pairs]
        cutoffs = [_rtol(pair) if rtol is None else rtol for pair in pairs]
        factors = perturbed(onto, ["A"], ["B"])
        E = {factor: [torch.empty(0)] * len(pairs) for factor in factors}
        norms: list[Tensor] = [torch.empty(0)] * len(pairs)
        for cutoff in dict.fromkeys(cutoffs):
            chosen = [i for i, own in enumerate(cutoffs) if own == cutoff]
            a, b = ([stacks[i].chunk(2, 1) for i in chosen] for stacks in (A, B))
            made, sizes = torch.ops.eflat.foreach_perturb(
                [factor.T for factor, _ in a],
                [factor for factor, _ in b],
                [gradient.T for _, gradient in a],
                [gradient for _, gradient in b],
                [pairs[i].scaling for i in chosen],
                rho,
                onto,
                "layer",
                cutoff,
            )
            for i, norm in zip(chosen, sizes.unbind(), strict=True):
                norms[i] = norm
            for (factor, i), e in zip(itertools.product(factors, chosen), made, strict=True):
                E[factor][i] = e.T if factor == "A" else e
        values = torch.stack(norms)
        if norm_scope == "global":
            shares = list((values / _total(values)).nan_to_num().unbind())
            E = {factor: list(torch._foreach_mul(own, shares)) for factor, own in E.items()}
        # The operator has seen float64: what the types of the factors cannot hold counts, too.
        limits = values.new_tensor([torch.finfo(dtype_of(kind)).max for kind in kinds])
        for own in E.values():
            values = values.where(torch.stack(torch._foreach_norm(own)) <= limits, torch.inf)
        found = self._norms(values, kinds, exchange[traced])
        perturbations: dict[int, Perturbation] = {}
        for factor, made in E.items():
            # Q holds NaN where the factors do: the choice has to come last.
            own = [side.own(e) for side, e in zip(sides["AB".index(factor)], made, strict=True)]
            own = [torch.where(ok, e, 0) for ok, e in zip(found.usable.unbind(), own, strict=True)]
            keys = [targets[factor] for targets in target_of]
            shards = self._shards(pairs, keys, factor, own)
            usable = self.spread(pairs, keys, factor, found.usable.unbind())
            for (key, shard), pair in zip(shards.items(), _one_each(pairs, keys), strict=True):
                shard = shard.to(dtype_of(pair.parameter_B.dtype))
                perturbations[key] = Perturbation(shard, usable[key])
        return perturbations, found

    @torch.no_grad()
    def bound(
        self,
        pairs: Sequence[LoraPair],
        averages: Sequence[Tensor],
        rho: float,
        norm_scope: str,
    ) -> Tensor:
        """As ``torch.ops.eflat.foreach_bound``, of averages laid out as the parameters of A."""
        exchange = Exchange(self.group, self.rank, self.world)
        average_of = {id(p.parameter_A): a for p, a in zip(pairs, averages, strict=True)}
        A = self._sides(exchange, pairs, "A", lambda p: [local(average_of[id(p)])])
        B = self._sides(exchange, pairs, "B", lambda p: [local(p)])
        exchange.run()
        return torch.ops.eflat.foreach_bound(
            [side.stack().T for side in A],
            [side.stack() for side in B],
            [pair.scaling for pair in pairs],
            rho,
            norm_scope,
        )

    @torch.no_grad()
    def gradient_norms(self, pairs: Sequence[LoraPair]) -> Norms:
        """Norm of (G_A, G_B) together, for each pair."""
        exchange = Exchange(self.group, self.rank, self.world)
        sides: list[Side] = []
        for pair, factor in ((pair, factor) for factor in "AB" for pair in pairs):
            parameter = pair.parameter(factor)
            gradient = _with_gradient(parameter)[1].double()
            if self._by_rows(factor, parameter):  # which may belong to several experts
                rows = gradient.flatten(1).norm(dim=1, keepdim=True)
                sides.append(Rows(exchange, pair, self._padded(parameter, rows)))
            else:
                norm = pair.part(factor, gradient).norm().reshape(1, 1)
                whole = self._dim(parameter) is None
                sides.append(Own(norm) if whole else Compressed(exchange, None, norm, 1, False))
        traced = exchange.add(_has_gradient(pairs))
        exchange.run()
        norm_A, norm_B = torch.stack([side.stack().norm() for side in sides]).chunk(2)
        kinds = [pair.parameter_A.dtype for pair in pairs]
        return self._norms(torch.hypot(norm_A, norm_B), kinds, exchange[traced])

    def gradient(self, pair: LoraPair, factor: str) -> Tensor:
        """This rank's shard of the gradient of a pair's parameter, zeros where there is none."""
        return _with_gradient(pair.parameter(factor))[1]

    def spread(
        self,
        pairs: Sequence[LoraPair],
        target_of: Sequence[int],
        factor: str,
        values: Sequence[Tensor],
    ) -> dict[int, Tensor]:
        """One number per pair, to be broadcast over its part of the shard of its target."""
        alone = {
            key: value
            for pair, key, value in zip(pairs, target_of, values, strict=True)
            if pair.experts == 1
        }
        experts = [i for i, pair in enumerate(pairs) if pair.experts > 1]
        parts = []
        for i in experts:
            meta = torch.empty(self._held_shape(pairs[i], factor), device="meta")
            parts.append(values[i].expand(pairs[i].part(factor, meta).flatten(1).shape))
        keys = [target_of[i] for i in experts]
        return {**alone, **self._shards([pairs[i] for i in experts], keys, factor, parts)}

    def _shards(
        self,
        pairs: Sequence[LoraPair],
        target_of: Sequence[int],
        factor: str,
        parts: Sequence[Tensor],
    ) -> dict[int, Tensor]:
        """This rank's shards of targets, from the matrices of their pairs."""
        held: dict[int, Tensor] = {}
        for pair, key, part in zip(pairs, target_of, parts, strict=True):
            shape = self._held_shape(pair, factor)
            if pair.experts == 1:
                held[key] = part.reshape(shape)
                continue
            if key not in held:
                held[key] = part.new_zeros(shape)
            view = pair.part(factor, held[key])
            view.copy_(part.reshape(view.shape))
        for key, pair in zip(held, _one_each(pairs, target_of), strict=True):
            parameter = pair.parameter(factor)
            if self._by_rows(factor, parameter):
                start = self.rank * self._chunk(parameter, 0)
                held[key] = held[key][start : start + local(parameter).shape[0]]
        return held

    def _held_shape(self, pair: LoraPair, factor: str) -> torch.Size:
        """What this rank knows of a factor: its shard, or all of one that was gathered."""
        parameter = pair.parameter(factor)
        return parameter.shape if self._by_rows(factor, parameter) else local(parameter).shape

    def _sides(
        self,
        exchange: Exchange,
        pairs: Sequence[LoraPair],
        factor: str,
        columns_of: Callable[[Tensor], list[Tensor]],
    ) -> list[Side]:
        """One factor of each pair: the columns that ``columns_of`` gives for its parameter."""
        sides: dict[int, Side] = {}
        rows_of: dict[int, Rows] = {}
        blocks: dict[int, Tensor] = {}
        for i, pair in enumerate(pairs):
            parameter = pair.parameter(factor)
            if not self._by_rows(factor, parameter):
                parts = [pair.part(factor, x).flatten(1) for x in columns_of(parameter)]
                block = torch.cat([x.T if factor == "A" else x for x in parts], 1).double()
                if self._dim(parameter) is None:
                    sides[i] = Own(block, factor == "A")
                else:
                    blocks[i] = block
            elif id(parameter) in rows_of:  # another expert's
                sides[i] = rows_of[id(parameter)].of(pair)
            else:
                columns = [self._padded(parameter, x) for x in columns_of(parameter)]
                sides[i] = rows_of[id(parameter)] = Rows(exchange, pair, *columns)
        for (i, block), (Q, R) in zip(blocks.items(), compress(blocks.values()), strict=True):
            parameter = pairs[i].parameter(factor)
            dim = 0 if factor == "B" else 1
            n, m, _ = pairs[i].sizes
            longest = self._chunk(parameter, dim) * ((n, m)[dim] // parameter.shape[dim])
            rows = min(longest, block.shape[1])
            sides[i] = Compressed(exchange, Q, R, rows, factor == "A")
        return [sides[i] for i in range(len(pairs))]

    def _padded(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """A shard by rows, with as many rows as the first rank has."""
        missing = self._chunk(parameter, 0) - shard.shape[0]
        return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])])

    def _by_rows(self, factor: str, parameter: Tensor) -> bool:
        return factor == "A" and self._dim(parameter) == 0

    def _norms(self, values: Tensor, kinds: list[torch.dtype], traced: Tensor) -> Norms:
        double = all(kind == torch.float64 for kind in kinds)
        values = values if double else values.float()
        usable = values.isfinite() & (values > 0)
        return Norms(values, usable, (~usable & traced.bool().any(0)).sum())

    def _dim(self, parameter: Any) -> int | None:
        """The dimension that is sharded, None if none is."""
        return None if self.axis is None else getattr(parameter.placements[self.axis], "dim", None)

    def _chunk(self, parameter: Tensor, dim: int) -> int:
        """The size of a shard along its dimension: the first is a whole one, the last ones less."""
        return -(-parameter.shape[dim] // self.world)


def _with_gradient(parameter: Tensor) -> list[Tensor]:
    """This rank's shards of a parameter and of its gradient, zeros where it has none."""
    value, gradient = local(parameter), parameter.grad
    if gradient is None:
        return [value, torch.zeros_like(value)]
    if not same_layout(gradient, parameter):
        raise RuntimeError(
            f"sharded model: expected gradients laid out as their parameters, "
            f"{parameter.placements}, got {getattr(gradient, 'placements', type(gradient))}"  # type: ignore[attr-defined]
        )
    return [value, local(gradient)]


def _has_gradient(pairs: Sequence[LoraPair]) -> Tensor:
    has = [pair.has_gradient for pair in pairs]
    return torch.tensor(has, dtype=torch.uint8, device=local(pairs[0].parameter_A).device)


def _one_each(pairs: Sequence[LoraPair], target_of: Sequence[int]) -> list[LoraPair]:
    """For each target, in order of appearance, one pair that has it."""
    one: dict[int, LoraPair] = {}
    for key, pair in zip(target_of, pairs, strict=True):
        one.setdefault(key, pair)
    return list(one.values())


def _rtol(pair: LoraPair) -> float:
    n, m, r = pair.sizes
    A, B = (torch.empty(s, dtype=pair.parameter_A.dtype, device="meta") for s in ((r, m), (n, r)))
    return default_rtol(A, B)


def _total(norms: Tensor) -> Tensor:
    """Root of the sum of squares of those norms that count."""
    norms = norms.where(norms.isfinite(), 0)
    largest = norms.max()
    return (norms / largest).norm() * largest
