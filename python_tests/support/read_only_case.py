"""Train with parameters in memory that is read-only except in the base optimizer's step."""

from __future__ import annotations

import copy
import ctypes
import mmap
from typing import Any

import torch
from models import CREATE, batches, lora_mlp, loss_of
from torch import nn

_libc = ctypes.CDLL(None, use_errno=True)


class Pages:
    """Move a model's parameters into pages of their own, which can be made read-only."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        size = sum(-(-p.nbytes // 64) * 64 for p in parameters)
        self._map = mmap.mmap(-1, size)
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        at = 0
        for p in parameters:
            held = torch.frombuffer(self._map, dtype=p.dtype, count=p.numel(), offset=at)
            p.data = held.view(p.shape).copy_(p.detach())
            at += -(-p.nbytes // 64) * 64

    def protect(self, *_: Any) -> None:
        self._allow(mmap.PROT_READ)

    def unprotect(self, *_: Any) -> None:
        self._allow(mmap.PROT_READ | mmap.PROT_WRITE)

    def _allow(self, access: int) -> None:
        if _libc.mprotect(ctypes.c_void_p(self._address), self._size, access):
            raise OSError(ctypes.get_errno(), "mprotect")


def train(method: str, fused: bool, attach: bool = False, **options: Any) -> nn.Module:
    """Take three steps; evaluate, save and merge a copy between forward and backward."""
    model = lora_mlp()
    pages = Pages(model)
    if attach:
        from eflat_ext import EFlatPerturbation

        trained = [p for p in model.parameters() if p.requires_grad]
        base = optimizer = torch.optim.AdamW(trained, lr=1e-2)
        base.register_step_pre_hook(lambda *_: pages.protect())  # before the perturbation's own
        perturbation = EFlatPerturbation(model, rho=0.3, **options).attach(base)
    else:
        if method == "eflat":
            options["fused_step"] = fused
        optimizer = CREATE[method](model, torch.optim.AdamW, lr=1e-2, rho=0.3, **options)
        base, perturbation = optimizer.base, optimizer.perturbation
    # A fused step is one operator. Any other begins to write where the base optimizer does.
    (optimizer if fused else base).register_step_pre_hook(pages.unprotect)
    base.register_step_post_hook(pages.protect) if not fused else None
    optimizer.register_step_post_hook(pages.protect)
    pages.protect()

    def closure(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        model.eval()
        with torch.no_grad():
            loss_of(model, batch)
        copy.deepcopy(model).merge_and_unload()
        model.state_dict()
        model.train()
        loss.backward()
        return loss

    for batch in batches(3):
        if method == "eflat":
            closure(batch)
            optimizer.step()
        else:
            optimizer.step(lambda batch=batch: closure(batch))
        optimizer.state_dict()
        perturbation.points()
    return model


if __name__ == "__main__":
    for onto in ("A", "B", "both"):
        for fused in (True, False):
            train("eflat", fused, onto=onto)
        train("eflat", False, attach=True, onto=onto)
        train("flat", False, onto=onto)
    train("lora-sam", False)
    print("no write", flush=True)
    # A write between steps is a segmentation fault.
    model = lora_mlp()
    Pages(model).protect()
    print("written next", flush=True)
    with torch.no_grad():
        next(model.parameters()).add_(1)
