"""Measure the sharpness that LoRA and EFlat-LoRA reach on a few movie reviews.

python examples/sharpness.py [--steps 20]
"""

import cyclopts

from eflat_ext.analysis import sharpness
from eflat_ext.analysis.full_space import mean_loss
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.measure import trained_models


def main(steps: int = 20, rho: float = 0.2) -> None:
    """Train with both methods from the same start, then measure on the training sentences.

    Args:
        steps: Optimizer steps, 8 sentences each.
        rho: Radius of the perturbations.
    """
    config = FinetuneConfig(
        train_size=64,
        validation_size=0,
        test_size=16,
        steps=steps,
        batch_size=8,
        lr=5e-3,
        rho=rho,
    )
    task = comparison.prepare(config)
    tokens = task.train
    batches = trained_models.make_batches(
        task.tokenizer, tokens.inputs, tokens.labels, 32, task.device
    )
    for method in ("lora", "eflat"):
        model, optimizer = comparison.build(config, task, method, seed=0)
        comparison.train(config, task, method, 0, model, optimizer)
        given = (model, trained_models.loss, batches)
        clean = mean_loss(*given)
        worst = sharpness.worst_case(*given, rho)
        transferred = sharpness.worst_case(*given, rho, transfer="B")
        random = sharpness.average_case(*given, rho, samples=3, clean_loss=clean)
        print(
            f"{method:5}  loss {clean:.4f}, rise within {rho}: worst {worst:.4f}, "
            f"by the transfer {transferred:.4f}, random {random.mean:.1e} "
            f"± {random.standard_error:.0e}"
        )


if __name__ == "__main__":
    cyclopts.run(main)
