"""Runs cases: first checked, then timed against stock torch and the limits of the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmfuse.bench.case import Case
from lmfuse.bench.limits import (
    Limits,
    Probe,
    best_of,
    cached_probe,
    copy_probe,
    measure,
    paired,
    peak_probe,
    read_probe,
    recycle_memory,
)


@dataclass(frozen=True)
class Result:
    """What one case reached. Seconds are medians; rates are 10⁹ a second.

    Attributes:
        fraction: of the bandwidth named by `limit`, measured in pairs; None without a limit.
        ratio: how many times faster than stock.
    """

    stem: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    bytes: int
    gigabytes: float
    gigaflops: float | None
    limit: str | None
    fraction: float | None
    stock_seconds: float
    ratio: float


class Runner:
    """Holds the probes, so that all cases of a run are judged by the same loops."""

    def __init__(self) -> None:
        self._probes: dict[str, Probe] = {"copy": copy_probe(), "read": read_probe()}
        self.limits: Limits = measure(self._probes["read"], self._probes["copy"])

    def _limit(self, case: Case, moved: int) -> tuple[str, Probe, int]:
        """What bounds a case: its name, a probe of it, and how much of it one run takes."""
        if case.limit == "cached":
            return "cache", cached_probe(moved), moved
        if case.limit in self._probes:
            return case.limit, self._probes[case.limit], moved
        unit = case.unit or ("bf16" if case.dtype is torch.bfloat16 else "fp32")
        peak: float = getattr(self.limits, unit)
        if moved / self.limits.read > case.flops / peak:
            return "read", self._probes["read"], moved
        unit = unit if getattr(self.limits, unit) > self.limits.fp32 else "fp32"
        return f"{unit} peak", peak_probe(unit), case.flops

    @torch.no_grad()
    def run(self, stem: str, case: Case) -> Result:
        """Checks and times one case.

        Raises:
            MismatchError: the op does not compute its formula.
        """
        recycle_memory(case.kind == "stream")
        inputs = case.inputs()
        case.check(inputs)
        moved = case.bytes(inputs)
        limit = fraction = None
        if case.limit:
            limit, probe, amount = self._limit(case, moved)
            ours, fraction = paired(lambda: case.run(*inputs), amount, probe)
            (stock,) = best_of(lambda: case.stock(*inputs), seconds=0)
        else:
            ours, stock = best_of(lambda: case.run(*inputs), lambda: case.stock(*inputs))
        return Result(
            stem=stem,
            name=case.name,
            kind=case.kind,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            seconds=ours.median,
            bytes=moved,
            gigabytes=moved / ours.median / 1e9,
            gigaflops=case.flops / ours.median / 1e9 if case.flops else None,
            limit=limit,
            fraction=fraction,
            stock_seconds=stock.median,
            ratio=stock.median / ours.median,
        )
