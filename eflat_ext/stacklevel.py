"""Make warnings point at the user's own line."""

from __future__ import annotations

import sys

_INNER = ("torch", __name__.split(".")[0])


def stacklevel_of_user() -> int:
    """Return the ``stacklevel`` of the first caller that is neither this package nor torch.

    A count would not do: torch, and every learning rate scheduler, wraps ``Optimizer.step``.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    return level
