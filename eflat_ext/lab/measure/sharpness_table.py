"""Measure the sharpness of trained models, and print and write it: ``eflat sharpness``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from eflat_ext.analysis.full_space import adapted_layers, gradients, mean_loss
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.data.validation import NOT_EMPTY, File, NonNegativeFloat
from eflat_ext.lab.finetune.config import Rtol
from eflat_ext.lab.finetune.versions import versions

from . import trained_models
from .config import MeasureConfig
from .each_model import RUN_COLUMNS, measure_each, run_columns
from .files import Columns, check_files, make_folder, write_csv, writing
from .trained_models import Loaded, Trained

if TYPE_CHECKING:
    from rich.table import Table

ITERATIONS = 20
TRACE_PRODUCTS = 30
_NUMBERS = (*RUN_COLUMNS, "measure", "rho", "value", "standard_error")
_PARTS = ("versions", "settings", "numbers", "estimates")  # of a JSON file


@dataclass(kw_only=True)
class SharpnessConfig(MeasureConfig):
    """Settings of ``eflat sharpness``."""

    rho: Annotated[list[NonNegativeFloat], NOT_EMPTY] = field(default_factory=lambda: [0.05, 0.2])
    """Radii of the perturbation."""
    radius: Literal["absolute", "layer", "filter"] = "absolute"
    """What a radius is: the norm of the perturbation, or its ratio to the norm of each layer's
    weight, or of each of its rows."""
    norm_scope: Literal["layer", "global"] = "layer"
    """Each layer moves by a radius of its own, or all layers share one."""
    samples: Annotated[int, Ge(0)] = 10
    """Random perturbations for the average case; 0 leaves it out."""
    hessian: list[Literal["full", "lora"]] = field(default_factory=list)
    """Also the Hessian's largest eigenvalue and trace: of the adapted layers' whole weights, of
    the factors. Each takes 50 products, of several gradients' time."""
    product: Literal["exact", "finite-difference"] = "exact"
    """How the Hessian is multiplied with."""
    estimate: bool = False
    """Also how good the estimate of the gradient by the factors' gradients is, in every layer."""
    rtol: list[Rtol] | None = None
    """Cutoffs of the pseudo-inverses: the first for the transfer, all for --estimate; the default
    follows from a layer's type and shape."""
    output: File | None = None
    """Write all numbers to this file, .csv or .json; those of --estimate go beside a NAME.csv as
    NAME-estimate.csv."""

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that is out of range."""
        super().check()
        if self.samples == 1:
            raise InputError("--samples must be 0 or at least 2, got 1")
        if self.output is not None and self.output.suffix.lower() not in (".csv", ".json"):
            raise InputError(f"--output must end in .csv or .json, got {self.output}")


def run(places: Sequence[Path], config: SharpnessConfig) -> list[dict[str, Any]]:
    """Measure the models in ``places``, show progress and tables, and write ``config.output``.

    Returns:
        A row for each number: run, method, seed, measure, rho, value, standard_error.

    Raises:
        InputError: a folder or a setting cannot be used; the message names it.
    """
    from rich.console import Console

    config.check()
    runs = trained_models.find(places)
    trained_models.check_use(config, runs)
    files = _files(config)
    if files:
        check_files(files, trained_models.data_of(runs, config))
    qualities: list[dict[str, Any]] = []

    def numbers_of(
        trained: Trained, loaded: Loaded, tick: Callable[[], None]
    ) -> list[dict[str, Any]]:
        numbers = measure(trained, loaded, config, tick)
        if config.estimate and trained.method != "full":
            qualities.extend(run_columns(trained) | row for row in _estimates(loaded, config))
        return numbers

    rows = measure_each(runs, config, _work(config), numbers_of)
    console = Console()
    console.print(_rises(rows, config))
    if config.hessian:
        console.print(_spectra(rows))
    for name in dict.fromkeys(row["run"] for row in qualities):
        console.print(_qualities([row for row in qualities if row["run"] == name]))
    for path in _write(files, config, rows, qualities):
        console.print(f"numbers: {path}", highlight=False, markup=False, soft_wrap=True)
    return rows


def measure(
    trained: Trained, loaded: Loaded, config: SharpnessConfig, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return a row for each number of one trained model: measure, rho, value, standard_error."""
    from eflat_ext.analysis.sharpness import (
        average_case,
        rise,
        transferred_direction,
        worst_direction,
    )

    model, batches, loss = loaded.model, loaded.batches, trained_models.loss
    layers = adapted_layers(model, loaded.layers)
    rows: list[dict[str, Any]] = []

    def add(measure: str, value: float, rho: float | None = None, error: float = math.nan) -> None:
        rows.append({"measure": measure, "rho": rho, "value": value, "standard_error": error})

    clean = mean_loss(model, loss, batches)
    add("loss", clean)
    tick()
    kind: dict[str, Any] = {"norm_scope": config.norm_scope, "radius": config.radius}
    directions = {}
    gradient, _ = gradients(model, loss, batches, layers)
    directions["worst"] = worst_direction(layers, gradient, **kind)
    tick()
    if trained.method != "full" and config.radius != "filter":
        rtol = config.rtol[0] if config.rtol else None
        directions["onto B"] = transferred_direction(
            model, loss, batches, layers, "B", rtol=rtol, **kind
        )
    tick()
    for name, direction in directions.items():
        for rho in config.rho:
            add(name, rise(model, loss, batches, layers, direction, rho, clean), rho)
            tick()
    for rho in config.rho if config.samples else []:
        average = average_case(
            model,
            loss,
            batches,
            rho,
            samples=config.samples,
            seed=config.seed,
            layers=loaded.layers,
            clean_loss=clean,
            on_sample=tick,
            **kind,
        )
        add("random", average.mean, rho, average.standard_error)
    for space in config.hessian:
        if space == "lora" and trained.method == "full":
            continue
        from eflat_ext.analysis.hessian import hessian

        found = hessian(
            model,
            loss,
            batches,
            space=space,
            eigenvalues=1,
            iterations=ITERATIONS,
            trace_products=TRACE_PRODUCTS,
            product=config.product,
            seed=config.seed,
            layers=loaded.layers,
            on_product=tick,
        )
        add(f"eigenvalue, {space}", found.eigenvalues[0], None, found.residuals[0])
        add(f"trace, {space}", found.trace, None, found.trace_standard_error)
    return rows


