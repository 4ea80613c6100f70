"""Check the installed package in a clean environment, for ``make test-wheel``."""

import sys

import torch

import eflat_ext
from eflat_ext import reference

assert "site-packages" in eflat_ext.__file__, f"not the installed package: {eflat_ext.__file__}"
assert not {"peft", "transformers", "numpy.testing"} & set(sys.modules), "a heavy import"

for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
    for onto in ("B", "A"):
        A, grad_A = torch.randn(2, 8, 300, dtype=dtype)
        B, grad_B = torch.randn(2, 200, 8, dtype=dtype)
        E, norm = eflat_ext.perturb(A, B, grad_A, grad_B, 2.0, 0.05, onto)
        expected, expected_norm = reference.perturb(A, B, grad_A, grad_B, 2.0, 0.05, onto)
        error = float((E.double() - expected).norm() / expected.norm())
        assert error < bound, f"{dtype} onto {onto}: E is off by {error}"
        assert abs(float(norm / expected_norm) - 1) < bound, f"{dtype} onto {onto}: norm {norm}"

    both, norms = eflat_ext.foreach_perturb([A], [B], [grad_A], [grad_B], [2.0], 0.05, "both")
    E_A, E_B, size = reference.tangent(A, B, grad_A, grad_B, 2.0, 0.05)
    for name, E, expected in zip("AB", both, (E_A, E_B), strict=True):
        error = float((E.double() - expected).norm() / expected.norm())
        assert error < bound, f"{dtype} onto both: E of {name} is off by {error}"
    assert abs(float(norms[0] / size) - 1) < bound, f"{dtype} onto both: norm {norms[0]}"

torch.library.opcheck(torch.ops.eflat.perturb.default, (A, B, grad_A, grad_B, 2.0, 0.05, "B", None))
print(f"torch {torch.__version__}, {eflat_ext.build_info()}: 1 passed, 0 failed")
