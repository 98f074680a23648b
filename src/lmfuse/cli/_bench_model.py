"""`lmfuse bench model`: whole models through `generate`, stock and optimized."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmfuse.bench.limits import Limits
from lmfuse.bench.model import CASES, ModelResult, ModelRunner
from lmfuse.bench.models import MODELS, quiet
from lmfuse.cli._console import console

DEFAULT = ",".join(MODELS)


class DType(str, Enum):
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def names(models: str) -> list[str]:
    """The names between the commas, each known."""
    found = [name.strip() for name in models.split(",") if name.strip()]
    for name in found:
        if name not in MODELS:
            text = f"no model is called {name!r}; there are {', '.join(MODELS)}"
            raise typer.BadParameter(text, param_hint="--models")
    return found


def run(models: list[str], dtype: DType, compiled: bool) -> list[dict[str, object]]:
    """Times and prints each model; returns what JSON is to hold."""
    found: list[dict[str, object]] = []
    for name in models:
        limits, results = _run(name, dtype, compiled)
        console().print(_table(limits, results))
        found += [
            {"limits": asdict(limits), **asdict(r), "prefill": r.prefill, "decode": r.decode}
            for r in results
        ]
    return found


def _run(name: str, dtype: DType, compiled: bool) -> tuple[Limits, list[ModelResult]]:
    results: list[ModelResult] = []
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"{name}: loading", total=len(CASES) + 1)
        try:
            with quiet():
                runner = ModelRunner(name, getattr(torch, dtype.value), compiled)
        except FileNotFoundError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        for case in CASES:
            progress.update(task, advance=1, description=f"{name}: {case}")
            results += runner.run(case)
    return runner.limits, results


def _table(limits: Limits, results: list[ModelResult]) -> Table:
    first = results[0]
    peak = limits.bf16 if first.dtype == "bfloat16" else limits.fp32
    table = Table(
        title=f"{first.model} {first.dtype}: {limits.isa}, threads: {limits.threads}",
        caption=f"this machine: read {limits.read:.1f} GB/s, {first.dtype} {peak:.0f} GFLOP/s. "
        "Tokens a second are those of all prompts; a fraction of the peak counts the operations of "
        "the prompts, one of the reading the weights, keys and values of a token.",
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
            "" if r.same is None else f"{r.same} of {r.case.new + 1}",
        )
        case = r.case
    return table
