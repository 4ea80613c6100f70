"""Measure slices of the loss around trained models, and draw them: ``eflat landscape``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.data.validation import File, PositiveFloat, PositiveInt
from eflat_ext.lab.finetune.screen import TITLES

from . import trained_models
from .config import MeasureConfig
from .each_model import RUN_COLUMNS, measure_each, named_errors
from .files import check_files, write_csv, writing
from .trained_models import Loaded, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_NUMBERS = (*RUN_COLUMNS, "sample", "x", "y", "loss")
_WIDTH = 6.75  # inches: two columns of a paper
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "eflat",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, and lines for print in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


@dataclass(kw_only=True)
class LandscapeConfig(MeasureConfig):
    """Settings of ``eflat landscape``."""

    directions: Literal["random", "hessian", "line"] = "random"
    """Random directions with every row as long as the weight's; the Hessian's eigenvectors of
    largest eigenvalue; or the line from the first adapter (0) to each other one (1)."""
    dimensions: Literal[1, 2] = 1
    """Curves or a map."""
    extent: PositiveFloat | None = None
    """The slice reaches from -extent to extent; by default 1. A line reaches this far beyond its
    ends, by default 0.5."""
    points: Annotated[int, Ge(3)] = 21
    """Points along each axis."""
    samples: PositiveInt = 1
    """Random directions that a curve is the mean of."""
    rise: bool = False
    """Draw the rise over the loss in the middle, to compare shapes; --points must be odd."""
    product: Literal["exact", "finite-difference"] = "exact"
    """How the Hessian is multiplied with."""
    output: File = Path("landscape.png")
    """The figure, NAME.png, .svg or .pdf; its numbers go beside it as NAME.csv."""

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that is out of range."""
        super().check()
        if self.directions == "line" and self.dimensions == 2:
            raise InputError("--directions line has one dimension, but --dimensions is 2")
        if self.rise and (self.points % 2 == 0 or self.directions == "line"):
            raise InputError("--rise needs an odd number of --points around a middle")
        if self.output.suffix.lower() not in FORMATS:
            raise InputError(f"--output must end in {', '.join(FORMATS)}, got {self.output}")


def run(places: Sequence[Path], config: LandscapeConfig) -> list[dict[str, Any]]:
    """Measure slices around the models in ``places``, draw them and write their numbers.

    Returns:
        A row for each number: run, method, seed, sample, x, y, loss.

    Raises:
        InputError: a folder or a setting cannot be used; the message names it.
    """
    from rich.console import Console

    config.check()
    runs = trained_models.find(places)
    trained_models.check_use(config, runs)
    along_line = config.directions == "line"
    if along_line and len(runs) < 2:
        raise InputError("--directions line needs two adapters or more")
    figure, numbers = config.output, config.output.with_suffix(".csv")
    check_files({figure: (), numbers: _NUMBERS}, trained_models.data_of(runs, config))
    first: Loaded | None = None
    if along_line:
        with named_errors(runs[0]):
            first = trained_models.load(runs[0], config)

    def slices_of(_: Trained, loaded: Loaded, tick: Callable[[], None]) -> list[dict[str, Any]]:
        return _slices(loaded, first, config, tick)

    rows = measure_each(runs[1:] if along_line else runs, config, _work(config), slices_of)
    with writing(numbers, figure):
        write_csv(numbers, _NUMBERS, rows)
    with writing(figure, figure):
        draw(rows, config, runs[0])
    Console().print(
        f"figure: {figure}\nnumbers: {numbers}", highlight=False, markup=False, soft_wrap=True
    )
    return rows


