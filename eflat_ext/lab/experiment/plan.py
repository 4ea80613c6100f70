"""An experiment's file: what ``eflat experiment`` reads, checked, and the runs that follow from it.

A file names tasks, methods, the values to tune and the seeds. Each task gives every method the
same sentences, batches and first weights for one seed. Stage "tuning" runs every value of a
method's grid and is judged on the validation part; stage "final" runs what was chosen with other
seeds, on the test part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from eflat_ext.lab.data.sections import Section, cast, read_yaml
from eflat_ext.lab.data.tables import InputError
from eflat_ext.lab.finetune.config import FinetuneConfig

Stage = Literal["tuning", "final"]
Settings = dict[str, Any]
TYPOS = "typos"

# What a file may not set, as the plan does.
_OURS = {"method", "seeds", "evaluate_on", "output_dir"}
_TYPES = get_type_hints(FinetuneConfig)


@dataclass(frozen=True)
class Task:
    """Data and the settings all methods share.

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
    """A method: who makes its optimizer, its fixed settings, and the values to choose from.

    Attributes:
        builder: a name in the table of methods, such as :data:`.comparison.METHODS`.
        tune: a grid, as lists of values by setting.
        like: the method whose chosen values this one starts from.
    """

    name: str
    builder: str
    settings: Settings = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    like: str | None = None

    def grid(self) -> list[Settings]:
        """Every combination of the values to tune; one empty one if there are none."""
        values = itertools.product(*self.tune.values())
        return [dict(zip(self.tune, row, strict=True)) for row in values]


@dataclass(frozen=True)
class Sharpness:
    """What is measured of a final run: the rise of the training loss around its weights.

    Both rises are taken in the full space of ``layers``, with one radius for all layers together
    unless ``norm_scope`` says otherwise.

    Attributes:
        worst_rho, random_rho: radii of the worst case and of random noise.
        samples: of random noise.
        sentences: of the training part, from its start.
        layers: ends of the names of the layers, the same for all methods.
    """

    worst_rho: float
    random_rho: float
    layers: tuple[str, ...]
    norm_scope: Literal["layer", "global"] = "global"
    radius: Literal["absolute", "layer", "filter"] = "absolute"
    samples: int = 2
    sentences: int = 256


