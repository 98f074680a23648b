"""Runs cases: first checked, then timed against stock torch and the limits of the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmfuse.bench.case import Case
from lmfuse.bench.limits import Limits, Probe, best_of, copy_probe, measure, paired, read_probe


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

    def limits(self) -> Limits:
        """The limits of the machine on the active instruction set and number of threads."""
        return measure(self._probes["read"], self._probes["copy"])

    @torch.no_grad()
    def run(self, stem: str, case: Case) -> Result:
        """Checks and times one case.

        Raises:
            MismatchError: the op does not compute its formula.
        """
        inputs = case.inputs()
        case.check(inputs)
        moved = case.bytes(inputs)
        fraction = None
        if case.limit:
            ours, fraction = paired(lambda: case.run(*inputs), moved, self._probes[case.limit])
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
            limit=case.limit,
            fraction=fraction,
            stock_seconds=stock.median,
            ratio=stock.median / ours.median,
        )
