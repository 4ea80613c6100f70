"""EFlatPerturbation: its claims, points and state, and models that change."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from eflat_case import LR, OPTIMIZERS, RHO, train
from models import (
    assert_same_bits,
    at_points,
    batches,
    lora_mlp,
    loss_of,
    train_on,
    trainable,
    weights,
)
from torch import Tensor, nn

import eflat_ext
from eflat_ext import EFlatPerturbation, create_eflat_optimizer


def test_another_models_state_is_refused_and_nothing_loaded() -> None:
    model = lora_mlp()
    train(model, eflat_ext.EFlatLoRA(model, OPTIMIZERS["SGD"](trainable(model))), batches(1))
    perturbation = EFlatPerturbation(model, rho=RHO)
    state = perturbation.state_dict()
    for change in ("missing", "shape", "nan"):
        bad = copy.deepcopy(state)
        name = next(iter(bad["averages"]))
        if change == "missing":
            del bad["averages"][name]
        elif change == "shape":
            bad["averages"][name] = bad["averages"][name][1:]
        else:
            bad["averages"][name][0, 0] = torch.nan
        bad["steps"] = 7
        with pytest.raises(ValueError, match="state_dict must have"):
            perturbation.load_state_dict(bad)
        assert perturbation.steps == 0


def test_it_claims_nothing_when_it_is_made() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    train(model, optimizer, batches(2))
    waiting = EFlatPerturbation(model, rho=RHO)
    model.eval()(batches(1)[0][0])  # no training pass
    train_on(model.train(), optimizer, [])
    optimizer.perturbation.check()
    loss_of(model, batches(1)[0]).backward()  # claims all
    with pytest.raises(RuntimeError, match="a newer perturbation"):
        optimizer.step()
    waiting.update()
    assert all(average.any() for average in waiting.averages.values())


def test_points_are_where_the_next_gradients_are_taken() -> None:
    for onto in ("A", "B", "both"):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO, onto=onto)
        train(model, optimizer, batches(3))
        x = batches(1)[0][0]
        with at_points(optimizer):
            expected = model.eval()(x)
        assert torch.equal(model.train()(x), expected)
        with optimizer.clean():
            points = optimizer.points()
            assert torch.equal(model(x), model.eval()(x))
            assert all(torch.equal(p, value) for p, value in points.items())
        model.train()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_onto_A_the_bound_follows_edits(scope: str) -> None:
    """Without the bound an edit of B gives 39 rho, ``scale_layer`` 10 rho."""
    model = lora_mlp()
    optimizer = create_eflat_optimizer(
        model, torch.optim.SGD, lr=LR, rho=RHO, onto="A", norm_scope=scope
    )
    train(model, optimizer, batches(4))

    def size() -> float:
        points, squares = optimizer.points(), []
        for pair in optimizer.pairs:
            E = points[pair.parameter_A] - pair.A
            squares.append(float((pair.scaling * pair.B @ E).detach().norm() ** 2))
        return max(squares) ** 0.5 if scope == "layer" else sum(squares) ** 0.5

    assert size() <= RHO * (1 + 1e-9)
    with torch.no_grad():
        for pair in optimizer.pairs:
            pair.parameter_B.mul_(40)
    model(batches(1)[0][0])
    assert size() == pytest.approx(RHO, rel=1e-9)
    for pair in optimizer.pairs:
        pair.layer.scale_layer(10.0)
    model(batches(1)[0][0])
    assert size() == pytest.approx(RHO, rel=1e-9)
    optimizer.rho = RHO / 2
    assert size() == pytest.approx(RHO / 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_have_the_dtype_of_the_factors(dtype: torch.dtype) -> None:
    model = lora_mlp(dtype)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=LR, rho=RHO)
    seen: list[Tensor] = []
    layer = model.base_model.model.up.lora_B["default"]
    for batch in batches(2, dtype):
        optimizer.zero_grad()
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
        loss_of(model, batch).backward()
        optimizer.step()
    average = next(iter(optimizer.averages.values()))
    assert average.dtype == torch.float32
    assert {value.dtype for value in seen} == {dtype}


def test_one_whose_constructor_raised_takes_nothing_over() -> None:
    """Nor does one that has claimed nothing yet; notebooks keep exceptions alive."""
    model = lora_mlp()
    head = [p for n, p in model.named_parameters() if "head" in n and p.requires_grad]
    with pytest.raises(ValueError, match="optimizer must train LoRA factors") as kept:
        eflat_ext.EFlatLoRA(model, torch.optim.SGD(head, lr=LR))
    waiting = EFlatPerturbation(model, rho=RHO)
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    train(model, optimizer, batches(3))
    assert kept.value is not None
    with pytest.raises(RuntimeError, match="a newer perturbation"):
        waiting.update()


def test_one_that_has_ended_says_so_and_perturbs_nothing() -> None:
    model = lora_mlp()
    base = torch.optim.SGD(trainable(model), lr=LR)
    perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
    train(model, base, batches(2))
    perturbation.remove()
    assert all(torch.equal(p, value) for p, value in perturbation.points().items())
    assert "perturbation_rho" not in base.param_groups[0]
    never = EFlatPerturbation(model, rho=RHO)
    never.remove()
    assert never.averages == {} and never.state_dict()["averages"] == {}


def test_a_forward_method_that_others_patch_stays_perturbed() -> None:
    """With functools.wraps, without it, or as a replacement; undone or not."""
    import functools

    for keep in (False, True):
        runs = []
        for patch in (None, "wraps", "plain"):
            model = lora_mlp()
            layer = model.base_model.model.up
            optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
            train(model, optimizer, batches(2))
            own = layer.forward
            if patch:
                around = lambda *a, own=own, **k: own(*a, **k)  # noqa: E731
                layer.forward = functools.wraps(own)(around) if patch == "wraps" else around
            train(model, optimizer, batches(2))
            if patch and not keep:
                layer.forward = own
            train(model, optimizer, batches(2))
            optimizer.remove_hooks()
            x = batches(1)[0][0]
            assert torch.equal(model(x), model.eval()(x))
            runs.append(weights(model))
        for other in runs[1:]:
            assert_same_bits(runs[0], other)


def test_clean_contexts_do_not_end_a_step_of_two_gradients() -> None:
    from models import CREATE

    model, other = lora_mlp(), lora_mlp()
    options = {"lr": LR, "rho": RHO}
    optimizer, plain = (CREATE["flat"](m, torch.optim.SGD, **options) for m in (model, other))
    for m, o in ((model, optimizer), (other, plain)):
        loss_of(m, batches(1)[0]).backward()
        o.first_step()
        loss_of(m, batches(1)[0]).backward()
    with optimizer.clean():
        optimizer.second_step()
    plain.second_step()
    assert_same_bits(weights(model), weights(other))
    loss_of(model, batches(1)[0]).backward()
    with optimizer.clean():
        optimizer.first_step()
        optimizer.abandon_step()
    assert torch.equal(model(batches(1)[0][0]), model.eval()(batches(1)[0][0]))


def test_one_created_under_inference_mode_perturbs() -> None:
    for onto in ("A", "B"):
        model = lora_mlp()
        perturbation = EFlatPerturbation(model, rho=RHO, onto=onto)
        with torch.inference_mode():
            model(batches(1)[0][0])  # claims
        for batch in batches(2):
            loss_of(model, batch).backward()
            perturbation.update()
        assert perturbation.steps == 2
        moved = [bool(average.any()) for average in perturbation.averages.values()]
        assert moved == [onto == "B"] * 2  # B = 0 carries nothing over to A


def test_a_computed_factor_is_named_and_trains_unperturbed() -> None:
    from torch.nn.utils import parametrize

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = lora_mlp()
    layer = model.base_model.model.up.lora_B["default"]
    parametrize.register_parametrization(layer, "weight", Twice())
    with pytest.warns(UserWarning, match=r"up \(Linear: a factor is computed"):
        optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    train(model, optimizer, batches(2))
    assert [pair.layer_name.split(".")[-1] for pair in optimizer.pairs] == ["down"]


def test_it_cannot_be_copied_with_its_model_and_models_can() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    train(model, optimizer, batches(2))
    with pytest.raises(TypeError, match="EFlatPerturbation cannot be copied or pickled"):
        copy.deepcopy(optimizer.perturbation)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"eflat" not in file.getvalue()
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        x = batches(1)[0][0]
        assert torch.equal(other.train()(x), model.eval()(x))
        model.train()


def test_onto_A_edits_through_data_are_followed() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO, onto="A")
    train(model, optimizer, batches(3))
    nn.utils.vector_to_parameters(
        20 * nn.utils.parameters_to_vector(trainable(model)), trainable(model)
    )
    for pair in optimizer.pairs:
        E = optimizer.points()[pair.parameter_A] - pair.A
        size = float((pair.scaling * pair.B @ E).detach().norm())
        assert size == pytest.approx(RHO, rel=1e-9)


def test_patches_put_on_and_taken_off_leave_nothing_behind() -> None:
    model = lora_mlp()
    layer = model.base_model.model.up
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    train(model, optimizer, batches(1))
    layer.forward = own
    train(model, optimizer, batches(1))
    optimizer.remove_hooks()
    assert "forward" not in vars(layer)
