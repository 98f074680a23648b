"""Answers as they are written, their times, and what stops them."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.cells import cell_len
from torch import Tensor


class Stream:
    """What `generate` calls with the prompt, with each new token, and at the end.

    Args:
        tokenizer: turns tokens into text.
        write: is given each new piece of text; none of it ends within a character.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self._prompt_seen = False
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter() - self._start)
        self.tokens.append(int(value))
        self._show(last=False)

    def end(self) -> None:
        self._show(last=True)

    def _show(self, last: bool) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:  # half a character: wait for the rest
            return
        if text.startswith(self.text) and len(text) > len(self.text):
            self.write(text[len(self.text) :])
            self.text = text

    def speed(self) -> str:
        """One line about the times."""
        if not self.times:
            return "no token"
        first, count = self.times[0], len(self.times) - 1
        text = f"first token {first * 1e3:.0f} ms"
        if count:
            text += f", then {count / (self.times[-1] - first):.1f} tokens/s"
        return text


def print_piece(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Words:
    """Writes pieces to a terminal, whose lines are not to end within a word.

    A word comes in pieces: once it does not fit, it moves to the next line.

    Args:
        write: prints; knows backspaces and the sequence that clears the rest of a line.
        width: of the terminal.
    """

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        self.write, self.width = write, width
        self._column = 0
        self._word = ""  # what of the last word is on the screen

    def __call__(self, text: str) -> None:
        out = ""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            size, word = cell_len(part), cell_len(self._word)
            if part == "\n":
                self._column, self._word = 0, ""
            elif part.isspace():
                self._column, self._word = self._column + size, ""
            elif self._column + size < self.width or word + size >= self.width:
                self._column = (self._column + size) % self.width
                self._word += part
            else:
                out += "\b" * word + "\x1b[K\n" + self._word
                self._column, self._word = word + size, self._word + part
            out += part
        self.write(out)


def printer() -> Callable[[str], object]:
    """Prints pieces of an answer: as they are where no terminal shows them."""
    if not sys.stdout.isatty():
        return print_piece
    return Words(print_piece, os.get_terminal_size(sys.stdout.fileno()).columns or 80)


@contextmanager
def stopped_by_interrupt() -> Iterator[Callable[..., Tensor]]:
    """A stopping criterion for `generate` that a first Ctrl-C fulfils; a second one is as usual.

    So a step is never left half done, and what was written until then stays.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), asked, dtype=torch.bool)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield criterion
    finally:
        signal.signal(signal.SIGINT, before)
