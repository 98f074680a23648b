"""`lmfuse run`: a prompt in, the answer out as it is written."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
import typer

from lmfuse.cli._load import (
    MODEL,
    Dtype,
    load_or_exit,
    most_positions,
    optimized,
    set_machine,
)
from lmfuse.cli._stream import Stream, print_piece, printer, stopped_by_interrupt


def run(
    model: Annotated[str, MODEL],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; from standard input if it is not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 256,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.bfloat16,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 for the likeliest token; more is bolder.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")
    ] = False,
    stock: Annotated[bool, typer.Option("--stock", help="Without lmfuse, to compare.")] = False,
    isa: Annotated[
        str | None, typer.Option(help="The instruction set; the best available by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many threads; as torch chooses by default.")
    ] = None,
) -> None:
    """Answer a prompt. Only the answer goes to standard output."""
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give one, or pipe one in", param_hint="PROMPT")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="PROMPT")
    set_machine(isa, threads)
    loaded, tokenizer = load_or_exit(model, dtype.torch)
    loaded = optimized(loaded, stock)
    inputs = encode(tokenizer, prompt, raw)
    check_length(loaded, inputs["input_ids"].shape[1])
    if seed is not None:
        torch.manual_seed(seed)
    stream = Stream(tokenizer, printer())
    with stopped_by_interrupt() as stop:
        answer(loaded, inputs, stream, stop, max_new_tokens, temperature)
    print_piece("\n")
    if sys.stderr.isatty():
        typer.secho(stream.speed(), err=True, dim=True)


def encode(tokenizer: Any, prompt: str, raw: bool = False) -> Any:
    """The tokens of a prompt, in the chat template if there is one."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def check_length(model: Any, tokens: int) -> None:
    """Ends with a sentence if a prompt is longer than what the model reads."""
    most = most_positions(model)
    if most is not None and tokens >= most:
        raise typer.BadParameter(
            f"it has {tokens} tokens, but the model reads at most {most}, its answer included",
            param_hint="PROMPT",
        )


def answer(
    model: Any,
    inputs: Any,
    stream: Stream,
    stop: Any,
    max_new_tokens: int,
    temperature: float,
    **options: Any,
) -> Any:
    """What `generate` returns for one prompt, streamed."""
    room = (most_positions(model) or sys.maxsize) - inputs["input_ids"].shape[1]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=_padding(model),
        streamer=stream,
        stopping_criteria=[stop],
        **({"do_sample": False} | sampling | options),
    )


def _padding(model: Any) -> int | None:
    """What generate would choose too, but with a warning."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    found: int | None = eos[0] if isinstance(eos, list) else eos
    return found