def _slices(
    loaded: Loaded, first: Loaded | None, config: LandscapeConfig, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    from eflat_ext.analysis import landscape
    from eflat_ext.analysis.full_space import adapted_layers

    model, batches, loss = loaded.model, loaded.batches, trained_models.loss
    options: dict[str, Any] = {"layers": loaded.layers, "on_point": tick}
    xs = _coordinates(config)
    if first is not None:
        losses = landscape.line(first.model, model, loss, batches, xs, **options)
        return [_row(0, x, 0.0, value) for x, value in zip(xs, losses, strict=True)]
    if config.directions == "hessian":
        directions = landscape.hessian_directions(
            model,
            loss,
            batches,
            config.dimensions,
            layers=loaded.layers,
            product=config.product,
            seed=config.seed,
            on_product=tick,
        )
    else:
        layers = adapted_layers(model, loaded.layers)
        count = 2 if config.dimensions == 2 else config.samples
        directions = [landscape.random_direction(layers, config.seed + k) for k in range(count)]
    if config.dimensions == 2:
        pair = (directions[0], directions[1])
        grid = landscape.slice_2d(model, loss, batches, pair, xs, xs, **options)
        return [
            _row(0, x, y, value)
            for y, line in zip(xs, grid, strict=True)
            for x, value in zip(xs, line, strict=True)
        ]
    return [
        _row(k, x, 0.0, value)
        for k, direction in enumerate(directions)
        for x, value in zip(
            xs, landscape.slice_1d(model, loss, batches, direction, xs, **options), strict=True
        )
    ]


def _row(sample: int, x: float, y: float, loss: float) -> dict[str, Any]:
    return {"sample": sample, "x": x, "y": y, "loss": loss}


def _coordinates(config: LandscapeConfig) -> list[float]:
    line = config.directions == "line"
    extent = config.extent or (0.5 if line else 1.0)
    low, high = (-extent, 1 + extent) if line else (-extent, extent)
    step = (high - low) / (config.points - 1)
    return [round(low + k * step, 12) for k in range(config.points)]


def _work(config: LandscapeConfig) -> int:
    if config.dimensions == 2:
        count = config.points**2
    else:
        count = config.points * (config.samples if config.directions == "random" else 1)
    return count + (20 if config.directions == "hessian" else 0)


# --- the figure --------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], config: LandscapeConfig, origin: Trained) -> None:
    """Draw the rows of :func:`run` as the figure ``config.output``.

    Args:
        rows: of all models.
        config: the settings.
        origin: the model that lines start from.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if config.rise:
        middle = {(r["run"], r["sample"]): r["loss"] for r in rows if r["x"] == r["y"] == 0}
        rows = [r | {"loss": r["loss"] - middle[r["run"], r["sample"]]} for r in rows]
    with matplotlib.rc_context(_STYLE):
        if config.dimensions == 2:
            figure = _maps(Figure, rows, config)
        else:
            figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
            _curves(figure, rows, config, origin)
        kind = config.output.suffix.lower()
        metadata = {"Date": None} if kind == ".svg" else None
        figure.savefig(config.output, dpi=300, metadata=metadata)


def _title(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the method, with the seed if the method has several."""
    title = TITLES.get(row["method"], "")
    if not title:
        return str(row["run"])
    if len({r["run"] for r in rows if r["method"] == row["method"]}) > 1:
        return f"{title}, seed {row['seed']}"
    return title


def _curves(
    figure: Figure, rows: Sequence[dict[str, Any]], config: LandscapeConfig, origin: Trained
) -> None:
    axes = figure.subplots()
    methods = list(dict.fromkeys(_method(row) for row in rows))
    for k, method in enumerate(methods):
        own = [row for row in rows if _method(row) == method]
        lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in own:
            lines.setdefault((row["run"], row["sample"]), []).append((row["x"], row["loss"]))
        xs = [x for x, _ in next(iter(lines.values()))]
        values = list(zip(*([y for _, y in line] for line in lines.values()), strict=True))
        color, style = _COLORS[k % len(_COLORS)], _LINES[k % len(_LINES)]
        mean = [statistics.fmean(column) for column in values]
        axes.plot(xs, mean, color=color, linestyle=style, linewidth=1.5, label=method)
        if len(lines) > 1:
            low, high = [min(column) for column in values], [max(column) for column in values]
            axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(_axis(config, 0))
    axes.set_ylabel(_loss(config))
    axes.margins(x=0)
    axes.grid(linewidth=0.4, alpha=0.4)
    several = len({(row["run"], row["sample"]) for row in rows}) > len(methods)
    title = "mean and range" if several else None
    if config.directions == "line":
        title = f"from {TITLES.get(origin.method, origin.name)} to"  # type: ignore[call-overload]
        for x in (0.0, 1.0):
            axes.axvline(x, color="0.4", linewidth=0.6)
    # Beside the axes, so that it covers no curve.
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        title=title,
        alignment="left",
    )


def _method(row: dict[str, Any]) -> str:
    return TITLES.get(row["method"], str(row["run"]))


def _maps(kind: Any, rows: Sequence[dict[str, Any]], config: LandscapeConfig) -> Figure:
    import numpy as np
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(row["run"] for row in rows))
    columns = 2 if len(names) in (2, 4) else min(len(names), 3)
    lines = math.ceil(len(names) / columns)
    figure: Figure = kind(
        figsize=(_WIDTH, 0.55 + lines * (_WIDTH - 0.9) / max(columns, 2)), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    levels = MaxNLocator(12).tick_values(min(losses, default=0.0), max(losses, default=1.0))
    norm = BoundaryNorm(levels, 256)
    image: Any = None
    for k, (name, axes) in enumerate(zip(names, grid.flat, strict=False)):
        own = [row for row in rows if row["run"] == name]
        xs = list(dict.fromkeys(row["x"] for row in own))
        loss = np.array([row["loss"] for row in own]).reshape(len(xs), len(xs))
        image = axes.contourf(xs, xs, loss, levels=levels, norm=norm, cmap="viridis")
        axes.contour(xs, xs, loss, levels=levels, colors="white", linewidths=0.4)
        axes.plot(0, 0, "+", color="white", markersize=7, markeredgewidth=1.2)
        axes.set_title(_title(own[0], rows))
        axes.set_aspect("equal")
        axes.tick_params(labelbottom=k + columns >= len(names))
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel(_axis(config, 0), fontsize=9)
    figure.supylabel(_axis(config, 1), fontsize=9)
    bar = figure.colorbar(image, ax=grid, aspect=25)
    bar.set_label(_loss(config))
    return figure


def _loss(config: LandscapeConfig) -> str:
    part = {"train": "training ", "validation": "validation ", "test": "test "}[config.part]
    part = "" if config.data else part  # an adapter of its own has no parts
    return f"rise of the {part}loss (nats)" if config.rise else f"{part}loss (nats)"


def _axis(config: LandscapeConfig, k: int) -> str:
    if config.directions == "line":
        return "position between the two (0: the first, 1: the other)"
    one = "a" if config.dimensions == 1 else ("the first", "the second")[k]
    if config.directions == "hessian":
        one = "the first" if config.dimensions == 1 else one
        return f"step along {one} eigenvector, ‖E‖"
    return f"step along {one} random direction, ‖e‖ / ‖w‖ of each row"
