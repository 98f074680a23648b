"""`python -m lmfuse quantize`: what it prints, draws and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils.quantization_config import GgufConfig
from typer.testing import CliRunner

from lmfuse.cli import app
from lmfuse.cli import quantize as command
from test_quantization import logits, tiny


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.txt").write_text("letters")


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Letters())


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


def test_compare_prints_and_draws(letters: None, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "in")
    picture = tmp_path / "errors.png"
    result = run(
        tmp_path / "in", "--bits", 4, "--group", 32, "--compare", "--tokens", 128,
        "--picture", picture, "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("int4 group 32", "perplexity", "KL divergence", "down_proj", "On 127 tokens"):
        assert words in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.lm_head).__name__ == "QuantizedLinear"
    assert logits(again).isfinite().all()
    assert (tmp_path / "out" / "tokenizer.txt").is_file()


def test_mistakes_are_one_message(letters: None, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("words")
    for words, text in (
        (["--bits", 3], "bits is 3"),
        (["--group", 33], "group_size is 33"),
        (["--kind", "int7"], "int7"),
        (["--compare", "--text", short], "the text has 5 tokens"),
    ):
        result = run(tmp_path, *words)
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.output.split())
    result = run(tmp_path / "nothing.gguf")
    assert result.exit_code == 2


def test_the_reference_is_bfloat16(
    letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().save_pretrained(tmp_path)
    seen: list[Any] = []
    quantized = command.quantized
    monkeypatch.setattr(command, "quantized", lambda m, c: seen.append(m) or quantized(m, c))
    result = run(tmp_path, "--bits", 4, "--head-bits", 4)
    assert result.exit_code == 0, result.output
    assert seen[0].dtype is torch.bfloat16
    assert "int4 per channel" in result.output


def test_saves_what_was_a_gguf_file(
    letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers refuses to save a model as long as it holds the quantizer of its file."""
    tiny().save_pretrained(tmp_path / "in")
    load = command.load_or_exit

    def from_gguf(*words: Any) -> Any:
        model, tokenizer = load(*words)
        model.hf_quantizer = GgufHfQuantizer(GgufConfig())
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "stock")
        return model, tokenizer

    monkeypatch.setattr(command, "load_or_exit", from_gguf)
    result = run(tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.lm_head).__name__ == "QuantizedLinear"
