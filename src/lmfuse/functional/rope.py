"""Rotary position embedding: pairs of each head turn by the angle of their token's position.

    half:         (x[j], x[j + rotary_dim/2])   GPT-NeoX, Llama
    interleaved:  (x[2j], x[2j + 1])            GPT-J

    (a, b) -> (a cos - b sin, b cos + a sin),  0 <= j < rotary_dim/2

The angles come as tables of their sines and cosines. Only the first rotary_dim/2 columns are read:
the usual tables, which hold each half twice, serve as they are. Elements from rotary_dim on are
kept. All compute in fp32 and round once; tables may be of another of the three dtypes than the
heads. Inference only: a backward raises.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, int64

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check

_rope = ops.rope.default
_rope_qk = ops.rope_qk.default
_rope_qk_ = ops.rope_qk_.default
_rope_qkv = ops.rope_qkv.default


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates query and key in place.

    Args:
        query: [batch, seq, heads, head_dim] or [tokens, heads, head_dim], float32, bfloat16 or
            float16; strided, but contiguous in the last dimension.
        key: as query; its number of heads may be another.
        sin, cos: [..., width], seen as [rows, width], with width >= rotary_dim/2.
        rotary_dim: how many elements of each head are rotated; even.
        rotary_half: half if True, interleaved if False.
        position_ids: the row of each token: [batch, seq], [1, seq] for all batches, or one element,
            the row of the first token; integers. None counts from 0 in each batch.

    Returns:
        query and key themselves.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if query is key:
        raise ValueError("query and key are written in place, but are the same tensor")
    _check_qk(query, key, (3, 4))
    _check.writable("query", query)
    _check.writable("key", key)
    sin, cos = _rows("sin", sin), _rows("cos", cos)
    q, k = (query, key) if query.dim() == 4 else (query.unsqueeze(0), key.unsqueeze(0))
    batch, seq, _, head_dim = q.shape
    position_ids = _check_angles(sin, cos, rotary_dim, position_ids, batch, seq, head_dim)
    call(_rope_qk_, q, k, sin, cos, position_ids, rotary_dim, rotary_half, written=(0, 1))
    return query, key


def rotate_qk(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Query and key, rotated into new tensors.

    Args:
        query: [batch, seq, heads, head_dim], or [batch, heads, seq, head_dim] if heads_first;
            float32, bfloat16 or float16.
        key: as query; its number of heads may be another.
        sin, cos: a table [rows, width], or a row for each token, [batch or 1, seq, width], with
            width >= rotary_dim/2.
        rotary_dim: how many elements of each head are rotated; even.
        rotary_half: half if True, interleaved if False.
        position_ids: as in `rotary_embedding`; None if sin and cos have a row for each token.
        heads_first: where the heads are.

    Returns:
        Tensors of the shapes and dtype of query and key. Whatever heads_first, their memory is laid
        out as [batch, seq, heads, head_dim].

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    query, key = _contiguous_heads(query), _contiguous_heads(key)
    if position_ids is not None:
        position_ids = _as_the_op_wants(position_ids)
    args = (query, key, sin, cos, position_ids, rotary_dim, rotary_half, heads_first)
    return cast(tuple[Tensor, Tensor], call(_rope_qk, *args, check=_check_rope_qk))


def rotate(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
    heads_first: bool = False,
) -> Tensor:
    """x, rotated into a new tensor; arguments, result and errors as for `rotate_qk`."""
    if position_ids is not None:
        position_ids = _as_the_op_wants(position_ids)
    args = (_contiguous_heads(x), sin, cos, position_ids, rotary_dim, rotary_half, heads_first)
    return cast(Tensor, call(_rope, *args, check=_check_rope))


def rotate_qkv(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    num_heads: int,
    head_dim: int,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the output of one linear for query, key and value, and rotates query and key.

    Args:
        x: [batch, seq, (num_heads + 2 kv_heads) head_dim], float32, bfloat16 or float16.
        num_heads: heads of the query; those of key and value follow from x.
        head_dim: elements of a head.
        sin, cos, rotary_dim, rotary_half, position_ids: as in `rotate_qk`.

    Returns:
        Query [batch, seq, num_heads, head_dim], key and value [batch, seq, kv_heads, head_dim].

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    features = _check.row("x", x)
    if x.dim() != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but query, key and value in one tensor must be "
            "[batch, seq, features]"
        )
    if num_heads < 1 or head_dim < 1:
        raise ValueError(
            f"num_heads is {num_heads} and head_dim {head_dim}, but both must be at least 1"
        )
    rest = features - num_heads * head_dim
    if rest <= 0 or rest % (2 * head_dim):
        raise ValueError(
            f"x has {features} features, but {num_heads} query heads of {head_dim} must leave "
            f"a multiple of {2 * head_dim} for key and value"
        )
    batch, seq, _ = x.shape
    position_ids = _check_angles(sin, cos, rotary_dim, position_ids, batch, seq, head_dim)
    x = _contiguous_heads(x)
    return cast(
        tuple[Tensor, Tensor, Tensor],
        call(_rope_qkv, x, sin, cos, position_ids, num_heads, head_dim, rotary_dim, rotary_half),
    )


def _rows(name: str, table: Tensor) -> Tensor:
    """The table [..., width] as [rows, width]."""
    if isinstance(table, Tensor) and table.dim() > 2:
        _check.row(name, table)
        return table.reshape(-1, table.shape[-1]) if table.numel() else table.flatten(0, -2)
    return table


def _contiguous_heads(x: Tensor) -> Tensor:
    try:
        return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    except (AttributeError, IndexError, RuntimeError):  # not such a tensor: checked later
        return x


def _as_the_op_wants(position_ids: Tensor) -> Tensor:
    """In int64 and two dimensions, unless it is wrong: that is found later."""
    if not isinstance(position_ids, Tensor) or position_ids.is_nested:
        return position_ids
    if position_ids.dtype in _check.INTEGERS:
        position_ids = position_ids.long()
    one_row = position_ids.dim() == 1 and position_ids.shape[0] != 1
    return position_ids.unsqueeze(0) if one_row else position_ids


def _check_rope_qk(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    half: bool,
    heads_first: bool,
) -> None:
    _check_qk(query, key, (4,), heads_first)
    _check_rope(query, sin, cos, positions, rotary_dim, half, heads_first)


def _check_rope(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    half: bool,
    heads_first: bool,
) -> None:
    _check_heads("x", x, (4,))
    batch, first, second, head_dim = x.shape
    seq = second if heads_first else first
    _check_angles(sin, cos, rotary_dim, positions, batch, seq, head_dim)


def _check_heads(name: str, x: Tensor, dims: tuple[int, ...]) -> None:
    _check.row(name, x)
    if x.dim() not in dims:
        forms = " or ".join(
            {3: "[tokens, heads, head_dim]", 4: "[batch, seq, heads, head_dim]"}[d] for d in dims
        )
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be {forms}")


def _check_qk(query: Tensor, key: Tensor, dims: tuple[int, ...], heads_first: bool = False) -> None:
    _check_heads("query", query, dims)
    _check_heads("key", key, dims)
    heads = 1 if heads_first else -2
    q, k = list(query.shape), list(key.shape)
    q[heads] = k[heads] = 0
    if q != k:
        raise ValueError(
            f"key has shape {tuple(key.shape)}, but must agree with query, {tuple(query.shape)}, "
            "in all but the heads"
        )
    if key.dtype is not query.dtype:
        raise TypeError(f"key is {key.dtype}, but must be {query.dtype}, the dtype of query")


def _check_angles(
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    position_ids: Tensor | None,
    batch: int,
    seq: int,
    head_dim: int,
) -> Tensor | None:
    """All that an op asks of its table; returns position_ids as the op wants them."""
    width = _check.row("sin", sin)
    _check.same("cos", cos, "sin", sin)
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim is {rotary_dim}, but must be even and at most head_dim, {head_dim}"
        )
    if 2 * width < rotary_dim:
        raise ValueError(
            f"sin and cos have {width} columns, but must have at least {rotary_dim // 2}: "
            "half of rotary_dim"
        )
    if sin.dim() == 2:
        if position_ids is not None:
            return _check_positions(position_ids, batch, seq)
        if sin.shape[0] < seq:
            raise ValueError(
                f"sin and cos have {sin.shape[0]} rows, but must have one for each of {seq} tokens"
            )
        return None
    if sin.dim() != 3 or sin.shape[0] not in (1, batch) or sin.shape[1] != seq:
        raise ValueError(
            f"sin and cos have shape {tuple(sin.shape)}, but must be a table [rows, width] or have "
            f"a row for each token: [{batch} or 1, {seq}, width]"
        )
    if position_ids is not None:
        raise ValueError("position_ids must be None: sin and cos have a row for each token")
    return None


def _check_positions(position_ids: Tensor, batch: int, seq: int) -> Tensor:
    _check.integers("position_ids", position_ids, _check.INTEGERS)
    if position_ids.dtype is not int64:
        position_ids = position_ids.long()
    shape = position_ids.shape
    if len(shape) == 2 and shape[1] == seq and (shape[0] == batch or shape[0] == 1):
        return position_ids
    if len(shape) == 1 and shape[0] == seq:
        return position_ids.unsqueeze(0)
    if position_ids.numel() != 1:
        raise ValueError(
            f"position_ids has shape {tuple(shape)}, but must be [{batch}, {seq}], [1, {seq}] or "
            "have one element: the position of the first token"
        )
    return position_ids


def _empty_heads(x: Tensor, sizes: Sequence[int], heads_first: bool = False) -> Tensor:
    """As the op makes it: laid out as [batch, seq, heads, head_dim] in memory."""
    _, first, second, dim = sizes
    if heads_first:
        return x.new_empty_strided(sizes, (first * second * dim, dim, first * dim, 1))
    return x.new_empty_strided(sizes, (first * second * dim, second * dim, dim, 1))


@register_fake("rope")
def _(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    half: bool,
    heads_first: bool,
) -> Tensor:
    _check_rope(x, sin, cos, positions, rotary_dim, half, heads_first)
    return _empty_heads(x, x.shape, heads_first)


@register_fake("rope_qk")
def _(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    half: bool,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    _check_rope_qk(query, key, sin, cos, positions, rotary_dim, half, heads_first)
    return _empty_heads(query, query.shape, heads_first), _empty_heads(key, key.shape, heads_first)


@register_fake("rope_qk_")
def _(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    half: bool,
) -> None:
    return None


@register_fake("rope_qkv")
def _(
    qkv: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    num_heads: int,
    head_dim: int,
    rotary_dim: int,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, features = qkv.shape
    kv = (batch, seq, (features // head_dim - num_heads) // 2, head_dim)
    return (
        qkv.new_empty((batch, seq, num_heads, head_dim)),
        qkv.new_empty(kv),
        qkv.new_empty(kv),
    )
