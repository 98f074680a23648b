"""Time, and what to compare it with: bandwidths and peaks of this machine, in this process.

A virtual machine changes its memory bandwidth by half within seconds, so a fraction of a limit is
taken in pairs: the limit right before and right after each run (`paired`).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

import lmfuse
from lmfuse.functional import limits

_SAMPLE = 50e-6  # seconds; a shorter sample would measure the clock
_SLICE = 30e-3
_PROBE_BYTES = 256 << 20

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    best: float


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: GB/s (10⁹ bytes) and GFLOP/s (10⁹ operations), all threads.

    copy counts each byte twice, read and written. bf16 and int8 are the fastest way the active
    instruction set has for products of these types, be it fp32 arithmetic.
    """

    isa: str
    threads: int
    read: float
    copy: float
    fp32: float
    bf16: float
    int8: float


@dataclass(frozen=True)
class Probe:
    """A loop that does nothing but move `bytes` bytes, or do so many operations."""

    run: Run
    bytes: int


def _seconds(run: Run, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - start) / calls


def _calls(run: Run) -> int:
    """How often to call in a row so that a sample is long enough."""
    calls = 1
    while (seconds := _seconds(run, calls) * calls) < _SAMPLE:
        calls = max(2 * calls, int(1.2 * calls * _SAMPLE / seconds))
    return calls


def best_of(run: Run, *others: Run, seconds: float = 0.3) -> list[Timing]:
    """Times `run` and `others` in turn, so that a change of the machine meets them all.

    Args:
        seconds: how long to measure each, at least; there are no fewer than 5 samples.
    """
    runs = (run, *others)
    calls = [_calls(r) for r in runs]
    samples: list[list[float]] = [[] for _ in runs]
    deadline = perf_counter() + seconds * len(runs)
    while len(samples[0]) < 5 or perf_counter() < deadline:
        for r, n, found in zip(runs, calls, samples, strict=True):
            found.append(_seconds(r, n))
    return [Timing(median(s), min(s)) for s in samples]


def paired(run: Run, moved: int, probe: Probe, slices: int = 9) -> tuple[Timing, float]:
    """The time of `run`, and its bandwidth as a fraction of that of `probe`.

    The probe runs right before and right after each slice of some milliseconds of work; the
    fraction is the median over the slices, so that drift of the machine cancels.

    Args:
        run: moves `moved` bytes, or does `moved` operations.
        probe: of bytes, or of operations.
    """
    run()
    probe.run()
    calls = max(1, int(_SLICE / _seconds(run, 1)))
    probes = max(1, int(_SLICE / 10 / _seconds(probe.run, 1)))
    seconds, fractions = [], []
    before = _seconds(probe.run, probes)
    for _ in range(slices):
        seconds.append(_seconds(run, calls))
        after = _seconds(probe.run, probes)
        fractions.append(moved / seconds[-1] * (before + after) / 2 / probe.bytes)
        before = after
    return Timing(median(seconds), min(seconds)), median(fractions)


def read_probe() -> Probe:
    """A prefetching read loop over a buffer far larger than the caches."""
    x = limits.buffer(_PROBE_BYTES // 4)
    return Probe(lambda: limits.read(x), x.nbytes)


def copy_probe() -> Probe:
    """The better of two copy loops, with ordinary stores and around the caches."""
    # Pages of 4 KB, as what the ops are given and return; weights and caches lie in large ones.
    x, y = torch.ones(_PROBE_BYTES // 4), torch.ones(_PROBE_BYTES // 4)

    def copy(stream: bool) -> Run:
        return lambda: limits.copy(x, y, stream)

    plain, stream = best_of(copy(False), copy(True))
    return Probe(copy(stream.best < plain.best), 2 * x.nbytes)


def cached_probe(size: int) -> Probe:
    """The read loop over the same `size` bytes again and again, in each thread its part."""
    page = 4096
    x = limits.buffer(-(-size // page) * page // 4)
    return Probe(lambda: limits.read(x), x.nbytes)


def peak_probe(unit: str) -> Probe:
    """Some milliseconds of nothing but arithmetic; see `lmfuse.functional.limits.peak`."""

    def run(rounds: int) -> Run:
        return lambda: limits.peak(unit, rounds)

    rounds = 1000
    while (seconds := _seconds(run(rounds), 1)) < _SLICE:
        rounds = int(rounds * min(10.0, 1.2 * _SLICE / seconds))
    return Probe(run(rounds), limits.peak(unit, rounds))


def _peak(unit: str) -> float:
    probe = peak_probe(unit)
    return probe.bytes / best_of(probe.run)[0].best / 1e9


def measure(read: Probe | None = None, copy: Probe | None = None) -> Limits:
    """Measures all limits; about two seconds."""

    def bandwidth(probe: Probe) -> float:
        return probe.bytes / best_of(probe.run)[0].median / 1e9

    fp32 = _peak("fp32")
    return Limits(
        isa=lmfuse.isa(),
        threads=torch.get_num_threads(),
        read=bandwidth(read or read_probe()),
        copy=bandwidth(copy or copy_probe()),
        fp32=fp32,
        bf16=max(fp32, _peak("bf16")),
        int8=max(fp32, _peak("int8")),
    )


def recycle_memory(on: bool) -> None:
    """Lets malloc keep all that is freed, for the whole process; only where it is glibc's.

    A result of 256 MB would otherwise come in fresh pages each time, which the operating system
    clears at less than half of the copy bandwidth: one would measure that instead. Weights want
    fresh pages, large ones.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the names of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0 if on else 65536)
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, -1)
