"""`lmfuse bench`: each op checked, then timed against stock torch and the limits of the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import lmfuse
from lmfuse.bench import STEMS, Case, cases, memory, plot
from lmfuse.bench.case import MismatchError
from lmfuse.bench.limits import Limits
from lmfuse.bench.machine import describe
from lmfuse.bench.model import ROUNDS
from lmfuse.bench.models import MODELS, WOQ
from lmfuse.bench.runner import Result, Runner
from lmfuse.cli import _bench_model
from lmfuse.cli._bench_model import DType
from lmfuse.cli._console import console

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def bench(
    stems: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Of {', '.join(STEMS)} (these if none is given), model (whole models through "
            "generate(), some minutes) and all."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Also draw the ops and the limits, as PNG or SVG."
        ),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="With --plot: draw what --json of earlier runs wrote, and time nothing.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many threads; as torch chooses by default.")
    ] = None,
    isa: Annotated[
        str | None, typer.Option(help="The instruction set; the best available by default.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only cases of this kind: stream, prompt, decode or row.")
    ] = None,
    models: Annotated[
        str, typer.Option(help="For model: which, with commas between.")
    ] = _bench_model.DEFAULT,
    dtype: Annotated[DType, typer.Option(help="For model: what it computes in.")] = DType.bfloat16,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="For model: beside stock through torch.compile, too.")
    ] = False,
    traced: Annotated[
        bool, typer.Option("--traced", help="For model: as a graph of torch.jit, too.")
    ] = False,
    woq: Annotated[
        str,
        typer.Option(
            metavar="KINDS",
            help=f"For model: quantized, too; of {', '.join(WOQ)}, with commas between.",
        ),
    ] = "",
    stock: Annotated[
        bool, typer.Option(help="For model: beside stock, which takes most of the time.")
    ] = True,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help="For model: one prompt of so many tokens, not the usual cases."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="For model: how many times, for medians.")
    ] = ROUNDS,
) -> None:
    """Check each op, then time it: GB/s, fraction of the machine's limit, ratio to stock torch."""
    if earlier:
        _draw(plot_file, earlier)
        return
    stems = list(dict.fromkeys(stems or STEMS))
    if "all" in stems:
        stems = [*STEMS, "model"]
    names = _bench_model.known(models, MODELS, "model", "--models") if "model" in stems else []
    quantized = _bench_model.known(woq, WOQ, "kind of weights", "--woq")
    chosen = _chosen([stem for stem in stems if stem != "model"], kind)
    if json_file is not None and not json_file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.parent}", param_hint="--json")
    if plot_file is not None:
        _check_plot(plot_file)
    if isa is not None:
        try:
            lmfuse.set_isa(isa)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--isa") from None
    if threads is not None:
        torch.set_num_threads(threads)
    machine = describe()
    found: dict[str, object] = {"machine": asdict(machine)}
    mismatches: list[str] = []
    if chosen:
        limits, results, mismatches = _run(chosen)
        console().print(_table(limits, results))
        if plot_file is not None and results:
            plot.plot(plot_file, limits, results, machine.cpu)
        found |= {"limits": asdict(limits), "results": [asdict(r) for r in results]}
    if any(case.name == "causal prompt" for _, case in chosen):
        found["prompt_memory"] = _prompt_memory()
    if names:
        choice = _bench_model.Choice(dtype, compiled, traced, quantized, stock, prompt, rounds)
        found["models"] = _bench_model.run(names, choice)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    for mismatch in mismatches:
        typer.echo(mismatch, err=True)
    if mismatches:
        raise typer.Exit(1)


def _check_plot(file: Path) -> None:
    try:
        plot.check(file)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint="--plot") from None


def _draw(plot_file: Path | None, earlier: list[Path]) -> None:
    """Results of earlier runs, with the limits of the first."""
    if plot_file is None:
        raise typer.BadParameter("it needs --plot, the picture to draw", param_hint="--from")
    _check_plot(plot_file)
    try:
        runs = [json.loads(file.read_text()) for file in earlier]
        rows = [row for run in runs for row in run["results"]]
        results = [Result(**{**row, "shape": tuple(row["shape"])}) for row in rows]
        limits = Limits(**runs[0]["limits"])
        machine = runs[0]["machine"]["cpu"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(map(str, earlier))
        raise typer.BadParameter(
            f"{names}: not what --json writes ({error!r})", param_hint="--from"
        ) from None
    plot.plot(plot_file, limits, results, machine)


def _chosen(stems: list[str], kind: str | None) -> list[tuple[str, Case]]:
    try:
        found = [(stem, case) for stem in stems for case in cases(stem)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="STEMS") from None
    kinds = dict.fromkeys(case.kind for _, case in found)
    if kind is not None and kind not in kinds:
        text = f"no case is of kind {kind!r}; there are {', '.join(kinds)}"
        raise typer.BadParameter(text, param_hint="--kind")
    return [(stem, case) for stem, case in found if kind in (None, case.kind)]


def _run(chosen: list[tuple[str, Case]]) -> tuple[Limits, list[Result], list[str]]:
    results, mismatches = [], []
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("limits of the machine", total=len(chosen) + 1)
        runner = Runner()
        limits = runner.limits
        for stem, case in chosen:
            progress.update(task, advance=1, description=str(case))
            try:
                results.append(runner.run(stem, case))
            except MismatchError as mismatch:
                mismatches.append(str(mismatch))
    return limits, results, mismatches


def _table(limits: Limits, results: list[Result]) -> Table:
    table = Table(
        title=f"{limits.isa}, threads: {limits.threads}",
        caption=f"this machine: read {limits.read:.1f} and copy {limits.copy:.1f} GB/s; "
        f"fp32 {limits.fp32:.0f}, bf16 {limits.bf16:.0f} and int8 {limits.int8:.0f} GFLOP/s",
    )
    table.add_column("op", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for name in ("time", "GB/s", "of limit", "stock", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    flops = any(r.gigaflops for r in results)
    if flops:
        table.add_column("GFLOP/s", justify="right", no_wrap=True)
    group = None
    for r in results:
        if group != (group := (r.stem, r.kind, r.dtype)):
            table.add_section()
        table.add_row(
            r.name,
            f"{list(r.shape)} {_SHORT.get(r.dtype, r.dtype)}",
            _time(r.seconds),
            f"{r.gigabytes:.1f}",
            f"{r.fraction:.0%} of {r.limit}" if r.fraction is not None else "",
            _time(r.stock_seconds),
            f"{r.ratio:.2f} x",
            *([f"{r.gigaflops:.0f}" if r.gigaflops else ""] if flops else []),
        )
    return table


def _prompt_memory() -> int | None:
    size = memory.beyond_prompt()
    if size is not None:
        console().print(
            f"causal prompt [1, {memory.LENGTH}, {memory.HEADS}, {memory.DIM}] bf16: "
            f"{size / 1e6:.1f} MB at its peak beyond q, k, v and out"
        )
    return size


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} us"
    return f"{seconds * 1e3:.2f} ms"
