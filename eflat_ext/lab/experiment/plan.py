"""Read and check the YAML file of an experiment, and list the runs that it asks for.

A file names tasks, methods, the values to tune and the seeds. Each task gives every method the
same sentences, batches and first weights for one seed. Stage "tuning" runs every value of a
method's grid and is judged on the validation part; stage "final" runs what was chosen with other
seeds, on the test part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import BeforeValidator

from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.data.validation import (
    DISTINCT,
    NOT_EMPTY,
    Name,
    NonNegativeFloat,
    PositiveInt,
    Section,
    Seed,
    Share,
    prefix_errors,
    read_yaml,
    section_of,
    validate,
)
from eflat_ext.lab.finetune.config import FinetuneConfig

Stage = Literal["tuning", "final"]
Settings = dict[str, Any]
TYPOS = "typos"

# Settings that an experiment makes itself.
_OURS = frozenset({"method", "seeds", "evaluate_on", "output_dir"})


@dataclass(frozen=True)
class Task:
    """Data, and the settings that all methods share.

    Attributes:
        settings: of :class:`FinetuneConfig`; ``train_size`` sentences are drawn for each seed.
        label_noise: share of the training labels that are wrong.
        also_test: further data to test on, as ``--data`` takes them; :data:`TYPOS` stands for the
            test part itself, misspelt.
    """

    name: str
    settings: Settings
    label_noise: float = 0.0
    also_test: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A method: its optimizer, its fixed settings and the values to choose from.

    Attributes:
        builder: name of the function that makes the optimizer, in a table such as
            :data:`.comparison.METHODS`.
        settings: of :class:`FinetuneConfig`, over those of the task.
        tune: the grid, a list of values for each setting.
        like: name of the method whose chosen values this one starts from.
    """

    name: str
    builder: str
    settings: Settings = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    like: str | None = None

    def grid(self) -> list[Settings]:
        """Return every combination of the values to tune; a single empty one without values."""
        values = itertools.product(*self.tune.values())
        return [dict(zip(self.tune, row, strict=True)) for row in values]


class Sharpness(Section):
    """Settings of the sharpness of final runs: rises of the training loss around the weights.

    Both rises are taken in the full space of ``layers``, with one radius for all layers together
    unless ``norm_scope`` says otherwise.

    Attributes:
        worst_rho, random_rho: radii of the worst case and of random noise.
        layers: ends of the names of the layers, the same for all methods.
        norm_scope, radius: as of ``eflat sharpness``.
        samples: of random noise.
        sentences: of the training part, from its start.
    """

    worst_rho: NonNegativeFloat
    random_rho: NonNegativeFloat
    layers: list[Name]
    norm_scope: Literal["layer", "global"] = "global"
    radius: Literal["absolute", "layer", "filter"] = "absolute"
    samples: Annotated[int, Ge(2)] = 2
    sentences: PositiveInt = 256


