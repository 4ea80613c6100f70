"""Settings that ``eflat sharpness`` and ``eflat landscape`` share."""

# Annotations are no strings here: cyclopts would look up their names in the subclasses' modules.

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.data.validation import NOT_EMPTY, Checked, Count, Name, Seed, option

if TYPE_CHECKING:
    from .trained_models import Trained

# Settings that a run folder has of its own.
_OF_DATA = ("data", "text_column", "text_pair_column", "label_column", "max_length")


@dataclass(kw_only=True)
class MeasureConfig(Checked):
    """On what a loss is measured."""

    part: Literal["train", "validation", "test"] = "train"
    """Part of a run folder's data; for an adapter of its own --data is taken from its start."""
    examples: Count = 256
    """Number of texts, or all if there are fewer."""
    batch_size: Count = 32
    """Texts of a batch."""
    data: Name | None = None
    """Data for an adapter that is not in a run folder, as for eflat finetune; a run folder has
    its own, and the columns and length."""
    text_column: Name = "text"
    """Column of the texts of --data."""
    text_pair_column: Name | None = None
    """Column of the second texts, where a task is on pairs of them."""
    label_column: Name = "label"
    """Column of the labels; a causal language model needs none."""
    max_length: Count = 128
    """Tokens of a text of --data."""
    layers: Annotated[list[Name], NOT_EMPTY] | None = None
    """Measure these layers only (the ends of their names); by default all with an adapter."""
    seed: Seed = 0
    """Seed of everything random."""
    device: Name = "auto"
    """Device as torch names it (cpu, cuda, cuda:1); auto takes the GPU if there is one."""

    def check_use(self, runs: Sequence["Trained"]) -> None:
        """Raise :class:`InputError` naming a setting that none of the runs has a use for."""
        given = [f.name for f in fields(MeasureConfig) if getattr(self, f.name) != f.default]
        if useless := [name for name in _OF_DATA if name in given and all(r.config for r in runs)]:
            raise InputError(
                f"{option(useless[0])} is for an adapter that is not in a run folder; "
                f"{runs[0].folder} has its own"
            )
        if "part" in given and not any(run.config for run in runs):
            raise InputError(
                f"--part is for run folders; {runs[0].folder} is none and is measured on --data"
            )
