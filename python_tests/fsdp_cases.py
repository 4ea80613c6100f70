"""What the tests of FSDP2 run on each rank."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from ddp_cases import Collectives
from lora_layers import batch_of, factors, gradient_matrices, lora_around
from models import assert_same_bits, batches, lora_mlp, loss_of
from sharded_cases import (
    assert_same_on_all_ranks,
    errors_against,
    named,
    one_process,
    optimizer_of,
    own_part,
    shard_model,
    train,
    whole,
)
from test_experts import lora_experts
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from eflat_ext import reference
from eflat_ext.dtensors import from_local, laid_out_as
from eflat_ext.pairs import find_pairs
from eflat_ext.sharded import Sharding


def against_one_process(
    method: str = "eflat",
    steps: int = 20,
    dim_A: int = 0,
    layers: bool = True,
    config: Any = None,
    replicas: int = 1,
    **options: Any,
) -> dict[str, float]:
    """Errors after some steps."""
    config = config or {}
    one, single = one_process(method, steps, config, **options)
    world = dist.get_world_size()
    names = {"mesh_dim_names": ("replicate", "shard")} if replicas > 1 else {}
    shape = (replicas, world // replicas) if replicas > 1 else (world,)
    mesh = dist.init_device_mesh("cpu", shape, **names)
    model = shard_model(lora_mlp(**config), dim_A, layers, mesh)
    optimizer = optimizer_of(model, method, **options)
    train(model, optimizer, batches(steps))
    counts = {"skipped": optimizer.skipped_perturbations}
    assert_same_on_all_ranks({**optimizer.perturbation_norms, **counts})
    return errors_against(model, optimizer, one, single)


def distribute(model: nn.Module, dim_A: int, dim_B: int = 0) -> nn.Module:
    """Make every LoRA factor, and its gradient, a DTensor; without FSDP."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if "lora_" not in name or parameter is None:
                continue
            dim = dim_A if "lora_A" in name or "lora_embedding_A" in name else dim_B
            new = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(dim)]))
            if parameter.grad is not None:
                new.grad = distribute_tensor(parameter.grad, mesh, [Shard(dim)])
            module._parameters[key] = new
    return model


def operators(
    kind: str, dim_A: int, onto: str, norm_scope: str, condition: float = 1.0
) -> dict[str, float]:
    """Errors of perturbation and norm against the reference, for one kind of layer."""
    if kind == "experts":
        model = lora_experts()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        x = torch.randn(5, 7, dtype=torch.float64)
    else:
        model = lora_around(kind)
        x = batch_of(model)
    pairs = find_pairs(model)
    with torch.no_grad():
        for pair in pairs:
            pair.parameter_B.flatten(1)[:, -1] *= 1 / condition
    model(x).backward()
    rows = (
        [(*factors(p), *gradient_matrices(p)) for p in pairs]
        if kind != "experts"
        else [
            (
                *(t.detach().clone() for t in (p.A, p.B)),
                *(
                    p.part(name, q.grad).flatten(1).clone()
                    for name, q in (("A", p.parameter_A), ("B", p.parameter_B))
                ),
            )
            for p in pairs
        ]
    )
    columns = [*zip(*rows, strict=True), [pair.scaling for pair in pairs]]
    made, norms = reference.foreach_perturb(*columns, 0.3, onto, norm_scope)
    carriers = ["A", "B"] if onto == "both" else [onto]
    first = [[p.group for p in pairs].index(pair.group) for pair in pairs]
    target_of = [{f: 2 * i + k for k, f in enumerate(carriers)} for i in first]
    distribute(model, dim_A)
    sharding = Sharding.of(pairs)
    assert sharding is not None
    with Collectives() as calls:
        given, found = sharding.perturb(pairs, target_of, 0.3, onto, norm_scope, None, lambda t: t)
    assert calls.count == 1
    assert_same_on_all_ranks({"norms": found.values})
    assert found.usable.all() and not found.skipped
    errors = {"norms": float((found.values / norms - 1).abs().max())}
    largest = 0.0
    for (factor, i), E in zip(itertools.product(carriers, range(len(pairs))), made, strict=True):
        pair, local = pairs[i], given[target_of[i][factor]].value
        parameter: Any = pair.parameter(factor)
        assert local.shape == parameter.to_local().shape
        full = from_local(local, parameter).full_tensor()
        part = pair.part(factor, full).flatten(1)
        largest = max(largest, float((part - E).norm() / E.norm().clamp_min(1e-9)))
    return {**errors, "perturbation": largest}


