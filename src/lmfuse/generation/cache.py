"""KV caches for transformers: appended to in place, shared by beams, read where they lie.

A layer keeps keys [kv_heads, slots, dim] and values likewise; `Slots` says which slots are a row of
the batch. `update` returns tensors for a single row, which are views, and otherwise `Cached`
tensors, which lmfuse's attention reads through the slots and which any other operation gathers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lmfuse import functional
from lmfuse.generation.cached import Cached
from lmfuse.generation.slots import Slots

_DTYPES = (None, torch.int8)


class Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys and values of one layer, in arenas that double when they are full of what is held.

    Args:
        slots: those of the layers that see the same positions; its own if None. Reordering,
            repeating or selecting rows of one of these layers does so for all.
        dtype: torch.int8 keeps int8 with a float32 scale for each token and head, max |x| / 127;
            None keeps the dtype of the keys.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, slots: Slots | None = None, dtype: torch.dtype | None = None) -> None:
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}, but must be torch.int8 or None")
        self.slots = Slots() if slots is None else slots
        self.stored = dtype
        self.is_initialized = False
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes heads, dimensions and dtype from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        stored = self.stored or self.dtype  # under autocast, values may be of another
        with torch.inference_mode(False):  # written later, perhaps outside of inference mode
            self.key_arena = _arena(key_states, stored)
            self.value_arena = _arena(value_states, stored)
            scales = torch.empty((key_states.shape[1], 0)) if self.stored else None
            self.key_scales, self.value_scales = scales, scales
        self.slots.users.append(self)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, kv_heads, tokens, dim] and returns all that the tokens may see.

        Returns:
            Keys and values [batch, kv_heads, visible, dim], valid until the cache changes.

        Raises:
            TypeError, ValueError: other sizes or dtypes than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, count, _ = key_states.shape
        self.take_slots(batch, count)
        self.seen = self.slots.total
        self._fit(self.slots.capacity)
        run = None if self.stored else self.slots.run(self.slots.visible)
        if run is not None:  # one sequence in one piece: two copies, and two views of what is seen
            first, end = run
            self.key_arena[:, end - count : end].copy_(key_states[0])
            self.value_arena[:, end - count : end].copy_(value_states[0])
            return self.key_arena[None, :, first:end], self.value_arena[None, :, first:end]
        functional.reshape_and_cache(
            _tokens(key_states),
            _tokens(value_states.to(key_states.dtype)),
            _paged(self.key_arena),
            _paged(self.value_arena),
            self.slots.new,
            key_scales=_paged(self.key_scales),
            value_scales=_paged(self.value_scales),
        )
        return Cached.of(self, "keys"), Cached.of(self, "values")

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float,
        sinks: Tensor | None,
        alibi: Tensor | None = None,
    ) -> Tensor | None:
        """Causal attention of the last tokens over what `update` made visible, where it lies.

        Args:
            query: [batch, tokens, heads, dim].
            mask: [batch, visible] bool (True: seen), or None.
            scale, softcap, sinks, alibi: as in `functional.attention`.
            window: how many positions a query sees, its own included; None for all.

        Returns:
            [batch, tokens, heads, dim], or None if the mask hides positions between others.
        """
        batch, count, heads, _ = query.shape
        found = self.slots.padded(mask, count) if window != 1 else None
        if found is None:
            return None
        tables, cu_q, cu_kv = found
        out = query.new_empty((batch * count, heads, self.value_arena.shape[2]))
        functional.flash_attn_varlen_func(
            out,
            query.flatten(0, 1),
            _paged(self.key_arena),
            _paged(self.value_arena),
            cu_q,
            cu_kv,
            count,
            self.slots.visible,
            scale,
            True,
            tables,
            alibi,
            window_size_left=-1 if window is None else window - 1,
            softcap=softcap,
            sinks=sinks,
            key_scales=_paged(self.key_scales),
            value_scales=_paged(self.value_scales),
        )
        return out.view(batch, count, heads, -1)

    def gather(self, part: str, last: int) -> Tensor:
        """A copy of the last "keys" or "values", [batch, kv_heads, last, dim]."""
        name, rows = part[:-1], self.slots.rows(last)
        found: Tensor = getattr(self, name + "_arena")[:, rows]
        scales = getattr(self, name + "_scales")
        if scales is not None:
            found = (found.float() * scales[:, rows].unsqueeze(-1)).to(self.dtype)
        return found.transpose(0, 1)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A copy of the keys held, [batch, kv_heads, tokens, dim]; None before the first."""
        return self.gather("keys", self.slots.kept) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A copy of the values held, as keys."""
        return self.gather("values", self.slots.kept) if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first token."""
        return self.slots.batch

    def get_seq_length(self) -> int:
        """How many tokens the layer has seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next tokens see, themselves included, and which is the first."""
        held = self.seen
        if self.slots.window is not None:
            held = min(held, self.slots.window - 1)
        return held + query_length, self.seen - held

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self.seen = 0
        self.slots.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back; `tokens_to_remove` is negative, as in transformers.

        Raises:
            ValueError: a positive number.
            RuntimeError: tokens would be seen again that left the sliding window.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, but must be negative: minus the number "
                "of tokens to remove"
            )
        total = max(0, self.seen + tokens_to_remove)
        self.slots.crop(total)
        self.seen = total

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what was row beam_idx[i]; no key or value moves."""
        if self.slots.total:
            self.slots.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that share what is held; no key or value moves."""
        if self.slots.total:
            self.slots.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i is what was row indices[i]; no key or value moves."""
        if self.slots.total:
            self.slots.select(indices)

    def offload(self) -> None:
        """Nothing: the cache is on the CPU."""

    def prefetch(self) -> None:
        """Nothing: the cache is on the CPU."""

    def move(self, slots: Tensor) -> None:
        """See `Arenas`."""
        for arena in (self.key_arena, self.value_arena, self.key_scales, self.value_scales):
            if arena is not None and arena.shape[1]:
                arena[:, : slots.numel()] = arena[:, slots]

    def take_slots(self, batch: int, count: int) -> None:
        """Slots for more tokens, unless another layer that shares them has done so.

        Raises:
            ValueError: the batch, or the number of tokens, is not that of the other layers.
        """
        if self.seen == self.slots.total:
            self.slots.append(batch, count)
        if self.slots.total != self.seen + count or batch != self.slots.batch:
            raise ValueError(
                f"this layer has seen {self.seen} tokens and is given {count} for a batch of "
                f"{batch}, but others of its cache have seen {self.slots.total} of "
                f"{self.slots.batch}: a forward was cut short; reset the cache"
            )

    def arenas(self) -> list[Tensor]:
        """Keys and values [kv_heads, slots, dim], and the scales of int8, [kv_heads, slots]."""
        if self.key_scales is None or self.value_scales is None:
            return [self.key_arena, self.value_arena]
        return [self.key_arena, self.value_arena, self.key_scales, self.value_scales]

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        new: Layer = type(self).__new__(type(self))
        memo[id(self)] = new
        for arena in self.arenas() if self.is_initialized else []:  # not all that shares its pages
            with torch.inference_mode(False):
                memo[id(arena)] = functional.new_cache(arena.shape, arena.dtype).copy_(arena)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def _fit(self, slots: int) -> None:
        if self.key_arena.size(1) == slots:
            return
        self.slots.made += 1
        for name in ("key_arena", "value_arena", "key_scales", "value_scales"):
            old = getattr(self, name)
            if old is not None:
                with torch.inference_mode(False):
                    new = functional.new_cache((old.shape[0], slots, *old.shape[2:]), old.dtype)
                kept = min(slots, old.shape[1])
                new[:, :kept] = old[:, :kept]
                setattr(self, name, new)


class SlidingLayer(Layer):  # type: ignore[no-untyped-call]
    """As `Layer`, but only what a sliding window shows is held.

    Args:
        slots: those of the layers with the same window.
        dtype: as in `Layer`.
    """

    is_sliding = True

    @property
    def sliding_window(self) -> int | None:
        """How many positions a token sees, its own included."""
        return self.slots.window

    @property
    def record_past(self) -> bool:
        """Whether positions out of the window are kept until the next crop."""
        return self.slots.recording

    def activate_past_recording(self) -> None:
        """Keeps positions out of the window until the next crop, so that it can bring them back."""
        self.slots.recording = True

    def get_max_length(self) -> int:
        """The window."""
        return self.slots.window or -1


class Cache(DynamicCache):
    """Drop-in for transformers' DynamicCache: `model.generate(..., past_key_values=Cache(config))`.

    Appending copies only the new tokens. Reordering beams, repeating the prompt for them, selecting
    rows and cropping touch lists of slots, once for all layers, and neither keys nor values. Layers
    that transformers gives another kind of state (linear attention, indexed) keep its own.

    Args:
        config: of the model; says which layers have sliding windows. None: none has.
        dtype: torch.int8 halves the memory of bfloat16, with one scale for each token and head;
            None keeps the dtype of the keys.

    Raises:
        TypeError: another dtype.
    """

    def __init__(
        self, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}, but must be torch.int8 or None")
        super().__init__(config=config)
        self.kv_dtype = dtype
        self._slots: dict[int | None, Slots] = {}
        self._opened: dict[Layer, _Opened] = {}  # by the first of the layers
        self.layers = [self._ours(layer) for layer in self.layers]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = cast(Any, self._full_layer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the batch continues what was row beam_idx[i]."""
        for layer in self._once():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch becomes `repeats` rows."""
        for layer in self._once():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i of the batch is what was row indices[i]."""
        for layer in self._once():
            layer.batch_select_indices(indices)

    def together(self, indices: Sequence[int], kinds: Sequence[int]) -> list[Layer] | None:
        """The layers of these indices, if all can take the next tokens in one call; else None.

        Args:
            kinds: a number for each; layers of the same number must see the same positions.
        """
        last = max(indices)
        if self.layer_class_to_replicate is not None:
            while len(self.layers) <= last:
                self.layers.append(self.layer_class_to_replicate())
        found: list[Any] = [self.layers[i] for i in indices] if last < len(self.layers) else []
        if not found or not all(isinstance(layer, Layer) for layer in found):
            return None
        seen, slots = found[0].seen, {k: x.slots for k, x in zip(kinds, found, strict=True)}
        alike = all(
            layer.slots is slots[kind] and layer.seen == seen
            for kind, layer in zip(kinds, found, strict=True)
        )
        return found if alike else None

    def extend(
        self,
        layers: list[Layer],
        batch: int,
        count: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
    ) -> functional.DecoderCaches:
        """Takes slots for new tokens in `layers`, which are together, and makes room there.

        Args:
            batch, count: rows, and how many tokens of each.
            kv_heads, dim, dtype: keys and values are [batch, kv_heads, count, dim] of this dtype.

        Returns:
            The arenas of the layers. Whoever wrote the new keys and values sets `seen` of each
            layer to the `total` of its slots.

        Raises:
            ValueError: the batch is not that of the tokens before; slots may have been taken.
        """
        opened = self._opened.get(layers[0])
        if opened is None or opened.layers != layers:
            opened = _Opened(layers)
        for first in opened.firsts:
            first.take_slots(batch, count)
        if opened.sizes == opened.current():
            return opened.caches
        for key in [k for k, known in self._opened.items() if known.sizes != known.current()]:
            del self._opened[key]  # before arenas grow: it holds those that were
        for layer in layers:
            if not layer.is_initialized:
                states = torch.empty((batch, kv_heads, 0, dim), dtype=dtype)
                layer.lazy_initialization(states, states)
            layer._fit(layer.slots.capacity)
        opened.caches = functional.DecoderCaches([a for layer in layers for a in layer.arenas()])
        opened.sizes = opened.current()
        self._opened[layers[0]] = opened
        return opened.caches

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        new: Cache = type(self).__new__(type(self))
        memo[id(self)] = new
        # A method of this cache would stay one: deepcopy takes functions as they are.
        vars(new).update(copy.deepcopy(self.__getstate__(), memo))
        if new.layer_class_to_replicate is not None:
            new.layer_class_to_replicate = cast(Any, new._full_layer)
        return new

    def _ours(self, layer: Any) -> Any:
        if type(layer) is DynamicLayer:
            return self._full_layer()
        if type(layer) is DynamicSlidingWindowLayer:
            return SlidingLayer(self._shared(layer.sliding_window), self.kv_dtype)
        return layer

    def _full_layer(self) -> Layer:
        return Layer(self._shared(None), self.kv_dtype)

    def _shared(self, window: int | None) -> Slots:
        return self._slots.setdefault(window, Slots(window))

    def _once(self) -> Iterator[Any]:
        """One layer of those that share their slots, and every other layer."""
        done: set[int] = set()
        for layer in self.layers:
            slots = getattr(layer, "slots", layer)
            if id(slots) not in done:
                done.add(id(slots))
                yield layer


class _Opened:
    """Layers that run whole.

    Attributes:
        firsts: one layer for each `Slots` of them.
        sizes: of the arenas when they were opened as `caches`.
    """

    caches: functional.DecoderCaches

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.firsts = list({layer.slots: layer for layer in layers}.values())
        self.sizes: list[tuple[int, int]] = []

    def current(self) -> list[tuple[int, int]]:
        """How large the arenas of each `Slots` are, and how many had been made."""
        return [(layer.slots.capacity, layer.slots.made) for layer in self.firsts]


def _arena(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((like.shape[1], 0, like.shape[3]), dtype=dtype)


def _tokens(x: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] -> [batch * tokens, heads, dim]"""
    return x.detach().transpose(1, 2).flatten(0, 1)


def _paged(arena: Tensor | None) -> Any:
    """An arena as a paged cache [slots, heads, 1, dim], or its scales as [slots, heads, 1]."""
    return None if arena is None else arena.transpose(0, 1).unsqueeze(2)
