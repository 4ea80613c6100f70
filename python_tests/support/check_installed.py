"""Check the installed package in a clean environment.

--train trains with it, too; --without-kernels expects pure Python.
"""

import sys

import torch

import eflat_ext
from eflat_ext import reference


def check_operators() -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for onto in ("B", "A"):
            A, grad_A = torch.randn(2, 8, 300, dtype=dtype)
            B, grad_B = torch.randn(2, 200, 8, dtype=dtype)
            E, norm = eflat_ext.perturb(A, B, grad_A, grad_B, 2.0, 0.05, onto)
            expected, expected_norm = reference.perturb(A, B, grad_A, grad_B, 2.0, 0.05, onto)
            error = float((E.double() - expected).norm() / expected.norm())
            assert error < bound, f"{dtype} onto {onto}: E is off by {error}"
            assert abs(float(norm / expected_norm) - 1) < bound, f"{dtype} onto {onto}: {norm}"

        both, norms = eflat_ext.foreach_perturb([A], [B], [grad_A], [grad_B], [2.0], 0.05, "both")
        E_A, E_B, size = reference.tangent(A, B, grad_A, grad_B, 2.0, 0.05)
        for name, E, expected in zip("AB", both, (E_A, E_B), strict=True):
            error = float((E.double() - expected).norm() / expected.norm())
            assert error < bound, f"{dtype} onto both: E of {name} is off by {error}"
        assert abs(float(norms[0] / size) - 1) < bound, f"{dtype} onto both: norm {norms[0]}"

    arguments = (A, B, grad_A, grad_B, 2.0, 0.05, "B", None)
    torch.library.opcheck(torch.ops.eflat.perturb.default, arguments)


def check_modules() -> None:
    """The CUDA module serves a CUDA torch, and is left alone by others."""
    info = eflat_ext.build_info()
    wanted = bool(info["cuda"]) and torch.version.cuda is not None
    assert ("eflat_ext._C_cuda" in sys.modules) == wanted
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("perturb", "foreach_perturb", "foreach_adamw_step_"):
        assert has_kernel(f"eflat::{name}", "CUDA") == wanted, f"{name}: CUDA kernels"
        assert has_kernel(f"eflat::{name}", "CPU") == info["kernels"], f"{name}: CPU kernels"


def train() -> None:
    """Train a tiny language model as README's plain loop does."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    base = transformers.GPT2LMHeadModel(config)
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc", "lm_head"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, lora)
    before = [p.detach().clone() for p in base.parameters() if not p.requires_grad]
    optimizer = eflat_ext.create_eflat_optimizer(model, torch.optim.AdamW, lr=3e-2, rho=0.05)
    ids = torch.randint(0, 8, (4, 16))
    losses = []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert optimizer.skipped_perturbations == 0 and optimizer.perturbation_norms
    assert losses[-1] < 0.9 * losses[0], losses
    after = [p for p in base.parameters() if not p.requires_grad]
    assert all(map(torch.equal, before, after)), "the base's weights changed"
    print(f"trained: loss {losses[0]:.3f} to {losses[-1]:.3f}", end="; ")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}")


assert "site-packages" in eflat_ext.__file__, f"not the installed package: {eflat_ext.__file__}"
assert not {"peft", "transformers", "numpy.testing"} & set(sys.modules), "a heavy import"
check_operators()
check_modules()
assert eflat_ext.build_info()["kernels"] != ("--without-kernels" in sys.argv[1:])
if "--train" in sys.argv[1:]:
    train()
print(f"torch {torch.__version__}, {eflat_ext.build_info()}: passed")
