"""Quantized weights: what is in them, packing, unpacking, and the values that they stand for.

A quantized weight is one plain tensor of bytes: a header, panels with codes and scales in the
layout of csrc/kernels/kernels.h, and the order of the columns where groups are scattered. So it is
saved, copied, shared and moved like any buffer; header and length are checked at every use. The
layout depends neither on the instruction set, nor on threads, nor on how it will be multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, dense, ops, register_fake
from lmfuse.functional import _check

_pack = ops.woq_pack.default
_header = ops.woq_header.default
_unpack = ops.woq_unpack.default
_values = ops.woq_values.default
_copy = ops.woq_copy.default

# The numbers of WoqKind, WoqZero and DType in csrc/kernels/kernels.h.
KINDS = ("int8", "int4", "nf4", "fp8")
_ZEROS = (None, "zeros", "offsets")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_CODES = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "nf4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}
_LEAST_GROUP, _MOST_COLUMNS = 32, 1 << 24


@dataclass(frozen=True)
class QuantizedFormat:
    """What the header of a quantized weight says.

    Attributes:
        kind: "int8", "int4", "nf4" or "fp8".
        out_features, in_features: n and k.
        group_size: columns that share a scale; -1 if all of a channel do.
        scale_dtype: of scales and zeros (or offsets), as they are held.
        zeros: "zeros", "offsets" or None; see `pack_quantized`.
        act_order: whether the columns of a group lie apart, as g_idx said.
        columns: k, and what pads the groups where g_idx leaves some of them short.
    """

    kind: str
    out_features: int
    in_features: int
    group_size: int
    scale_dtype: torch.dtype
    zeros: str | None
    act_order: bool
    columns: int

    @property
    def groups(self) -> int:
        """How many scales a channel has."""
        return 1 if self.group_size == -1 else -(-self.columns // self.group_size)


@dataclass(frozen=True)
class Quantized:
    """What `unpack_quantized` gives back: the arguments of `pack_quantized`.

    Attributes:
        kind, codes, group_size, g_idx: as they were given.
        scales, zeros, offsets: [n, groups], in the dtype in which they are held.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    group_size: int
    g_idx: Tensor | None

    def pack(self) -> Tensor:
        """The bytes again."""
        return pack_quantized(
            self.kind,
            self.codes,
            self.scales,
            self.zeros,
            offsets=self.offsets,
            group_size=self.group_size,
            g_idx=self.g_idx,
        )


