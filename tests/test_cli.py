"""The command line: what it prints, writes and returns, and how it takes a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import lmfuse
from lmfuse.bench import cases, limits, machine, runner
from lmfuse.bench.case import Case
from lmfuse.cli import COMMANDS, app
from lmfuse.cli import bench as command


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), prog_name="lmfuse")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of each stem on a few rows, and a malloc that stays as it was."""
    monkeypatch.setattr(limits, "_PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(runner, "recycle_memory", lambda on: None)
    monkeypatch.setattr(command, "cases", lambda stem: [c.small() for c in cases(stem)[:2]])


def test_env_prints_without_a_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lmfuse", "env"], capture_output=True, text=True, check=True
    )
    assert torch.__version__ in done.stdout
    assert f"{lmfuse.isa()}" in done.stdout
    assert "rms_norm" in done.stdout
    assert not done.stderr


def test_env_json() -> None:
    result = run("env", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["lmfuse"] == lmfuse.__version__
    assert [level["name"] for level in found["levels"] if level["available"]] == list(
        lmfuse.available_isas()
    )
    assert {"rms_norm", "silu_mul", "rope", "limit_read"} <= set(found["ops"])
    assert found["memory"] > 0
    assert found["cores"] > 0


def test_env_says_why_a_level_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmfuse, "available_isas", lambda: ("generic", "avx2"))
    flags = "avx avx2 fma f16c avx512f avx512dq avx512vl"
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"model name": "Any", "flags": flags})
    levels = {level.name: level for level in machine.describe().levels}
    assert not levels["avx2"].missing
    assert levels["avx512"].missing == "the processor does not show avx512bw"
    assert "avx512_bf16, avx512_vnni, avx512vbmi" in levels["avx512_bf16"].missing


def test_env_says_when_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmfuse, "available_isas", lambda: ("generic",))
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": "avx avx2 fma f16c"})
    levels = {level.name: level for level in machine.describe().levels}
    assert "operating system" in levels["avx2"].missing


def test_bench_prints_and_writes(small: None, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = run("bench", "norm", "activation", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "rms_norm" in result.stdout
    assert "% of copy" in result.stdout
    found = json.loads(file.read_text())
    assert [r["stem"] for r in found["results"]] == ["norm", "norm", "activation", "activation"]
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in found["results"])
    assert found["limits"]["copy"] > 0
    assert found["machine"]["versions"]["torch"] == torch.__version__


def test_bench_takes_isa_and_threads(small: None) -> None:
    threads = torch.get_num_threads()
    with lmfuse.use_isa(lmfuse.isa()):
        result = run("bench", "rope", "--isa", "generic", "--threads", "1")
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "generic, threads: 1" in result.stdout


def test_bench_fails_on_a_wrong_op(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right, other = cases("norm")[:2]
    wrong: Case = replace(right, run=lambda x, w: x)
    monkeypatch.setattr(command, "cases", lambda stem: [wrong.small(), other.small()])
    result = run("bench", "norm")
    assert result.exit_code == 1
    assert "rms_norm [5, 4096] float32 is wrong" in result.stderr
    assert "add_rms_norm" in result.stdout  # the others are timed all the same


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["bench", "nrom"], "nrom"),
        (["bench", "--isa", "mmx"], "mmx"),
        (["bench", "--threads", "0"], "threads"),
        (["bench", "--kind", "huge"], "huge"),
        (["bench", "--json", "no/such/folder/x.json"], "no/such/folder"),
        (["bnech"], "bnech"),
    ],
)
def test_mistakes_are_one_message(words: list[str], text: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert text in line


def test_a_mistake_in_words_says_where_to_read() -> None:
    assert run("bnech").stderr.endswith(" See lmfuse --help\n")
    assert run("run").stderr.endswith(" See lmfuse run --help\n")


def test_nothing_asked_is_answered_with_help() -> None:
    assert all(name in run().output for name in COMMANDS)


def test_help_lists_every_command() -> None:
    text = run("--help").stdout
    assert all(name in text for name in COMMANDS)
