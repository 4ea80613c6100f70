"""Split labelled texts into parts, shuffle them, and disturb their texts and labels."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from .texts import InputError, Table, Texts


@dataclass(frozen=True)
class LeftOut:
    """Counts of the rows that :func:`split` leaves out, since their text is in a part already.

    Attributes:
        repeated: rows with the text of an earlier row.
        contradictory: repeated rows with another class than the earlier row.
        example: text and both labels of the first contradictory row.
        in_test: rows with a text of the test data.
    """

    repeated: int = 0
    contradictory: int = 0
    example: tuple[str, str, str] | None = None
    in_test: int = 0

    def __str__(self) -> str:
        """Return the counts in words; empty if no row is left out."""
        facts = []
        if self.repeated:
            facts.append(f"rows left out for the text of an earlier row: {self.repeated:,}")
        if self.example is not None:
            text, first, second = self.example
            facts.append(
                f"of these with another label than the earlier one: {self.contradictory:,}, "
                f"such as {text[:60]!r} with {first!r} and {second!r}"
            )
        if self.in_test:
            facts.append(f"rows left out for a text of the test data: {self.in_test:,}")
        return "; ".join(facts)

    def in_brackets(self) -> str:
        """Return the words in brackets, to end a sentence with."""
        return f" ({self})" if str(self) else ""


@dataclass(frozen=True)
class Splits:
    """Train, validation and test parts that share no text.

    Attributes:
        train, validation, test: the parts.
        classes: the name of each class number; empty if labels are no classes but text to write.
        left_out: counts of the rows that are in no part.
    """

    train: Texts
    validation: Texts
    test: Texts
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)


def split(
    data: Table,
    test: Table | None = None,
    *,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    classify: bool = True,
) -> Splits:
    """Cut ``data`` into disjoint parts in which the classes are mixed as in the whole.

    The same data, sizes and seed give the same parts, on any machine. Of texts or pairs in
    ``data`` that differ in letter case and spacing alone, the first is used. If ``test`` is given,
    the test part is taken from it, and its texts or pairs are left out of the other parts.

    Args:
        data: at least two classes, where they are to be told apart.
        test: a test set of its own; without it the test part is cut from ``data``.
        train_size: sentences to train on; by default all that remain.
        validation_size: sentences for validation; by default a tenth of what the test part
            leaves, at most 1,000.
        test_size: sentences to test on; by default a fifth of ``data``, at most 2,000, or
            all of ``test``.
        seed: of the shuffle.
        classify: turn labels into class numbers; otherwise they stay text.

    Raises:
        InputError: fewer than two classes, a size that the data cannot fill, a label in
            the validation or test part that the train part lacks, or pairs in one of ``data``
            and ``test``.
    """
    if test is not None and test.kind != data.kind:
        raise InputError(f"the test data holds {test.kind}, but the training data {data.kind}")
    first_rows, left_out = _first_of_each(data, set(test.text_keys()) if test else set(), classify)
    data = data.rows(first_rows)
    order = mixed_order if classify else random_order
    data = data.rows(order(data.labels, seed))
    if test is None:
        size = min(2000, len(data) // 5) if test_size is None else test_size
        test, data = data.rows(range(len(data))[:size]), data.rows(range(len(data))[size:])
    else:
        test = test.rows(order(test.labels, seed))
        size = len(test) if test_size is None else test_size
        test = test.rows(range(len(test))[:size])
    _check_size("test", size, len(test), left_out)
    size = min(1000, len(data) // 10) if validation_size is None else validation_size
    validation, data = data.rows(range(len(data))[:size]), data.rows(range(len(data))[size:])
    _check_size("validation", size, len(validation), left_out)
    size = len(data) if train_size is None else train_size
    train = data.rows(range(len(data))[:size])
    _check_size("train", size, len(train), left_out)
    if not len(train):
        all_tested = left_out.in_test and not first_rows
        raise InputError(
            "the training data has no sentence"
            + (": all its texts are in the test data" if all_tested else left_out.in_brackets())
        )
    if not classify:
        return Splits(train, validation, test, [], left_out)

    classes = class_names(train.labels)
    if len(classes) < 2:
        raise InputError(
            "a classifier needs at least two classes, but the training data has "
            f"the label {classes[0]!r} alone{left_out.in_brackets()}"
        )
    number = {name: k for k, name in enumerate(classes)}

    def numbered(name: str, part: Table) -> Texts:
        for label in part.labels:
            if label not in number:
                raise InputError(
                    f"the label {label!r} occurs in the {name} data but not in the training data"
                )
        labels = [number[label] for label in part.labels]
        return Texts(part.texts, labels, part.pairs, part.images)

    return Splits(
        numbered("training", train),
        numbered("validation", validation),
        numbered("test", test),
        classes,
        left_out,
    )


def _first_of_each(data: Table, tested: set[str], classify: bool) -> tuple[list[int], LeftOut]:
    """Return the first row of each text outside the test data, and counts of the other rows."""
    first: dict[str, int] = {}
    repeated, in_test = [], 0
    for index, key in enumerate(data.text_keys()):
        if key in tested:
            in_test += 1
        elif first.setdefault(key, index) != index:
            repeated.append((first[key], index))
    labels = data.labels
    contradictory = [(a, b) for a, b in repeated if classify and labels[a] != labels[b]]
    example = None
    if contradictory:
        earlier, later = contradictory[0]
        example = data.texts[later], labels[earlier], labels[later]
    return list(first.values()), LeftOut(len(repeated), len(contradictory), example, in_test)


def mixed_order(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Return shuffled indices of which every stretch holds the classes in their overall shares."""
    shuffled = list(range(len(labels)))
    random.Random(seed).shuffle(shuffled)
    count: dict[Hashable, int] = {}
    rank = {}
    for index in shuffled:
        rank[index] = count.get(labels[index], 0)
        count[labels[index]] = rank[index] + 1
    return sorted(shuffled, key=lambda index: (rank[index] + 0.5) / count[labels[index]])


def random_order(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Return shuffled indices, for labels that are no classes but text to write."""
    return mixed_order([None] * len(labels), seed)


def flip_labels(labels: Sequence[int], share: float, classes: int, seed: int) -> list[int]:
    """Return the labels with a share of them, rounded to whole labels, changed to another class."""
    rng = random.Random(seed)
    flipped = list(labels)
    for index in rng.sample(range(len(labels)), round(share * len(labels))):
        flipped[index] = (flipped[index] + rng.randrange(1, classes)) % classes
    return flipped


def with_typos(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Return the texts with two inner letters swapped in a share of the words of four or more."""
    rng = random.Random(seed)

    def misspell(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() >= share:
            return word
        k = rng.randrange(1, len(word) - 2)  # first and last letters stay
        return word[:k] + word[k + 1] + word[k] + word[k + 2 :]

    return [re.sub(r"[^\W\d_]{4,}", misspell, text) for text in texts]


def without_texts(data: Table, keys: Iterable[str]) -> Table:
    """Return the rows of ``data`` whose key is not in ``keys``."""
    keys = set(keys)
    return data.rows(i for i, key in enumerate(data.text_keys()) if key not in keys)


def class_names(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in the order of their class numbers."""
    return sorted(set(labels), key=_label_order)


def _label_order(label: str) -> tuple[int, float, str]:
    """Return a sorting key: numbers by value, then words by alphabet."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def _check_size(name: str, wanted: int, available: int, left_out: LeftOut) -> None:
    if wanted > available:
        raise InputError(
            f"--{name}-size must be at most {available}, the sentences that are left for it"
            f"{left_out.in_brackets()}, got {wanted}"
        )
