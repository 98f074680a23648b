"""Benchmarks: each op checked first, then timed against stock torch and the limits of the machine.

A module per stem (norm, activation, rope, linear, attention, woq, experts) holds a list `CASES`;
the tests check them too.
"""

from __future__ import annotations

from importlib import import_module

from lmfuse.bench.case import Case

STEMS = ("norm", "activation", "rope", "linear", "attention", "woq", "experts")


def cases(stem: str) -> list[Case]:
    """The cases of one stem.

    Raises:
        ValueError: there is no such stem.
    """
    if stem not in STEMS:
        raise ValueError(f"no benchmark is called {stem!r}; there are {', '.join(STEMS)}")
    found: list[Case] = import_module(f"lmfuse.bench.{stem}").CASES
    return found


__all__ = ["STEMS", "Case", "cases"]
