"""IPEX's tuple caches as a transformers Cache; see `lmfuse.functional.indirect_attention`.

A model is given tuples and returns tuples; on the way through its layers they are this cache. A
graph that was traced so takes and returns nothing but tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lmfuse import functional
from lmfuse.functional._indirect import LayerPast

# Rows that a new cache has if the model's config has no `text_max_length`.
ROWS = 2048


class Appended(NamedTuple):
    """New keys or values, on their way from a layer's `update` to attention, which appends them."""

    states: Tensor
    layer: TupleLayer


class TupleLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's tuple. Only lmfuse's attention can read it."""

    is_sliding = False
    is_croppable = False

    def __init__(self, past: LayerPast, rows: int = ROWS) -> None:
        self.past = past
        self.rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a placeholder says all."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Both in `Appended`."""
        return Appended(key_states, self), Appended(value_states, self)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Appends key and value, [batch, heads, tokens, dim], and attends; [batch, tokens, heads,
        dim]. The other arguments are those of `Layer.attend`."""
        out, self.past = functional.indirect_cache_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.past,
            mask=mask,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            text_max_length=self.rows,
        )
        return out

    def get_seq_length(self) -> int:
        """How many tokens the tuple holds."""
        return self.past[0].size(-2)

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next tokens see, and that the first is the first."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what was row beam_idx[i]; no key or value moves."""
        self.past[3][self.get_seq_length() - 1] = beam_idx

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows; before the first token they share what comes."""
        if self.get_seq_length() == 0:
            none, keys, values, beam_idx = self.past
            self.past = (none, keys, values, beam_idx.repeat(1, repeats))
        else:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i is what was row indices[i]; all is copied."""
        keys, values = functional.gather_indirect(self.past)
        self.past = tuple_of(keys[indices], values[indices])

    @property
    def batch_size(self) -> int:
        """Rows, those of all beams."""
        return self.past[3].shape[1]

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A copy of the keys held, [batch, kv_heads, tokens, dim]; None before the first."""
        held = self.get_seq_length() > 0
        return functional.gather_indirect(self.past)[0].transpose(1, 2) if held else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A copy of the values held, as keys."""
        held = self.get_seq_length() > 0
        return functional.gather_indirect(self.past)[1].transpose(1, 2) if held else None


class TupleCache(Cache):
    """The tuples of all layers.

    Args:
        past: one for each layer.
        rows: of new caches.
    """

    layers: list[TupleLayer]  # type: ignore[assignment]

    def __init__(self, past: Sequence[LayerPast], rows: int = ROWS) -> None:
        super().__init__(layers=[TupleLayer(layer, rows) for layer in past])

    @property
    def past(self) -> tuple[LayerPast, ...]:
        """What `IndirectAccessKVCacheAttention` and its graphs take."""
        return tuple(layer.past for layer in self.layers)

    @past.setter
    def past(self, past: Sequence[LayerPast]) -> None:
        for layer, new in zip(self.layers, past, strict=True):
            layer.past = new


def placeholders(config: Any, rows: int) -> tuple[LayerPast, ...]:
    """What a model that uses tuples is given before its first token.

    Args:
        config: of the model; says how many layers it has.
        rows: the batch times the beams.
    """
    layers: int = config.get_text_config(decoder=True).num_hidden_layers
    # Every tensor is its own, for torch.jit.trace takes the same one twice for one input.
    return tuple(
        (
            torch.zeros((1, 0, 0, 1), dtype=torch.int64),
            torch.zeros((1, 1, 1, 1)),
            torch.zeros((1, 1, 1, 1)),
            torch.zeros((1, rows), dtype=torch.int64),
        )
        for _ in range(layers)
    )


def tuple_of(keys: Tensor, values: Tensor) -> LayerPast:
    """The tuple that holds keys and values, [batch, tokens, kv_heads, dim], and nothing else."""
    batch, tokens = keys.shape[:2]
    beam_idx = torch.arange(batch).repeat(tokens + 2, 1)
    beam_idx[tokens], beam_idx[tokens + 1] = tokens, batch
    info = torch.zeros((), dtype=torch.int64).expand(1, tokens, tokens, 1)
    key_cache, value_cache = (
        functional.new_cache((tokens, batch, *x.shape[2:]), x.dtype).copy_(x.transpose(0, 1))
        for x in (keys, values)
    )
    return info, key_cache, value_cache, beam_idx
