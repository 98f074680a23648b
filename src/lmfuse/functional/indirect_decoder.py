"""`functional.decoder` over the caches of `indirect_attention`, for graphs of torch.jit.

A graph holds tensors and numbers, and what it is given and gives are tensors. So the op takes a
stack as the tensors of which it is made, and the tuples of all layers as one list; what it had to
find out about these at one call it finds again at the next, beside the same tensors.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lmfuse._library import call, ops
from lmfuse.functional import _check, _indirect
from lmfuse.functional._decoder_cache import Presents, Step
from lmfuse.functional._indirect import LayerPast
from lmfuse.functional.decoder import DecoderCaches, DecoderStack, decoder
from lmfuse.functional.decoder_layer import cache_sizes

# As `attention_indirect_step`, it writes the caches in place while they do not grow. sizes: see
# `cache_sizes`.
torch.library.define(
    "lmfuse::decoder_indirect_step",
    "(Tensor hidden_states, Tensor[] parameters, Tensor layout, Tensor numbers,"
    " Tensor[] layer_past, Tensor? mask, Tensor[] angles, int[] sizes, int rows)"
    " -> (Tensor, Tensor[])",
)
_op_step = ops.decoder_indirect_step.default


def indirect_cache_decoder(
    hidden_states: Tensor,
    stack: DecoderStack,
    layer_past: Sequence[LayerPast],
    *,
    mask: Tensor | None = None,
    cos: Sequence[Tensor] = (),
    sin: Sequence[Tensor] = (),
    text_max_length: int = 2048,
) -> tuple[Tensor, tuple[LayerPast, ...]]:
    """The layers of `stack`, of which each appends to its cache and attends to all of it.

    For graphs of torch.jit: one op, whether the caches are still placeholders or not. It serves any
    length, batch and number of beams. What torch.compile and torch.export hold are the ops of the
    single layers.

    Args:
        hidden_states: [batch, seq, hidden], of the dtype of the packed weights.
        stack: see `decoder`.
        layer_past: the cache of each layer; see `indirect_access_kv_cache_attention`. All are of
            the dtype of hidden_states and reordered alike; written in place until they grow.
        mask: [batch, L + seq] bool (True: seen); None: nothing is hidden. Where it hides a position
            behind one that is seen (padding on the right), new tokens are taken one by one.
        cos, sin: for each kind of layer; see `decoder`. None of them without RoPE.
        text_max_length: rows of new caches.

    Returns:
        (out, presents): out as hidden_states, and the caches for the next call.

    Raises:
        TypeError, ValueError: as `decoder` and `indirect_access_kv_cache_attention`, and of caches
            in float8.
    """
    past = [x for layer in layer_past for x in layer]
    given = (hidden_states, stack.parameters, stack.layout, stack.numbers, past, mask)
    options = ([*cos, *sin], cache_sizes(stack.layout), text_max_length)
    out, found = call(_op_step, *given, *options, check=_check_step)
    return out, tuple(_tuples(found))


def _check_step(hidden_states: Tensor, *args: Any) -> None:
    _, _, _, layer_past, mask, angles, *_ = args
    _check.held("hidden_states", hidden_states)
    for i, x in enumerate(layer_past):
        _check.held(f"layer_past[{i % 4}]", x)
    if mask is not None:
        _check.held("mask", mask)
    for i, x in enumerate(angles):
        _check.held("cos" if 2 * i < len(angles) else "sin", x)


def _tuples(tensors: list[Tensor]) -> list[LayerPast]:
    """Those of the layers, four tensors each."""
    pairs = [iter(tensors)] * 4
    return list(zip(*pairs, strict=True))


class _Known(NamedTuple):
    """What `Presents` knows of caches that hold `length` tokens."""

    caches: list[Tensor]
    length: int
    slots: Tensor
    shared: int
    arenas: DecoderCaches


# Beside a layout, which its graph keeps (and torch.jit every graph that it traced), and beside the
# beam indices of the first layer, which whoever generates hands on. No value holds its key.
_stacks: Any = WeakTensorKeyDictionary()
_known: Any = WeakTensorKeyDictionary()


def _stack(parameters: list[Tensor], layout: Tensor, numbers: Tensor) -> DecoderStack:
    stack: DecoderStack | None = _stacks.get(layout)
    if stack is None or list(map(id, stack.parameters)) != list(map(id, parameters)):
        stack = _stacks[layout] = DecoderStack(parameters, layout.clone(), numbers)
    return stack


def _remembered(past: Sequence[LayerPast]) -> Sequence[LayerPast]:
    """`past`, as `Presents` if the last step gave these."""
    known: _Known | None = _known.get(past[0][3])
    if known is None or {info.size(-2) for info, *_ in past} != {known.length}:
        return past
    if not all(map(operator.is_, known.caches, _caches(past))):
        return past
    presents = Presents(past)
    _, _, presents.slots, presents.shared, presents.arenas = known
    return presents


def _caches(past: Sequence[LayerPast]) -> list[Tensor]:
    return [cache for layer in past for cache in layer[1:3]]


@torch.library.impl("lmfuse::decoder_indirect_step", "CompositeExplicitAutograd")
@torch.no_grad()
def _op_step_impl(
    hidden_states: Tensor,
    parameters: list[Tensor],
    layout: Tensor,
    numbers: Tensor,
    layer_past: list[Tensor],
    mask: Tensor | None,
    angles: list[Tensor],
    sizes: list[int],
    rows: int,
) -> tuple[Tensor, list[Tensor]]:
    stack = _stack(parameters, layout, numbers)
    step = _step(hidden_states, layer_past, len(stack), sizes, rows)
    length, batch = step.slots.shape
    mask = _mask(mask, batch, length)
    half = len(angles) // 2
    run = _Run(stack, step, angles[:half], angles[half:], sizes[2:])
    seen = step.seen(mask)
    if seen is None:
        assert mask is not None  # or nothing were hidden
        out = run.one_by_one(hidden_states, mask)
    else:
        out = run.whole(hidden_states, *seen)
    present = step.present
    known = (_caches(present), length, present.slots, present.shared, present.arenas)
    _known[present[0][3]] = _Known(*known)
    return out, [x for layer in present for x in layer]


def _step(
    hidden_states: Tensor, layer_past: list[Tensor], layers: int, sizes: list[int], rows: int
) -> Step:
    """The new tokens and where they go, in caches that were looked at."""
    _check.held("hidden_states", hidden_states, _check.FLOATS)
    if hidden_states.dim() != 3 or not hidden_states.numel():
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, but must be [batch, seq, "
            "hidden], and not empty"
        )
    if len(layer_past) != 4 * layers:
        raise ValueError(
            f"layer_past has {len(layer_past)} tensors, but must have four for each of {layers} "
            "layers"
        )
    past: Sequence[LayerPast] = _tuples(layer_past)
    before = _indirect.past_length(past[0], None)
    if before:
        past = _remembered(past)
    if before and not isinstance(past, Presents):
        for layer in past:
            _indirect.check_cache(layer, _indirect.past_length(layer, None))
    return Step(hidden_states, past, (layers, sizes[0], sizes[1]), rows)


def _mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    shape = tuple(_check.held("mask", mask, (torch.bool,)).shape)
    if shape not in ((batch, length), (1, length)):
        raise ValueError(f"mask has shape {shape}, but must be [batch, L + seq], {batch, length}")
    return mask.expand(batch, length)


class _Run(NamedTuple):
    """The layers, and the tokens that they are given.

    Attributes:
        windows: of each kind of layer; see `DecoderLayer`.
    """

    stack: DecoderStack
    step: Step
    cos: list[Tensor]
    sin: list[Tensor]
    windows: list[int]

    def whole(self, x: Tensor, table: Tensor, ends: Tensor) -> Tensor:
        """All tokens at once; see `Step.seen`."""
        count = len(self.windows)
        slots = [self.step.new] * count
        return self._decoder(x, slots, [table] * count, [ends] * count, self.cos, self.sin)

    def one_by_one(self, x: Tensor, mask: Tensor) -> Tensor:
        """Each token sees a list of slots of its own, without what `mask` hides."""
        batch, tokens, _ = x.shape
        if tokens > 1:
            warnings.warn(
                f"mask hides positions behind others that are seen: {tokens} tokens are taken one "
                "by one. Padding on the left costs nothing",
                stacklevel=2,
            )
        length = len(self.step.slots)
        new = self.step.new.view(batch, tokens)
        results = []
        for i in range(tokens):
            seen = [self._seen(mask, length - tokens + i, window) for window in self.windows]
            tables, ends = [table for table, _ in seen], [end for _, end in seen]
            cos, sin = ([a[:, i : i + 1] for a in each] for each in (self.cos, self.sin))
            slots = [new[:, i]] * len(seen)
            results.append(self._decoder(x[:, i : i + 1], slots, tables, ends, cos, sin))
        return torch.cat(results, 1)

    def _seen(self, mask: Tensor, at: int, window: int) -> tuple[Tensor, Tensor]:
        """block_tables and cu_seqlens of `decoder` for the tokens at this position."""
        first = 0 if window < 0 else max(at - window, 0)
        seen = mask[:, first : at + 1]
        order = (~seen).byte().argsort(dim=1, stable=True)
        table = self.step.slots[first : at + 1].t().gather(1, order)
        return table, torch.nn.functional.pad(seen.sum(1).cumsum(0), (1, 0))

    def _decoder(
        self,
        x: Tensor,
        slots: list[Tensor],
        tables: list[Tensor],
        ends: list[Tensor],
        cos: list[Tensor],
        sin: list[Tensor],
    ) -> Tensor:
        held, angles = self.step.present.arenas, (cos or None, sin or None)
        return decoder(x, self.stack, held, slots, tables, ends, *angles)
