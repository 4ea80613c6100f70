"""Train on several devices: DistributedDataParallel, then FSDP2 with a checkpoint.

Run by Python it starts two processes on the CPU; on GPUs run it by torchrun:

    torchrun --nproc-per-node 8 examples/several_devices.py

The model is small, with random weights; the data are word counts of 10,072 movie-review sentences.
"""

from __future__ import annotations

import functools
import os
import tempfile
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eflat_ext import create_eflat_optimizer
from eflat_ext.lab.data.corpora import movie_reviews

TEST = 2000  # sentences


def make_model(device: torch.device) -> nn.Module:
    """Return a perceptron with LoRA on two layers, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model.append(nn.Linear(64, 2))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], modules_to_save=["4"])
    return get_peft_model(model, config).to(device)


def shard(model: nn.Module) -> nn.Module:
    for layer in [m for m in model.modules() if hasattr(m, "lora_A")]:
        fully_shard(layer)
    return fully_shard(model)  # the root, too


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Train; each rank takes its own rows of every batch."""
    counts, labels = sentences(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(TEST, len(labels), (256,), generator=generator)
        mine = rows.chunk(dist.get_world_size())[dist.get_rank()].to(labels.device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(counts[mine]), labels[mine]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the test sentences, at the unperturbed weights."""
    counts, labels = sentences(next(model.parameters()).device)
    model.eval()
    return float((model(counts[:TEST]).argmax(1) == labels[:TEST]).float().mean())


@functools.cache
def sentences(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return word counts in 1024 bins and labels, 1 for positive, shuffled."""
    table = movie_reviews()
    counts = torch.zeros(len(table), 1024)
    for row, text in zip(counts, table.texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 1024] += 1
    labels = torch.tensor([int(label == "positive") for label in table.labels])
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    return counts[order].to(device), labels[order].to(device)


def with_ddp(device: torch.device) -> None:
    net = DistributedDataParallel(make_model(device))
    optimizer = create_eflat_optimizer(net, torch.optim.AdamW, lr=1e-2, rho=0.05)
    train(net, optimizer, 60, seed=1)
    say(f"DDP: accuracy {accuracy(net):.3f}")


def with_fsdp(device: torch.device, folder: str) -> None:
    model = shard(make_model(device))
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=0.05)
    train(model, optimizer, 30, seed=1)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, 30, seed=2)
    finished = accuracy(model)

    model = shard(make_model(device))
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=0.05)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, 30, seed=2)
    resumed = accuracy(model)
    say(f"FSDP2: accuracy {finished:.3f}, resumed from the checkpoint {resumed:.3f}")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main(rank: int, world: int, store: str) -> None:
    """Run one of ``world`` processes: DDP, then FSDP2."""
    place = int(os.environ.get("LOCAL_RANK", rank))
    cuda = torch.cuda.device_count() > int(os.environ.get("LOCAL_WORLD_SIZE", world)) - 1
    device = torch.device("cuda", place) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if cuda else "gloo"
    address = f"file://{store}" if store else "env://"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world)
    if rank == 0:
        movie_reviews()  # downloads the data at first use
    dist.barrier()
    with_ddp(device)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    with_fsdp(device, folder[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(main, args=(2, f"{folder}/store"), nprocs=2)
