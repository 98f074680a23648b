"""A whole model in one op: tokens to logits, against the parts that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import functional
from lmfuse.functional import DecoderEnds, DecoderLinear, PackedWeight, pack_linear
from lmfuse.reference.decoder import decoder as reference
from lmfuse.reference.decoder import linear as linear_reference
from lmfuse.reference.decoder import norm as norm_reference
from test_decoder import DIM, FORMS, HIDDEN, TOLERANCE, linear, make, norm

VOCABULARY = 75


def quantized(n: int, k: int) -> Tensor:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return functional.pack_quantized("int8", codes, torch.rand(n) / 100 + 0.001)


def embedding(how: str, dtype: torch.dtype) -> tuple[PackedWeight | Tensor, Tensor]:
    """What the op is given, and the values of its rows."""
    plain = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    if how == "packed":
        return pack_linear(plain), plain
    if how == "quantized":
        packed = quantized(VOCABULARY, HIDDEN)
        return packed, functional.dequantize(packed).to(dtype)
    return plain, plain


class Whole:
    """A model over a batch whose rows lie in turn, each seeing its own columns."""

    def __init__(
        self,
        dtype: torch.dtype,
        how: str = "plain",
        scale: float = 1.0,
        normed: bool = True,
        padding: Sequence[int] = (0, 3),
        placed: bool = False,
        norm_before: bool | None = None,
        **form: Any,
    ) -> None:
        self.batch, self.tokens, self.padding = len(padding), 11, padding
        self.layers = [make(dtype, **form) for _ in range(2)]
        given, self.values = embedding(how, dtype)
        self.norm = norm(HIDDEN, dtype) if normed else None
        self.head = linear(VOCABULARY, HIDDEN, dtype, bias=True)
        self.scale = scale
        self.rows = torch.randn(20, HIDDEN).to(dtype) if placed else None
        self.before = None if norm_before is None else norm(HIDDEN, F32, norm_before)
        self.ends = DecoderEnds(given, self.norm, self.head, scale, self.rows, self.before)
        self.stack = functional.decoder_stack(self.layers)
        slots = self.batch * (self.tokens + 2)
        self.table = torch.arange(slots).view(self.tokens + 2, self.batch).T.contiguous().int()
        self.ids = torch.randint(VOCABULARY, (self.batch, self.tokens))
        self.cos, self.sin = (torch.randn(40, DIM) for _ in range(2))
        self.positions = torch.arange(self.tokens) - torch.tensor(padding)[:, None] + 9
        self.caches = [
            torch.zeros(self.layers[0].kv_heads, slots, DIM, dtype=dtype) for _ in range(4)
        ]

    def piece(self, begin: int, end: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Tokens [begin, end), two columns on in the table."""
        columns = [end + 2, *(2 + first for first in self.padding[rows])]
        ids, positions = self.ids[rows, begin:end], self.positions[rows, begin].tolist()
        angles = [self.cos], [self.sin], positions
        given = self.stack, self.caches, [self.table[rows]], columns
        return functional.decoder_logits(ids, self.ends, *given, *angles)

    def step_by_step(self) -> Tensor:
        """The same by single ops."""
        x = self.values[self.ids]
        if self.scale != 1.0:
            x = x * self.scale
        if self.rows is not None:
            x = x + self.rows[self.positions]
        if self.before is not None and self.before.centered:
            x = functional.layer_norm(x, self.before.weight, self.before.bias, self.before.eps)
        elif self.before is not None:
            x = functional.rms_norm(x, self.before.weight, self.before.eps)
        slots = self.table[:, 2:].flatten()
        lengths = torch.tensor([0, *(self.tokens - p for p in self.padding)]).cumsum(0)
        tables = torch.zeros_like(self.table)
        for row, first in zip(range(self.batch), self.padding, strict=True):
            tables[row, : self.tokens - first] = self.table[row, 2 + first :]
        angles = self.cos[self.positions], self.sin[self.positions]
        y = functional.decoder(x, self.stack, self.caches, slots, tables, lengths, *angles)
        if self.norm is not None:
            y = functional.rms_norm(y, self.norm.weight, self.norm.eps)
        weight: Any = self.head.weight
        return functional.linear(y, weight, self.head.bias)


