"""Define the settings that ``eflat sharpness`` and ``eflat landscape`` share."""

# Annotations are no strings here: cyclopts would look up their names in the subclasses' modules.

from dataclasses import dataclass
from typing import Annotated, Literal

from eflat_ext.lab.data.validation import NOT_EMPTY, Checked, Name, PositiveInt, Seed


@dataclass(kw_only=True)
class MeasureConfig(Checked):
    """Settings of the data and layers that a loss is measured on."""

    part: Literal["train", "validation", "test"] = "train"
    """Part of a run folder's data; for an adapter of its own --data is taken from its start."""
    examples: PositiveInt = 256
    """Number of texts, or all if there are fewer."""
    batch_size: PositiveInt = 32
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
    max_length: PositiveInt = 128
    """Tokens of a text of --data."""
    layers: Annotated[list[Name], NOT_EMPTY] | None = None
    """Measure these layers only (the ends of their names); by default all with an adapter."""
    seed: Seed = 0
    """Seed of everything random."""
    device: Name = "auto"
    """Device as torch names it (cpu, cuda, cuda:1); auto takes the GPU if there is one."""
