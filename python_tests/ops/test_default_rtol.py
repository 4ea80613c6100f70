"""The cutoff that C++ takes by default (bindings/arguments.h) is ``reference.default_rtol``."""

import pytest
import torch
from strategies import DTYPES, generator, normal

import eflat_ext
from eflat_ext import reference

# The longest side is m, n or r; the cutoff of 32 bits at most ends at 1e-3, that of float64 begins
# at 1e-7. (What float64 has beyond that, sides of more than 4e8, no test can hold.)
SHAPES = [(40, 900, 3), (900, 40, 3), (5, 6, 200), (9000, 7, 2), (2, 2, 2)]


@pytest.mark.parametrize("n, m, r", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_cut_where_the_reference_does(dtype, n, m, r):
    """A direction just below the cutoff is left out of E, and one just above it is not."""
    rtol = reference.default_rtol(torch.empty(r, m, dtype=dtype), torch.empty(n, r, dtype=dtype))
    g = generator(0)
    grad_A, grad_B = torch.zeros(r, m, dtype=dtype), normal(g, n, r).to(dtype)
    for share, counts in ((0.98, False), (1.02, True)):
        A = torch.zeros(r, m, dtype=dtype)
        A[0, 0], A[1, 1] = 1024.0, share * rtol * 1024  # its singular values
        E, _ = eflat_ext.perturb(A, torch.eye(n, r, dtype=dtype), grad_A, grad_B, 1.0, 1e-6)
        assert bool(E[:, 1].any()) == counts
