"""`lmfuse bench model`: whole models through `generate`, stock and optimized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmfuse.bench.limits import Limits
from lmfuse.bench.model import CASES, ROUNDS, ModelCase, ModelResult, ModelRunner
from lmfuse.bench.models import MODELS, quiet
from lmfuse.cli._console import console
from lmfuse.modules import QuantizedLinear

DEFAULT = ",".join(MODELS)


class DType(str, Enum):
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Choice:
    """What is measured of each model; see the options of `bench`."""

    dtype: DType = DType.bfloat16
    compiled: bool = False
    traced: bool = False
    woq: Sequence[str] = ()
    stock: bool = True
    prompt: int | None = None
    rounds: int = ROUNDS

    def cases(self) -> Sequence[ModelCase]:
        """The usual ones, or one prompt of the length asked for."""
        return CASES if self.prompt is None else [ModelCase(prompt=self.prompt)]


def known(text: str, names: Mapping[str, object], what: str, option: str) -> list[str]:
    """The names between the commas, each one of `names`."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in names:
            words = f"no {what} is called {name!r}; there are {', '.join(names)}"
            raise typer.BadParameter(words, param_hint=option)
    return found


def run(models: list[str], choice: Choice) -> list[dict[str, object]]:
    """Times and prints each model; returns what JSON is to hold."""
    found: list[dict[str, object]] = []
    for name in models:
        limits, results, notes = _run(name, choice)
        console().print(_table(limits, results, notes))
        found += [
            {"limits": asdict(limits), **asdict(r), "prefill": r.prefill, "decode": r.decode}
            for r in results
        ]
    return found


def _run(name: str, choice: Choice) -> tuple[Limits, list[ModelResult], list[str]]:
    results: list[ModelResult] = []
    stderr = Console(stderr=True)
    cases = choice.cases()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=len(cases) + 1)

        def say(what: str, steps: int = 1) -> None:
            progress.update(task, advance=steps, description=f"{name}: {what}")
            if not stderr.is_terminal:  # a case takes minutes
                stderr.print(f"{name}: {what}", highlight=False)

        say("loading", 0)
        dtype = getattr(torch, choice.dtype.value)
        try:
            with quiet():
                runner = ModelRunner(
                    name,
                    dtype,
                    compiled=choice.compiled,
                    traced=choice.traced,
                    woq=choice.woq,
                    stock=choice.stock,
                )
        except FileNotFoundError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        for case in cases:
            say(str(case))
            results += runner.run(case, choice.rounds)
    notes = [_computes(w, runner.models[f"lmfuse {w}"]) for w in choice.woq]
    return runner.limits, results, notes


def _computes(woq: str, model: Any) -> str:
    """How many of the layers of a quantized model compute in what."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    counts = Counter(m.compute for m in layers)
    each = ", ".join(f"{n} in {compute}" for compute, n in counts.items())
    return f"{woq}: of {len(layers)} layers compute {each}."


def _table(limits: Limits, results: list[ModelResult], notes: list[str]) -> Table:
    first = results[0]
    peak = limits.bf16 if first.dtype == "bfloat16" else limits.fp32
    table = Table(
        title=f"{first.model} {first.dtype}: {limits.isa}, threads: {limits.threads}",
        caption=f"this machine: read {limits.read:.1f} GB/s, {first.dtype} {peak:.0f} GFLOP/s. "
        "Tokens a second are those of all prompts; a fraction of the peak counts the operations of "
        "the prompts, one of the reading the weights, keys and values of a token, each as it is "
        "held; outside: the share of a next token outside of lmfuse's ops. " + " ".join(notes),
    )
    table.add_column("case", no_wrap=True)
    for name in (
        "",
        "first token",
        "tokens/s",
        "of peak",
        "next",
        "tokens/s",
        "of read",
        "outside",
        "as stock",
    ):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    case = None
    for r in results:
        if case != r.case:
            table.add_section()
        table.add_row(
            str(r.case) if case != r.case else "",
            r.contender,
            f"{r.first * 1e3:.0f} ms",
            f"{r.prefill:.0f}",
            f"{r.first_fraction:.0%}",
            f"{r.next * 1e3:.2f} ms",
            f"{r.decode:.1f}",
            f"{r.next_fraction:.0%}",
            "" if r.outside is None else f"{r.outside:.1%}",
            "" if r.same is None else f"{r.same} of {r.case.new + 1}",
        )
        case = r.case
    return table
