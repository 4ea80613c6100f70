"""KeyboardInterrupt at a chosen moment, as Ctrl-C would raise it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

# Python looks for signals where a function begins and where a C function has returned.
_MOMENTS = ("call", "c_return")


def interrupted(action: Callable[[], Any], at: int | None = None) -> tuple[bool, list[str]]:
    """Run ``action``; interrupt it at moment number ``at``, counted from 0 (None: never).

    Returns:
        Whether it was interrupted, and the name of the module that ran, for each moment.
    """
    moments: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in _MOMENTS:
            moments.append(frame.f_globals.get("__name__", ""))
            if at is not None and len(moments) > at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        action()
    except KeyboardInterrupt:
        return True, moments
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own ``no_grad`` may be cut short
    return False, moments
