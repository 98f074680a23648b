"""The picture of a benchmark: that it is drawn, with every result, and refused before timing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from lmfuse.bench import plot
from lmfuse.bench.limits import Limits
from lmfuse.bench.runner import Result
from lmfuse.cli import app

LIMITS = Limits("amx", 2, read=30.0, copy=40.0, fp32=500.0, bf16=7000.0, int8=14000.0)


def result(
    stem: str,
    shape: tuple[int, ...],
    gigaflops: float | None,
    dtype: str,
    fraction: float | None = None,
) -> Result:
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
        limit=None if fraction is None else "read",
        fraction=fraction,
        stock_seconds=2e-3,
        ratio=2.0,
    )


LINEAR = [
    result("linear", (1, 64), 20.0, "bfloat16", 0.9),
    result("linear", (1, 128), 30.0, "bfloat16", 0.8),
    result("linear", (8, 64), 90.0, "float32", 0.7),
]
NORM = [result("norm", (512, 64), None, "float32")]


def dots(file: Path) -> int:
    """Filled and hollow ones, without those of legends."""
    root = ElementTree.parse(file).getroot()
    names = "{http://www.w3.org/2000/svg}"
    groups = [(g.get("id", ""), len(list(g.iter(f"{names}use")))) for g in root.iter(f"{names}g")]
    inside = {"PathCollection": 1, "legend": -1}
    return sum(sign * n for name, n in groups for kind, sign in inside.items() if kind in name)


@pytest.mark.parametrize("results", [LINEAR + NORM, LINEAR, NORM])
def test_every_result_and_limit_is_drawn(tmp_path: Path, results: list[Result]) -> None:
    file = tmp_path / "ops.svg"
    plot.plot(file, LIMITS, results, "Some CPU")
    text = " ".join(ElementTree.parse(file).getroot().itertext())
    assert "on 2 threads of Some CPU, amx" in text
    assert dots(file) == sum(4 if r in LINEAR else 2 for r in results)  # LINEAR is drawn twice
    if results != NORM:
        assert "linear op, bf16, 1 row" in text
        assert "linear op, fp32, 8 rows" in text
        assert "reading, 30.0 GB/s" in text
        assert "bf16 peak, 7000 GFLOP/s" in text
        assert "fp32 peak, 500 GFLOP/s" in text
    if results != LINEAR:
        assert "norm op 512x64 fp32" in text


def test_what_was_written_is_drawn_later(tmp_path: Path) -> None:
    files = []
    for i, results in enumerate((LINEAR, NORM)):
        files.append(tmp_path / f"{i}.json")
        machine = {"cpu": "Some CPU"}
        run = {"machine": machine, "limits": asdict(LIMITS), "results": list(map(asdict, results))}
        files[-1].write_text(json.dumps(run))
    picture, expected = tmp_path / "ops.svg", tmp_path / "expected.svg"
    words = ["bench", "--plot", str(picture), "--from", str(files[0]), "--from", str(files[1])]
    assert CliRunner().invoke(app, words).exit_code == 0
    plot.plot(expected, LIMITS, LINEAR + NORM, "Some CPU")
    assert picture.read_text() == expected.read_text()
    for words, text in (
        (["--from", str(files[0])], "it needs --plot"),
        (["--from", str(picture), "--plot", str(picture)], "not what --json writes"),
    ):
        found = CliRunner().invoke(app, ["bench", *words])
        assert found.exit_code == 2
        assert text in found.stderr


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
