"""Functions that the tests of FSDP2 run on each rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_cases import Collectives
from experts import lora_experts
from lora_layers import batch_of, factors, gradient_matrices, lora_around
from models import assert_same_bits, batches, lora_mlp, loss_of
from peft import LoraConfig, get_peft_model
from sharded_cases import (
    assert_same_on_all_ranks,
    errors_against,
    named,
    one_process,
    optimizer_of,
    own_part,
    relative_errors,
    shard_model,
    train,
    whole,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from eflat_ext import EFlatPerturbation, reference
from eflat_ext.lora import find_pairs
from eflat_ext.perturbation.dtensors import laid_out_as


def against_one_process(
    method: str = "eflat",
    steps: int = 20,
    dim_A: int = 0,
    layers: bool = True,
    config: Any = None,
    replicas: int = 1,
    **options: Any,
) -> dict[str, float]:
    """Return the errors after some steps."""
    config = config or {}
    one, single = one_process(method, steps, config, **options)
    world = dist.get_world_size()
    names = {"mesh_dim_names": ("replicate", "shard")} if replicas > 1 else {}
    shape = (replicas, world // replicas) if replicas > 1 else (world,)
    mesh = dist.init_device_mesh("cpu", shape, **names)
    model = shard_model(lora_mlp(**config), dim_A, layers, mesh)
    optimizer = optimizer_of(model, method, **options)
    data = batches(steps)
    train(model, optimizer, data[:-1])
    last = own_part(data[-1])
    optimizer.zero_grad()
    loss_of(model, last).backward()
    with Collectives() as calls:
        optimizer.step() if method == "eflat" else optimizer.first_step()
    # All factors and gradients at once; after a step the new B, which bounds averages onto A.
    bound = method == "eflat" and optimizer.onto != "B"
    assert calls.count == 1 + bound
    assert_whole(optimizer)
    if method != "eflat":
        loss_of(model, last).backward()
        optimizer.step()
    counts = {"skipped": optimizer.skipped_perturbations}
    assert_same_on_all_ranks({**optimizer.perturbation_norms, **counts})
    return errors_against(model, optimizer, one, single)


def submodules(onto: str) -> dict[str, float]:
    """Return the errors where the modules within LoRA layers gather their factors themselves."""
    one, single = one_process("eflat", 6, {}, onto=onto)
    model = lora_mlp()
    for module in [m for name, m in model.named_modules() if name.endswith("default")]:
        fully_shard(module)
    fully_shard(model)
    optimizer = optimizer_of(model, onto=onto)
    train(model, optimizer, batches(6))
    assert_whole(optimizer)
    return errors_against(model, optimizer, one, single)


def assert_whole(optimizer: Any) -> None:
    """Check that E is whole, and the same on all ranks."""
    made = {str(i): factor.E for i, factor in enumerate(optimizer.perturbation.factors)}
    for E, factor in zip(made.values(), optimizer.perturbation.factors, strict=True):
        assert E.shape == factor.parameter.shape and hasattr(factor.parameter, "full_tensor")
    made.update(getattr(optimizer, "averages", {}))
    assert all(type(E) is Tensor for E in made.values())
    assert_same_on_all_ranks(made)


def distribute(model: nn.Module, dim_A: int | None, dim_B: int | None = 0) -> nn.Module:
    """Make every LoRA factor, and its gradient, a DTensor, replicated for None; without FSDP."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if "lora_" not in name or parameter is None:
                continue
            dim = dim_A if "lora_A" in name or "lora_embedding_A" in name else dim_B
            layout = [Replicate() if dim is None else Shard(dim)]
            new = nn.Parameter(distribute_tensor(parameter.detach(), mesh, layout))
            if parameter.grad is not None:
                new.grad = distribute_tensor(parameter.grad, mesh, layout)
            module._parameters[key] = new
    return model


