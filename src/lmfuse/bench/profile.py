"""torch's profiler, without the lines in which it announces itself on standard error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def profiled() -> Iterator[torch.profiler.profile]:
    """Profiles the operations of the CPU; what else is written while it runs comes through."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with _silence():
        profiler.start()
    try:
        yield profiler
    finally:
        with _silence():
            profiler.stop()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the descriptor of standard error, to which C++ writes past sys.stderr."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