def refused(kind: str) -> str:
    """The error at construction."""
    model = lora_mlp()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "FSDP":
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
    elif kind == "columns of B":
        model = distribute(model, dim_A=1, dim_B=1)
    elif kind == "mixed":
        fully_shard(model.base_model.model.up, mesh=mesh)
    elif kind == "two meshes":
        fully_shard(model.base_model.model.up, mesh=mesh)
        other = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("r", "s"))
        fully_shard(model.base_model.model.down, mesh=other)
    before = {k: id(v) for k, v in model.named_parameters()}
    try:
        optimizer_of(model)
    except NotImplementedError as error:
        assert before == {k: id(v) for k, v in model.named_parameters()}
        assert (
            not any(m._forward_pre_hooks for m in model.modules() if "Fully" not in str(type(m)))
            or kind != "columns of B"
        )
        return str(error)
    return ""


def life_cycle(layers: bool) -> None:
    """Weights are perturbed in training forward passes and nowhere else."""
    data = batches(4)
    model = shard_model(lora_mlp(), layers=layers)
    optimizer = optimizer_of(model)
    plain = lora_mlp()
    train(model, optimizer, data[:3])
    clean = named(model)
    perturbed = dict(clean)
    for name, average in whole(optimizer.averages).items():
        key = name.replace(".default", ".lora_B.default") + ".weight"
        perturbed[key] = clean[key] + average

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(weights[name])
            return plain(data[0][0])

    def check(training: bool, save: bool) -> None:
        model.train(training)
        with torch.no_grad():
            given = model(data[0][0])
        torch.testing.assert_close(given, outputs(perturbed if training else clean))
        assert optimizer._weights.applied == training
        if not save:
            return
        # What is saved is clean, at any moment, and sharded as the parameters are.
        state = model.state_dict()
        assert_same_bits(whole({n: state[n] for n in clean}), clean)

    assert not torch.equal(outputs(perturbed), outputs(clean))
    # FSDP2 keeps what its root module has gathered, until a state_dict or a backward pass.
    for save in (False, True):
        for training in (True, False, True, True, False, False, True):
            check(training, save)
    with optimizer.clean():
        assert_same_bits(named(model), clean)
    loss_of(model, own_part(data[3])).backward()
    optimizer.eval()
    assert_same_bits(named(model), clean)
    optimizer.step()
    optimizer.remove_hooks()


def checkpointed() -> None:
    """What is computed again is gathered as the shards are: it cannot be perturbed by then."""
    model = shard_model(lora_mlp())
    inner = model.base_model.model
    plain = inner.forward
    inner.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(3))
    for between in (model.eval, optimizer.eval):
        optimizer.zero_grad()
        loss = loss_of(model, batches(1)[0])
        between()
        if between == model.eval:
            loss_of(model, batches(1)[0])
            model.train()
        try:
            loss.backward()
            raise AssertionError("computed again at clean weights")
        except RuntimeError as error:
            assert "weights were restored between the forward and the backward pass" in str(error)


