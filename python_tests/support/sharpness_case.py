"""A model small enough to hold the Hessian of its adapted weights, and its merged form."""

import copy

import torch
from models import batches, lora_mlp, loss_of
from torch import nn
from torch.func import functional_call

from eflat_ext.analysis.full_space import adapted_layers, gradients

DATA = batches(2)


def trained_mlp(seed=0, dtype=torch.float64):
    """Return a model after some steps, whose Hessian has positive and negative eigenvalues."""
    model = lora_mlp(seed=seed, dtype=dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(15):
        optimizer.zero_grad()
        sum(loss_of(model, (x.to(dtype), y)) for x, y in DATA).backward()
        optimizer.step()
    model.zero_grad()
    return model


def merged(model):
    """Return all adapted weights as one vector, merged by PEFT, and the loss as a function of it.

    It shares no code with what is tested.
    """
    plain = copy.deepcopy(model).merge_and_unload().eval()
    names = ["up.weight", "down.weight"]
    start = {name: p.detach() for name, p in plain.named_parameters()}
    W = torch.cat([start[name].flatten() for name in names])

    def loss(flat):
        pieces = flat.split([start[name].numel() for name in names])
        own = {n: w.view_as(start[n]) for n, w in zip(names, pieces, strict=True)}
        return torch.stack(
            [
                nn.functional.cross_entropy(functional_call(plain, start | own, (x,)), y)
                for x, y in DATA
            ]
        ).mean()

    return W, loss


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient_of(model):
    layers = adapted_layers(model)
    return layers, gradients(model, loss_of, DATA, layers)[0]