@dataclass(frozen=True)
class Run:
    """One training run."""

    stage: Stage
    task: Task
    method: Method
    seed: int
    tuned: Settings

    def settings(self) -> Settings:
        """Return its settings: the task's, the method's and the tuned ones, later ones winning."""
        return {**self.task.settings, **self.method.settings, **self.tuned}

    def config(self) -> FinetuneConfig:
        """Return its settings together with the defaults."""
        part: Any = "validation" if self.stage == "tuning" else "test"
        settings = validate(section_of(FinetuneConfig, _OURS), self.settings())
        return FinetuneConfig(**settings.given(), evaluate_on=part)

    def key(self) -> tuple[str, ...]:
        """Return its key, different for every run of the experiment, as in the CSV file."""
        tuned = json.dumps(self.tuned, sort_keys=True)
        return self.stage, self.task.name, self.method.name, str(self.seed), tuned

    def digest(self) -> str:
        """Return a short hash of its settings, by which a row of other settings is recognised."""
        task = [self.task.label_noise, self.task.also_test, self.method.builder]
        text = json.dumps([self.settings(), task], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's file.

    Attributes:
        name: of the file, without its suffix.
        results: path of the CSV file.
        tasks, methods: in the order of the file.
        tuning_seeds, seeds: of the tuning runs and of the final runs.
        choose_by: figure of the validation part that chooses tuned values.
        sharpness: what to measure of final runs, if anything.
    """

    name: str
    results: Path
    tasks: list[Task]
    methods: list[Method]
    tuning_seeds: list[int]
    seeds: list[int]
    choose_by: Literal["accuracy", "loss"] = "accuracy"
    sharpness: Sharpness | None = None

    def method(self, name: str) -> Method:
        """Return the method of this name."""
        return next(method for method in self.methods if method.name == name)

    def only(self, tasks: Collection[str] = (), methods: Collection[str] = ()) -> Experiment:
        """Return the part of these tasks and methods, with those named by the methods' ``like``.

        Args:
            tasks, methods: names; none stands for all.

        Raises:
            InputError: the file has no such name.
        """
        for kind, wanted, there in (
            ("task", tasks, [task.name for task in self.tasks]),
            ("method", methods, [method.name for method in self.methods]),
        ):
            if unknown := [name for name in wanted if name not in there]:
                raise InputError(f"--{kind} must be one of {', '.join(there)}, got {unknown[0]!r}")
        needed = {*methods, *(self.method(name).like for name in methods)}
        return dataclasses.replace(
            self,
            tasks=[task for task in self.tasks if not tasks or task.name in tasks],
            methods=[method for method in self.methods if not methods or method.name in needed],
        )

    def tuning(self, task: Task, method: Method, inherited: Settings) -> list[Run]:
        """Return the tuning runs of a method; none if it has no values to choose from."""
        if not method.tune:
            return []
        pairs = itertools.product(method.grid(), self.tuning_seeds)
        return [Run("tuning", task, method, seed, {**inherited, **row}) for row, seed in pairs]

    def count(self) -> int:
        """Return the number of all runs."""
        each = [len(m.grid()) * len(self.tuning_seeds) if m.tune else 0 for m in self.methods]
        return len(self.tasks) * (sum(each) + len(self.seeds) * len(self.methods))


# --- reading a file ----------------------------------------------------------------------


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_Key = Annotated[str, BeforeValidator(str)]
_Sizes = Annotated[list[PositiveInt | None], BeforeValidator(_listed)]


class _Shared(section_of(FinetuneConfig, _OURS)):  # type: ignore[misc]
    train_size: _Sizes | None = None


class _Task(_Shared):
    label_noise: Annotated[list[Share], BeforeValidator(_listed)] = [0.0]  # noqa: RUF012
    also_test: list[Name] = []  # noqa: RUF012


class _Grid(section_of(FinetuneConfig, _OURS, listed=True)):  # type: ignore[misc]
    pass


class _Method(section_of(FinetuneConfig, _OURS)):  # type: ignore[misc]
    method: Name | None = None
    like: Name | None = None
    tune: _Grid = _Grid()


class _Tuning(Section):
    seeds: Annotated[list[Seed], DISTINCT] = []  # noqa: RUF012
    choose_by: Literal["accuracy", "loss"] = "accuracy"


class _File(Section):
    settings: _Shared = _Shared()
    tasks: Annotated[dict[_Key, _Task | None], NOT_EMPTY]
    methods: Annotated[dict[_Key, _Method | None], NOT_EMPTY]
    tuning: _Tuning = _Tuning()
    seeds: Annotated[list[Seed], NOT_EMPTY, DISTINCT]
    sharpness: Sharpness | None = None
    results: Name | None = None


def load(path: Path, methods: Collection[str]) -> Experiment:
    """Read and check an experiment's file.

    Args:
        path: the file.
        methods: names that a method's ``method:`` may have.

    Raises:
        InputError: the file cannot be read or something in it cannot be used; the message names it.
    """
    content = read_yaml(path)
    file = validate(_File, content, str(path))
    with prefix_errors(str(path)):
        experiment = Experiment(
            name=path.stem,
            results=(path.parent / (file.results or f"{path.stem}.csv")).resolve(),
            tasks=[
                task
                for name, entry in content["tasks"].items()
                for task in _tasks(
                    str(name), file.tasks[str(name)] or _Task(), entry or {}, content
                )
            ],
            methods=[_method(name, entry or _Method()) for name, entry in file.methods.items()],
            tuning_seeds=file.tuning.seeds,
            seeds=file.seeds,
            choose_by=file.tuning.choose_by,
            sharpness=file.sharpness,
        )
        _check(experiment, methods)
    return experiment


def _check(experiment: Experiment, methods: Collection[str]) -> None:
    if common := set(experiment.seeds) & set(experiment.tuning_seeds):
        raise InputError(f"seeds must be none of tuning.seeds, got {min(common)} in both")
    tasks = [task.name for task in experiment.tasks]
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        raise InputError(f"tasks must have distinct names, got {twice[0]!r} twice")
    names = [method.name for method in experiment.methods]
    for method in experiment.methods:
        key = f"methods.{method.name}"
        if method.builder not in methods:
            known = ", ".join(sorted(methods))
            raise InputError(f"{key}.method must be one of {known}, got {method.builder!r}")
        if method.tune and not experiment.tuning_seeds:
            raise InputError(f"tuning.seeds must be at least one, for {key}.tune, got []")
        if method.like is not None:
            if method.like not in names:
                there = ", ".join(names)
                raise InputError(f"{key}.like must be one of {there}, got {method.like!r}")
            if experiment.method(method.like).like is not None:
                raise InputError(
                    f"{key}.like must be a method that is like no other, got {method.like!r}"
                )
    for task, method in itertools.product(experiment.tasks, experiment.methods):
        for tuned in method.grid():
            with prefix_errors(f"task {task.name!r}, method {method.name!r}"):
                Run("final", task, method, experiment.seeds[0], tuned).config().check()


def _tasks(name: str, checked: _Task, given: Settings, content: Settings) -> Iterator[Task]:
    """Yield a task for each training size and share of label noise that its entry lists.

    Args:
        name: of the entry.
        checked: the entry.
        given: the entry as it stands in the file.
        content: of the whole file.
    """
    own = {key: value for key, value in given.items() if key not in ("label_noise", "also_test")}
    # As they stand in the file: the digests in its CSV file are of these.
    settings = {**content.get("settings", {}), **own}
    if any(checked.label_noise) and settings.get("task_type", "SEQ_CLS") != "SEQ_CLS":
        raise InputError(f"tasks.{name}.label_noise needs labels that are classes")
    sizes = settings.get("train_size")
    for size, noise in itertools.product(_listed(sizes), checked.label_noise):
        full = name
        full += f"-{size}" if isinstance(sizes, list) else ""
        full += f"-noise{100 * noise:g}" if isinstance(given.get("label_noise"), list) else ""
        yield Task(full, {**settings, "train_size": size}, noise, tuple(checked.also_test))


def _method(name: str, entry: _Method) -> Method:
    settings = entry.given()
    own = {key: settings.pop(key, None) for key in ("method", "like", "tune")}
    return Method(name, own["method"] or name, settings, entry.tune.given(), own["like"])
