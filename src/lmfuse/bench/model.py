"""Whole models through transformers' `generate`: the first token, and the next ones.

Both are judged by the machine: a first token by the operations of its prompt, a next one by the
bytes that it must read, which are the weights of the linear layers once, and the keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import hf
from lmfuse.bench.limits import Limits, Probe, measure, peak_probe, read_probe, recycle_memory
from lmfuse.bench.models import MODELS, WOQ
from lmfuse.bench.profile import profiled
from lmfuse.hf import tracing
from lmfuse.modules import QuantizedLinear

PROMPT, NEW, ROUNDS = 512, 64, 3
_MARK = "lmfuse bench: a step"


@dataclass(frozen=True)
class ModelCase:
    """One way of generating: how many prompts, of how many tokens, with how many beams each."""

    batch: int = 1
    beams: int = 1
    prompt: int = PROMPT
    new: int = NEW

    def __str__(self) -> str:
        rows = [f"{self.batch} prompts"] * (self.batch > 1) + [f"{self.beams} beams"] * (
            self.beams > 1
        )
        return f"{self.prompt} + {self.new} tokens" + "".join(f", {r}" for r in rows)


CASES = (ModelCase(), ModelCase(beams=4), ModelCase(batch=8, prompt=64))


@dataclass(frozen=True)
class ModelResult:
    """What one model reached in one case. Seconds are medians.

    Attributes:
        contender: "stock", "stock, compiled", "lmfuse", "lmfuse, traced", or "lmfuse int8" and the
            like, quantized.
        first, next: seconds until the first token, and for each one after it.
        first_fraction, next_fraction: of the arithmetic peak, and of the read bandwidth, that were
            measured right before and after.
        outside: of a next token, the share that is spent outside of lmfuse's ops; None for stock.
        same: how many of the new tokens are those of stock; None for stock itself, or without it.
    """

    model: str
    dtype: str
    case: ModelCase
    contender: str
    first: float
    next: float
    first_fraction: float
    next_fraction: float
    outside: float | None
    same: int | None

    @property
    def prefill(self) -> float:
        """Prompt tokens a second, of all prompts."""
        return self.case.batch * self.case.prompt / self.first

    @property
    def decode(self) -> float:
        """New tokens a second, of all prompts."""
        return self.case.batch / self.next


@dataclass(frozen=True)
class Work:
    """What a model must at least read and compute."""

    weights: int  # bytes of the linear layers, each once
    products: dict[str, int]  # multiply-adds of one token in them by unit, the head left out
    head: int
    head_unit: str
    cached: int  # bytes of keys and values of one token
    attention: int  # multiply-adds for each pair of a query and a key that it sees

    def first_flops(self, case: ModelCase, peaks: Mapping[str, float], unit: str) -> float:
        """Operations of the prompts, in those of `unit` that take as long by `peaks`.

        The head is needed for the last token alone.
        """
        pairs = case.prompt * (case.prompt + 1) // 2
        each = {u: n * case.prompt for u, n in self.products.items()}
        each[self.head_unit] = each.get(self.head_unit, 0) + self.head
        inside = sum(n * peaks[unit] / peaks[u] for u, n in each.items())
        return 2 * case.batch * (inside + self.attention * pairs)

    def next_bytes(self, case: ModelCase) -> int:
        """Bytes of a next token, half way through; the beams of a prompt share it."""
        shared = case.batch * case.prompt
        own = case.batch * case.beams * case.new // 2
        return self.weights + self.cached * (shared + own)


def work(model: Any) -> Work:
    """Counts for `model`, stock, optimized or quantized."""
    config = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    kinds = (nn.Linear, QuantizedLinear)
    linears = {id(m.weight): m for m in model.modules() if isinstance(m, kinds)}
    products: dict[str, int] = {}
    for m in linears.values():
        if m is not head:
            products[_unit(m)] = products.get(_unit(m), 0) + m.out_features * m.in_features
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Work(
        weights=sum(_bytes(m) for m in {id(m): m for m in (*linears.values(), head)}.values()),
        products=products,
        head=head.out_features * head.in_features,
        head_unit=_unit(head),
        cached=2 * config.num_hidden_layers * kv_heads * dim * model.dtype.itemsize,
        attention=2 * config.num_hidden_layers * config.num_attention_heads * dim,
    )


def _bytes(linear: Any) -> int:
    quantized = isinstance(linear, QuantizedLinear)
    count: int = linear.weight.numel() if quantized else linear.out_features * linear.in_features
    return count * int(linear.weight.dtype.itemsize)


def _unit(linear: Any) -> str:
    """Whose peak bounds its products; see `Limits`."""
    if isinstance(linear, QuantizedLinear):
        return {"int8": "int8", "bf16": "bf16"}.get(linear.compute, "fp32")
    return "bf16" if linear.weight.dtype is torch.bfloat16 else "fp32"


class ModelRunner:
    """Loads a model once, stock, optimized and quantized, and times them in turn.

    Args:
        name: of `MODELS`.
        dtype: what it computes in.
        compiled: also stock through torch.compile.
        traced: also optimized, as a graph of torch.jit.
        woq: also optimized with these weights, of `WOQ`.
        stock: stock itself; it takes most of the time.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        *,
        compiled: bool = False,
        traced: bool = False,
        woq: Sequence[str] = (),
        stock: bool = True,
    ) -> None:
        recycle_memory(False)
        made = MODELS[name](dtype)
        self.name, self.dtype = name, str(dtype).removeprefix("torch.")
        self.models: dict[str, Any] = {"stock": made} if stock else {}
        if compiled:
            self.models["stock, compiled"] = _compiled(made)
        more = {f"lmfuse {w}": hf.optimize(made, quantization_config=WOQ[w]) for w in woq}
        if traced:
            more["lmfuse, traced"] = tracing.trace_for_generation(hf.optimize(made))
        self.models["lmfuse"] = hf.optimize(made, inplace=not stock and not compiled)
        self.models |= more
        for model in self.models.values():
            model.generation_config.eos_token_id = None  # all are to write as much
        self.work = {name: work(model) for name, model in self.models.items()}
        self.read = read_probe()
        self.unit = "bf16" if dtype is torch.bfloat16 else "fp32"
        self.peak = peak_probe(self.unit)
        self.limits: Limits = measure(self.read)

    @torch.no_grad()
    def run(self, case: ModelCase, rounds: int = ROUNDS) -> Iterator[ModelResult]:
        """Times `case`; the models take turns, so that a change of the machine meets them all."""
        ids = self._prompt(case)
        runs: dict[str, list[_Round]] = {name: [] for name in self.models}
        for model in self.models.values():
            _generate(model, ids, case, 2)
        for _ in range(rounds):
            for name in self.models:
                runs[name].append(self._round(name, ids, case))
        expected = runs["stock"][0].tokens if "stock" in runs else None
        for name, found in runs.items():
            yield ModelResult(
                self.name,
                self.dtype,
                case,
                name,
                first=median(r.first for r in found),
                next=median(r.next for r in found),
                first_fraction=median(r.first_fraction for r in found),
                next_fraction=median(r.next_fraction for r in found),
                outside=None if "stock" in name else _outside(self.models[name], ids, case),
                same=None
                if name == "stock" or expected is None
                else _same(expected, found[0].tokens),
            )

    def _prompt(self, case: ModelCase) -> Tensor:
        vocabulary = self.models["lmfuse"].get_input_embeddings().num_embeddings
        random = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (case.batch, case.prompt), generator=random)

    def _round(self, name: str, ids: Tensor, case: ModelCase) -> _Round:
        model, work = self.models[name], self.work[name]
        _, first, peak = _beside(lambda: _generate(model, ids, case, 1), self.peak)
        tokens, whole, read = _beside(lambda: _generate(model, ids, case, 1 + case.new), self.read)
        each = (whole - first) / case.new
        return _Round(
            first,
            each,
            work.first_flops(case, vars(self.limits), self.unit) / first / peak,
            work.next_bytes(case) / each / read,
            tokens,
        )


