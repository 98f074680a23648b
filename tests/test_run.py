"""examples/run.py on a model of a few kilobytes: the lines that IPEX's entry script prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import lmfuse
from lmfuse.bench.limits import Limits
from tiny import save_tiny

EXAMPLES = str(Path(__file__).parents[1] / "examples")
if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)

import run as script  # noqa: E402

QUICK = ("--num-iter", "3", "--num-warmup", "1", "--max-new-tokens", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(lmfuse.isa(), 2, read=10.0, copy=10.0, fp32=100.0, bf16=100.0, int8=100.0)
    monkeypatch.setattr(script, "measure", lambda: limits)
    monkeypatch.setattr(script, "recycle_memory", lambda on: None)  # it would outlive the test


def call(*words: str) -> Result:
    return CliRunner().invoke(script.app, list(words))


def test_prints_the_lines(folder: str) -> None:
    result = call("-m", folder, *QUICK, "--token-latency", "--input-tokens", "20")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^Iteration: \d, Time: \d+\.\d+ sec$", result.stdout, re.M)) == 3
    for line in (
        "Inference latency",
        "First token average latency",
        r"Average 2\.\.\. latency",
        r"P90 2\.\.\. latency",
        r"P99 2\.\.\. latency",
    ):
        assert re.search(rf"^{line}: \d+\.\d{{5}} sec\.$", result.stdout, re.M)
    assert "20 + 4 tokens, 4 beams" in result.stdout
    assert re.search(r"next token .*ms.*%", result.stdout)
    assert not result.stderr


def _written(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[0]


@pytest.mark.parametrize("options", [("--greedy",), ("--batch-size", "2")])
def test_writes_what_stock_writes(folder: str, options: tuple[str, ...]) -> None:
    words = ("-m", folder, "--prompt", "Once upon a time", *QUICK, *options)
    ours = _written(call(*words))
    assert ours.count("Once upon a time") == (2 if "--batch-size" in options else 1)
    assert ours == _written(call(*words, "--stock"))


def test_takes_the_showcase(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(script.lmfuse, "optimize", lambda model, **_: seen.append(model) or model)
    call("-m", folder, *QUICK)
    assert type(seen[0]) is script.SHOWCASES["llama"]


def test_beams_share_their_prompt(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    optimized = script.optimized

    def watched(*arguments: Any) -> Any:
        model = optimized(*arguments)
        inputs = model.get_input_embeddings()
        inputs.register_forward_hook(lambda module, ids, out: rows.append(out.shape[0]))
        return model

    monkeypatch.setattr(script, "optimized", watched)
    assert call("-m", folder, *QUICK).exit_code == 0
    assert rows == [1, 4, 4, 4] * 3


def test_profiles(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = call("-m", folder, *QUICK, "--profile")
    assert "profiler" not in capfd.readouterr().err
    assert "Self CPU time total" in result.stdout
    assert "lmfuse::" in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-m", "/no/such/folder"], "there is no folder"),
        (["-m", "TINY", "--num-iter", "5"], "must be more than --num-warmup"),
        (["-m", "TINY", "--input-tokens", "600"], "the model reads 1 to 512"),
        (["-m", "TINY", "--prompt", ""], "it has 0 tokens"),
        (["-m", "TINY", "--dtype", "int3"], "int3"),
        (["-m", "TINY", "--isa", "mmx"], "mmx"),
        (["-m", "TINY", "--woq", "int8", "--stock"], "stock transformers has no such weights"),
        (["-m", "TINY", "--woq", "int4", "--group-size", "7"], "a power of two from 32 on"),
    ],
)
def test_mistakes_are_one_message(folder: str, words: list[str], text: str) -> None:
    result = call(*[folder if word == "TINY" else word for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert text in line


@pytest.mark.parametrize("woq", ["int8", "int4"])
def test_quantizes(folder: str, woq: str) -> None:
    result = call("-m", folder, *QUICK, "--greedy", "--woq", woq, "--group-size", "32")
    assert result.exit_code == 0, result.output
    assert re.search(r"next token .*ms.*%", result.stdout)
