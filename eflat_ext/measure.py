"""``eflat sharpness``: the instruments on everything trained, its tables and its file."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eflat_ext import trained as training
from eflat_ext.data import InputError
from eflat_ext.full_space import adapted_layers, gradients, mean_loss
from eflat_ext.run_folder import versions
from eflat_ext.trained import Loaded, MeasureConfig, Trained

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

ITERATIONS = 20
TRACE_PRODUCTS = 30


@dataclass(kw_only=True)
class SharpnessConfig(MeasureConfig):
    """Settings of ``eflat sharpness``."""

    rho: list[float] = field(default_factory=lambda: [0.05, 0.2])
    """Radii of the perturbation."""
    radius: Literal["absolute", "layer", "filter"] = "absolute"
    """What a radius is: the norm of the perturbation, or its ratio to the norm of each layer's
    weight, or of each of its rows."""
    norm_scope: Literal["layer", "global"] = "layer"
    """Each layer moves by a radius of its own, or all layers share one."""
    samples: int = 10
    """Random perturbations for the average case; 0 leaves it out."""
    hessian: list[Literal["full", "lora"]] = field(default_factory=list)
    """Also the Hessian's largest eigenvalue and trace: of the adapted layers' whole weights, of
    the factors. Each takes 50 products, of several gradients' time."""
    product: Literal["exact", "finite-difference"] = "exact"
    """How the Hessian is multiplied with."""
    estimate: bool = False
    """Also how good the estimate of the gradient by the factors' gradients is, in every layer."""
    rtol: list[float] | None = None
    """Cutoffs of the pseudo-inverses: the first for the transfer, all for --estimate; the default
    follows from a layer's type and shape."""
    output: Path | None = None
    """Write all numbers to this file, .csv or .json."""

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that is out of range."""
        super().check()
        if not self.rho:
            raise InputError("--rho needs at least one value")
        for rho in self.rho:
            if not (math.isfinite(rho) and rho >= 0):
                raise InputError(f"--rho is {rho}, but must not be less than 0")
        if self.samples != 0 and self.samples < 2:
            raise InputError(f"--samples is {self.samples}, but must be 0 or at least 2")
        for rtol in self.rtol or []:
            if not 1e-7 <= rtol < 1:
                raise InputError(f"--rtol is {rtol}, but must lie in 1e-7 to 1, without 1")
        if self.output is not None and self.output.suffix.lower() not in (".csv", ".json"):
            raise InputError(f"--output {self.output} must end in .csv or .json")


def run(places: Sequence[Path], config: SharpnessConfig) -> list[dict[str, Any]]:
    """Measure everything in ``places``, show progress and tables, and write ``config.output``.

    Returns:
        A row for each number: run, method, seed, measure, rho, value, standard_error.

    Raises:
        InputError: a folder or a setting cannot be used; the message names it.
    """
    from rich.console import Console

    config.check()
    runs = training.find(places)
    if config.output is not None:
        training.check_output(config.output)
    rows: list[dict[str, Any]] = []
    qualities: list[dict[str, Any]] = []
    with progress() as bars:
        for one in runs:
            bar = bars.add_task(one.name, total=_work(config))
            loaded = training.load(one, config)
            about = {"run": one.name, "method": one.method, "seed": one.seed}
            with training.named_errors(one):
                numbers = measure(one, loaded, config, partial(bars.advance, bar))
            rows += [about | number for number in numbers]
            if config.estimate and one.method != "full":
                qualities += [about | row for row in _estimates(loaded, config)]
            bars.update(bar, completed=_work(config))  # some have less to measure
            del loaded
            gc.collect()
    console = Console()
    console.print(_rises(rows, config))
    if config.hessian:
        console.print(_spectra(rows))
    for name in dict.fromkeys(row["run"] for row in qualities):
        console.print(_qualities([row for row in qualities if row["run"] == name]))
    if config.output is not None:
        _write(config, rows, qualities)
        console.print(f"numbers: {config.output}", highlight=False, soft_wrap=True)
    return rows


def measure(
    one: Trained, loaded: Loaded, config: SharpnessConfig, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """A row for each number of one trained model: measure, rho, value, standard_error."""
    from eflat_ext.sharpness import average_case, rise, transferred_direction, worst_direction

    model, batches, loss = loaded.model, loaded.batches, training.loss
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
    if one.method != "full" and config.radius != "filter":
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
        if space == "lora" and one.method == "full":
            continue
        from eflat_ext.hessian import hessian

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


def progress() -> Progress:
    """Progress bars on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _work(config: SharpnessConfig) -> int:
    count = 4 + 2 * len(config.rho) + config.samples * len(config.rho)
    return count + (ITERATIONS + TRACE_PRODUCTS) * len(config.hessian)


def _estimates(loaded: Loaded, config: SharpnessConfig) -> list[dict[str, Any]]:
    from eflat_ext.estimate import estimate_quality

    rtols: Sequence[float | None] = config.rtol or [None]
    found = estimate_quality(
        loaded.model, training.loss, loaded.batches, rtols=rtols, layers=loaded.layers
    )
    return [asdict(row) for row in found]


# --- tables and files --------------------------------------------------------------------


def _rises(rows: Sequence[dict[str, Any]], config: SharpnessConfig) -> Table:
    from rich.table import Table

    unit = {"absolute": "", "layer": " of each layer's norm", "filter": " of each row's norm"}
    table = Table(
        title=f"rise of the loss (nats) on the {config.part} part, "
        f"radius{unit[config.radius]} per {'model' if config.norm_scope == 'global' else 'layer'}"
    )
    table.add_column("run", no_wrap=True)
    for title in ("loss", "radius", "worst case", "by the transfer", "random"):
        table.add_column(title, justify="right")
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        loss = next(row["value"] for row in own if row["measure"] == "loss")
        for rho in config.rho:
            cells = [run, f"{loss:.4f}", f"{rho:g}"]
            for measure in ("worst", "onto B", "random"):
                row = next((r for r in own if r["measure"] == measure and r["rho"] == rho), None)
                cells.append("" if row is None else _figure(row))
            table.add_row(*cells)
    return table


def _spectra(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table

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
        table.add_row(run, *(_figure(own[m]) if m in own else "" for m in measures))
    return table


def _qualities(rows: Sequence[dict[str, Any]]) -> Table:
    """One run's estimates: in every cell the cosine, below it the ratio of norms."""
    from rich.table import Table

    from eflat_ext.estimate import ESTIMATES, Quality, mean_over_layers

    table = Table(title=f"{rows[0]['run']}: cosine and norm over those of the true gradient")
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


def _write(
    config: SharpnessConfig, rows: Sequence[dict[str, Any]], qualities: Sequence[dict[str, Any]]
) -> None:
    path = config.output
    assert path is not None
    try:
        if path.suffix.lower() == ".csv":
            _write_csv(path, rows)
            if qualities:
                _write_csv(path.with_name(f"{path.stem}-estimate.csv"), qualities)
            return
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        content: dict[str, Any] = {"versions": versions(), "settings": settings}
        content |= {"numbers": _plain(rows), "estimates": _plain(qualities)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise training.cannot_write(path, error) from None


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(_plain(rows))


def _plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """NaN and infinity as None, which is an empty cell of CSV and null of JSON."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: clean(value) for name, value in row.items()} for row in rows]
