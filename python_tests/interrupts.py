"""KeyboardInterrupt at a chosen moment, as Ctrl-C would raise it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

# Python looks for signals where a function begins and where a C function has returned.
_MOMENTS = ("call", "c_return")


def interrupted(action: Callable[[], Any], at: int | None = None) -> tuple[bool, int]:
    """Run ``action``; interrupt it at moment number ``at``, counted from 0 (None: never).

    Returns:
        Whether it was interrupted, and how many moments there were.
    """
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event in _MOMENTS:
            count += 1
            if at is not None and count > at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        action()
    except KeyboardInterrupt:
        return True, count
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own ``no_grad`` may be cut short
    return False, count
