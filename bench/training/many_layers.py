"""Time the forward passes of many tiny layers: the host's time for each layer.

    python -m bench.training.many_layers [--layers 200] [--runs 5] [--json FILE]

200 linear layers of 32x32 with adapters of rank 4 have so little to compute that EFlat-LoRA's work
in each layer's forward pass is most visible. Whole steps of EFlat-LoRA and plain LoRA take turns;
figures are ratios to plain LoRA's, of the step and of forward and backward passes alone. The floor
is one addition for each layer and pass, about 2 us with its backward.
"""

import json
import statistics
import subprocess
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bench.timing import arguments, interleaved, machine, print_table, write_json
from eflat_ext import create_eflat_optimizer

OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}


def model_of(layers):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
    config = LoraConfig(r=4, target_modules=[str(i) for i in range(layers)])
    return get_peft_model(net, config).train()


def contenders(layers):
    """Return a step, and forward and backward alone, with and without EFlat-LoRA."""
    x = torch.randn(8, 32)
    found = {}
    for name in ("lora", "eflat"):
        model = model_of(layers)
        if name == "eflat":
            optimizer = create_eflat_optimizer(model, torch.optim.AdamW, **OPTIONS)
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, **OPTIONS)

        def passes(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(x).square().mean().backward()

        def step(passes=passes, optimizer=optimizer):
            passes()
            optimizer.step()

        step()
        found |= {f"{name} step": step, f"{name} passes": passes}
    return found


def measure(layers):
    seconds = interleaved(contenders(layers), rounds=25, at_least=0.1)
    return [seconds[f"eflat {what}"] / seconds[f"lora {what}"] for what in ("step", "passes")]


def main():
    parser = arguments(__doc__, plot=False)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", action="store_true", help="a single run, printed as JSON")
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args.layers)))
    # The memory layout of a process shifts ratios by percents, so each run is a process.
    command = [
        sys.executable,
        "-m",
        "bench.training.many_layers",
        "--one",
        "--layers",
        str(args.layers),
    ]
    runs = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        for _ in range(args.runs)
    ]
    rows = []
    for i, what in enumerate(("whole step", "forward and backward")):
        x = [run[i] for run in runs]
        rows.append(
            {"what": what, "ratio": statistics.median(x), "least": min(x), "largest": max(x)}
        )
    print(f"{machine()}; {args.layers} layers of 32x32, rank 4")
    header = ["", "EFlat-LoRA / LoRA", "least", "largest"]
    columns = ("ratio", "least", "largest")
    print_table(header, [[row["what"], *(f"{row[c]:.3f}" for c in columns)] for row in rows])
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
