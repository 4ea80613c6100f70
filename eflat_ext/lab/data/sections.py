"""A YAML file of sections: every name known and given once, every value of an annotation's type."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from .tables import InputError


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: it cannot be read, is no YAML, or names something twice in one place.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8")
        _check_names(yaml.compose(text, yaml.SafeLoader), path, set())
        return yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None


def _check_names(node: Any, path: Path, seen: set[int]) -> None:
    """YAML itself would take the last of two values of one name."""
    if id(node) in seen or not isinstance(getattr(node, "value", None), list):
        return
    seen.add(id(node))  # an alias may stand within what it names
    names = set()
    for item in node.value:
        if isinstance(item, tuple):  # of a mapping; else of a list
            name, item = item
            if isinstance(name.value, str) and name.value in names:
                line = name.start_mark.line + 1
                raise InputError(f"{path}, line {line}: {name.value!r} is there twice")
            names.add(str(name.value))
        _check_names(item, path, seen)


class Section:
    """A mapping of the file, whose every name has to be known."""

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise InputError(f"{where}: expected names and values, not {content!r}")
        self._where, self._content = where, dict(content)

    def take(self, name: str, default: Any) -> Any:
        """The value of ``name``, of the default's kind."""
        value = self._content.pop(name, default)
        if isinstance(default, (dict, list)) and not isinstance(value, type(default)):
            kind = "a list" if isinstance(default, list) else "names and values"
            raise InputError(f"{self._where}: {name} is {value!r}, but must be {kind}")
        return value

    def rest(self) -> dict[str, Any]:
        """All that has not been taken."""
        return self._content

    def end(self) -> None:
        """Complain of names that nobody asked for."""
        for name in self._content:
            raise InputError(f"{self._where}: there is no {name!r}")


def cast(value: Any, kind: Any, where: str) -> Any:
    """The value as an annotation says; YAML takes 1e-3 for a word, and 1 for no float.

    Raises:
        InputError: it is of another kind; ``where`` says what it is.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return cast(value, next(arg for arg in args if arg is not type(None)), where)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(cast(item, args[0], where) for item in value)
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    elif (
        isinstance(kind, type)
        and isinstance(value, kind)
        and isinstance(value, bool) == (kind is bool)
    ):
        return value
    one = {float: "number", int: "whole number", str: "word"}.get(kind, "list")
    wanted = " or ".join(map(str, args)) if origin is Literal else f"a {one}"
    raise InputError(f"{where} is {value!r}, but must be {wanted}")
