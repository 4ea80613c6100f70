"""Time an optimizer step of EFlat-LoRA, fused and unfused, against AdamW on the same parameters.

    python -m bench.training.fused_step [--layers 4] [--rank 16] [--device cpu] [--json FILE]

The 7 linear modules of each layer of Llama-2-7B: four of 4096 x 4096, two of 11008 x 4096 and one
of 4096 x 11008; 32 layers make 224 pairs. float32, given gradients, no forward pass.

    AdamW foreach, fused   ``torch.optim.AdamW.step``, the base optimizer of the next two
    unfused, foreach       ``EFlatLoRA.step`` with fused_step=False around it: perturbation and
    unfused, fused         average, AdamW
    fused                  ``EFlatLoRA.step``: one operator
    perturb                ``foreach_perturb_ema_`` alone: EFlat-LoRA's work beyond AdamW
    operator               ``foreach_adamw_step_`` alone, without Python code around it

Bytes per element of a factor, float32, if second readings hit a cache:

    AdamW        28: weight, gradient and two moments read; weight and moments written (foreach
                 makes a pass per operation and moves several times that)
    fused        28, and for the perturbed factor 8 of its average
    unfused      perturbation 8, and for the perturbed factor 8 of its average; AdamW 28

Adding the perturbation in the next forward pass takes another 12 per element of the perturbed
factor (read the weight and the average, write their sum) and is not included. The floor is the
bytes of the fused step over the speed of a copy; on a CPU the multiply-adds of perturb_cpu.py take
longer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bench.timing import arguments, copy_of, interleaved, machine, new_plot, print_table, write_json
from eflat_ext import EFlatLoRA
from eflat_ext.optim.fused_adamw import adamw_arguments

SHAPES = {  # name: inputs, outputs
    **{name: (4096, 4096) for name in ("q", "k", "v", "o")},
    **{name: (4096, 11008) for name in ("gate", "up")},
    "down": (11008, 4096),
}


def lora_model(layers: int, rank: int, device: str) -> nn.Module:
    """Return a model of LoRA pairs whose base weights are on the meta device."""
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in SHAPES.items()})
            for _ in range(layers)
        )
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=list(SHAPES)))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            n, m = module.weight.shape
            value = torch.randn(n, m, device=device) / m**0.5
            module.weight = nn.Parameter(value)
            module.weight.grad = torch.randn(n, m, device=device) / n
    return model.train()


def eflat(layers: int, rank: int, device: str, fused_step: bool, **kind: bool) -> EFlatLoRA:
    model = lora_model(layers, rank, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(parameters, lr=1e-6, **kind)
    optimizer = EFlatLoRA(model, base, fused_step=fused_step)
    optimizer.step()  # creates AdamW's state
    return optimizer


def ran_perturbed(optimizer: EFlatLoRA) -> None:
    """Mark the gradients as those of a perturbed forward pass, which is not timed."""
    for factor in optimizer.perturbation.factors:
        factor.ran_perturbed = True


def at_the_perturbed_point(optimizer: EFlatLoRA) -> Callable[[], object]:
    def step() -> None:
        ran_perturbed(optimizer)
        optimizer.step()

    return step


def operators(optimizer: EFlatLoRA) -> tuple[Callable[[], object], Callable[[], object]]:
    ran_perturbed(optimizer)
    rows = optimizer.perturbation.operands()
    adamw = adamw_arguments(optimizer.base, rows.parameters)
    if adamw is None:
        raise SystemExit("the fused operator does not apply")
    averages = [torch.zeros_like(b, dtype=torch.float32) for b in rows.B]
    skipped = torch.zeros((), dtype=torch.int64, device=rows.A[0].device)
    arguments: dict[str, Any] = {
        "A": rows.A,
        "B": rows.B,
        "grad_A": rows.grad_A,
        "grad_B": rows.grad_B,
        "E": averages,
        "ema": averages,
        "skipped": skipped,
        "scaling": rows.scaling,
        "rho": 0.05,
        "beta": 0.9,
    }

    def perturb() -> None:
        torch.ops.eflat.foreach_perturb_ema_(**arguments)

    @torch.no_grad()
    def step() -> None:
        torch.ops.eflat.foreach_adamw_step_(**arguments, **adamw)

    return perturb, step


def on_gpu(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time as ``timing.interleaved`` does, by CUDA events."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-2, rounds):
        for name in random.sample(list(contenders), len(contenders)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            contenders[name]()
            end.record()
            torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(layers: int, rank: int, device: str, rounds: int) -> list[dict[str, object]]:
    size = (layers, rank, device)
    fused, of_operators = (eflat(*size, True, fused=True) for _ in range(2))
    unfused = {kind: eflat(*size, False, **{kind: True}) for kind in ("foreach", "fused")}
    perturb, operator = operators(of_operators)
    targets = sum(pair.B.numel() for pair in fused.pairs)
    elements = targets + sum(pair.A.numel() for pair in fused.pairs)
    floor = 28 * elements + 8 * targets
    source = torch.ones(floor // 8, device=device)
    copy = torch.empty_like(source)
    contenders = {
        "AdamW foreach": unfused["foreach"].base.step,
        "AdamW fused": unfused["fused"].base.step,
        "unfused, foreach": at_the_perturbed_point(unfused["foreach"]),
        "unfused, fused": at_the_perturbed_point(unfused["fused"]),
        "fused": at_the_perturbed_point(fused),
        "perturb": perturb,
        "operator": operator,
        "copy": copy_of(floor) if device == "cpu" else lambda: copy.copy_(source),
    }
    time = interleaved if device == "cpu" else on_gpu
    seconds = time(contenders, rounds)
    traffic = {
        "AdamW foreach": 28 * elements,
        "AdamW fused": 28 * elements,
        "unfused, foreach": 36 * elements + 8 * targets,
        "unfused, fused": 36 * elements + 8 * targets,
        "fused": floor,
        "perturb": 8 * elements + 8 * targets,
        "operator": floor,
        "copy": floor,
    }
    return [
        {
            "step": name,
            "seconds": seconds[name],
            "over_adamw": seconds[name] / seconds["AdamW fused"],
            "over_floor": seconds[name] / seconds["copy"],
            "bytes": traffic[name],
        }
        for name in contenders
    ]


def draw(rows: list[dict[str, object]], path: str) -> None:
    figure, axis = new_plot(figsize=(6, 2.6))
    bars = axis.barh([row["step"] for row in rows], [row["over_adamw"] for row in rows])
    axis.bar_label(bars, fmt="%.2f")
    axis.invert_yaxis()
    axis.set_xlabel("time of an optimizer step, torch's fused AdamW = 1")
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(options.layers, options.rank, options.device, options.rounds)
    name = machine() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}; {len(SHAPES) * options.layers} pairs, rank {options.rank}")
    print_table(
        ["step", "time (ms)", "AdamW fused = 1", "floor = 1", "MB"],
        [
            [
                str(row["step"]),
                f"{1e3 * row['seconds']:.2f}",
                f"{row['over_adamw']:.2f}",
                f"{row['over_floor']:.2f}",
                f"{row['bytes'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )
    write_json(options.json, rows)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