def operators(
    kind: str,
    dim_A: int | None,
    onto: str,
    norm_scope: str,
    dim_B: int | None = 0,
    condition: float = 1.0,
) -> dict[str, float]:
    """Return the errors of perturbations and norms against the reference for one kind of layer."""
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
    distribute(model, dim_A, dim_B)
    perturbation = EFlatPerturbation(model, 0.3, beta=1.0, onto=onto, norm_scope=norm_scope)
    with Collectives() as calls:
        perturbation.update()
    assert calls.count == 1
    assert_same_on_all_ranks(perturbation.norms)
    assert int(perturbation.skipped) == 0
    found = torch.stack([perturbation.norms[pair.name] for pair in pairs])
    largest = 0.0
    for average, E in zip(perturbation.averages.values(), made, strict=True):
        error = (average.flatten(1) - E).norm() / E.norm().clamp_min(1e-9)
        largest = max(largest, float(error))
    return {"norms": float((found / norms - 1).abs().max()), "perturbation": largest}


def refused(kind: str) -> str:
    """Return the message of the error at construction."""
    model = lora_mlp()
    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world,))
    grid = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("r", "s"))
    up, down = model.base_model.model.up, model.base_model.model.down
    if kind == "FSDP":
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
    elif kind == "mixed":
        fully_shard(up, mesh=mesh)
    elif kind == "two meshes":
        fully_shard(up, mesh=mesh)
        fully_shard(down, mesh=grid)
    elif kind == "two dimensions":
        for module, placements in ((up, [Replicate(), Shard(0)]), (down, [Shard(0), Replicate()])):
            for factor in (module.lora_A["default"], module.lora_B["default"]):
                weight = distribute_tensor(factor.weight.detach(), grid, placements)
                factor.weight = nn.Parameter(weight)
    before = {k: id(v) for k, v in model.named_parameters()}
    try:
        optimizer_of(model)
    except NotImplementedError as error:
        message = str(error)
    assert before == {k: id(v) for k, v in model.named_parameters()}
    assert not any("forward" in vars(module) for module in model.modules())
    return message