@dataclass(frozen=True)
class Run:
    """One training run."""

    stage: Stage
    task: Task
    method: Method
    seed: int
    tuned: Settings

    def settings(self) -> Settings:
        """All that is set for it, in the order of precedence."""
        return {**self.task.settings, **self.method.settings, **self.tuned}

    def config(self) -> FinetuneConfig:
        """Its settings, with the defaults."""
        part = "validation" if self.stage == "tuning" else "test"
        return _config(self.settings(), f"method {self.method.name!r}", part)

    def key(self) -> tuple[str, ...]:
        """What tells it from every other run of the experiment; as the CSV file holds it."""
        tuned = json.dumps(self.tuned, sort_keys=True)
        return self.stage, self.task.name, self.method.name, str(self.seed), tuned

    def digest(self) -> str:
        """A short hash of all that the file says of it."""
        task = [self.task.label_noise, self.task.also_test, self.method.builder]
        text = json.dumps([self.settings(), task], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Experiment:
    """A whole file."""

    name: str
    results: Path
    tasks: list[Task]
    methods: list[Method]
    tuning_seeds: list[int]
    seeds: list[int]
    choose_by: Literal["accuracy", "loss"] = "accuracy"
    sharpness: Sharpness | None = None

    def method(self, name: str) -> Method:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    def only(self, tasks: Collection[str] = (), methods: Collection[str] = ()) -> Experiment:
        """The part of these tasks and methods, and of those that the methods are like.

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
                raise InputError(
                    f"--{kind}: {self.name} has no {unknown[0]!r}, but {', '.join(there)}"
                )
        needed = {*methods, *(self.method(name).like for name in methods)}
        return dataclasses.replace(
            self,
            tasks=[task for task in self.tasks if not tasks or task.name in tasks],
            methods=[method for method in self.methods if not methods or method.name in needed],
        )

    def tuning(self, task: Task, method: Method, inherited: Settings) -> list[Run]:
        """The tuning runs of a method; none if it has no values to choose from."""
        if not method.tune:
            return []
        pairs = itertools.product(method.grid(), self.tuning_seeds)
        return [Run("tuning", task, method, seed, {**inherited, **row}) for row, seed in pairs]

    def count(self) -> int:
        """How many runs there are in all."""
        each = [len(m.grid()) * len(self.tuning_seeds) if m.tune else 0 for m in self.methods]
        return len(self.tasks) * (sum(each) + len(self.seeds) * len(self.methods))


def load(path: Path, methods: Collection[str]) -> Experiment:
    """Read and check an experiment's file.

    Args:
        methods: names that a method's ``method:`` may have.

    Raises:
        InputError: the file cannot be read or something in it cannot be used; the message names it.
    """
    content = Section(str(path), read_yaml(path))
    shared = content.take("settings", {})
    tuning = Section("tuning", content.take("tuning", {}))
    sharpness = content.take("sharpness", None)
    results = cast(content.take("results", f"{path.stem}.csv"), str, "results")
    try:
        file = (path.parent / results).resolve()
    except ValueError:
        raise InputError(f"results is {results!r}, but must be UTF-8 without NUL") from None
    experiment = Experiment(
        name=path.stem,
        results=file,
        tasks=[
            task
            for name, entry in content.take("tasks", {}).items()
            for task in _tasks(str(name), entry, shared)
        ],
        methods=[_method(str(name), entry) for name, entry in content.take("methods", {}).items()],
        tuning_seeds=cast(tuning.take("seeds", []), list[int], "tuning: seeds"),
        seeds=cast(content.take("seeds", []), list[int], "seeds"),
        choose_by=tuning.take("choose_by", "accuracy"),
        sharpness=_sharpness(sharpness) if sharpness else None,
    )
    content.end()
    tuning.end()
    _check(experiment, methods)
    return experiment


def _check(experiment: Experiment, methods: Collection[str]) -> None:
    for kind in ("tasks", "methods", "seeds"):
        if not getattr(experiment, kind):
            raise InputError(f"the experiment has no {kind}")
    if experiment.choose_by not in ("accuracy", "loss"):
        raise InputError(f"choose_by is {experiment.choose_by!r}, but must be accuracy or loss")
    for where, seeds in (("seeds", experiment.seeds), ("tuning: seeds", experiment.tuning_seeds)):
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{where} names a seed twice")
        if seeds:
            with _named(where):
                FinetuneConfig(seeds=seeds).check()
    if common := set(experiment.seeds) & set(experiment.tuning_seeds):
        raise InputError(
            f"seed {min(common)} is in seeds and in tuning: final runs need fresh ones"
        )
    tasks = [task.name for task in experiment.tasks]
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        raise InputError(f"two tasks are called {twice[0]!r}")
    names = [method.name for method in experiment.methods]
    for method in experiment.methods:
        if method.builder not in methods:
            raise InputError(
                f"method {method.name!r}: there is no {method.builder!r}, "
                f"but {', '.join(sorted(methods))}"
            )
        if method.tune and not experiment.tuning_seeds:
            raise InputError(f"method {method.name!r} has values to tune, but tuning has no seeds")
        if method.like is not None:
            if method.like not in names:
                raise InputError(
                    f"method {method.name!r} is like {method.like!r}, but there is no method of "
                    f"this name, only {', '.join(names)}"
                )
            if experiment.method(method.like).like is not None:
                raise InputError(f"method {method.like!r} is itself like another one")
    for task, method in itertools.product(experiment.tasks, experiment.methods):
        for tuned in method.grid():
            with _named(f"task {task.name!r}, method {method.name!r}"):
                Run("final", task, method, experiment.seeds[0], tuned).config().check()


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the place before what is wrong there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _tasks(name: str, entry: Any, shared: Mapping[str, Any]) -> Iterator[Task]:
    """One task for each training size and share of label noise that the entry lists."""
    section = Section(f"task {name!r}", {} if entry is None else entry)
    noises = section.take("label_noise", 0.0)
    also = cast(section.take("also_test", []), tuple[str, ...], f"task {name!r}: also_test")
    settings = {**shared, **section.rest()}
    sizes = settings.get("train_size")
    for size in sizes if isinstance(sizes, list) else [sizes]:
        for noise in noises if isinstance(noises, list) else [noises]:
            noise = cast(noise, float, f"task {name!r}: label_noise")
            if not 0 <= noise < 1:
                raise InputError(f"task {name!r}: label_noise is {noise}, but must lie in 0 to 1")
            full = name
            full += f"-{size}" if isinstance(sizes, list) else ""
            full += f"-noise{100 * noise:g}" if isinstance(noises, list) else ""
            own = {**settings, "train_size": size}
            config = _config(own, f"task {name!r}", "test")
            if noise and config.task_type != "SEQ_CLS":
                raise InputError(f"task {name!r}: label_noise needs labels that are classes")
            yield Task(full, own, noise, also)


def _method(name: str, entry: Any) -> Method:
    where = f"method {name!r}"
    section = Section(where, {} if entry is None else entry)
    builder = cast(section.take("method", name), str, f"{where}: method")
    like = cast(section.take("like", None), str | None, f"{where}: like")
    grid = {}
    for setting, values in section.take("tune", {}).items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: tune: {setting} needs a list of values")
        kind = _type(setting, where)
        grid[setting] = [cast(value, kind, f"{where}: {setting}") for value in values]
        if twice := [value for value in grid[setting] if grid[setting].count(value) > 1]:
            raise InputError(f"{where}: tune: {setting} names {twice[0]!r} twice")
    return Method(name, builder, _typed(section.rest(), where), grid, like)


def _config(settings: Settings, where: str, part: str) -> FinetuneConfig:
    return FinetuneConfig(**_typed(settings, where), evaluate_on=part)  # type: ignore[arg-type]


def _typed(settings: Mapping[str, Any], where: str) -> Settings:
    """The settings, checked by name and type."""
    return {
        name: cast(value, _type(name, where), f"{where}: {name}")
        for name, value in settings.items()
    }


def _type(name: str, where: str) -> Any:
    if name not in _TYPES or name in _OURS:
        raise InputError(f"{where}: there is no setting {name!r}")
    return _TYPES[name]


def _sharpness(content: Any) -> Sharpness:
    section = Section("sharpness", content)
    given: dict[str, Any] = {}
    kinds = get_type_hints(Sharpness)
    for f in dataclasses.fields(Sharpness):
        value = section.take(f.name, dataclasses.MISSING)
        if value is not dataclasses.MISSING:
            given[f.name] = cast(value, kinds[f.name], f"sharpness: {f.name}")
        elif f.default is dataclasses.MISSING:
            raise InputError(f"sharpness lacks {f.name}")
    section.end()
    settings = Sharpness(**given)
    for name, least in (("worst_rho", 0), ("random_rho", 0), ("samples", 2), ("sentences", 1)):
        if not least <= getattr(settings, name) < math.inf:
            value = getattr(settings, name)
            raise InputError(f"sharpness: {name} is {value}, but must be at least {least}")
    return settings
