"""`lmfuse chat`: a conversation, whose keys and values are kept from one answer to the next."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lmfuse.cli._load import (
    MODEL,
    Dtype,
    load_or_exit,
    most_positions,
    optimized,
    set_machine,
)
from lmfuse.cli._stream import Stream, print_piece, printer, stopped_by_interrupt
from lmfuse.cli.run import answer

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def chat(
    model: Annotated[str, MODEL],
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 1024,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.bfloat16,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 for the likeliest token; more is bolder.")
    ] = 0.0,
    isa: Annotated[
        str | None, typer.Option(help="The instruction set; the best available by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many threads; as torch chooses by default.")
    ] = None,
) -> None:
    """Talk with a model. Ctrl-C stops its answer, Ctrl-D ends the conversation."""
    set_machine(isa, threads)
    loaded, tokenizer = load_or_exit(model, dtype.torch)
    if not tokenizer.chat_template:
        raise typer.BadParameter(
            "it has no chat template; `lmfuse run` continues any text", param_hint="MODEL"
        )
    talk = Conversation(optimized(loaded), tokenizer, system)
    if sys.stdin.isatty():
        typer.secho(_HELP, err=True, dim=True)
    while (text := _ask()) is not None:
        if text == "/exit":
            break
        if text == "/clear":
            talk.clear()
        elif text.startswith("/"):
            typer.echo(_HELP, err=True)
        elif text:
            _say(talk, text, max_new_tokens, temperature)


def _say(talk: Conversation, text: str, max_new_tokens: int, temperature: float) -> None:
    try:
        stream = talk.say(text, max_new_tokens, temperature)
    except ConversationTooLongError as error:
        typer.echo(str(error), err=True)
        return
    print_piece("\n")
    if sys.stderr.isatty():
        typer.secho(stream.speed(), err=True, dim=True)


def _ask() -> str | None:
    """The next line of the user; None at the end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:  # nothing is being answered: only the line is dropped
            typer.secho(f"\n{_HELP}", err=True, dim=True)


class ConversationTooLongError(Exception):
    """The conversation no longer fits into the model."""


class Conversation:
    """Messages, and the cache that holds the tokens of those that were computed."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.clear()

    def clear(self) -> None:
        """Forgets all but the system's message."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._forget()

    def say(self, text: str, max_new_tokens: int, temperature: float) -> Stream:
        """Streams the answer to `text`, and remembers both.

        Raises:
            ConversationTooLongError: nothing is remembered then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids, most = inputs["input_ids"], most_positions(self.model)
        if most is not None and ids.shape[1] >= most:
            raise ConversationTooLongError(
                f"the conversation has {ids.shape[1]} tokens, but the model reads at most {most}: "
                "/clear forgets it"
            )
        stream = Stream(self.tokenizer, printer())
        cache = self._cache_for(ids)
        with stopped_by_interrupt() as stop:
            found = answer(
                self.model, inputs, stream, stop, max_new_tokens, temperature, past_key_values=cache
            )
        self._cached = found[:, : cache.get_seq_length()]
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
        return stream

    def _cache_for(self, ids: Tensor) -> Any:
        """The cache, if what it holds is how `ids` begin; a new one else.

        An answer may be written in other tokens when it comes back as history.
        """
        held = self._cached.shape[1]
        if not 0 < held < ids.shape[1] or not torch.equal(self._cached, ids[:, :held]):
            self._forget()
        return self._cache

    def _forget(self) -> None:
        from transformers import DynamicCache

        from lmfuse.generation.cache import Cache
        from lmfuse.hf.generation import FusedGeneration

        kind = Cache if isinstance(self.model, FusedGeneration) else DynamicCache
        self._cache = kind(config=self.model.config.get_text_config(decoder=True))
        self._cached = torch.empty(1, 0, dtype=torch.long)