@dataclass(frozen=True)
class _Round:
    first: float
    next: float
    first_fraction: float
    next_fraction: float
    tokens: Tensor


def _beside(run: Callable[[], Tensor], probe: Probe) -> tuple[Tensor, float, float]:
    """What `run` returns, its seconds, and the rate of `probe` right before and after."""
    before = _seconds(probe.run)
    start = perf_counter()
    found = run()
    seconds = perf_counter() - start
    return found, seconds, 2 * probe.bytes / (before + _seconds(probe.run))


def _seconds(run: Callable[[], object], samples: int = 3) -> float:
    taken = []
    for _ in range(samples):
        start = perf_counter()
        run()
        taken.append(perf_counter() - start)
    return median(taken)


def _outside(model: Any, ids: Tensor, case: ModelCase, new: int = 12) -> float:
    """The share of a next token that is not spent in lmfuse's ops, as torch's profiler has it."""
    from transformers import LogitsProcessor, LogitsProcessorList
    from transformers.generation.streamers import BaseStreamer

    class Mark(LogitsProcessor, BaseStreamer):
        def put(self, value: Tensor) -> None:
            with torch.profiler.record_function(_MARK):
                pass

        def end(self) -> None:
            pass

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.put(scores)
            return scores

    # A streamer changes nothing of a step; beams have none.
    how: dict[str, Any] = {"streamer": Mark()}
    if case.beams > 1:
        how = {"logits_processor": LogitsProcessorList([Mark()])}
    with profiled() as seen:
        _generate(model, ids, case, 1 + new, **how)
    events = [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()]  # type: ignore[no-untyped-call]
    marks = sorted(start for name, start, _ in events if name == _MARK)
    begin, end = marks[1], marks[-1]  # the first may be that of the prompt
    ops = [e[1:] for e in events if e[0].startswith("lmfuse::") and begin < e[1] < end]
    return 1 - _covered(ops) / float(end - begin)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """How long any of these lasted: an op of a graph may call others."""
    whole, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        whole += max(stop - max(start, reached), 0.0)
        reached = max(reached, stop)
    return whole


def _generate(model: Any, ids: Tensor, case: ModelCase, new: int, **options: Any) -> Tensor:
    """The new tokens of greedy or beam search, `new` for each prompt."""
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        num_beams=case.beams,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found[:, ids.shape[1] :]


def _same(expected: Tensor, tokens: Tensor) -> int:
    """For how many tokens the rows agree, in the mean."""
    agree = (expected == tokens).long().cumprod(dim=1).sum(dim=1)
    return int(agree.double().mean())


def _compiled(stock: nn.Module) -> nn.Module:
    """`stock` with its forward through torch.compile, over the same weights."""
    other = hf.swap.copied(stock)
    other.forward = torch.compile(stock.forward, dynamic=True)
    return other
