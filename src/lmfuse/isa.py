"""Which instruction sets the kernels use: chosen at run time, visible, and forceable.

`generic` is plain C++; `avx2` needs AVX2, FMA and F16C; `avx512` F, DQ, BW and VL; `avx512_bf16`
BF16, VNNI and VBMI besides (Zen 4, Sapphire Rapids and newer); `amx` the tile, BF16 and INT8 units.
The best that CPU and operating system have is active from the start; the environment variable
`LMFUSE_ISA` or `use_isa` choose another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lmfuse.functional import isa as _isa

LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def isa() -> str:
    """The name of the active level."""
    return LEVELS[_isa.active()]


def available_isas() -> tuple[str, ...]:
    """The levels that this CPU and its operating system can run, the plainest first."""
    return LEVELS[: _isa.best() + 1]


def set_isa(name: str) -> None:
    """Makes `name` the active level of the whole process.

    Raises:
        ValueError: there is no such level, or this machine cannot run it.
    """
    if name not in LEVELS:
        raise ValueError(f"isa is {name!r}, but must be one of {', '.join(LEVELS)}")
    if not _isa.use(LEVELS.index(name)):
        raise ValueError(
            f"isa is {name!r}, but this machine can run only {', '.join(available_isas())}"
        )


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the body of a `with` statement on level `name`, in all threads of the process.

    Raises:
        ValueError: there is no such level, or this machine cannot run it.
    """
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def _from_environment() -> None:
    name = os.environ.get("LMFUSE_ISA", "").strip()
    if name:
        try:
            set_isa(name)
        except ValueError as error:
            raise ValueError(f"environment variable LMFUSE_ISA: {error}") from None


_from_environment()