def _work(config: SharpnessConfig) -> int:
    count = 4 + 2 * len(config.rho) + config.samples * len(config.rho)
    return count + (ITERATIONS + TRACE_PRODUCTS) * len(config.hessian)


def _estimates(loaded: Loaded, config: SharpnessConfig) -> list[dict[str, Any]]:
    from eflat_ext.analysis.estimate import estimate_quality

    rtols: Sequence[float | None] = config.rtol or [None]
    found = estimate_quality(
        loaded.model, trained_models.loss, loaded.batches, rtols=rtols, layers=loaded.layers
    )
    return [asdict(row) for row in found]


# --- tables and files --------------------------------------------------------------------


def _rises(rows: Sequence[dict[str, Any]], config: SharpnessConfig) -> Table:
    from rich.table import Table
    from rich.text import Text

    unit = {"absolute": "", "layer": " of each layer's norm", "filter": " of each row's norm"}
    kinds = sorted({row["method"] == trained_models.ADAPTER for row in rows})
    where = [str(config.data) if own else f"the {config.part} part" for own in kinds]
    title = (
        f"rise of the loss (nats) on {' and '.join(where)}, "
        f"radius{unit[config.radius]} per {'model' if config.norm_scope == 'global' else 'layer'}"
    )
    table = Table(title=Text(title))
    table.add_column("run", no_wrap=True)
    for name in ("loss", "radius", "worst case", "by the transfer", "random"):
        table.add_column(name, justify="right")
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        loss = next(row["value"] for row in own if row["measure"] == "loss")
        for rho in config.rho:
            cells = [f"{loss:.4f}", f"{rho:g}"]
            for measure in ("worst", "onto B", "random"):
                row = next((r for r in own if r["measure"] == measure and r["rho"] == rho), None)
                cells.append("" if row is None else _figure(row))
            table.add_row(Text(run), *cells)
    return table