def pack_quantized(
    kind: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    group_size: int = -1,
    g_idx: Tensor | None = None,
) -> Tensor:
    """The bytes of a quantized weight; nothing of what is given is changed or lost

    | kind | codes q                   | value                                        |
    |------|---------------------------|----------------------------------------------|
    | int8 | int8                      | (q - zero) scale, or q scale + offset        |
    | int4 | uint8, 0 … 15             | (q - zero) scale, or q scale + offset        |
    | nf4  | uint8, 0 … 15             | v_q scale, v the table of NormalFloat 4      |
    | fp8  | float8_e4m3fn             | q scale                                      |

    Args:
        kind: a row of the table.
        codes: [n, k], one code for each weight.
        scales: [n], [n, 1], or [n, ⌈k / group_size⌉]; float32, bfloat16 or float16, finite.
        zeros: like scales, of any real dtype, in the units of the codes; they need not be integers.
            None: 0, for int4 8.
        offsets: like scales, in the units of the weights, instead of zeros.
        group_size: columns that share a scale, a power of two from 32 on; the last group may be
            shorter. -1: all of a channel.
        g_idx: [k], integers: the group of each column, where it is not column // group_size
            ("act-order"). No group may have more than group_size columns.

    Returns:
        [bytes], uint8. Scales and zeros are held in the dtype of scales, or in float32 if that
        cannot hold the zeros exactly.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    _check_codes(kind, codes)
    if kind in ("nf4", "fp8") and (zeros is not None or offsets is not None):
        raise ValueError(f"{kind} has neither zeros nor offsets")
    if zeros is not None and offsets is not None:
        raise ValueError("zeros and offsets are both given, but a weight has one or the other")
    order = None if g_idx is None else _order(g_idx, codes.shape[1], group_size)
    columns = codes.shape[1] if order is None else order.numel()
    groups = _group_count(columns, group_size)
    _check.tensor("scales", scales)
    scale = _per_group("scales", scales, codes.shape[0], groups)
    name, extra = ("zeros", zeros) if offsets is None else ("offsets", offsets)
    dtype = scales.dtype
    zero = None
    if extra is not None:
        zero = _per_group(name, extra, codes.shape[0], groups)
        if not torch.equal(zero.to(dtype).float(), zero):
            dtype = torch.float32
    with torch.no_grad():
        packed = call(
            _pack,
            codes.detach().contiguous().view(torch.uint8),
            scale,
            zero,
            order,
            KINDS.index(kind),
            _ZEROS.index(None if extra is None else name),
            0 if group_size == -1 else group_size,
            dtype,
        )
    return cast(Tensor, packed)


def quantized_format(packed: Tensor) -> QuantizedFormat:
    """What the header of `packed` says, once header and length were checked.

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight.
    """
    _check_bytes("packed", packed)
    _check.held("packed", packed)
    n, k, columns, group, kind, zero, scale, ordered = call(_header, packed).tolist()
    return QuantizedFormat(
        KINDS[kind], n, k, group or -1, _DTYPES[scale], _ZEROS[zero], bool(ordered), columns
    )


def copy_quantized(packed: Tensor) -> Tensor:
    """The same bytes in memory of their own, in pages of 2 MB as `pack_quantized` makes them: from
    there a row is multiplied 4 to 12 % faster than from a clone, and 15 % than from a view into a
    file, which is aligned to 8 bytes (8 weights of 32 MB, on a Zen 4).

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight.
    """
    _check_bytes("packed", packed)
    with torch.no_grad():
        return cast(Tensor, call(_copy, packed))


def unpack_quantized(packed: Tensor) -> Quantized:
    """Exactly what was packed: codes, scales and zeros.

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight.
    """
    f = quantized_format(packed)
    n, k = f.out_features, f.in_features
    columns = f.columns if f.act_order else 0
    codes, scales, zeros, order = call(
        _unpack, packed, n, k, f.groups, f.zeros is not None, columns
    )
    g_idx = None
    if f.act_order:
        present = ((order >= 0) & (order < k)).nonzero().squeeze(1)
        g_idx = torch.zeros(k, dtype=torch.int32)
        g_idx[order[present].long()] = (present // f.group_size).int()
    zeros = zeros.to(f.scale_dtype)
    return Quantized(
        f.kind,
        codes.view(_CODES[f.kind]),
        scales.to(f.scale_dtype),
        zeros if f.zeros == "zeros" else None,
        zeros if f.zeros == "offsets" else None,
        f.group_size,
        g_idx,
    )


def dequantize(packed: Tensor) -> Tensor:
    """The values of a quantized weight, [n, k] in float32

    (q - zero) scale, the difference and the product each rounded once (the difference of integers
    is exact), or q scale + offset, rounded once.

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight.
    """
    f = quantized_format(packed)
    return cast(Tensor, call(_values, packed, None, f.out_features, f.in_features))


def quantized_rows(packed: Tensor, rows: Tensor, out_features: int, in_features: int) -> Tensor:
    """dequantize(packed)[rows]: what an embedding reads

    Args:
        packed: the bytes of a quantized weight [out_features, in_features].
        rows: integers in [0, out_features), of any shape.

    Returns:
        [*rows.shape, in_features], float32.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    _check_bytes("packed", packed)
    _check.integers("rows", rows)
    return cast(Tensor, call(_values, packed, rows.long(), out_features, in_features))


def _check_bytes(name: str, packed: object) -> None:
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name} is {type(packed).__name__}, but must come from pack_quantized")
    dense(name, packed)
    if packed.dtype is not torch.uint8 or packed.dim() != 1:
        raise TypeError(
            f"{name} is {packed.dtype} of shape {tuple(packed.shape)}, but must be the bytes that "
            "pack_quantized returns"
        )
    if not packed.is_contiguous():
        raise ValueError(f"{name} has stride {packed.stride(0)}, but must be contiguous")


def _check_codes(kind: str, codes: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes is {type(codes).__name__}, but must be a torch.Tensor")
    dense("codes", codes)
    if codes.dtype is not _CODES[kind]:
        raise TypeError(f"codes is {codes.dtype}, but must be {_CODES[kind]} for {kind}")
    if codes.dim() != 2 or not codes.numel():
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}, but must have two dimensions, neither empty"
        )
    if codes.device.type != "cpu":
        raise ValueError(f"codes is on {codes.device}, but lmfuse computes on the CPU")
    if codes.shape[1] > _MOST_COLUMNS:
        raise ValueError(f"codes has {codes.shape[1]} columns, but may have {_MOST_COLUMNS}")
    if kind in ("int4", "nf4") and int(codes.max()) > 15:
        raise ValueError(f"codes has {int(codes.max())}, but a code of {kind} is 0 … 15")
    if kind == "fp8" and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError("codes has NaN")


