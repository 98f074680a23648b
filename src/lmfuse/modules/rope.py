"""Rotary position embedding as a module that keeps its table of sines and cosines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.modules.rope_scaling import DEFAULT_BASE, Rope


class RopeTable:
    """sin and cos, [rows, dim/2] in fp32, of the positions 0, 1, 2 …; never changed once built.

    Equal tables are one: the layers of a model share theirs, which for 131072 positions of 128
    elements takes 64 MiB. Two threads may build one at the same time; both are right, and each
    keeps its own.
    """

    def __init__(self, rope: Rope, rows: int, long: bool) -> None:
        self.key = (rope, rows, long)
        self.rows = rows
        positions = torch.arange(rows, device="cpu")
        self.sin, self.cos = _sin_cos(rope, positions, rope.original + 1 if long else 0)

    @classmethod
    def of(cls, rope: Rope, rows: int, long: bool = False) -> RopeTable:
        """The table for sequences up to, or if long beyond, the original context."""
        table = _tables.get((rope, rows, long))
        if table is None:
            table = _tables[rope, rows, long] = cls(rope, rows, long)
        return table

    def __reduce__(self) -> tuple[Any, ...]:  # copy and pickle: the arguments, not the memory
        return RopeTable.of, self.key


_tables: WeakValueDictionary[tuple[Rope, int, bool], RopeTable] = WeakValueDictionary()


def _sin_cos(rope: Rope, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
    """[*positions, dim/2]"""
    angles = positions.to(torch.float32).unsqueeze(-1) * rope.inv_freq(length)
    return angles.sin() * rope.attention_factor, angles.cos() * rope.attention_factor


class RotaryEmbedding(nn.Module):
    """Rotates the heads of query and key by their positions; see `lmfuse.functional.rope`.

    The table is computed once, in fp32, and is in no state_dict. It grows, at least twofold, if a
    seq_len asks for more. A sequence for which longrope or dynamic scaling changes the frequencies
    is recognised as in transformers: by its length, seq_len or else the last position plus one,
    and for no longer than it lasts. A graph that torch.jit, torch.compile or torch.export traced
    keeps the table that it was traced with, and raises for a position outside of it.

    Args:
        max_position_embeddings: rows of the table; also what some scalings start from.
        pos_embd_dim: d, the rotated width of a head: head_dim, or head_dim · partial_rotary_factor
            (not for "proportional", whose factor is applied here).
        base: theta; a `rope_theta` in extra_rope_config stands for the default.
        backbone: the model's architecture. Accepted for compatibility; nothing depends on it.
        extra_rope_config: `config.rope_parameters` of transformers, its former `rope_scaling`, or
            IPEX's: a dict whose "rope_type" or "type" is default, linear, dynamic, yarn, longrope
            (su), llama3 or proportional, with the keys of that scaling. None for no scaling.

    Raises:
        ValueError: extra_rope_config lacks a key or has a value that cannot be.
    """

    def __init__(
        self,
        max_position_embeddings: int,
        pos_embd_dim: int,
        base: float = DEFAULT_BASE,
        backbone: str | None = None,
        extra_rope_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rope = Rope.of(pos_embd_dim, base, max_position_embeddings, extra_rope_config)
        rows = self.rope.original if self.rope.kind == "longrope" else max_position_embeddings
        self._table = RopeTable.of(self.rope, rows)
        self._long_table: RopeTable | None = None  # of longrope, made when first needed

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        num_head: int,
        head_dim: int,
        offset: int,
        rotary_ndims: int,
        seq_len: int | Tensor | None = None,
        num_concats: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Heads rotated into new tensors.

        Args:
            x: [batch, seq, num_head, head_dim] or [batch, seq, num_head · head_dim].
            position_ids: [batch, seq], [1, seq], or one element, the position of the first token;
                None counts from 0.
            num_head: heads of x; of the query if x is query, key and value in one.
            head_dim: elements of a head.
            offset: 1 for pairs (2j, 2j + 1), rotary_ndims/2 for pairs (j, j + rotary_ndims/2).
            rotary_ndims: how many elements of each head are rotated; at most pos_embd_dim.
            seq_len: how long the sequence is with what came before; the table grows to it.
            num_concats: not None: x is [batch, seq, (num_head + 2 kv_heads) · head_dim], the output
                of one linear for query, key and value. kv_heads follows from the shape.

        Returns:
            x rotated, [batch, seq, num_head, head_dim]; or query and key rotated, and value.

        Raises:
            TypeError, ValueError: an argument that cannot be, or a position outside of the table.
        """
        half = _is_half(offset, rotary_ndims)
        if rotary_ndims > self.rope.dim:
            raise ValueError(
                f"rotary_ndims is {rotary_ndims}, but must be at most pos_embd_dim, {self.rope.dim}"
            )
        if num_concats is None:
            x = _heads(x, num_head, head_dim)
        sin, cos, position_ids = self._angles(x.shape[1], position_ids, seq_len)
        if num_concats is None:
            return functional.rotate(x, sin, cos, rotary_ndims, half, position_ids)
        return functional.rotate_qkv(
            x, sin, cos, num_head, head_dim, rotary_ndims, half, position_ids
        )

    def angles(
        self, tokens: int, position_ids: Tensor | None = None, seq_len: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """sin and cos of `tokens` tokens, each [batch or 1, tokens, pos_embd_dim/2] in fp32.

        Args:
            tokens: how many.
            position_ids, seq_len: as in forward.
        """
        sin, cos, rows = self._angles(tokens, position_ids, seq_len)
        if rows is None and sin.dim() == 3:
            return sin, cos
        rows = _positions(rows, tokens)
        return sin[rows], cos[rows]

    @staticmethod
    def apply_function(
        query: Tensor,
        key: Tensor,
        sin: Tensor,
        cos: Tensor,
        rotary_dim: int,
        rotary_half: bool,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`lmfuse.functional.rotary_embedding`."""
        return functional.rotary_embedding(
            query, key, sin, cos, rotary_dim, rotary_half, position_ids
        )

    def _angles(
        self, tokens: int, position_ids: Tensor | None, seq_len: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """sin and cos, and the rows to read: None if they have a row for each token."""
        rope, table = self.rope, self._table
        if _is_jit_tracing() or torch.compiler.is_compiling():
            if not rope.by_length:
                return table.sin, table.cos, position_ids
            return self._angles_of_tokens(tokens, position_ids, seq_len)
        if seq_len is None and not rope.by_length:
            return table.sin, table.cos, position_ids
        length = int(_last(position_ids, tokens) + 1 if seq_len is None else seq_len)
        if rope.kind == "dynamic" and length > rope.max_positions:
            return self._angles_of_tokens(tokens, position_ids, length)
        if rope.kind == "longrope" and length > rope.original:
            long = self._long_table or RopeTable.of(
                rope, max(length, rope.max_positions), long=True
            )
            table = self._long_table = _grown(long, length)
        else:
            table = self._table = _grown(table, length)
        return table.sin, table.cos, position_ids

    def _angles_of_tokens(
        self, tokens: int, position_ids: Tensor | None, seq_len: int | Tensor | None
    ) -> tuple[Tensor, Tensor, None]:
        """For frequencies that hold for this call only: the rows of its tokens, not a table."""
        length = _last(position_ids, tokens) + 1 if seq_len is None else seq_len
        sin, cos = _sin_cos(self.rope, _positions(position_ids, tokens), length)
        return sin, cos, None

    def extra_repr(self) -> str:
        rope = self.rope
        return f"{rope.max_positions}, {rope.dim}, base={rope.base}, rope_type={rope.kind!r}"


def _grown(table: RopeTable, length: int) -> RopeTable:
    if length <= table.rows:
        return table
    rope, rows, long = table.key
    return RopeTable.of(rope, max(length, 2 * rows), long)


def _is_jit_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def _is_half(offset: int, rotary_ndims: int) -> bool:
    if offset == 1:
        return False
    if 2 * offset != rotary_ndims:
        raise ValueError(
            f"offset is {offset}, but must be 1 (pairs of neighbours) or half of rotary_ndims, "
            f"{rotary_ndims}"
        )
    return True


def _heads(x: Tensor, num_head: int, head_dim: int) -> Tensor:
    """x as [batch, seq, num_head, head_dim]; the query's part if it is query, key and value."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, but must be a torch.Tensor")
    size = num_head * head_dim
    if x.dim() == 3 and num_head > 0 and head_dim > 0:
        rest = x.shape[2] - size
        if rest == 0 or (rest > 0 and rest % (2 * head_dim) == 0):
            return x[:, :, :size].view(x.shape[0], x.shape[1], num_head, head_dim)
    if x.dim() != 4 or x.shape[2:] != (num_head, head_dim):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must be [batch, seq, {num_head}, {head_dim}] or "
            f"[batch, seq, {size}]: num_head and head_dim"
        )
    return x


def _positions(position_ids: Tensor | None, tokens: int) -> Tensor:
    """[batch or 1, tokens]"""
    if position_ids is None:
        return torch.arange(tokens, device="cpu").unsqueeze(0)
    if position_ids.numel() == 1:
        return (position_ids.reshape(()) + torch.arange(tokens, device="cpu")).unsqueeze(0)
    return position_ids if position_ids.dim() == 2 else position_ids.unsqueeze(0)


def _last(position_ids: Tensor | None, tokens: int) -> int | Tensor:
    if position_ids is None or not position_ids.numel():
        return tokens - 1
    if position_ids.numel() == 1:
        return position_ids.reshape(()) + (tokens - 1)
    return position_ids.max()
