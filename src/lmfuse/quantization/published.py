"""Weights as GPTQ and AWQ checkpoints publish them, packed as they are: no value is rounded again.

|         | GPTQ, as AutoGPTQ and GPTQModel store it    | AWQ, "gemm"                             |
|---------|---------------------------------------------|-----------------------------------------|
| qweight | int32 [k bits/32, n]: rows side by side     | int32 [k, n/8]: columns side by side    |
| in it   | row 8 r + j is nibble j of word r (4 bits)  | column 8 c + (0 2 4 6 1 3 5 7)[j]: j    |
| scales  | [groups, n]                                 | [groups, n]                             |
| qzeros  | int32 [groups, n bits/32], minus one        | int32 [groups, n/8], in qweight's order |
| g_idx   | [k]: the group of each row, or None         |                                         |

value = (q - zero) scale; without qzeros, zero is the middle code. arXiv:2210.17323, 2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmfuse.functional import _check, pack_quantized

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_gptq(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    g_idx: Tensor | None = None,
    bits: int = 4,
    group_size: int | None = None,
    zero_offset: int = 1,
) -> Tensor:
    """The packed bytes (`lmfuse.functional.pack_quantized`) of a GPTQ weight.

    Args:
        qweight, scales, qzeros, g_idx: see the table of the module.
        bits: 4 or 8.
        group_size: rows that share a scale; None: k / groups, rounded up to a power of two.
        zero_offset: what is added to stored zero points, modulo 2^bits: 1, and 0 in the format
            "gptq_v2". A sum of 2^bits wraps to 0, as in the kernels that wrote the files.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit together; a g_idx out of range.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}, but lmfuse reads GPTQ weights of 4 and 8 bits")
    _words("qweight", qweight)
    per_word = 32 // bits
    k, n = qweight.shape[0] * per_word, qweight.shape[1]
    groups = _scales(scales, n)
    codes = gptq_codes(qweight, bits)
    zeros = torch.full((n, groups), 1 << (bits - 1), dtype=torch.uint8)
    if qzeros is not None:
        _words("qzeros", qzeros, (groups, -(-n // per_word)))
        stored = unpack_words(qzeros, bits).reshape(groups, -1)[:, :n]
        zeros = ((stored.to(torch.int16) + zero_offset) % (1 << bits)).T
    size = _group_size(k, groups, group_size)
    return _pack(bits, codes, scales, zeros, size, _act_order(g_idx, k, groups, size))


def pack_awq(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """The packed bytes (`lmfuse.functional.pack_quantized`) of an AWQ weight of 4 bits.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit together.
    """
    _words("qweight", qweight)
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = _scales(scales, n)
    codes = awq_codes(qweight)
    zeros = torch.full((n, groups), 8, dtype=torch.uint8)
    if qzeros is not None:
        _words("qzeros", qzeros, (groups, n // 8))
        zeros = awq_codes(qzeros)
    return _pack(4, codes, scales, zeros, _group_size(k, groups, group_size), None)


def gptq_codes(qweight: Tensor, bits: int = 4) -> Tensor:
    """[n, k] uint8: the codes in words [k bits/32, n]."""
    words = unpack_words(qweight, bits)  # [k/8, n, 8]
    return words.permute(1, 0, 2).reshape(qweight.shape[1], -1)


def awq_codes(words: Tensor) -> Tensor:
    """[n, k] uint8: the codes in words [k, n/8]."""
    place = torch.tensor(_AWQ_ORDER).argsort()  # where in its word column c is
    return unpack_words(words, 4)[..., place].reshape(words.shape[0], -1).T


def _pack(
    bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, g_idx: Tensor | None
) -> Tensor:
    scales = scales.detach().T.contiguous()
    if bits == 8:  # 0..255 becomes -128..127
        codes, zeros = (codes.to(torch.int16) - 128).to(torch.int8), zeros.to(torch.int16) - 128
    zeros = zeros.float().contiguous()
    middle = 8.0 if bits == 4 else 0.0
    held = None if bool((zeros == middle).all()) else zeros
    kind = f"int{bits}"
    return pack_quantized(
        kind, codes.contiguous(), scales, held, group_size=group_size, g_idx=g_idx
    )


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """[..., 32 / bits] uint8: the numbers in each word, lowest bits first."""
    octets = words.detach().resolve_neg().contiguous().view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _words(name: str, words: object, shape: tuple[int, int] | None = None) -> None:
    words = _check.held(name, words, (torch.int32,))
    if words.dim() != 2 or not words.numel():
        raise ValueError(
            f"{name} has shape {tuple(words.shape)}, but must have two dimensions, neither empty"
        )
    if shape is not None and tuple(words.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(words.shape)}, but must have {shape}")


def _scales(scales: object, n: int) -> int:
    """The number of groups."""
    scales = _check.held("scales", scales)
    if scales.dim() != 2 or scales.shape[1] != n or not scales.numel():
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}, but must be [groups, {n}] beside this qweight"
        )
    return scales.shape[0]


def _group_size(k: int, groups: int, said: int | None) -> int:
    if said is None or said <= 0:
        if groups == 1:
            return -1
        size = 1 << (-(-k // groups) - 1).bit_length()
    else:
        size = said
    if groups == 1 and size >= k:
        return -1
    if -(-k // size) != groups:
        raise ValueError(
            f"scales has {groups} groups, but {k} rows in groups of {size} are {-(-k // size)}"
        )
    return size


def _act_order(g_idx: Tensor | None, k: int, groups: int, size: int) -> Tensor | None:
    """g_idx, checked; None where it says what is so without it."""
    if g_idx is None or groups == 1:
        return None
    g_idx = _check.held("g_idx", g_idx, _check.INTEGERS)
    if tuple(g_idx.shape) != (k,):
        raise ValueError(f"g_idx has shape {tuple(g_idx.shape)}, but must have ({k},)")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"g_idx reaches from {int(g_idx.min())} to {int(g_idx.max())}, but must lie in "
            f"[0, {groups})"
        )
    trivial = torch.equal(g_idx.long(), torch.arange(k) // size) or not bool(g_idx.any())
    return None if trivial else g_idx.contiguous()
