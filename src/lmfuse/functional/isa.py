"""The active instruction set, by number; `lmfuse.isa` gives the numbers names."""

from __future__ import annotations

from typing import cast

from lmfuse._library import ops


def active() -> int:
    """The level in use."""
    return cast(int, ops.isa_active())


def best() -> int:
    """The highest level that this machine can run."""
    return cast(int, ops.isa_best())


def use(level: int) -> bool:
    """Makes `level` the active one; False if this machine cannot run it."""
    return cast(bool, ops.isa_use(level))
