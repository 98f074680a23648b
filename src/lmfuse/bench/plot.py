"""A picture of what the ops reach: a roofline, and fractions of limits, beside stock torch.

Source: Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmfuse.bench.limits import Limits
from lmfuse.bench.runner import Result

FORMATS = (".png", ".svg")
_LIMIT, _STOCK, _FAINT = "#222222", "#8a8a8a", "#dddddd"
_COLORS = {
    "linear": "#0072b2",
    "woq": "#d55e00",
    "experts": "#6a3d9a",
    "attention": "#009e73",
    "norm": "#cc79a7",
    "activation": "#a06b00",
    "rope": "#56b4e9",
}
_NAMES = {"woq": "quantized linear"}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_WIDTH, _LINE = 12.0, 0.185  # inches: of the picture, and of a row of results


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


def plot(file: Path, limits: Limits, results: Sequence[Result], machine: str = "") -> None:
    """Draws `results` into `file`: a roofline of those that count operations, below it the fraction
    of its limit that each reaches, and last the time of those that stay in a cache.

    Filled is lmfuse, hollow is stock torch, black are the limits measured in the same run.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    computing = [r for r in results if r.gigaflops]
    limited = _grouped([r for r in results if r.fraction is not None])
    # Without a limit, what decodes compares two ways of lmfuse.
    cached = _grouped([r for r in results if r.fraction is None and r.kind != "decode"])
    heights = [
        5.8 if computing else 0.0,
        _LINE * (len(limited) + 1) // 2 + 1.0 if limited else 0.0,
        _LINE * (len(cached) + 1) // 2 + 1.0 if cached else 0.0,
    ]
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "lmfuse", "font.size": 9}
    with mpl.rc_context({**style, "axes.edgecolor": _STOCK}):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.6), layout="constrained")
        parts: Any = figure.subfigures(
            3 - heights.count(0.0), 1, height_ratios=[h for h in heights if h]
        )
        rest = iter([parts] if heights.count(0.0) == 2 else parts)
        if computing:
            _roofline(next(rest).subplots(), limits, computing)
        if limited:
            _columns(
                next(rest),
                "Of its limit, measured right before and after, in %; "
                "quantized layers: weights, what they compute in",
                limited,
                _fractions,
            )
        if cached:
            _columns(next(rest), "Data in a cache: microseconds of a call", cached, _times)
        threads = f"{limits.threads} thread{'s' * (limits.threads > 1)}"
        of = f" of {machine}" if machine else ""
        figure.suptitle(
            f"lmfuse and stock torch on {threads}{of}, {limits.isa}: filled is lmfuse, "
            "hollow is stock torch",
            fontsize=11,
        )
        undated = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=110, metadata=undated)


# --- the roofline -----------------------------------------------------------------------------


