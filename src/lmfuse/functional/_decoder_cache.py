"""The caches of `IndirectAccessKVCacheAttention`, of all layers, for `functional.decoder`.

There a row of the batch is a list of slots: position t in column c of a cache with C columns is
slot C t + c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmfuse.functional import _indirect
from lmfuse.functional._indirect import Caches, LayerPast
from lmfuse.functional.decoder import DecoderCaches


class Presents(tuple[LayerPast, ...]):
    """The caches of all layers, and what the next step would have to find out otherwise.

    Attributes:
        slots: [length, columns]: where each position of each row lies.
        shared: so many positions are those of a prompt that several rows share.
        arenas: keys and values of the layers, [kv_heads, slots, head_dim].
    """

    slots: Tensor
    shared: int
    arenas: DecoderCaches


class Step:
    """New tokens behind those in the caches.

    Attributes:
        slots: [length, batch]: what each row sees, the new tokens included.
        new: [batch * tokens]: where these go.
        present: the caches for the next step.
    """

    def __init__(
        self, x: Tensor, past: Sequence[LayerPast] | None, like: tuple[int, int, int], rows: int
    ) -> None:
        """
        Args:
            x: [batch, tokens, hidden].
            past: the cache of each layer; None, or placeholders, before the first token.
            like: how many layers, their kv_heads and head_dim.
            rows: of new caches.

        Raises:
            UnlikeError: the op cannot read these caches, or not these for this batch.
        """
        layers, heads, dim = like
        batch, tokens, _ = x.shape
        before = past[0][0].size(-2) if past else 0
        if past is not None and len(past) != layers:
            raise UnlikeError(f"layer_past has {len(past)} layers, but must have {layers}")
        if past is None or before == 0:
            key = x.new_empty((batch, tokens, heads, dim))
            caches = _fresh(key, past, layers, rows)
            held = torch.empty((0, batch), dtype=torch.int64)
        else:
            caches = _checked(x, past, heads, dim, before + tokens)
            held = _held(past, before)
        columns = caches[0][2].shape[1]
        beams = columns // batch
        begins = torch.arange(before * columns, (before + tokens) * columns, columns).unsqueeze(1)
        new = begins + torch.arange(0, columns, beams)
        self.new = new.t().flatten()
        self.slots = torch.cat([held, new]) if before else new
        info = _indirect.info(before + tokens)
        self.present = Presents((info, *c) for c in caches)
        self.present.slots = (
            self.slots if beams == 1 else self.slots.repeat_interleave(beams, dim=1)
        )
        self.present.shared = getattr(past, "shared", 0) if before else tokens * (beams > 1)
        same = isinstance(past, Presents) and past[0][1] is caches[0][0]
        self.present.arenas = past.arenas if same else _arenas(caches)  # type: ignore[union-attr]

    def seen(self, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """block_tables and cu_seqlens of `functional.decoder`; None if `mask` is not [batch,
        length], or hides a position behind one that is seen."""
        length, batch = self.slots.shape
        if mask is not None and tuple(mask.shape) != (batch, length):
            return None
        table = self.slots.t()
        if mask is None or bool(mask.all()):
            return table, torch.arange(0, (batch + 1) * length, length)
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            return None
        lengths = mask.sum(1)
        from_left = torch.arange(length) + (length - lengths).unsqueeze(1)
        table = table.gather(1, from_left.clamp_(max=length - 1))
        return table, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


class UnlikeError(ValueError):
    """The caches are for the modules to read, or to refuse in words of their own."""


def _fresh(key: Tensor, past: Sequence[LayerPast] | None, layers: int, rows: int) -> list[Caches]:
    """New caches, whose beam indices are one for all layers."""
    if past is not None and past[0][1].dtype.itemsize == 1:
        raise UnlikeError(_unlike(1, past[0][1], f"{key.dtype}, the dtype of hidden_states"))
    keys, values, beam_idx = _indirect.new_caches(key, key, None if past is None else past[0], rows)
    rest = [(torch.empty_like(keys), torch.empty_like(keys), beam_idx) for _ in range(layers - 1)]
    return [(keys, values, beam_idx), *rest]


def _checked(
    x: Tensor, past: Sequence[LayerPast], heads: int, dim: int, length: int
) -> list[Caches]:
    """The caches, with rows for so many positions."""
    rows, columns = past[0][3].shape[0] - 2, x.shape[0]
    shape = (rows, columns, heads, dim)
    for info, keys, values, beam_idx in () if isinstance(past, Presents) else past:
        for place, cache in ((1, keys), (2, values)):
            if (
                tuple(cache.shape) != shape
                or cache.dtype is not x.dtype
                or not cache.is_contiguous()
            ):
                raise UnlikeError(_unlike(place, cache, f"contiguous {x.dtype} of shape {shape}"))
        if tuple(beam_idx.shape) != (rows + 2, columns):
            raise UnlikeError(_unlike(3, beam_idx, f"of shape {(rows + 2, columns)}"))
        if info.shape != past[0][0].shape:
            raise UnlikeError(_unlike(0, info, "that of the first layer"))
    if past[0][3].shape[1] != columns or past[0][1].dtype is not x.dtype:
        raise UnlikeError(_unlike(1, past[0][1], f"{x.dtype}, for a batch of {columns}"))
    if length <= rows:
        return [layer[1:] for layer in past]
    return [_indirect.grown(layer[1:], length) for layer in past]


def _unlike(place: int, is_: Tensor, must: str) -> str:
    return f"layer_past[{place}] is {is_.dtype} of shape {tuple(is_.shape)}, but must be {must}"


def _held(past: Sequence[LayerPast], before: int) -> Tensor:
    """[before, columns]: the slots of what each row was, as the caller reordered the last step."""
    beam_idx = past[0][3]
    columns = beam_idx.shape[1]
    if not isinstance(past, Presents):
        found = _indirect.columns(beam_idx, before, before)
        return found + torch.arange(0, before * columns, columns).unsqueeze(1)
    if columns == 1 or before <= past.shared:
        return past.slots
    parents = beam_idx[before - 1]
    _indirect.check_columns(parents.unsqueeze(0), before - 1)
    return torch.cat([past.slots[: past.shared], past.slots[past.shared :, parents]])


def _arenas(caches: list[Caches]) -> DecoderCaches:
    return DecoderCaches(
        [c.flatten(0, 1).transpose(0, 1) for keys, values, _ in caches for c in (keys, values)]
    )
