"""Train with DeepSpeed ZeRO, save a checkpoint, and resume from it.

Run by Python it starts two processes on the CPU; on GPUs use DeepSpeed's launcher or torchrun:

    torchrun --nproc-per-node 8 examples/deepspeed_zero.py --stage 3

Model and data are those of several_devices.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch.distributed as dist
from several_devices import TEST, make_model, movie_reviews, sentences
from torch import nn

from eflat_ext import EFlatPerturbation
from eflat_ext.engines.deepspeed import attach

ROWS = 128  # of a batch, on each rank


def start(stage: int) -> tuple[Any, EFlatPerturbation]:
    """Return an engine and the perturbation that is attached to it."""
    model = make_model(torch.device("cpu"))  # DeepSpeed moves it
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    return engine, attach(engine, EFlatPerturbation(model, rho=0.05))


def train(engine: Any, steps: int, seed: int) -> None:
    """Train; each rank takes its own rows of every batch."""
    counts, labels = sentences(engine.device)
    generator = torch.Generator().manual_seed(seed)
    batch = (ROWS * dist.get_world_size(),)
    engine.train()
    for _ in range(steps):
        rows = torch.randint(TEST, len(labels), batch, generator=generator)
        mine = rows.chunk(dist.get_world_size())[dist.get_rank()].to(engine.device)
        for part in mine.chunk(2):  # micro-batches
            loss = nn.functional.cross_entropy(engine(counts[part]), labels[part])
            engine.backward(loss)
            engine.step()


@torch.no_grad()
def test_loss(engine: Any) -> float:
    """Return the loss on the test sentences, at the unperturbed weights."""
    counts, labels = sentences(engine.device)
    engine.eval()
    return float(nn.functional.cross_entropy(engine(counts[:TEST]), labels[:TEST]))


def main(rank: int, world: int, stage: int) -> None:
    """Run one of ``world`` processes."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if torch.cuda.is_available():
        deepspeed.init_distributed()
    else:
        torch.set_num_threads(1)
        deepspeed.ops.__compatible_ops__.clear()  # it would compile its own communication
        deepspeed.init_distributed("gloo", rank=rank, world_size=world)
    if rank == 0:
        movie_reviews()  # downloads the data at first use
    dist.barrier()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)

    engine, perturbation = start(stage)
    train(engine, 20, seed=1)
    engine.save_checkpoint(folder[0])  # with the perturbation in it
    train(engine, 20, seed=2)
    finished = test_loss(engine)

    engine, perturbation = start(stage)
    engine.load_checkpoint(folder[0])
    train(engine, 20, seed=2)
    resumed = test_loss(engine)
    if rank == 0:
        print(f"ZeRO {stage}: {perturbation.steps} steps, test loss {finished:.6f}", end=", ")
        print(f"resumed from the checkpoint {resumed:.6f}, difference {resumed - finished:.1e}")
    dist.destroy_process_group()


def on_cpus(rank: int, port: int, stage: int) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    main(rank, 2, stage)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=range(4), default=3)
    parser.add_argument("--local_rank", type=int, default=0)  # of DeepSpeed's launcher
    stage = parser.parse_args().stage
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), stage)
    else:
        port = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port
        processes = torch.multiprocessing.start_processes
        processes(on_cpus, (port, stage), nprocs=2, start_method="fork")  # which imports once
