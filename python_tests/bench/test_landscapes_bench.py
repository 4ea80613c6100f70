"""bench.experiments.landscapes: slices around an experiment's runs, and their figure."""

import pytest
import yaml
from tiny_model import make_rows, save_tiny_model, write_csv

from bench import csv_rows
from bench.experiments import landscapes
from eflat_ext.lab.experiment import runner


def test_slices_around_a_run_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "SENTENCES", 1000)
    content = {
        "settings": {
            "model": save_tiny_model(tmp_path / "model"),
            "data": write_csv(tmp_path / "data.csv", make_rows(300)),
            "max_length": 32,
            "steps": 8,
            "lr": 5e-3,
            "device": "cpu",
        },
        "tasks": {"words": {"train_size": 48, "validation_size": 40, "test_size": 60}},
        "methods": {"lora": {}, "eflat": {"tune": {"rho": [0.05, 0.1]}}},
        "tuning": {"seeds": [100]},
        "seeds": [0, 1],
        "sharpness": {"worst_rho": 0.1, "random_rho": 1.0, "layers": ["query", "value"]},
    }
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="lacks tuning runs of eflat"):
        list(landscapes.rows_of("eflat", 1, file))
    final = {
        row["method"]: row
        for row in csv_rows.read(runner.run(file))
        if row["stage"] == "final" and row["seed"] == "1"
    }
    rows = [row for m in ("lora", "eflat") for row in landscapes.rows_of(m, 1, file)]
    assert len(rows) == 2 * landscapes.DIRECTIONS * len(landscapes.XS)
    for row in rows:
        if row["x"] == 0:
            expected = float(final[row["method"]]["train_loss"])
            assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert len({row["loss"] for row in rows if row["x"] == 1}) == 2 * landscapes.DIRECTIONS

    # Rows of a file give the same figure every time.
    csv_rows.write(tmp_path / "rows.csv", rows)
    for name in ("one.svg", "two.svg"):
        landscapes.draw_figure(csv_rows.read(tmp_path / "rows.csv"), tmp_path / name)
    figure = (tmp_path / "one.svg").read_text()
    assert figure == (tmp_path / "two.svg").read_text()
    for words in ("EFlat-LoRA", "mean and range", "rise of the training loss"):
        assert words in figure
