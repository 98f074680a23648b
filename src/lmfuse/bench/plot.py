"""A picture of what the ops reach: a roofline, and bandwidths, lmfuse beside stock torch.

Source: Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmfuse.bench.limits import Limits
from lmfuse.bench.runner import Result

FORMATS = (".png", ".svg")
_OURS, _STOCK, _LIMIT = "#0b6e4f", "#c1666b", "#000000"


def check(file: Path) -> None:
    """What can be known before anything is timed.

    Raises:
        ValueError: the name ends in neither .png nor .svg, or its folder is not there.
        ImportError: matplotlib is missing.
    """
    if file.suffix not in FORMATS:
        raise ValueError(f"{file.name} ends in {file.suffix!r}, but must end in .png or .svg")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("a picture needs matplotlib: python -m pip install matplotlib") from None


def plot(file: Path, limits: Limits, results: Sequence[Result]) -> None:
    """Draws `results` into `file`: those that count operations left, the others right.

    A line leads from what stock torch reaches to what lmfuse reaches; black are the limits that
    were measured in the same run.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    computing = [r for r in results if r.gigaflops]
    moving = [r for r in results if not r.gigaflops]
    panels = [p for p in ((_roofline, computing), (_bandwidths, moving)) if p[1]]
    height = max(6.0, 0.23 * len(moving) + 1.5)
    figure = Figure(figsize=(8 * len(panels), height), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (draw, found) in zip(drawn, panels, strict=True):
        draw(axes, limits, found)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.suptitle(f"lmfuse ({limits.isa}, {limits.threads} threads) and stock torch")
    figure.savefig(file, dpi=120)


def _roofline(axes: Any, limits: Limits, results: Sequence[Result]) -> None:
    """GFLOP/s over operations per byte, both logarithmic."""
    xs = [_operations(r) / r.bytes for r in results]
    first, last = min(xs) / 2, max(xs) * 2
    for name, peak in _peaks(limits, results):
        knee = peak / limits.read
        end = max(last, knee)
        axes.plot([first, knee, end], [first * limits.read, peak, peak], color=_LIMIT, lw=1)
        axes.annotate(f"{name} peak, {peak:.0f}", (end, peak), ha="right", va="bottom", fontsize=8)
    text, at = f"  reading, {limits.read:.1f} GB/s", (first, first * limits.read)
    axes.annotate(text, at, va="top", fontsize=8)
    stock = [_operations(r) / r.stock_seconds / 1e9 for r in results]
    ours = [_operations(r) / r.seconds / 1e9 for r in results]
    axes.vlines(xs, stock, ours, color=_OURS, alpha=0.4, lw=0.8)
    _dots(axes, xs, stock, "stock torch", _STOCK)
    _dots(axes, xs, ours, "lmfuse", _OURS)
    for text, at in _labels(results, xs, ours).items():
        axes.annotate(text, at, xytext=(7, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")


def _labels(
    results: Sequence[Result], xs: Sequence[float], ys: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """One for all results of a family with as many rows and the same dtype, at the highest."""
    best: dict[str, tuple[float, float]] = {}
    for r, x, y in zip(results, xs, ys, strict=True):
        rows = r.shape[0] if len(r.shape) == 2 else r.shape[0] * r.shape[1]
        text = f"{r.stem}, {rows} row{'s' * (rows > 1)}, {r.dtype}"
        if text not in best or y > best[text][1]:
            best[text] = (x, y)
    return best


def _bandwidths(axes: Any, limits: Limits, results: Sequence[Result]) -> None:
    """GB/s, a row for each result."""
    rows = range(len(results), 0, -1)
    stock = [r.bytes / r.stock_seconds / 1e9 for r in results]
    ours = [r.gigabytes for r in results]
    for name, value in (("read", limits.read), ("copy", limits.copy)):
        axes.axvline(value, color=_LIMIT, lw=1)
        axes.annotate(f" {name}, {value:.1f}", (value, 0.2), rotation=90, fontsize=8)
    axes.hlines(rows, stock, ours, color=_OURS, alpha=0.4, lw=0.8)
    _dots(axes, stock, rows, "stock torch", _STOCK)
    _dots(axes, ours, rows, "lmfuse", _OURS)
    axes.set_yticks(rows, [f"{r.name} {list(r.shape)} {r.dtype}" for r in results], fontsize=7)
    axes.set(xscale="log", xlabel="GB/s", ylim=(0, len(results) + 1))


def _dots(axes: Any, xs: Sequence[float], ys: Sequence[float], label: str, color: str) -> None:
    axes.scatter(xs, ys, s=18, label=label, color=color, zorder=3)


def _peaks(limits: Limits, results: Sequence[Result]) -> list[tuple[str, float]]:
    """The arithmetic peaks of the dtypes that were timed."""
    names = ["fp32"]
    if any(r.dtype == "bfloat16" for r in results) and limits.bf16 > limits.fp32:
        names.append("bf16")
    return [(name, getattr(limits, name)) for name in names]


def _operations(result: Result) -> float:
    return (result.gigaflops or 0.0) * result.seconds * 1e9