def _spectra(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Hessian")
    table.add_column("run", no_wrap=True)
    measures = [
        name
        for name in dict.fromkeys(row["measure"] for row in rows)
        if name.startswith(("eigenvalue", "trace"))
    ]
    for measure in measures:
        table.add_column(measure, justify="right")
    for run in dict.fromkeys(row["run"] for row in rows):
        own = {row["measure"]: row for row in rows if row["run"] == run}
        table.add_row(Text(run), *(_figure(own[m]) if m in own else "" for m in measures))
    return table


def _qualities(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table of one run's estimates: in each cell the cosine above the ratio of norms."""
    from rich.table import Table
    from rich.text import Text

    from eflat_ext.analysis.estimate import ESTIMATES, Quality, mean_over_layers

    title = f"{rows[0]['run']}: cosine and norm over those of the true gradient"
    table = Table(title=Text(title))
    table.add_column("layer", overflow="fold", min_width=12)
    table.add_column("cutoff", justify="right")
    for estimate in ESTIMATES:
        table.add_column(estimate, justify="right")
    paths = [row["layer"].replace(".", "/") for row in rows]
    prefix = os.path.commonpath(paths).replace("/", ".")
    lines: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["layer"], row["rtol"]), {})[row["estimate"]] = row
    for (layer, rtol), own in lines.items():
        cells = [f"{own[e]['cosine']:.2f}\n{own[e]['norm_ratio']:.2f}" for e in ESTIMATES]
        table.add_row(layer.removeprefix(f"{prefix}."), f"{rtol:.0e}", *cells)
    table.add_section()
    names = [one.name for one in fields(Quality)]
    means = mean_over_layers([Quality(**{name: row[name] for name in names}) for row in rows])
    for k in range(0, len(means), len(ESTIMATES)):
        group = means[k : k + len(ESTIMATES)]
        cells = [f"{mean['cosine']:.2f}\n{mean['norm_ratio']:.2f}" for mean in group]
        table.add_row("mean", f"{group[0]['rtol']:.0e}", *cells)
    return table


def _figure(row: dict[str, Any]) -> str:
    text = f"{row['value']:.3g}"
    if not math.isnan(row["standard_error"]):
        text += f" ± {row['standard_error']:.1g}"
    return text


def _files(config: SharpnessConfig) -> dict[Path, Columns]:
    """Return the files to write, ``config.output`` first, with their columns or names in JSON."""
    path = config.output
    if path is None:
        return {}
    if path.suffix.lower() != ".csv":
        return {path: _PARTS}
    files: dict[Path, Columns] = {path: _NUMBERS}
    if config.estimate:
        from eflat_ext.analysis.estimate import Quality

        of_estimate = tuple(one.name for one in fields(Quality))
        files[path.with_name(f"{path.stem}-estimate.csv")] = (*RUN_COLUMNS, *of_estimate)
    return files


def _write(
    files: Mapping[Path, Columns],
    config: SharpnessConfig,
    rows: Sequence[dict[str, Any]],
    qualities: Sequence[dict[str, Any]],
) -> Iterator[Path]:
    """Write the files, and yield the path of each when it is written."""
    for (path, columns), numbers in zip(files.items(), (rows, qualities), strict=False):
        with writing(path, next(iter(files))):
            if path.suffix.lower() == ".csv":
                write_csv(path, columns, _plain(numbers))
            else:
                make_folder(path)
                path.write_text(_json(config, rows, qualities), encoding="utf-8")
        yield path


def _json(
    config: SharpnessConfig, rows: Sequence[dict[str, Any]], qualities: Sequence[dict[str, Any]]
) -> str:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    parts = (versions(), settings, _plain(rows), _plain(qualities))
    return json.dumps(dict(zip(_PARTS, parts, strict=True)), indent=2) + "\n"


def _plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with None for NaN and infinity: an empty cell in CSV, null in JSON."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: clean(value) for name, value in row.items()} for row in rows]
