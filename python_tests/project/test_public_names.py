"""Names that the documentation promises: exports, import paths, operator schemas, attributes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from eflat_case import eflat
from models import lora_mlp

import eflat_ext

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "eflat_ext").rglob("*.py"))

EXPORTS = [
    "EFlatLoRA",
    "EFlatPerturbation",
    "FlatLoRA",
    "LoRASAM",
    "build_info",
    "create_eflat_optimizer",
    "create_flat_optimizer",
    "create_lora_sam_optimizer",
    "foreach_perturb",
    "perturb",
]
# By module, for what the pages describe without an import statement.
PATHS = {
    "eflat_ext.trainer": "EFlatCallback PerturbationMixin eflat_optimizer flat_optimizer "
    "lora_sam_optimizer last_complete_checkpoint",
    "eflat_ext.engines.deepspeed": "attach CLIENT_STATE",
    "eflat_ext.ops": "perturb foreach_perturb",
    "eflat_ext.reference": "default_rtol full_space_gradient transfer tangent perturb "
    "foreach_perturb flat_lora_step eflat_lora_step lora_sam_step",
    "eflat_ext.sharpness": "worst_case average_case worst_direction transferred_direction rise",
    "eflat_ext.hessian": "hessian Spectrum",
    "eflat_ext.landscape": "random_direction hessian_directions slice_1d slice_2d line",
    "eflat_ext.full_space": "adapted_layers mean_loss gradients shifted Layer",
}
SCHEMAS = """\
perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, float scaling, float rho, str onto="B",
  float? rtol=None) -> (Tensor E, Tensor norm)

foreach_perturb(Tensor[] A, Tensor[] B, Tensor[] grad_A, Tensor[] grad_B, float[] scaling,
  float rho, str onto="B", str norm_scope="layer", float? rtol=None) -> (Tensor[] E, Tensor norms)

foreach_perturb_ema_(Tensor[] A, Tensor[] B, Tensor[] grad_A, Tensor[] grad_B, Tensor[] E,
  Tensor(a!)[] ema, Tensor(b!) skipped, float[] scaling, float rho, float beta, str onto="B",
  str norm_scope="layer", float? rtol=None) -> Tensor norms

foreach_bound(Tensor[] ema, Tensor[] B, float[] scaling, float rho,
  str norm_scope="layer") -> Tensor factors

foreach_adamw_step_(Tensor(a!)[] A, Tensor(b!)[] B, Tensor[] grad_A, Tensor[] grad_B, Tensor[] E,
  Tensor(c!)[] ema, Tensor(d!)[] exp_avg, Tensor(e!)[] exp_avg_sq, Tensor(f!)[] step,
  Tensor(g!) skipped, float[] scaling, float rho, float beta, float[] lr, float[] beta1,
  float[] beta2, float[] eps, float[] weight_decay, str onto="B", str norm_scope="layer",
  float? rtol=None) -> Tensor norms
"""


def documented() -> set[str]:
    """Return the dotted names in pages and in cross-references of docstrings."""
    names = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names |= set(re.findall(r"\b(?:eflat_ext|torch\.ops\.eflat)(?:\.[A-Za-z]\w*)+", text))
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("eflat_ext"):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        names |= set(re.findall(r":\w+:`~?(eflat_ext\.[\w.]+)`", text))
    return names


def test_exports_are_these():
    assert sorted(eflat_ext.__all__) == EXPORTS
    assert all(hasattr(eflat_ext, name) for name in EXPORTS)


@pytest.mark.parametrize("path", PATHS)
def test_public_modules_have_their_names(path):
    module = importlib.import_module(path)
    assert [name for name in PATHS[path].split() if not hasattr(module, name)] == []


def test_schemas_of_the_operators_are_these():
    found = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("eflat::")}
    assert found == {f"eflat::{' '.join(schema.split())}" for schema in SCHEMAS.split("\n\n")}


def test_documented_names_can_be_imported():
    names = documented()
    assert {"eflat_ext.trainer.eflat_optimizer", "torch.ops.eflat.perturb"} <= names
    missing = []
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def test_documented_attributes_exist():
    """Attributes are those of EFlat-LoRA's optimizer, or of one with two gradients."""
    optimizers = [eflat_ext.FlatLoRA, eflat(lora_mlp())]
    owners = {"optimizer": optimizers, "perturbation": [eflat_ext.EFlatPerturbation]}
    names = {"EFlatPerturbation": [eflat_ext.EFlatPerturbation]} | owners
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found |= set(
            re.findall(r"(?<![.\w])(optimizer|perturbation|EFlatPerturbation)\.(\w+)", text)
        )
    found.discard(("optimizer", "optimizer"))  # of Accelerate's wrapper
    assert {("optimizer", "averages"), ("optimizer", "first_step")} <= found
    assert [(o, n) for o, n in sorted(found) if not any(hasattr(x, n) for x in names[o])] == []


def test_importing_needs_torch_alone():
    """Modules that import torch alone does not load are this package's own."""
    code = (
        "import sys, torch; before = {name.partition('.')[0] for name in sys.modules}\n"
        "import eflat_ext, eflat_ext.ops, eflat_ext.reference, eflat_ext.optim.eflat\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["eflat_ext"]
