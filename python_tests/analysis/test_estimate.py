"""Estimates of the full-space gradient equal the paper's equations with (n, m) matrices."""

import pytest
import torch
from models import lora_mlp, loss_of
from sharpness_case import DATA, gradient_of, trained_mlp

from eflat_ext import reference
from eflat_ext.analysis.estimate import ESTIMATES, estimate_quality, mean_over_layers


def test_estimates_equal_the_papers_equations():
    model = trained_mlp()
    layers, gradient = gradient_of(model)
    rows = estimate_quality(model, loss_of, DATA, rtols=[None, 0.3])
    assert [row.estimate for row in rows[:6]] == list(ESTIMATES)
    assert len(rows) == 2 * 2 * 6 and len(mean_over_layers(rows)) == 12
    for layer in layers:
        pair, G = layer.pairs[0], gradient[layer.name]
        A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
        for rtol in (reference.default_rtol(A, B), 0.3):
            pinv_A, pinv_B = (torch.linalg.pinv(x, rtol=rtol) for x in (A, B))
            P_A, P_B = pinv_A @ A, B @ pinv_B
            mean = reference.full_space_gradient(A, B, s * B.T @ G, s * G @ A.T, s, rtol)
            unit = mean / mean.norm()
            expected = {
                "term A": G @ P_A,
                "term B": P_B @ G,
                "mean": mean,
                "tangent": G @ P_A + P_B @ G - P_B @ G @ P_A,
                "onto B": unit @ P_A,
                "onto A": P_B @ unit,
            }
            own = {r.estimate: r for r in rows if r.layer == layer.name and r.rtol == rtol}
            for name, X in expected.items():
                norm = float(X.norm()) / (1 if name.startswith("onto") else float(G.norm()))
                cosine = float((X * G).sum() / X.norm() / G.norm())
                assert own[name].norm_ratio == pytest.approx(norm, rel=1e-6), name
                assert own[name].cosine == pytest.approx(cosine, rel=1e-6), name
            share = torch.linalg.svdvals(G)[0] ** 2 / G.norm() ** 2
            assert own["mean"].top_share == pytest.approx(float(share), rel=1e-9)


def test_at_b_zero_only_the_row_space_of_a_is_estimated():
    rows = estimate_quality(lora_mlp(), loss_of, DATA)
    own = {row.estimate: row for row in rows if row.layer == "up"}
    assert own["term B"].cosine == 0 and own["term B"].norm_ratio == 0
    assert own["onto A"].norm_ratio == 0
    assert own["onto B"].norm_ratio == pytest.approx(1)
    assert own["mean"].norm_ratio == pytest.approx(own["term A"].norm_ratio / 2)