def _roofline(axes: Any, limits: Limits, results: Sequence[Result]) -> None:
    """GFLOP/s over operations per byte, both logarithmic."""
    xs = [_operations(r) / r.bytes for r in results]
    first, last = min(xs) / 1.6, max(xs) * 1.6
    for name, peak in _peaks(limits, results):
        knee = peak / limits.read
        axes.plot([knee, max(last, knee)], [peak, peak], color=_LIMIT, lw=1.2)
        text = f"{name} peak, {peak:.0f} GFLOP/s"
        axes.text(max(last, knee), 1.04 * peak, text, ha="right", color=_LIMIT, zorder=5)
    top = max(peak for _, peak in _peaks(limits, results))
    axes.plot([first, top / limits.read], [first * limits.read, top], color=_LIMIT, lw=1.2)
    axes.text(
        1.05 * first,
        1.25 * first * limits.read,
        f"reading, {limits.read:.1f} GB/s",
        rotation=math.degrees(math.atan(limits.read)),  # as the line has it, in data
        rotation_mode="anchor",
        transform_rotates_text=True,
        color=_LIMIT,
    )
    for stem in dict.fromkeys(r.stem for r in results):
        color = _COLORS.get(stem, _LIMIT)
        some = [(x, r) for x, r in zip(xs, results, strict=True) if r.stem == stem]
        at = [x for x, _ in some]
        ours = [_operations(r) / r.seconds / 1e9 for _, r in some]
        stock = [_operations(r) / r.stock_seconds / 1e9 for _, r in some]
        axes.vlines(at, stock, ours, color=color, alpha=0.35, lw=0.9)
        axes.scatter(at, stock, s=20, facecolors="none", edgecolors=color, lw=0.8, zorder=3)
        axes.scatter(at, ours, s=22, color=color, label=_NAMES.get(stem, stem), zorder=4)
    for text, lowest in _labels(results, xs).items():
        axes.annotate(
            text,
            lowest,
            xytext=(0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.set_title("Either reading bounds it (the slope), or arithmetic (the ceilings)", loc="left")
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left")


def _labels(results: Sequence[Result], xs: Sequence[float]) -> dict[str, tuple[float, float]]:
    """For each number of rows of linear layers in bfloat16, where its lowest dot is."""
    lowest: dict[str, tuple[float, float]] = {}
    for r, x in zip(results, xs, strict=True):
        if r.stem != "linear" or r.dtype != "bfloat16" or len(r.shape) != 2:
            continue
        y = _operations(r) / max(r.seconds, r.stock_seconds) / 1e9
        text = f"{r.shape[0]} row{'s' * (r.shape[0] > 1)}"
        if text not in lowest or y < lowest[text][1]:
            lowest[text] = (x, y)
    return lowest


def _peaks(limits: Limits, results: Sequence[Result]) -> list[tuple[str, float]]:
    """The arithmetic peaks of what was timed; int8 is for quantized weights."""
    names = ["fp32"]
    if any(r.dtype == "bfloat16" for r in results) and limits.bf16 > 1.05 * limits.fp32:
        names.append("bf16")
    if any(r.stem in ("woq", "experts") for r in results) and limits.int8 > 1.05 * limits.bf16:
        names.append("int8")
    return [(name, getattr(limits, name)) for name in names]


def _operations(result: Result) -> float:
    return (result.gigaflops or 0.0) * result.seconds * 1e9


# --- rows of results --------------------------------------------------------------------------

_Rows = list[tuple[str, str, list[Result]]]  # stem, label, results


def _grouped(results: Sequence[Result]) -> _Rows:
    """One row for the sizes of one op with one dtype and number of rows."""
    found: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        found.setdefault((r.stem, _label(r)), []).append(r)
    return [(stem, label, some) for (stem, label), some in found.items()]


def _label(r: Result) -> str:
    name, dtype = r.name, _SHORT.get(r.dtype, r.dtype)
    if r.stem in ("linear", "woq"):  # the name ends in the layer's outputs
        words = [w for w in name.split() if not w.isdigit()]
        rows = f"{r.shape[0]} row{'s' * (r.shape[0] > 1)}"
        weights = [] if r.stem == "woq" else [dtype]
        return ", ".join([" ".join(words), *weights, rows])
    if r.stem == "attention":
        return f"{name} {'x'.join(map(str, r.shape))}"
    return f"{name} {'x'.join(map(str, r.shape))} {dtype}"


def _columns(figure: Any, title: str, rows: _Rows, draw: Any) -> None:
    """Two columns of rows, read from top to bottom."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.8)
    half = -(-len(rows) // 2)
    columns = [rows[:half], rows[half:]] if len(rows) > 1 else [rows]
    for axes, some in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        places = range(half, half - len(some), -1)
        draw(axes, places, some)
        axes.set_yticks(places, [label for _, label, _ in some], fontsize=8)
        axes.set_ylim(0.3, half + 0.7)
        axes.tick_params(axis="y", length=0)
        for tick, (stem, _, _) in zip(axes.get_yticklabels(), some, strict=True):
            tick.set_color(_COLORS.get(stem, _LIMIT))
        axes.grid(color=_FAINT, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)


def _fractions(axes: Any, places: Sequence[int], rows: _Rows) -> None:
    axes.axvline(100, color=_LIMIT, lw=1.2)
    for place, (stem, _, some) in zip(places, rows, strict=True):
        ours = [100 * (r.fraction or 0.0) for r in some]
        _pairs(axes, place, stem, [x / r.ratio for x, r in zip(ours, some, strict=True)], ours)
    axes.set_xlim(0, max(125.0, axes.get_xlim()[1]))


def _times(axes: Any, places: Sequence[int], rows: _Rows) -> None:
    for place, (stem, _, some) in zip(places, rows, strict=True):
        ours = [r.seconds * 1e6 for r in some]
        _pairs(axes, place, stem, [r.stock_seconds * 1e6 for r in some], ours)
    axes.set_xscale("log")


def _pairs(axes: Any, y: float, stem: str, stock: list[float], ours: list[float]) -> None:
    color = _COLORS.get(stem, _LIMIT)
    ys = [y] * len(ours)
    axes.hlines(ys, stock, ours, color=color, alpha=0.3, lw=1.2)
    axes.scatter(stock, ys, s=18, facecolors="white", edgecolors=color, lw=0.8, zorder=3)
    axes.scatter(ours, ys, s=20, color=color, zorder=4)
