"""`lmfuse explain`: what `lmfuse.optimize` makes of each module of a model, and what stays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor, nn

import lmfuse
from lmfuse import hf
from lmfuse.cli._console import console
from lmfuse.cli._load import MODEL, Dtype, load_or_exit, optimized, set_machine
from lmfuse.functional import PackedWeight

# What a report says that a module became, by its first word -> the op that computes it.
_OPS = {
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "silu_mul": "linear_gate_up",
    "gelu_mul": "gelu_mul",
    "rope": "rope_qk",
    "attention": "attention",
    "packed": "linear",
    "decoder": "decoder",
    "stack": "decoder",
    "table": "torch",
    "experts": "experts",
}


@dataclass(frozen=True)
class Row:
    """A module, or as many as have one name but for the number of their layer.

    Attributes:
        was: its class before.
        became: what the report calls it; "stock" if it stayed.
        kernel: the lmfuse op that it calls, or torch.
        bytes: of its own parameters, without those of modules within.
        why: it stayed stock.
    """

    module: str
    was: str
    became: str
    kernel: str
    dtype: str
    bytes: int
    why: str
    count: int = 1


def explain(
    model: Annotated[str, MODEL],
    dtype: Annotated[Dtype, typer.Option(help="What to load the model in.")] = Dtype.bfloat16,
    every: Annotated[
        bool, typer.Option("--all", help="Each layer by itself; alike ones are one line else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    isa: Annotated[
        str | None, typer.Option(help="The instruction set; the best available by default.")
    ] = None,
) -> None:
    """Show what each module of a model becomes, which kernel it calls, and what stays stock."""
    set_machine(isa, None)
    loaded, _ = load_or_exit(model, dtype.torch)
    rows = list(_rows(loaded))
    if not every:
        rows = _merged(rows)
    if as_json:
        typer.echo(
            json.dumps({"isa": lmfuse.isa(), "modules": [asdict(r) for r in rows]}, indent=2)
        )
    else:
        console().print(_table(model, rows))


def _rows(model: nn.Module) -> Iterator[Row]:
    """Optimizes the model and describes each module that computes something by itself."""
    before = {name: type(module).__name__ for name, module in model.named_modules()}
    model = optimized(model)
    report = hf.report(model)
    became = {**report.packed, **report.replaced}
    seen: set[int] = set()
    modules = dict(model.named_modules())
    for name in [*modules, *(n for n in (*became, *report.stock) if n not in modules)]:
        module = modules.get(name)
        own = dict(module.named_parameters(recurse=False)) if module is not None else {}
        if name not in became and name not in report.stock and not own:
            continue
        what = became.get(name, "stock")
        new = [p for p in own.values() if id(p) not in seen]
        seen.update(id(p) for p in new)
        yield Row(
            name or "(the model)",
            before.get(name, ""),
            what,
            _kernel(what, module) if name in became else "torch",
            ", ".join(sorted({_dtype(p) for p in own.values()})),
            sum(_bytes(p) for p in new),
            "" if name in became else report.stock.get(name, ""),
        )


def _kernel(what: str, module: nn.Module | None) -> str:
    if isinstance(module, nn.Embedding):
        return "linear_rows"
    return _OPS.get(re.split(r"\W", what)[0], what)


def _dtype(parameter: Tensor) -> str:
    packed = parameter.packed_dtype if isinstance(parameter, PackedWeight) else parameter.dtype
    return str(packed).removeprefix("torch.")


def _bytes(parameter: Tensor) -> int:
    return (parameter.packed if isinstance(parameter, PackedWeight) else parameter).nbytes


def _merged(rows: list[Row]) -> list[Row]:
    """Modules that differ in the number of their layer only, in one row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)
        groups.setdefault(replace(row, module=name, bytes=0), []).append(row)
    return [
        replace(alike, bytes=sum(r.bytes for r in found), count=len(found))
        if len(found) > 1
        else found[0]
        for alike, found in groups.items()
    ]


def _table(name: str, rows: list[Row]) -> Table:
    total = sum(r.bytes for r in rows)
    stayed = sum(r.count for r in rows if r.became == "stock")
    table = Table(
        title=f"{name} through lmfuse.optimize, {lmfuse.isa()}",
        caption=f"{total / 1e6:.1f} MB of parameters; {stayed} modules stay stock",
    )
    table.add_column("module", no_wrap=True)
    table.add_column("was")
    table.add_column("becomes")
    table.add_column("kernel")
    table.add_column("dtype")
    table.add_column("MB", justify="right")
    table.add_column("why stock", overflow="fold")
    for row in rows:
        times = f" [dim]× {row.count}[/dim]" if row.count > 1 else ""
        style = "yellow" if row.became == "stock" else None
        table.add_row(
            f"{row.module}{times}",
            row.was,
            row.became,
            row.kernel,
            row.dtype,
            f"{row.bytes / 1e6:.1f}" if row.bytes else "",
            row.why,
            style=style,
        )
    return table