def mixed_precision(onto: str) -> None:
    """Forward and backward in bfloat16, shards in float32; the first average is the reference's."""
    model = shard_model(
        lora_mlp(torch.float32, init_lora_weights=False),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    optimizer = optimizer_of(model, beta=1.0, onto=onto, rho=0.1)
    data = batches(4, torch.float32)
    loss_of(model, own_part(data[0])).backward()
    expected = {}
    for pair in optimizer.pairs:
        A, B = (p.detach().full_tensor() for p in (pair.parameter_A, pair.parameter_B))
        grads = [p.grad.full_tensor() for p in (pair.parameter_A, pair.parameter_B)]
        expected[pair.name] = reference.perturb(A, B, *grads, pair.scaling, 0.1, onto)[0]
    optimizer.step()
    for name, average in whole(optimizer.averages).items():
        assert average.dtype == torch.float32
        error = (average - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, error
    train(model, optimizer, data[1:])
    assert all(torch.isfinite(t).all() for t in named(model).values())
    assert_same_on_all_ranks(optimizer.perturbation_norms)


def bad_gradient_on_one_rank(value: float, dim_A: int, factor: str, **options: Any) -> None:
    """A single element of one shard: the pair is left out on all ranks, the other goes on."""
    data = batches(4)
    model = shard_model(lora_mlp(), dim_A)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, data[:3])
    before = whole(optimizer.averages)
    optimizer.zero_grad()
    loss_of(model, own_part(data[3])).backward()
    bad, good = optimizer.pairs
    parameter: Any = bad.parameter_A if factor == "A" else bad.parameter_B
    if dist.get_rank() == 1:
        parameter.grad.to_local().view(-1)[-1:] = value
    optimizer.step()
    after = whole(optimizer.averages)
    assert_same_bits({bad.name: after[bad.name]}, {bad.name: before[bad.name]})
    assert not torch.equal(after[good.name], before[good.name])
    assert all(torch.isfinite(average).all() for average in after.values())
    assert int(optimizer.skipped_perturbations) == 1
    norms = optimizer.perturbation_norms
    assert not norms[bad.name].isfinite() and norms[good.name] > 0


def missing_gradients_on_one_rank(method: str) -> None:
    """Every rank takes part in what is exchanged, whatever gradients it has."""
    data = batches(3)
    model = shard_model(lora_mlp())
    optimizer = optimizer_of(model, method)
    train(model, optimizer, data[:2])
    optimizer.zero_grad()
    loss_of(model, own_part(data[2])).backward()
    if dist.get_rank() == 1:
        optimizer.pairs[0].parameter_A.grad = None
        optimizer.pairs[0].parameter_B.grad = None
    if method != "eflat":
        optimizer.first_step()
    optimizer.step()
    assert_same_on_all_ranks({"skipped": optimizer.skipped_perturbations})
    assert all(torch.isfinite(t).all() for t in named(model).values())
    optimizer.zero_grad()
    if method == "eflat":  # no gradient anywhere
        before = whole(optimizer.averages)
        optimizer.step()
        assert_same_bits(whole(optimizer.averages), before)
        assert int(optimizer.skipped_perturbations) == 0


def missing_gradients_at_the_first_step(method: str) -> None:
    """A warm-up that begins at zero: whether this is a step at all, all ranks decide together."""
    model = shard_model(lora_mlp())
    optimizer = optimizer_of(model, method, lr=0.0)
    loss_of(model, own_part(batches(1)[0])).backward()
    if dist.get_rank() == 1:
        optimizer.pairs[0].parameter_B.grad = None
    if method != "eflat":
        optimizer.first_step(zero_grad=False)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["perturbation_steps"] == 1


def replicated() -> None:
    """Factors that are DTensors, whole on every rank."""
    model, plain = lora_mlp(), lora_mlp()
    for each in (model, plain):
        loss_of(each, batches(1)[0]).backward()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            new = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()]))
            if parameter.grad is not None:
                new.grad = distribute_tensor(parameter.grad, mesh, [Replicate()])
            module._parameters[key] = new
    optimizers = [optimizer_of(each) for each in (model, plain)]
    for optimizer in optimizers:
        optimizer.step()
    for given, average in zip(*(o.averages.values() for o in optimizers), strict=True):
        torch.testing.assert_close(given.full_tensor(), average)


def sharded_after_construction(method: str, loaded: bool) -> None:
    """As accelerate does: the optimizer comes first, and is given the shards in place."""
    data = batches(8)
    one, single = lora_mlp(), None
    single = optimizer_of(one, method)
    model = lora_mlp()
    optimizer = optimizer_of(model, method)
    if loaded:  # a perturbation is due at the first forward pass
        train(one, single, data[:4], lambda batch: batch)
        model.load_state_dict(one.state_dict())
        optimizer.load_state_dict(single.state_dict())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    states = {names[id(p)]: state for p, state in optimizer.state.items()}
    shard_model(model)
    shards = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [shards[name] for name in own]
    optimizer.state.clear()
    if loaded:
        for name, state in states.items():
            own = {key: laid_out_as(t, shards[name]) if t.dim() else t for key, t in state.items()}
            optimizer.state[shards[name]] = own
        try:
            model(data[4][0])
            raise AssertionError("the first forward pass had begun before the perturbation")
        except RuntimeError as error:
            assert "call optimizer.train() before the first forward pass" in str(error)
        return
    train(model, optimizer, data)
    train(one, single, data, lambda batch: batch)
    assert max(errors_against(model, optimizer, one, single).values()) < 1e-6


def replaced_parameters() -> None:
    """An engine that gives the base optimizer parameters of its own, as DeepSpeed ZeRO does."""
    model = lora_mlp()
    optimizer = optimizer_of(model)
    loss_of(model, batches(1)[0]).backward()
    flat = torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])
    optimizer.param_groups[0]["params"] = [nn.Parameter(flat)]
    try:
        optimizer.step()
        raise AssertionError("stepped")
    except RuntimeError as error:
        assert "DeepSpeed ZeRO" in str(error)


def experts(onto: str) -> None:
    """A whole step where the experts of a layer share sharded parameters."""
    models = [lora_experts(), lora_experts()]
    shard_model(models[0], layers=False)
    optimizers = [optimizer_of(model, onto=onto, norm_scope="global") for model in models]
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).view(3, 7)
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
    assert max(errors_against(models[0], optimizers[0], models[1], optimizers[1]).values()) < 1e-6
