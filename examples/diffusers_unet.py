"""Fine-tune a diffusion model of diffusers on other images than it was trained on.

A small UNet learns, without LoRA, to draw the digits 0 to 4 of scikit-learn's images, by their
class. LoRA on its attention layers, trained by EFlat-LoRA, then teaches it 5 to 9.

    pip install diffusers scikit-learn cyclopts
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import cyclopts
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from peft import LoraConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn

from eflat_ext import EFlatPerturbation

SCHEDULE = DDPMScheduler(num_train_timesteps=200)


def small_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=10,
        attention_head_dim=8,
    )


def digits(low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return the images of some digits, 8x8 in [-1, 1], and their classes."""
    data = load_digits()
    images, labels = torch.tensor(data.images).float(), torch.tensor(data.target)
    images = images[:, None] / 8 - 1
    chosen = (labels >= low) & (labels <= high)
    return images[chosen], labels[chosen]


def loss_of(unet: Any, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the error of the noise that the model predicts."""
    noise = torch.randn(images.shape, generator=generator)
    times = torch.randint(0, len(SCHEDULE.timesteps), (len(images),), generator=generator)
    prompt = nn.functional.one_hot(labels, 10).float()[:, None]
    noisy = SCHEDULE.add_noise(images, noise, times)
    return nn.functional.mse_loss(unet(noisy, times, prompt).sample, noise)


def train(unet: Any, optimizer: Any, data: tuple[Tensor, Tensor], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    unet.train()
    for _ in range(steps):
        rows = torch.randint(0, len(data[0]), (16,), generator=generator)
        optimizer.zero_grad()
        loss_of(unet, data[0][rows], data[1][rows], generator).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(unet: Any, data: tuple[Tensor, Tensor]) -> float:
    """Return the loss on 200 images, with the same noise every time."""
    images, labels = (tensor[:200] for tensor in data)
    return loss_of(unet.eval(), images, labels, torch.Generator().manual_seed(1)).item()


def main(
    optimizer: Literal["AdamW", "Adafactor", "NAdam"] = "AdamW",
    rho: float = 0.05,
    steps: int = 200,
) -> None:
    """Train the base, then the adapter; save the adapter and load it into a new model.

    Args:
        optimizer: Class of torch.optim.
        rho: Radius of the perturbation.
        steps: Of the base, and of the adapter.
    """
    logging.set_verbosity_error()
    unet = small_unet()
    train(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3), digits(0, 4), steps)
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    new = digits(5, 9)
    before = evaluate(unet, new)

    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    own = getattr(torch.optim, optimizer)(trained, lr=2e-3)
    EFlatPerturbation(unet, rho=rho).attach(own)
    train(unet, own, new, steps)
    after = evaluate(unet, new)

    with tempfile.TemporaryDirectory() as folder:
        unet.save_lora_adapter(folder)
        other = small_unet()
        other.load_state_dict(base)
        other.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    print(f"loss on new digits: {before:.3f} before, {after:.3f} after LoRA")
    print(f"difference of the loaded adapter's loss: {abs(evaluate(other, new) - after):g}")


if __name__ == "__main__":
    cyclopts.run(main)