@pytest.mark.parametrize("how", ["plain", "packed", "quantized"])
@pytest.mark.parametrize(
    "form", ["llama", "interleaved partial rope", "experts, gelu", "codegen", "shared expert"]
)
def test_the_bits_of_its_parts(isa: str, dtype: torch.dtype, how: str, form: str) -> None:
    for scale in (1.0, 3.7):
        whole = Whole(dtype, how, scale, normed=how == "quantized" or scale == 1.0, **FORMS[form])
        logits, largest = whole.piece(0, whole.tokens)
        assert logits.dtype is dtype
        assert_same_bits(logits, whole.step_by_step())
        assert torch.equal(largest, logits.argmax(-1))


@pytest.mark.parametrize("how", ["plain", "packed", "quantized"])
def test_rows_for_positions_and_a_norm_before(isa: str, dtype: torch.dtype, how: str) -> None:
    for placed, norm_before, scale in ((True, None, 1.0), (False, True, 1.0), (True, False, 3.7)):
        whole = Whole(dtype, how, scale, placed=placed, norm_before=norm_before)
        expected = whole.step_by_step()
        assert_same_bits(whole.piece(0, whole.tokens)[0], expected)
        pieces = [whole.piece(*ends)[0] for ends in ((0, 4), (4, 5), (5, 11))]
        assert_same_bits(torch.cat(pieces, 1), expected)


def test_reference(isa: str, dtype: torch.dtype) -> None:
    whole = Whole(dtype, padding=(0, 0), rotary_dim=DIM)
    logits, _ = whole.piece(0, whole.tokens)
    angles = whole.cos[whole.positions[:1]], whole.sin[whole.positions[:1]]
    y = reference(whole.values[whole.ids].double(), whole.layers, *angles)
    expected = linear_reference(norm_reference(whole.norm, y), whole.head)
    error = (logits.double() - expected).abs().max() / expected.abs().max()
    assert error < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_bits_depend_on_the_row_alone(isa: str, kind: torch.dtype) -> None:
    whole = Whole(kind, "packed", padding=(0, 2, 0), rotary_dim=DIM)
    expected, _ = whole.piece(0, 11)
    pieces = [whole.piece(*ends)[0] for ends in ((0, 4), (4, 5), (5, 6), (6, 11))]
    assert_same_bits(torch.cat(pieces, 1), expected)
    torch.set_num_threads(1)
    alone = [whole.piece(i, i + 1, slice(1, 2))[0] for i in range(2, 11)]
    assert_same_bits(torch.cat(alone, 1), expected[1:2, 2:])


def test_two_kinds(isa: str) -> None:
    """Each sees columns of its own."""
    whole = Whole(F32, padding=(0, 0), rotary_dim=DIM)
    near = [replace(layer, window=4, kind=i) for i, layer in enumerate(whole.layers)]
    near[0] = replace(near[0], window=-1)
    stack = functional.decoder_stack(near)
    tables, cos, sin = [whole.table] * 2, [whole.cos] * 2, [whole.sin] * 2
    given = whole.ends, stack, whole.caches, tables
    every, _ = functional.decoder_logits(
        whole.ids, *given, [13, 2, 2] * 2, cos, sin, whole.positions[:, 0].tolist()
    )
    last = (
        whole.ids[:, -1:],
        *given,
        [13, 2, 2, 13, 8, 8],
        cos,
        sin,
        whole.positions[:, -1].tolist(),
    )
    assert_same_bits(functional.decoder_logits(*last)[0], every[:, -1:])
    fewer = [13, 2, 2, 13, 9, 9]
    assert not torch.equal(functional.decoder_logits(*last[:5], fewer, *last[6:])[0], every[:, -1:])


def test_angles_of_tokens() -> None:
    """In place of tables and positions."""
    whole = Whole(F16, rotary_dim=DIM)
    expected, _ = whole.piece(0, 11)
    angles = [whole.cos[whole.positions]], [whole.sin[whole.positions]]
    given = whole.stack, whole.caches, [whole.table], [13, 2, 5]
    assert_same_bits(functional.decoder_logits(whole.ids, whole.ends, *given, *angles)[0], expected)


def test_what_is_written_into_a_parameter_counts() -> None:
    whole = Whole(F32, rotary_dim=DIM)
    before, _ = whole.piece(0, 11)
    assert whole.norm is not None
    whole.values.mul_(2)
    whole.norm.weight.mul_(0.5)
    after, _ = whole.piece(0, 11)
    assert not torch.equal(before, after)
    assert_same_bits(after, whole.step_by_step())


def refused(words: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=words)


