"""Provoke the errors and warnings of the optimizers, and print each with its remedy.

python examples/troubleshooting.py
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from eflat_ext import EFlatLoRA, EFlatPerturbation, create_eflat_optimizer, create_flat_optimizer
from eflat_ext.trainer import EFlatCallback

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


def second_pass_in_eval_mode() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    loss_of(model).backward()
    optimizer.first_step()
    loss_of(model.eval()).backward()
    optimizer.second_step()


def second_optimizer() -> None:
    model = make_model()
    first = create_eflat_optimizer(model, ADAMW)
    second = create_eflat_optimizer(model, ADAMW, lr=first.param_groups[0]["lr"] / 2)
    loss_of(model).backward()
    second.step()
    first.step()


def optimizer_of_somebody_else() -> None:
    model = make_model()
    optimizer = create_eflat_optimizer(model, ADAMW)
    loss_of(model).backward()
    ADAMW([p for p in model.parameters() if p.requires_grad]).step()  # not optimizer.step()
    del optimizer


def attached_twice() -> None:
    model = make_model()
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    perturbation = EFlatPerturbation(model).attach(optimizer)
    perturbation.attach(optimizer)


def parameters_replaced() -> None:
    model = make_model()
    optimizer = create_eflat_optimizer(model, ADAMW)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    loss_of(model).backward()
    optimizer.step()


def engine_with_parameters_of_its_own() -> None:
    model = make_model()
    optimizer = create_eflat_optimizer(model, ADAMW)
    (group,) = optimizer.param_groups
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    loss_of(model).backward()
    optimizer.step()


def step_without_closure() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    loss_of(model).backward()
    optimizer.step()


def closure_that_accumulates() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    loss_of(model).backward()
    optimizer.step(lambda: loss_of(model).backward())  # without optimizer.zero_grad()


def second_half_never_came() -> None:
    model = make_model()
    optimizer = create_flat_optimizer(model, ADAMW)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.first_step()


def name_for_a_class() -> None:
    create_eflat_optimizer(make_model(), "adamw")  # type: ignore[arg-type]


def no_adapter() -> None:
    create_eflat_optimizer(Net(), ADAMW)


def frozen_factor() -> None:
    model = make_model()
    model.base_model.model.head.lora_B.default.weight.requires_grad_(False)
    create_eflat_optimizer(model, ADAMW)


def frozen_factor_of_both() -> None:
    model = make_model()
    model.base_model.model.head.lora_B.default.weight.requires_grad_(False)
    create_eflat_optimizer(model, ADAMW, onto="both")


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


def base_that_perturbs_by_itself() -> None:
    class SAM(torch.optim.SGD):  # as in SAM packages
        def first_step(self) -> None: ...

    create_eflat_optimizer(make_model(), SAM, lr=0.1)


def base_that_maximises() -> None:
    create_eflat_optimizer(make_model(), ADAMW, maximize=True)


def factors_of_a_layer_on_two_devices() -> None:
    model = make_model()
    model.base_model.model.head.lora_A.to("meta")
    create_eflat_optimizer(model, ADAMW)


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


def callback_and_optimizer() -> None:
    model = make_model()
    optimizer = create_eflat_optimizer(model, ADAMW)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
        )
        data = [{"x": torch.ones(4, 8)}]
        callbacks = [EFlatCallback()]  # the optimizer of this package would do
        Trainer(
            model, arguments, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None)
        ).train()


def radius_out_of_range() -> None:
    create_eflat_optimizer(make_model(), ADAMW, rho=-0.05)


REMEDIES: dict[Callable[[], None], str] = {
    model_left_in_eval_mode: "call model.train() before the training forward pass",
    second_pass_in_eval_mode: "call model.train() before the second pass, too",
    second_optimizer: "step the newer one; to change numbers alone, change its param_groups",
    optimizer_of_somebody_else: "step this package's, or attach an EFlatPerturbation to the other",
    attached_twice: "make a new EFlatPerturbation for each optimizer",
    parameters_replaced: "load without assign=True, or make the optimizer afterwards",
    engine_with_parameters_of_its_own: "attach to the engine: eflat_ext.engines.deepspeed.attach",
    step_without_closure: "step(closure), or first_step() and second_step(); in Trainer, the mixin",
    closure_that_accumulates: "zero_grad() in the closure; accumulate by the two half steps",
    second_half_never_came: "call abandon_step() when the second pass failed or was skipped",
    name_for_a_class: "give the class itself, torch.optim.AdamW",
    no_adapter: "call get_peft_model first; the adapter has to be a LoRA and active",
    frozen_factor: 'unfreeze it, or perturb the other one: onto="A"',
    frozen_factor_of_both: 'unfreeze it, or perturb the one that trains: onto="A"',
    parameters_of_another_model: "make the optimizer after the adapter, over its parameters",
    grouped_convolution: "nothing: the layer trains as with plain LoRA",
    base_needs_a_closure: "take an optimizer of one gradient: AdamW, SGD, Adafactor",
    wrapped_twice: "wrap the plain optimizer, once",
    base_prepared_on_its_own: "this package's optimizer around the plain one, then prepare that",
    base_that_perturbs_by_itself: "take the optimizer that it would be wrapped around",
    base_that_maximises: "negate the loss",
    factors_of_a_layer_on_two_devices: "move the whole layer; layers may be on several devices",
    copied_optimizer: "make a new one on the other model, then load_state_dict",
    checkpoint_of_another_rank: "resume with the LoraConfig that the checkpoint was made with",
    checkpoint_of_the_other_factor: "resume with the options that the checkpoint was made with",
    damaged_checkpoint: "resume from an earlier checkpoint",
    callback_and_optimizer: "the callback alone, or an optimizer of this package alone",
    radius_out_of_range: "give a number >= 0, or a function of the step that returns such",
}


def provoke(mistake: Callable[[], None]) -> str:
    """Make a mistake and return the error or the warning that follows."""
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
