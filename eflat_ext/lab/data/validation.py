"""Read YAML files of settings, and check settings with pydantic.

A type such as :data:`Share` says what a setting may be; :func:`validate` turns the first error of
pydantic into an :class:`InputError` of the form "NAME must be EXPECTED, got GIVEN".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import yaml  # type: ignore[import-untyped]
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
)

from .texts import InputError

MAX_BYTES = 1_000_000
_OF_YAML = "of YAML"
_Model = TypeVar("_Model", bound=BaseModel)
_Values = TypeVar("_Values", bound=list[Any])


# --- what a setting may be ---------------------------------------------------------------


def _number(value: Any, info: ValidationInfo) -> Any:
    """Return a number that YAML takes for a word, such as 1e-3, as a float."""
    try:
        return float(value) if info.context == _OF_YAML and isinstance(value, str) else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    try:
        encodable = b"\0" not in str(value).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, on the command line or in a file name
        encodable = False
    if not encodable:
        raise ValueError("UTF-8 without NUL")
    return value


def _distinct(values: _Values) -> _Values:
    if any(value in values[:k] for k, value in enumerate(values)):
        raise ValueError("distinct values")
    return values


Number = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Number, Gt(0)]
NonNegativeFloat = Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Lt(1)]
PositiveInt = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Name = Annotated[str, BeforeValidator(_text)]
File = Annotated[Path, BeforeValidator(_text)]
NOT_EMPTY = MinLen(1)
DISTINCT = AfterValidator(_distinct)


# --- checking ----------------------------------------------------------------------------


class Section(BaseModel):
    """A mapping of known names to values of exactly their types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    def given(self) -> dict[str, Any]:
        """Return the values that were given, without defaults, in the order of the fields."""
        names = [name for name in type(self).model_fields if name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}


class Checked:
    """Base of a dataclass whose annotations are the types of this module."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def check(self) -> None:
        """Raise :class:`InputError` naming the first setting that is not what it may be."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _validate(section_of(type(self)), values, option)  # type: ignore[arg-type]


@cache
def section_of(
    kind: type, without: frozenset[str] = frozenset(), listed: bool = False
) -> type[Section]:
    """Return a section with the fields of a dataclass, all of them optional.

    Args:
        kind: the dataclass.
        without: fields to leave out.
        listed: make each value a list of distinct ones.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        if f.name not in without:
            hint = hints[f.name]
            hint = Annotated[list[hint], NOT_EMPTY, DISTINCT] if listed else hint  # type: ignore[valid-type]
            fields[f.name] = hint, None
    return create_model(kind.__name__, __base__=Section, **fields)


def validate(section: type[_Model], content: Any, where: str = "") -> _Model:
    """Return the content of a YAML file, or of a part of it, as a section.

    Args:
        section: the model to check it with.
        content: names and values, as :func:`read_yaml` gives them.
        where: the file or the part, which errors start with.

    Raises:
        InputError: a name is unknown or missing, or a value is not what it may be.
    """
    return _validate(section, content, str, where, _OF_YAML)


def _validate(
    section: type[_Model],
    content: Any,
    name_of: Callable[[str], str],
    where: str = "",
    context: str | None = None,
) -> _Model:
    try:
        return section.model_validate(content, context=context)
    except ValidationError as error:
        place = f"{where}: " if where and error.errors()[0]["loc"] else ""
        raise InputError(place + first_error(error, where, name_of)) from None


@contextmanager
def prefix_errors(where: str) -> Iterator[None]:
    """Put the place before the message of an :class:`InputError` that is raised within."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def option(name: str) -> str:
    """Return the option of the command line that sets ``name``."""
    return "--" + name.replace("_", "-")


_EXPECTED = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word",
    "string_unicode": "UTF-8 without NUL",
    "is_instance_of": "a {class}",
    "list_type": "a list",
    "dict_type": "names and values",
    "model_type": "names and values",
    "too_short": "at least one",
    "literal_error": "{expected}",
    "value_error": "{error}",
}


def first_error(errors: ValidationError, whole: str, name_of: Callable[[str], str] = str) -> str:
    """Return the first error of pydantic in the form "NAME must be EXPECTED, got GIVEN".

    Args:
        errors: of one validation.
        whole: name of all that was validated.
        name_of: makes a setting's name out of its keys, parted by dots.
    """
    error = errors.errors()[0]
    kind, path = error["type"], error["loc"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{name_of('.'.join(map(str, path)))} is no known name"
    keys = [str(key) for key in path if not isinstance(key, int)]  # numbers are places in lists
    name = name_of(".".join(keys)) if keys else whole
    if kind == "missing":
        return f"{name} is missing"
    if path and isinstance(path[-1], int):
        name = f"each of {name}"
    expected = _EXPECTED.get(kind, error["msg"]).format(**error.get("ctx", {}))
    return f"{name} must be {expected}, got {error['input']!r}"


# --- files -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuse a second value of a name, where YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{self.name}, line {line}: {key.value!r} is there twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, name: str = "") -> Any:
    """Return the content of a YAML file of at most 1 MB.

    Args:
        path: the file.
        name: of the file in errors, by default its path.

    Raises:
        InputError: it cannot be read, is no YAML, or gives one name twice in one place.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # a device may have no end
        if len(content) > MAX_BYTES:
            raise ValueError("longer than 1 MB")
        loader = _Loader(content.decode())
        loader.name = name
        return loader.get_single_data()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from None
