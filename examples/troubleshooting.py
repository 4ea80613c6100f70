"""Provokes the errors and warnings of the optimizers, and prints each beside what to do.

python examples/troubleshooting.py
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from eflat_ext import create_eflat_optimizer, create_flat_optimizer
from eflat_ext.optimizers import EFlatLoRA

ADAMW = torch.optim.AdamW


class Net(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, groups=groups)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean(-1))


def make_model(groups: int = 1) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["conv", "head"])
    return get_peft_model(Net(groups), config).train()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 4, 8)).square().mean()


def model_left_in_eval_mode() -> None:
    model = make_model().eval()
    optimizer = create_eflat_optimizer(model, ADAMW)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def second_optimizer() -> None:
    model = make_model()
    first = create_eflat_optimizer(model, ADAMW)
    create_eflat_optimizer(model, ADAMW, lr=first.param_groups[0]["lr"] / 2)


def step_without_closure() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    loss_of(model).backward()
    optimizer.step()


def second_half_never_came() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.first_step()


def no_adapter() -> None:
    create_eflat_optimizer(Net(), ADAMW)


def frozen_factor() -> None:
    model = make_model()
    model.base_model.model.head.lora_B.default.weight.requires_grad_(False)
    create_eflat_optimizer(model, ADAMW)


def parameters_of_another_model() -> None:
    EFlatLoRA(make_model(), ADAMW(make_model().parameters()))


def grouped_convolution() -> None:
    create_eflat_optimizer(make_model(groups=2), ADAMW)


def base_needs_a_closure() -> None:
    create_eflat_optimizer(make_model(), torch.optim.LBFGS)


def wrapped_twice() -> None:
    model = make_model()
    EFlatLoRA(model, create_eflat_optimizer(model, ADAMW))


def base_prepared_on_its_own() -> None:
    base = Accelerator(cpu=True).prepare(ADAMW((model := make_model()).parameters()))
    EFlatLoRA(model, base)


def base_that_moves_weights_by_itself() -> None:
    class ScheduleFree(torch.optim.SGD):  # the two methods of schedule-free optimizers
        def train(self) -> None: ...

        def eval(self) -> None: ...

    create_eflat_optimizer(make_model(), ScheduleFree, lr=0.1)


def base_that_maximises() -> None:
    create_eflat_optimizer(make_model(), ADAMW, maximize=True)


def several_devices_in_one_model() -> None:
    model = make_model()
    model.base_model.model.head.to("meta")
    create_eflat_optimizer(model, ADAMW)


def rank_beyond_the_kernels() -> None:
    config = LoraConfig(r=300, target_modules=["head"])
    create_eflat_optimizer(get_peft_model(Net(), config), ADAMW)


def data_parallel() -> None:
    model = make_model()
    optimizer = create_eflat_optimizer(model, ADAMW)
    model._replicate_for_data_parallel()(torch.ones(2, 4, 8))  # as nn.DataParallel does
    del optimizer


def copied_optimizer() -> None:
    copy.deepcopy(create_eflat_optimizer(make_model(), ADAMW))


def small_optimizer(r: int = 4, onto: str = "B") -> EFlatLoRA:
    config = LoraConfig(r=r, target_modules=["head"])
    return create_eflat_optimizer(get_peft_model(Net(), config), torch.optim.SGD, lr=0.1, onto=onto)


def checkpoint_of_another_rank() -> None:
    small_optimizer().load_state_dict(small_optimizer(r=8).state_dict())


def checkpoint_of_the_other_factor() -> None:
    small_optimizer().load_state_dict(small_optimizer(onto="A").state_dict())


def damaged_checkpoint() -> None:
    state = small_optimizer().state_dict()
    for entry in state["state"].values():
        entry["perturbation_ema"].fill_(float("nan"))
    small_optimizer().load_state_dict(state)


def radius_out_of_range() -> None:
    create_eflat_optimizer(make_model(), ADAMW, rho=-0.05)


REMEDIES: dict[Callable[[], None], str] = {
    model_left_in_eval_mode: "call model.train() before the training forward pass",
    second_optimizer: "call remove_hooks() of the first one, or change its param_groups",
    step_without_closure: "step(closure), or first_step() and second_step(); in Trainer, the mixin",
    second_half_never_came: "call abandon_step() when the second pass failed or was skipped",
    no_adapter: "call get_peft_model first; the adapter has to be a LoRA and active",
    frozen_factor: 'unfreeze it, or perturb the other one: onto="A"',
    parameters_of_another_model: "make the optimizer after the adapter, over its parameters",
    grouped_convolution: "nothing: the layer trains as with plain LoRA",
    base_needs_a_closure: "take an optimizer of one gradient: AdamW, SGD, Adafactor",
    wrapped_twice: "wrap the plain optimizer, once",
    base_prepared_on_its_own: "this package's optimizer around the plain one, then prepare that",
    base_that_moves_weights_by_itself: "take an optimizer that changes weights in step() alone",
    base_that_maximises: "negate the loss",
    several_devices_in_one_model: "one device, or DistributedDataParallel, or FSDP2",
    rank_beyond_the_kernels: "a smaller rank, or LoRA-SAM, which has no kernel of its own",
    data_parallel: "use DistributedDataParallel",
    copied_optimizer: "make a new one on the other model, then load_state_dict",
    checkpoint_of_another_rank: "resume with the LoraConfig that the checkpoint was made with",
    checkpoint_of_the_other_factor: "resume with the options that the checkpoint was made with",
    damaged_checkpoint: "resume from an earlier checkpoint",
    radius_out_of_range: "give a number >= 0, or a function of the step that returns such",
}


def provoke(mistake: Callable[[], None]) -> str:
    """The error or the warning that a mistake leads to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    warning = [w for w in caught if issubclass(w.category, UserWarning)][-1]
    return f"{warning.category.__name__}: {warning.message}"


def main() -> None:
    for mistake, remedy in REMEDIES.items():
        print(mistake.__name__.replace("_", " "))
        print(f"    {provoke(mistake)}")
        print(f"    -> {remedy}")


if __name__ == "__main__":
    main()
