"""The picture of a benchmark: that it is drawn, with every result, and refused before timing."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from typer.testing import CliRunner

from lmfuse.bench import plot
from lmfuse.bench.limits import Limits
from lmfuse.bench.runner import Result
from lmfuse.cli import app

LIMITS = Limits("amx", 2, read=30.0, copy=40.0, fp32=500.0, bf16=7000.0, int8=14000.0)


def result(stem: str, shape: tuple[int, ...], gigaflops: float | None, dtype: str) -> Result:
    return Result(
        stem=stem,
        name=f"{stem} op",
        kind="row",
        shape=shape,
        dtype=dtype,
        seconds=1e-3,
        bytes=10**7,
        gigabytes=10.0,
        gigaflops=gigaflops,
        limit=None,
        fraction=None,
        stock_seconds=2e-3,
        ratio=2.0,
    )


LINEAR = [
    result("linear", (1, 64), 20.0, "bfloat16"),
    result("linear", (1, 128), 30.0, "bfloat16"),
    result("linear", (8, 64), 90.0, "float32"),
]
NORM = [result("norm", (512, 64), None, "float32")]


@pytest.mark.parametrize("results", [LINEAR + NORM, LINEAR, NORM])
def test_every_result_and_limit_is_drawn(tmp_path: Path, results: list[Result]) -> None:
    file = tmp_path / "ops.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.plot(file, LIMITS, results)
    text = " ".join(ElementTree.parse(file).getroot().itertext())
    assert "lmfuse (amx, 2 threads)" in text
    if results != NORM:
        assert text.count("linear, 1 row, bfloat16") == 1
        assert "linear, 8 rows, float32" in text
        assert "reading, 30.0 GB/s" in text
        assert "bf16 peak, 7000" in text
    if results != LINEAR:
        assert "norm op [512, 64] float32" in text
        assert "copy, 40.0" in text


def test_png(tmp_path: Path) -> None:
    plot.plot(tmp_path / "ops.png", LIMITS, NORM)
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "text"),
    [("ops.jpg", "must end in .png or .svg"), ("no/ops.png", "there is no folder")],
)
def test_mistakes_are_told_before_timing(name: str, text: str) -> None:
    found = CliRunner().invoke(app, ["bench", "norm", "--plot", name])
    assert found.exit_code == 2
    assert text in " ".join(found.stderr.replace("│", " ").split())


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.check(tmp_path / "ops.png")
