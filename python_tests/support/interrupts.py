"""KeyboardInterrupt at a chosen moment, as Ctrl-C would raise it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

# Python checks for signals where a function begins and where a C function has returned.
_MOMENTS = ("call", "c_return")


def interrupted(action: Callable[[], Any], at: int | None = None) -> tuple[bool, list[str]]:
    """Run ``action``; interrupt it at moment number ``at``, counted from 0 (None: never).

    Returns:
        True if it was interrupted, and the name of the module that ran at each moment.
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


def interrupted_within(
    package: str, kind: str, action: Callable[[], Any], at: int | None = None
) -> tuple[bool, int]:
    """Run ``action``; interrupt it before a line or an opcode of a package.

    Args:
        package: its name.
        kind: "line" or "opcode".
        at: the number of the line or opcode, counted from 0 as they run (None: never).

    Returns:
        True if it was interrupted, and the number of lines or opcodes that began.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_globals.get("__name__", "").split(".")[0] != package:
            return None
        frame.f_trace_opcodes = kind == "opcode"
        if event == kind:
            count += 1
            if at is not None and count > at:
                raise KeyboardInterrupt  # which ends the tracing, too
        return trace

    gc.disable()  # exceptions raised within a garbage collection are dropped
    try:
        sys.settrace(trace)
        action()
    except KeyboardInterrupt:
        return True, count
    finally:
        sys.settrace(None)
        gc.enable()
        torch.set_grad_enabled(True)
    return False, count