def _group_count(columns: int, group_size: int) -> int:
    if group_size == -1:
        return 1
    if (
        not isinstance(group_size, int)
        or group_size < _LEAST_GROUP
        or group_size & (group_size - 1)
        or group_size > _MOST_COLUMNS
    ):
        raise ValueError(
            f"group_size is {group_size}, but must be -1 or a power of two from {_LEAST_GROUP} on"
        )
    return -(-columns // group_size)


def _per_group(name: str, x: Tensor, n: int, groups: int) -> Tensor:
    """`x` as [n, groups] in float32, checked."""
    _check.held(name, x)
    shape = tuple(x.shape)
    if shape != (n, groups) and not (groups == 1 and shape == (n,)):
        raise ValueError(f"{name} has shape {shape}, but must have ({n}, {groups})")
    wide = x.detach().to("cpu", torch.float32).reshape(n, groups).contiguous()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinity")
    return wide


def _order(g_idx: Tensor, k: int, group_size: int) -> Tensor:
    """Which column each place of the panels holds, -1 for none: groups in order, and in each group
    the columns in order."""
    if group_size == -1:
        raise ValueError("g_idx is given, but with group_size -1 there is one group")
    if not isinstance(g_idx, Tensor) or g_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError("g_idx must be a torch.Tensor of int32 or int64")
    _check.held("g_idx", g_idx)
    if tuple(g_idx.shape) != (k,):
        raise ValueError(f"g_idx has shape {tuple(g_idx.shape)}, but must have ({k},)")
    groups = _group_count(k, group_size)
    index = g_idx.detach().cpu().long()
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(
            f"g_idx has {int(index.min())} … {int(index.max())}, but there are {groups} groups"
        )
    counts = index.bincount(minlength=groups)
    if int(counts.max()) > group_size:
        raise ValueError(
            f"g_idx gives group {int(counts.argmax())} {int(counts.max())} columns, but group_size "
            f"is {group_size}"
        )
    sorted_ = index.argsort(stable=True).int()
    if bool((counts[:-1] == group_size).all()):
        return sorted_
    order = torch.full((groups, group_size), -1, dtype=torch.int32)
    for group, columns in enumerate(torch.split(sorted_, counts.tolist())):
        order[group, : len(columns)] = columns
    return order.flatten()


def packed_bytes(f: QuantizedFormat) -> int:
    """How many bytes a weight of this format has."""
    step = 32 if f.group_size == 32 or (f.group_size == -1 and f.columns == 32) else 64
    k = -(-f.columns // step) * step
    codes = 32 * k // (2 if f.kind in ("int4", "nf4") else 1)
    scales = 32 * f.scale_dtype.itemsize * (1 if f.zeros is None else 2)
    panels = -(-f.out_features // 32) * (codes + f.groups * scales)
    return 64 + panels + (4 * f.columns if f.act_order else 0)


@register_fake("woq_pack")
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: int,
    zero: int,
    group: int,
    scale_dtype: torch.dtype,
) -> Tensor:
    n, k = codes.shape
    columns = k if order is None else order.shape[0]
    f = QuantizedFormat(
        KINDS[kind], n, k, group or -1, scale_dtype, _ZEROS[zero], order is not None, columns
    )
    return codes.new_empty((packed_bytes(f),))


@register_fake("woq_header")
def _(packed: Tensor) -> Tensor:
    return packed.new_empty((8,), dtype=torch.int64)


@register_fake("woq_copy")
def _(packed: Tensor) -> Tensor:
    _check_bytes("packed", packed)
    return packed.new_empty(packed.shape)


@register_fake("woq_unpack")
def _(
    packed: Tensor, out_features: int, in_features: int, groups: int, zeros: bool, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def floats(count: int) -> Tensor:
        return packed.new_empty((out_features, count), dtype=torch.float32)

    return (
        packed.new_empty((out_features, in_features)),
        floats(groups),
        floats(groups if zeros else 0),
        packed.new_empty((columns,), dtype=torch.int32),
    )


@register_fake("woq_values")
def _(packed: Tensor, rows: Tensor | None, out_features: int, in_features: int) -> Tensor:
    lead = (out_features,) if rows is None else rows.shape
    return packed.new_empty((*lead, in_features), dtype=torch.float32)
