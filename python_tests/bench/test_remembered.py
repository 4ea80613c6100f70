"""bench.methods.remembered and bench.experiments.batch_rise, example by example."""

import copy
import math

import pytest
import torch
from models import lora_gpt2
from tiny_model import make_rows, save_tiny_model, write_csv
from torch.nn.functional import cross_entropy

from bench.experiments import batch_rise
from bench.methods import remembered
from bench.methods.remembered import FactorGradients, RememberedLoRASAM, examples_of
from eflat_ext.lab.data.tables import InputError
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lora import find_pairs

RHO = 0.3


@pytest.fixture
def model(tmp_path):
    """Return a classifier with adapters whose B is not zero, without dropout."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        save_tiny_model(tmp_path), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    for pair in find_pairs(model):
        torch.nn.init.normal_(pair.parameter_B, std=0.1)
    return model.double().train()


def batch(*numbers):
    """Return a batch of examples of different lengths by their numbers; padding is token 0."""
    rows = [[2 + (7 * n + k) % 80 for k in range(3 + n % 5)] for n in numbers]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.tensor(numbers) % 2


def backward(model, numbers):
    model.zero_grad()
    inputs, labels = batch(*numbers)
    loss = cross_entropy(model(**inputs).logits, labels)
    loss.backward()
    return loss.detach()


def factors(model):
    return [f for pair in find_pairs(model) for f in (pair.parameter_A, pair.parameter_B)]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_examples_are_identified_without_padding():
    assert examples_of(batch(1, 4)[0]) == [*examples_of(batch(1)[0]), *examples_of(batch(4)[0])]


def test_each_examples_gradient_is_its_own(model):
    gradients = [FactorGradients(pair) for pair in find_pairs(model)]
    backward(model, [3, 6, 9])
    rows = torch.cat([one.rows() for one in gradients], dim=1)
    torch.testing.assert_close(rows.sum(0), flat(f.grad for f in factors(model)))
    for row, number in zip(rows, [3, 6, 9], strict=True):
        backward(model, [number])
        torch.testing.assert_close(row, flat(f.grad for f in factors(model)) / 3)


def test_a_step_is_perturbed_along_its_examples_last_gradients(model):
    twin = copy.deepcopy(model)
    sizes = [f.numel() for f in factors(model)]
    optimizer = RememberedLoRASAM(model, rho=RHO, lr=0.01, weight_decay=0.0)
    left = {}
    for numbers in ([1, 2, 3], [4, 5, 6], [3, 4, 7], [8, 9, 10], [7, 1, 2]):
        clean = flat(factors(model))
        twin.load_state_dict(model.state_dict())
        expected = [factor.data for factor in factors(twin)]
        known = [left[n] for n in numbers if n in left]
        for k in range(0, len(sizes), 2) if known else ():
            gradients = sum(known).split(sizes)[k : k + 2]
            for factor, gradient in zip(expected[k : k + 2], gradients, strict=True):
                factor += RHO * (gradient / torch.cat(gradients).norm()).view_as(factor)
        # The gradient is that of the twin, whose factors were moved.
        loss = backward(twin, numbers)
        gradient = flat(f.grad for f in factors(twin))
        optimizer.zero_grad()
        found = optimizer.step(lambda numbers=numbers: backward(model, numbers))
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(flat(f.grad for f in factors(model)), gradient)
        # AdamW stepped from the clean factors, by about its learning rate at most.
        assert 0 < (flat(factors(model)) - clean).abs().max() < 0.05
        for n in numbers:
            backward(twin, [n])
            left[n] = flat(f.grad for f in factors(twin)) / len(numbers)


def test_what_is_not_finite_is_not_remembered(model):
    optimizer = RememberedLoRASAM(model, rho=RHO, lr=0.01)

    def overflows():
        model.zero_grad()
        inputs, labels = batch(1, 2)
        logits = model(**inputs).logits * torch.tensor([[math.inf], [1.0]])
        cross_entropy(logits, labels).backward()

    optimizer.step(overflows)
    first, second = examples_of(batch(1, 2)[0])
    assert optimizer._memory.recall([first]) is None
    assert optimizer._memory.recall([first, second]).isfinite().all()


def test_a_second_pass_within_a_step_starts_from_clean_weights(model):
    optimizer = RememberedLoRASAM(model, rho=RHO, lr=0.0, weight_decay=0.0)
    optimizer.step(lambda: backward(model, [1, 2]))
    first, again, other = (model(**batch(*n)[0]).logits for n in ([1, 2], [1, 2], [3, 4]))
    assert torch.equal(first, again)
    # The others have no stored gradient: they run at the clean weights.
    assert torch.equal(other, model.eval()(**batch(3, 4)[0]).logits)
    assert not torch.equal(first, model(**batch(1, 2)[0]).logits)


def test_layers_that_are_not_linear_are_refused():
    model = lora_gpt2()  # of Conv1D layers
    with pytest.raises(InputError, match=r"lora-sam-memory: .*c_attn is no linear layer"):
        remembered.lora_sam_memory(FinetuneConfig(), model, 4)


def test_weights_are_clean_always_and_an_evaluation_too(model):
    optimizer = RememberedLoRASAM(model, rho=RHO, lr=0.01)
    optimizer.step(lambda: backward(model, [1, 2]))
    clean = flat(factors(model))
    plain = copy.deepcopy(model).eval()(**batch(1, 2)[0]).logits

    def fails():
        perturbed = model(**batch(1, 2)[0]).logits
        assert (perturbed - plain).abs().max() > 1e-4
        assert torch.equal(flat(factors(model)), clean)
        assert torch.equal(model.eval()(**batch(1, 2)[0]).logits, plain)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert torch.equal(flat(factors(model)), clean)


def test_rises_of_a_batch_along_other_gradients(tmp_path, monkeypatch):
    data = write_csv(tmp_path / "data.csv", make_rows(120))
    config = FinetuneConfig(
        model=save_tiny_model(tmp_path / "model"),
        max_length=32,
        data=data,
        test_size=20,
        batch_size=8,
        steps=24,
        lr=1e-2,
        rank=4,
        device="cpu",
    )
    rows = list(batch_rise.rows_of(32, 0, config))
    assert [row["step"] for row in rows[:: len(batch_rise.DIRECTIONS)]] == [4, 8, 12, 16, 20, 24]
    remembered = [row for row in rows if row["direction"] == "remembered"]
    # In the first epoch no gradient is stored.
    assert remembered[0]["rise"] == 0 and all(row["rise"] != 0 for row in remembered[1:])
    assert list(batch_rise.rows_of(32, 0, config)) == rows
    # Close to the weights no direction of this radius rises faster than the batch's own.
    monkeypatch.setattr(batch_rise, "RHO", 1e-3)
    rows = list(batch_rise.rows_of(32, 0, config))
    assert all(row["rise"] < 1.01 * row["own rise"] and row["own rise"] > 0 for row in rows)
    assert any(row["rise"] > 0.2 * row["own rise"] for row in rows)


def test_the_table_of_rises_sums_over_quarters_and_all_steps():
    rows = [
        {"examples": "64", "seed": seed, "step": step, "direction": name}
        | {"cosine": 0.5, "rise": rise, "own rise": own}
        for name in batch_rise.DIRECTIONS
        for seed, rise in (("0", 0.5), ("1", 1.0))
        for step, own in ((32, 2.0), (64, 2.0), (96, 2.0), (128, 1.5))
    ]
    ((title, head, lines),) = batch_rise.tables(rows)
    assert title == "64 examples, share of the rise (cosine), 2 seeds"
    quarters = ["steps 1 to 32", "steps 33 to 64", "steps 65 to 96", "steps 97 to 128"]
    assert head[1:] == [*quarters, "all steps"]
    cells = [*["0.38 (0.50)"] * 3, "0.50 (0.50)", "0.40 (0.50)"]  # 6 of 15 in all
    assert lines == [[name, *cells] for name in batch_rise.DIRECTIONS]
