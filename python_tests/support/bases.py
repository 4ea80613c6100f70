"""Every optimizer class of torch and pytorch_optimizer, with arguments that make it train."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from models import trainable
from torch import Tensor, nn
from torch.optim import Optimizer

CLASSES: dict[str, type[Optimizer]] = {
    f"{package.__name__}.{name}": cls
    for package in (torch.optim, pytorch_optimizer)
    for name, cls in sorted(vars(package).items())
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in trainable(model) if parameter.dim() == 2]


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    rest = [parameter for parameter in trainable(model) if parameter.dim() != 2]
    return [{"params": matrices(model), "use_muon": True}, {"params": rest, "use_muon": False}]


class RhoSchedule:
    """Stand in for the scheduler of rho that GSAM asks for."""

    def step(self) -> float:
        return 0.05


# Values of arguments without a default, by their names.
ARGUMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "params": trainable,
    "model": lambda model: model,
    "optimizer": lambda model: torch.optim.AdamW(trainable(model), lr=0.01),
    "base_optimizer": lambda model: torch.optim.SGD,
    "rho_scheduler": lambda model: RhoSchedule(),
    "num_iterations": lambda model: 10,
    "num_data": lambda model: 32,
}
# Other values of the first one.
FIRST = {
    "torch.optim.Muon": matrices,
    "pytorch_optimizer.SpectralSphere": matrices,
    **{
        f"pytorch_optimizer.{name}": muon_groups
        for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
    },
    "pytorch_optimizer.ScheduleFreeWrapper": lambda model: torch.optim.SGD(
        trainable(model), lr=0.01
    ),
}
# For those that would not move within three steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.AdaShift": {"keep_num": 1},
    "pytorch_optimizer.RAdam": {"degenerated_to_sgd": True},
    "pytorch_optimizer.ScheduleFreeRAdam": {"silent_sgd_phase": False},
    "pytorch_optimizer.TRAC": {"s_prev": 0.1},
}
DIFFERENTIATE_TWICE = {"pytorch_optimizer.AdaHessian", "pytorch_optimizer.SophiaH"}
NEED_A_LOSS = {"pytorch_optimizer.AliG"}  # from a closure that may have evaluated it before

# Those that cannot be a base, by what the error says.
REFUSED = {
    **dict.fromkeys(
        [f"pytorch_optimizer.{name}SAM" for name in ("", "B", "Friendly", "G", "Look", "W")],
        "perturbs the weights itself",
    ),
    "torch.optim.LBFGS": "needs no closure",
    "pytorch_optimizer.LBFGS": "needs no closure",
    "pytorch_optimizer.LOMO": "steps each parameter within it",
    "pytorch_optimizer.AdaLOMO": "steps each parameter within it",
    "pytorch_optimizer.SafeFP16Optimizer": "with param_groups",
    "torch.optim.SparseAdam": "does not support dense gradients",  # as it says itself
}
REFUSE_DENSE_GRADIENTS = {"torch.optim.SparseAdam"}


def create(name: str, model: nn.Module) -> Optimizer:
    """Return a new optimizer of what a model trains."""
    cls = CLASSES[name]
    needed = [
        parameter.name
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    arguments = {key: ARGUMENTS[key](model) for key in needed}
    if name == "pytorch_optimizer.GSAM":
        arguments["base_optimizer"] = torch.optim.SGD(trainable(model), lr=0.01)
    if name in FIRST:
        arguments[needed[0]] = FIRST[name](model)
    return cls(**arguments, **OPTIONS.get(name, {}))


def closure_of(name: str, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a closure that zeroes, runs a loss and its backward pass."""

    @torch.enable_grad()  # AliG's step does not
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward(create_graph=name in DIFFERENTIATE_TWICE)
        return value

    return closure
