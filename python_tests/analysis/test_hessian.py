"""Eigenvalues and traces equal those of the dense Hessian and of another library."""

import copy
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from models import assert_same_bits, lora_bert, lora_mlp, loss_of, weights
from sharpness_case import DATA, flat, merged, trained_mlp
from torch import nn
from torch.func import functional_call

from eflat_ext.analysis.full_space import adapted_layers
from eflat_ext.analysis.hessian import hessian

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("hessian_eigenthings") is None, reason="hessian-eigenthings is absent"
)


@needs_library
@pytest.mark.parametrize("product", ["exact", "finite-difference"])
@pytest.mark.parametrize("space", ["full", "lora"])
def test_eigenvalues_and_trace_equal_the_dense_hessians(space, product):
    model = trained_mlp()
    if space == "full":
        W, loss = merged(model)
    else:
        pairs = [layer.pairs[0] for layer in adapted_layers(model)]
        names = {id(p): name for name, p in model.named_parameters()}
        factors = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
        W = flat(factors).detach()

        def loss(W):
            pieces = W.split([p.numel() for p in factors])
            own = {names[id(p)]: w.view_as(p) for p, w in zip(factors, pieces, strict=True)}
            return sum(
                nn.functional.cross_entropy(functional_call(model, own, (x,)), y) for x, y in DATA
            ) / len(DATA)

    H = torch.autograd.functional.hessian(loss, W)
    values = torch.linalg.eigvalsh(H)
    before = weights(model)
    found = hessian(
        model,
        loss_of,
        DATA,
        space=space,
        eigenvalues=2,
        iterations=60,
        trace_products=90,
        product=product,
        seed=1,
    )
    assert_same_bits(weights(model), before)
    assert found.size == W.numel()
    assert found.eigenvalues == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-5)
    assert abs(found.trace - float(H.trace())) < 5 * found.trace_standard_error
    assert found.trace_standard_error < 0.2 * float(values.abs().sum())
    for value, vector in zip(found.eigenvalues, found.vectors, strict=True):
        torch.testing.assert_close(H @ vector, value * vector, rtol=1e-3, atol=1e-4)


@needs_library
def test_eigenvalues_of_a_model_with_fused_attention():
    """In float32, both products agree up to the rounding of the finite difference."""
    model = lora_bert()
    tokens = torch.randint(1, 40, (8, 9))

    def loss_fn(model, tokens):
        return nn.functional.cross_entropy(model(tokens).logits, tokens[:, 0] % 3)

    options = {"eigenvalues": 1, "trace_products": 0, "iterations": 20}
    exact = hessian(model, loss_fn, [tokens], **options)
    difference = hessian(model, loss_fn, [tokens], product="finite-difference", **options)
    assert exact.eigenvalues[0] > 0
    assert difference.eigenvalues == pytest.approx(exact.eigenvalues, rel=0.02)
    assert math.isnan(exact.trace)


@needs_library
def test_eigenvalues_equal_those_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    model = trained_mlp()
    plain = copy.deepcopy(model).merge_and_unload().eval()
    parameters = [plain.up.weight, plain.down.weight]
    for p in plain.parameters():
        p.requires_grad_(any(p is q for q in parameters))
    operator = curvlinops.HessianLinearOperator(
        plain, nn.CrossEntropyLoss(), parameters, DATA, check_deterministic=False
    )
    expected = eigsh(operator.to_scipy(), k=2, which="LA")[0][::-1]
    options = {"eigenvalues": 2, "iterations": 60, "trace_products": 150}
    found = hessian(model, loss_of, DATA, **options)
    assert found.eigenvalues == pytest.approx(expected.tolist(), rel=1e-5)
    trace = float(curvlinops.hutchpp_trace(operator, num_matvecs=150))
    assert found.trace == pytest.approx(trace, abs=8 * found.trace_standard_error)


@needs_library
@pytest.mark.parametrize("space", ["full", "lora"])
def test_a_loss_that_is_not_finite_gives_nan(space):
    model = trained_mlp()
    found = hessian(model, lambda *_: torch.tensor(math.inf), DATA, space=space, eigenvalues=2)
    numbers = [*found.eigenvalues, *found.residuals, found.trace, found.trace_standard_error]
    assert len(numbers) == 6 and all(map(math.isnan, numbers))
    assert found.vectors.shape == (2, found.size) and bool(found.vectors.isnan().all())


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    with pytest.raises(ImportError, match="pip install 'hessian-eigenthings") as caught:
        hessian(lora_mlp(), loss_of, DATA)
    requirement = str(caught.value).split("'")[1]
    assert f'"{requirement}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
