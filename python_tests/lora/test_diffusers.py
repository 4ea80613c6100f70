"""Models of diffusers, which hold PEFT's LoRA layers without being PEFT models."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CREATE, assert_same_bits, at_points, same_bits, trainable, weights
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore", "error:.*perturb")
SCHEDULE = diffusers.DDPMScheduler(num_train_timesteps=100)


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


MODELS = {"UNet": unet, "SD3 transformer": transformer}
every_model = pytest.mark.parametrize("kind", MODELS)
every_method = pytest.mark.parametrize("method", CREATE)


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    return model.train()


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Return the loss of noise prediction."""
    generator = torch.Generator().manual_seed(step)
    images, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    prompt = torch.randn(2, 3, 16, generator=generator)
    times = torch.randint(0, 100, (2,), generator=generator)
    noisy = SCHEDULE.add_noise(images, noise, times)
    inputs = {"encoder_hidden_states": prompt, "timestep": times}
    if isinstance(model, diffusers.SD3Transformer2DModel):
        inputs["pooled_projections"] = prompt.mean(1)
    return nn.functional.mse_loss(model(noisy, **inputs).sample, noise)


def within_a_step(kind: str, method: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return a model after two steps and a half, its optimizer and its clean weights."""
    model = adapted(kind)
    optimizer = CREATE[method](model, torch.optim.AdamW, lr=0.01, rho=1.0)
    for step in range(3):
        clean = weights(model)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if method != "eflat":
            optimizer.first_step()
            loss_of(model, step).backward()
        if step < 2:
            optimizer.step()
    return model, optimizer, clean


@pytest.mark.proves("diffusers", "gradients are taken at the perturbed point")
@every_method
@every_model
def test_gradients_are_those_of_the_points(kind: str, method: str) -> None:
    model, optimizer, clean = within_a_step(kind, method)
    assert len(optimizer.pairs) == len(trainable(model)) / 2
    with at_points(optimizer):
        other = copy.deepcopy(model)  # runs unperturbed
    other.zero_grad()
    loss_of(other, 2).backward()
    moved = weights(other)
    assert not all(same_bits(moved[name], clean[name]) for name in clean)
    for parameter, copied in zip(trainable(model), trainable(other), strict=True):
        assert same_bits(parameter.grad, copied.grad)


@pytest.mark.proves("diffusers", "saved and fused weights are clean, in the middle of a step too")
@every_method
@every_model
def test_saved_and_fused_weights_are_clean(kind: str, method: str, tmp_path: Path) -> None:
    model, _, clean = within_a_step(kind, method)
    plain = adapted(kind)
    plain.load_state_dict(clean, strict=False)  # a table of positions is a buffer
    for folder, one in (("mine", model), ("plain", plain)):
        one.save_lora_adapter(tmp_path / folder)
    saved, expected = (
        load_file(tmp_path / folder / "pytorch_lora_weights.safetensors")
        for folder in ("mine", "plain")
    )
    assert_same_bits(saved, expected)

    loaded = MODELS[kind]()
    base = {n.replace(".base_layer", ""): p for n, p in clean.items() if "lora_" not in n}
    loaded.load_state_dict(base, strict=False)
    loaded.load_lora_adapter(tmp_path / "mine", prefix=None, use_safetensors=True)
    with torch.no_grad():
        outputs = [loss_of(one.eval(), 9) for one in (model, plain, loaded)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[1])
    model.train()
    for one in (model, plain):
        one.fuse_lora()
    assert_same_bits(weights(model), weights(plain))


@pytest.mark.proves("diffusers", "gradient checkpointing changes no bit; a saved run resumes so")
@every_model
def test_checkpointing_and_resuming_change_no_bit(kind: str) -> None:
    found = []
    for way in ("plain", "checkpointed", "resumed"):
        model, optimizer, _ = within_a_step(kind, "eflat")
        if way == "resumed":
            buffer = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], buffer)
            buffer.seek(0)
            states = torch.load(buffer, weights_only=True)
            model = adapted(kind)
            optimizer = CREATE["eflat"](model, torch.optim.AdamW, lr=0.01, rho=1.0)
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        elif way == "checkpointed":
            model.enable_gradient_checkpointing()
        optimizer.zero_grad()
        for step in (3, 4):
            loss_of(model, step).backward()
        optimizer.step()
        found.append(weights(model))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