def tensor_parallel(folder: str) -> str:
    """Return the message of the error for a model that transformers has made tensor-parallel."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if dist.get_rank() == 0:
        LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, **shape)).save_pretrained(
            folder
        )
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert len(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight) == 8
    with pytest.raises(NotImplementedError) as raised:
        EFlatPerturbation(model)
    return str(raised.value)


class Plain:
    """A model in one process, to compare a sharded one with."""

    def __init__(self, clean: dict[str, Tensor], averages: dict[str, Tensor]) -> None:
        self.model = lora_mlp()
        self.clean, self.perturbed = clean, dict(clean)
        for name, average in averages.items():
            key = name.replace(".default", ".lora_B.default") + ".weight"
            self.perturbed[key] = clean[key] + average

    def load(self, perturbed: bool) -> nn.Module:
        self.model.load_state_dict(self.perturbed if perturbed else self.clean, strict=False)
        return self.model

    def output(self, x: Tensor, perturbed: bool) -> Tensor:
        with torch.no_grad():
            return self.load(perturbed)(x)

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """Return the gradients at the perturbed weights by the names of trained parameters."""
        model = self.load(True)
        model.zero_grad()
        loss_of(model, batch).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained_beside_plain(layers: bool) -> tuple[nn.Module, Any, Plain]:
    model = shard_model(lora_mlp(), layers=layers)
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(3))
    optimizer.zero_grad()
    return model, optimizer, Plain(named(model), optimizer.averages)


def life_cycle(layers: bool) -> None:
    """Check that training forward passes are perturbed and nothing else is."""
    data = batches(4)
    model, optimizer, plain = trained_beside_plain(layers)
    x = data[0][0]
    assert not torch.equal(plain.output(x, True), plain.output(x, False))

    def check(training: bool, save: bool) -> None:
        model.train(training)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain.output(x, training))
        if save:  # clean, and sharded as the parameters are
            state = model.state_dict()
            assert all(hasattr(value, "full_tensor") for value in state.values())
            assert_same_bits(whole({n: state[n] for n in plain.clean}), plain.clean)

    # FSDP2 keeps what its root has gathered until a state_dict or a backward pass.
    for save in (False, True):
        for training in (True, False, True, True, False, False, True):
            check(training, save)
    with optimizer.clean(), torch.no_grad():
        torch.testing.assert_close(model(x), plain.output(x, False))
    check(True, False)
    loss_of(model, own_part(data[3])).backward()
    assert_same_bits(named(model), plain.clean)
    optimizer.step()
    optimizer.remove_hooks()
    with torch.no_grad():
        now = Plain(named(model), {})
        torch.testing.assert_close(model(x), now.output(x, False))


def interrupted_step(layers: bool, checkpointed: bool) -> None:
    """Check that evaluation and ``state_dict()`` before backward leave the gradients alone."""
    model, optimizer, plain = trained_beside_plain(layers)
    batch = batches(4)[3]
    if checkpointed:
        inner = model.base_model.model
        forward = inner.forward
        inner.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    expected = plain.gradients(batch)
    for between in ("nothing", "state_dict", "evaluation", "both"):
        for saved_within in (False, True):
            optimizer.zero_grad()
            loss = loss_of(model, own_part(batch))
            if between in ("evaluation", "both"):
                model.eval()
                with torch.no_grad():
                    found = model(batch[0])
                torch.testing.assert_close(found, plain.output(batch[0], False))
                model.train(saved_within)  # in either mode at the beginning of the backward pass
            if between in ("state_dict", "both"):
                state = model.state_dict()
                assert_same_bits(whole({n: state[n] for n in plain.clean}), plain.clean)
            loss.backward()
            model.train()
            parameters = dict(model.named_parameters())
            for name, gradient in expected.items():
                torch.testing.assert_close(parameters[name].grad.full_tensor(), gradient)
    optimizer.step()
    assert_whole(optimizer)


def mixed_precision(onto: str) -> None:
    """Check the first average against the reference, with bfloat16 passes and float32 shards."""
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
    """Check that one bad element of a shard skips its pair on all ranks, and only that."""
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
    """Check that ranks without gradients take part in collective operations."""
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
    """Check a first step at a learning rate of zero, which all ranks have to judge alike."""
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
    """Check factors that are replicated DTensors."""
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
        torch.testing.assert_close(given, average)


def sharded_after_construction(method: str, loaded: bool) -> None:
    """Create the optimizer first and give it the shards in place, as Accelerate does."""
    data = batches(8)
    one, single = lora_mlp(), None
    single = optimizer_of(one, method)
    model = lora_mlp()
    optimizer = optimizer_of(model, method)
    if loaded:  # the first pass is perturbed
        train(one, single, data[:4], lambda batch: batch)
        model.load_state_dict(one.state_dict())
        optimizer.load_state_dict(copy.deepcopy(single.state_dict()))
    states = {n: optimizer.state.get(p, {}) for n, p in model.named_parameters()}
    give_shards(model, optimizer)
    for name, parameter in model.named_parameters():
        for key, value in states[name].items():
            value = laid_out_as(value, parameter) if value.dim() else value
            optimizer.state[parameter][key] = value
    rest = data[4:] if loaded else data
    if loaded and method == "eflat":
        with torch.no_grad():
            torch.testing.assert_close(model(data[4][0]), one(data[4][0]))
    train(model, optimizer, rest)
    train(one, single, rest, lambda batch: batch)
    assert max(errors_against(model, optimizer, one, single).values()) < 1e-6


def give_shards(model: nn.Module, optimizer: Any) -> None:
    """Shard a model, and let its optimizer train the shards in place of what it trained."""
    names = {id(p): name for name, p in model.named_parameters()}
    shard_model(model)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[id(p)]] for p in group["params"]]
    optimizer.state.clear()


def sharded_around_an_attached_one(moment: str) -> None:
    """Shard a model before, between or after creating and attaching a perturbation."""
    data = batches(6)
    one = lora_mlp()
    single = optimizer_of(one)
    model = lora_mlp()
    if moment == "before it is made":
        shard_model(model)
    perturbation = EFlatPerturbation(model, rho=0.3)
    if moment == "before it is attached":
        shard_model(model)
    elif moment == "once it has run":
        loss_of(model, own_part(data[0])).backward()
        shard_model(model.zero_grad() or model)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    perturbation.attach(base)
    if moment == "once it is attached":
        give_shards(model, base)
    for batch in data:
        base.zero_grad()
        loss_of(model, own_part(batch)).backward()
        base.step()
    train(one, single, data, lambda batch: batch)
    assert relative_errors(named(model), named(one)) < 1e-6
    assert relative_errors(perturbation.averages, single.averages) < 1e-6
    assert all(type(average) is Tensor for average in perturbation.averages.values())
    assert_same_on_all_ranks(perturbation.averages)


def replaced_parameters() -> None:
    """Give the base optimizer other parameters, as DeepSpeed ZeRO does."""
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
    """Take a step with experts that share sharded parameters."""
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
