"""GGUF files: their table of tensors, checked before anything is read, and their blocks, packed as
they are.

| type | bytes of 32 columns | value | becomes |
|------|---------------------|-------|---------|
| Q4_0 | d fp16, 16 bytes    | (q - 8) d | int4, group 32 |
| Q4_1 | d, m fp16, 16 bytes | q d + m   | int4, group 32, offsets |
| Q8_0 | d fp16, 32 int8     | q d       | int8, group 32 |

Byte j of 16 holds columns j (low nibble) and j + 16. Other types are not kept: transformers unpacks
them. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lmfuse.functional import _check, pack_quantized

KEPT = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}
# type: (elements, bytes) of a block; ggml.h.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),  # Q5_0
    7: (32, 24),
    8: (32, 34),
    9: (32, 40),
    10: (256, 84),  # Q2_K …
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),  # … Q8_K
    16: (256, 66),  # IQ …
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),  # I8 … I64, F64
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),  # BF16
}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of metadata
_STRING, _ARRAY, _U32 = 8, 9, 4
_MOST_ELEMENTS = 1 << 48


class GgufTensor(NamedTuple):
    """Where a tensor lies in its file."""

    name: str
    shape: tuple[int, ...]  # as torch says it: the rows' length last
    type: int
    start: int  # from the start of the file
    size: int  # bytes


def gguf_tensors(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file, each known to lie inside of it.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, or one whose counts, lengths, shapes or
            offsets cannot be.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).tensors()


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a sound GGUF file: {what}")

    def skip(self, size: int, what: str) -> int:
        """Moves over `size` bytes; returns where they begin."""
        start = self.at
        if size > self.end - start:
            raise self.error(f"{what} reaches beyond its end, at byte {start}")
        self.at = start + size
        return start

    def number(self, form: str, what: str) -> int:
        return int(struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0])

    def string(self, what: str) -> bytes:
        size = self.number("<Q", what)
        start = self.skip(size, what)
        return bytes(self.data[start : start + size])

    def count(self, what: str, least: int) -> int:
        """A number of things of at least `least` bytes each."""
        count = self.number("<Q", what)
        if count > (self.end - self.at) // least:
            raise self.error(f"it says that there are {count} {what}")
        return count

    def tensors(self) -> dict[str, GgufTensor]:
        if self.data[self.skip(4, "its magic") : 4] != b"GGUF":
            raise self.error("it does not begin with GGUF")
        version = self.number("<I", "its version")
        if version not in (2, 3):
            raise self.error(f"its version is {version}, but must be 2 or 3")
        tensors = self.count("tensors", 24)
        alignment = 32
        for _ in range(self.count("keys", 13)):
            key, kind = self.string("a key"), self.number("<I", "a type")
            value = self.value(kind, 0)
            if key == b"general.alignment":
                alignment = value
        if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.error(f"its alignment is {alignment}, but must be a power of two from 8 on")
        found = [self.entry() for _ in range(tensors)]
        base = -(-self.at // alignment) * alignment
        return self.placed(found, base, alignment)

    def value(self, kind: int, depth: int) -> int:
        """Moves over a value; returns it if it is an unsigned number."""
        if kind == _STRING:
            self.string("a string")
        elif kind == _ARRAY and depth < 4:
            inner = self.number("<I", "a type")
            if inner in _SIZES:
                self.skip(self.count("values", _SIZES[inner]) * _SIZES[inner], "an array")
            else:
                for _ in range(self.count("values", 8)):
                    self.value(inner, depth + 1)
        elif kind == _U32:
            return self.number("<I", "a value")
        elif kind in _SIZES:
            self.skip(_SIZES[kind], "a value")
        else:
            raise self.error(f"it holds a value of type {kind}")
        return 0

    def entry(self) -> GgufTensor:
        raw = self.string("a name")
        name = raw.decode("utf-8", "backslashreplace")
        dims = self.number("<I", "a number of dimensions")
        if not 1 <= dims <= 4:
            raise self.error(f"{name} has {dims} dimensions, but must have 1 to 4")
        shape = tuple(self.number("<Q", "a dimension") for _ in range(dims))[::-1]
        kind, start = self.number("<I", "a type"), self.number("<Q", "an offset")
        if kind not in BLOCKS:
            raise self.error(f"{name} is of type {kind}, which is not known")
        elements, size = BLOCKS[kind]
        if not all(shape) or prod(shape) > _MOST_ELEMENTS:
            raise self.error(f"{name} has shape {shape}")
        if shape[-1] % elements:
            raise self.error(f"{name} has rows of {shape[-1]}, not a multiple of {elements}")
        return GgufTensor(name, shape, kind, start, prod(shape) // elements * size)

    def placed(self, found: list[GgufTensor], base: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        reach = base
        for tensor in sorted(found, key=lambda t: t.start):
            start = base + tensor.start
            if tensor.name in tensors:
                raise self.error(f"it has two tensors called {tensor.name}")
            if tensor.start % alignment or start < reach:
                raise self.error(f"{tensor.name} lies at {tensor.start}, askew or over another")
            reach = start + tensor.size
            if reach > self.end:
                raise self.error(
                    f"{tensor.name} has shape {tensor.shape}, {tensor.size} bytes from {start} on, "
                    f"but the file ends at {self.end}"
                )
            tensors[tensor.name] = tensor._replace(start=start)
        return tensors


def pack_gguf(blocks: Tensor, type: int) -> Tensor:
    """The packed bytes (`lmfuse.functional.pack_quantized`) of blocks of Q4_0, Q4_1 or Q8_0.

    Args:
        blocks: [n, bytes of a row], uint8.
        type: 2, 3 or 8.

    Raises:
        ValueError: another type, or rows that are no whole number of blocks.
    """
    if type not in KEPT:
        raise ValueError(f"type is {type}, but must be 2 (Q4_0), 3 (Q4_1) or 8 (Q8_0)")
    size = BLOCKS[type][1]
    _check.held("blocks", blocks, (torch.uint8,))
    if blocks.dim() != 2 or not blocks.numel() or blocks.shape[1] % size:
        raise ValueError(
            f"blocks has shape {tuple(blocks.shape)}, but must be rows of blocks of {size} bytes"
        )
    n = blocks.shape[0]
    parts = blocks.reshape(n, -1, size)
    head = 4 if type == 3 else 2
    numbers = parts[..., :head].contiguous().view(torch.float16)
    codes = parts[..., head:]
    scales = numbers[..., 0].contiguous()
    if type == 8:
        return pack_quantized("int8", codes.reshape(n, -1).view(torch.int8), scales, group_size=32)
    nibbles = torch.cat((codes & 15, codes >> 4), -1).reshape(n, -1)
    offsets = numbers[..., 1].contiguous() if type == 3 else None
    return pack_quantized("int4", nibbles, scales, offsets=offsets, group_size=32)
