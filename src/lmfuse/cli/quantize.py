"""`python -m lmfuse quantize`: quantizes a model, says what that changes, and saves it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmfuse import hf
from lmfuse.bench.models import quiet
from lmfuse.cli._console import console
from lmfuse.cli._load import MODEL, load_or_exit, status
from lmfuse.quantization import WeightOnlyConfig, quality, quantization
from lmfuse.quantization.model import quantize as quantized


class Kind(str, Enum):
    """What weights become."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    fp8 = "fp8"


class Scales(str, Enum):
    """How scales are chosen."""

    plain = "plain"
    search = "search"


class Compute(str, Enum):
    """What layers compute in."""

    auto = "auto"
    bf16 = "bf16"
    int8 = "int8"
    fp32 = "fp32"


def quantize(
    model: Annotated[str, MODEL],
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 8,
    group: Annotated[int, typer.Option(help="Columns that share a scale; -1: a whole row.")] = -1,
    kind: Annotated[
        Kind | None, typer.Option(help="By default int8 or int4, as bits says.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option(help="Without zero points; by default int8 is, and int4 is not.")
    ] = None,
    scales: Annotated[
        Scales | None,
        typer.Option(help="From the largest weight, or those with the least error: so for int4."),
    ] = None,
    compute: Annotated[
        Compute, typer.Option(help="auto: int8 where it hardly changes a result, else bf16.")
    ] = Compute.auto,
    lm_head: Annotated[bool, typer.Option(help="Quantize the layer of the logits.")] = True,
    head_bits: Annotated[
        int | None, typer.Option(help="Of the layer of the logits and the embedding; 8 by default.")
    ] = None,
    embedding: Annotated[bool, typer.Option(help="Quantize the input embedding.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the quantized model there.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure both models on a text.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="The text; by default Python's own help texts.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it.")] = 20480,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the error of each layer there.")
    ] = None,
) -> None:
    """Quantize a model's weights, say what that changes, and save it."""
    try:
        config = WeightOnlyConfig(
            bits=bits if kind is None else 8 if kind.value in ("int8", "fp8") else 4,
            group_size=group,
            kind=None if kind is None else kind.value,
            symmetric=symmetric,
            scales=None if scales is None else scales.value,
            compute=compute.value,
            lm_head=lm_head,
            head_bits=head_bits,
            embedding=embedding,
        )
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    reference, tokenizer = load_or_exit(model, torch.bfloat16)
    try:
        smaller = quantized(reference, config)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    out = console()
    out.print(_summary(reference, smaller, config))
    if output is not None:
        with quiet():  # transformers' bar of the shards
            smaller.save_pretrained(output)
            tokenizer.save_pretrained(output)
        out.print(f"Saved in {output}; lmfuse imported, transformers loads it from there.")
    if compare:
        _compare(out, reference, smaller, tokenizer, text, tokens, picture or Path("quantize.png"))


def _bytes(model: torch.nn.Module) -> int:
    seen = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


def _summary(reference: Any, model: Any, config: WeightOnlyConfig) -> Table:
    """How large both are, and how many layers became what."""
    done = quantization(model)
    kinds: dict[str, int] = {}
    for what in [v.split(":")[0] for v in done.quantized.values()]:
        kinds[what] = kinds.get(what, 0) + 1
    before, after = _bytes(reference), _bytes(model)
    table = Table(
        "layers",
        "became",
        title=f"{config}: {before / 1e6:.0f} MB in bfloat16, {after / 1e6:.0f} MB quantized",
    )
    for what, count in sorted(kinds.items()):
        table.add_row(str(count), what)
    for name, why in done.stock.items():
        table.add_row(name, f"stays as it is: {why}")
    return table


def _compare(
    out: Console,
    reference: Any,
    model: Any,
    tokenizer: Any,
    text: Path | None,
    tokens: int,
    picture: Path,
) -> None:
    words = quality.default_text() if text is None else text.read_text()
    # A token is seldom longer than eight letters, and a tokenizer of slow Python takes minutes.
    ids = torch.tensor(tokenizer(words[: 8 * tokens])["input_ids"])
    try:
        rows = quality.windows(ids, tokens, min(512, tokens))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from None
    with status("Comparing the layers …"):
        errors = quality.layer_errors(reference, model, rows[0])
        fused, smaller = hf.optimize(reference), hf.optimize(model)
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("reading the text", total=len(rows))
        found = quality.compare(fused, smaller, rows, lambda: progress.advance(task))
    out.print(_quality_table(found))
    out.print(_error_table(errors))
    _draw(errors, picture)
    out.print(f"The error of each layer: {picture}")


def _quality_table(found: quality.Quality) -> Table:
    table = Table("", "bfloat16", "quantized", title=f"On {found.tokens} tokens")
    table.add_row(
        "perplexity",
        f"{found.reference:.4f}",
        f"{found.perplexity:.4f} ({found.change:+.2%})",
    )
    table.add_row("KL divergence, nats a token", "", f"{found.divergence:.5f}")
    table.add_row("the same most probable token", "", f"{found.agreement:.2%}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _by_kind(errors: list[quality.LayerError]) -> dict[str, list[quality.LayerError]]:
    kinds: dict[str, list[quality.LayerError]] = {}
    for error in errors:
        kinds.setdefault(error.name.rpartition(".")[2], []).append(error)
    return kinds


def _error_table(errors: list[quality.LayerError]) -> Table:
    """The errors of the layers of one name, over the depth of the model."""
    table = Table("layers", "", "weight error", "largest", "result error", "largest", "in")
    for kind, found in _by_kind(errors).items():
        worst = max(found, key=lambda e: e.output)
        table.add_row(
            kind,
            str(len(found)),
            f"{sum(e.weight for e in found) / len(found):.2%}",
            f"{max(e.weight for e in found):.2%}",
            f"{sum(e.output for e in found) / len(found):.2%}",
            f"{worst.output:.2%}",
            worst.name,
        )
    for column in table.columns[1:6]:
        column.justify = "right"
    return table


def _draw(errors: list[quality.LayerError], picture: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        typer.echo("The picture needs one more package: python -m pip install matplotlib", err=True)
        raise typer.Exit(1) from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    for kind, found in _by_kind(errors).items():
        for axis, attribute in zip(axes, ("weight", "output"), strict=True):
            values = [100 * getattr(error, attribute) for error in found]
            axis.plot(values, marker=".", label=kind)
    for axis, title in zip(axes, ("weights", "results of a layer"), strict=True):
        axis.set(title=f"relative error of {title}", xlabel="depth", yscale="log")
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("%")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, dpi=150)