def test_refusals() -> None:
    whole = Whole(F32, rotary_dim=DIM)
    good: dict[str, Any] = {
        "input_ids": whole.ids,
        "ends": whole.ends,
        "stack": whole.stack,
        "caches": whole.caches,
        "tables": [whole.table],
        "columns": [13, 2, 5],
        "cos": [whole.cos],
        "sin": [whole.sin],
        "positions": whole.positions[:, 0].tolist(),
    }

    def call(**changed: Any) -> Any:
        return functional.decoder_logits(**good | changed)

    call()
    for ids in (whole.ids + VOCABULARY, -1 - whole.ids):
        with refused("input_ids has"):
            call(input_ids=ids)
    with refused("input_ids", TypeError):
        call(input_ids=whole.ids.int())
    with refused("input_ids has shape"):
        call(input_ids=whole.ids[0])
    for columns in ([14, 2, 5], [10, 2, 5], [13, -1, 5], [13, 2, 14], [13, 2], [2**62, 0, 0]):
        with refused("columns|tables"):
            call(columns=columns)
    with refused("columns has", TypeError):
        call(columns=[13, 2, 5.5])
    for tables in ([whole.table + 1], [whole.table - 30], [whole.table[:1]], []):
        with refused("tables"):
            call(tables=tables)
    for positions in ([0, 30], [-1, 0], [0, 2**63 - 1], [-(2**63), 0], [1], [1, 2, 3]):
        with refused("position"):
            call(positions=positions)
    with refused("positions has", TypeError):
        call(positions=[0, 1.5])
    with refused("cos"):
        call(positions=[])
    with refused("cos"):
        call(cos=[], sin=[])
    with refused("dtype of the weights"):
        call(ends=Whole(BF16).ends)


def test_refused_positions() -> None:
    whole = Whole(F32, placed=True)
    given = whole.stack, whole.caches, [whole.table], [13, 2, 5]
    for positions in ([0, 10], [-1, 0], [0, 2**63 - 1], [-(2**63), 0]):
        with refused("positions has .* there are rows for 20 positions"):
            functional.decoder_logits(whole.ids, whole.ends, *given, [], [], positions)
    with refused("there are 0 positions for 2 sequences"):
        functional.decoder_logits(whole.ids, whole.ends, *given)
    with refused("positions must have the dtype"):
        ends = DecoderEnds(whole.values, None, whole.head, 1.0, torch.randn(20, HIDDEN).half())
        functional.decoder_logits(whole.ids, ends, *given, [], [], [0, 0])


def test_refused_ends() -> None:
    head, plain = linear(VOCABULARY, HIDDEN, F32), torch.randn(VOCABULARY, HIDDEN)
    with refused("embedding has shape"):
        DecoderEnds(plain.T, None, head)
    with refused("embedding has shape"):
        DecoderEnds(plain[0], None, head)
    with refused("the weight of norm"):
        DecoderEnds(plain, norm(HIDDEN + 1, F32), head)
    with refused("the weight of embedding_norm"):
        DecoderEnds(plain, None, head, embedding_norm=norm(HIDDEN + 1, F32))
    for positions in (plain.T, plain[0], torch.randn(3, HIDDEN + 1)):
        with refused("positions"):
            DecoderEnds(plain, None, head, positions=positions)
    with refused("quantized|packed", TypeError):
        DecoderEnds(plain, None, DecoderLinear(plain))
    stack = functional.decoder_stack([make(F32)])
    ends = DecoderEnds(torch.randn(5, HIDDEN + 8), None, linear(9, HIDDEN + 8, F32))
    caches = [torch.zeros(2, 8, DIM) for _ in range(2)]
    ids, table = torch.tensor([[1]]), torch.arange(8).view(1, 8)
    with refused("the embedding must have"):
        functional.decoder_logits(ids, ends, stack, caches, [table], [1, 0])
    ends = DecoderEnds(torch.randn(5, HIDDEN), None, linear(9, HIDDEN + 8, F32))
    with refused("head must read"):
        functional.decoder_logits(ids, ends, stack, caches, [table], [1, 0])
    with refused("norm must have a weight"):
        bare = DecoderEnds(quantized(VOCABULARY, HIDDEN), None, head)
        functional.decoder_logits(ids, bare, stack, caches, [table], [1, 0])


def test_shapes_without_data() -> None:
    whole = Whole(BF16, rotary_dim=DIM)
    op = torch.ops.lmfuse.decoder_logits.default
    numbers = whole.stack._number, whole.ends._number, 0
    meta = whole.ids.to("meta")
    logits, largest = op(meta, *numbers, [], [], [], [])
    assert (logits.shape, logits.dtype, logits.is_meta) == ((2, 11, VOCABULARY), BF16, True)
    assert (largest.shape, largest.dtype) == ((2, 11), torch.int64)
