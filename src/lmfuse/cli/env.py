"""`lmfuse env`: what is installed here and what this machine can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from lmfuse.bench.machine import Level, Machine, describe
from lmfuse.cli._console import console


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, processor, instruction sets and registered ops."""
    machine = describe()
    if as_json:
        typer.echo(json.dumps(asdict(machine), indent=2))
    else:
        console().print(_table(machine))


def _table(machine: Machine) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, number in machine.versions.items():
        table.add_row(name, number)
    table.add_section()
    table.add_row("platform", machine.platform)
    table.add_row("processor", machine.cpu)
    table.add_row("cores", f"{machine.cores}, processors {machine.cpus}, threads {machine.threads}")
    table.add_row("caches", ", ".join(f"{name} {size}" for name, size in machine.caches.items()))
    table.add_row("memory", f"{machine.memory / 2**30:.1f} GiB")
    table.add_section()
    for level in machine.levels:
        table.add_row(level.name, _state(level))
    table.add_section()
    table.add_row(f"{len(machine.ops)} ops", ", ".join(machine.ops))
    return table


def _state(level: Level) -> str:
    if level.active:
        return "[green]active[/green]"
    return "available" if level.available else f"[yellow]no: {level.missing}[/yellow]"
