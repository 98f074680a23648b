"""The decoder op against plain torch in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import functional
from lmfuse.functional import (
    DecoderExperts,
    DecoderLayer,
    DecoderLinear,
    DecoderNorm,
    decoder_stack,
    pack_linear,
)
from lmfuse.reference.decoder import decoder as reference

HIDDEN, INNER, DIM = 40, 72, 20


def linear(n: int, k: int, dtype: torch.dtype, bias: bool = False) -> DecoderLinear:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return DecoderLinear(pack_linear(weight), torch.randn(n).to(dtype) if bias else None)


def norm(n: int, dtype: torch.dtype, centered: bool = False) -> DecoderNorm:
    bias = torch.randn(n).to(dtype) if centered else None
    return DecoderNorm(1 + 0.3 * torch.randn(n).to(dtype), bias, 1e-5, centered)


def mixture(
    experts: int, dtype: torch.dtype, chosen: int, normalized: bool, gate: bool
) -> DecoderExperts:
    gate_up = (torch.randn(experts, 2 * INNER, HIDDEN) / HIDDEN**0.5).to(dtype)
    down = (torch.randn(experts, HIDDEN, INNER) / INNER**0.5).to(dtype)
    router = linear(experts, HIDDEN, dtype)
    router = DecoderLinear(pack_linear(router.weight.unpack() * 4))
    packed = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    shared_gate = linear(1, HIDDEN, dtype) if gate else None
    return DecoderExperts(router, *packed, INNER, chosen, normalized, shared_gate=shared_gate)


# What layers of transformers differ in, a few at a time.
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"rotary_dim": DIM},
    "biases": {"rotary_dim": DIM, "bias": True},
    "window, softcap": {"rotary_dim": DIM, "window": 6, "softcap": 2.0},
    "interleaved partial rope": {"rotary_dim": 8, "rotary_half": False},
    "parallel": {"parallel": True, "centered": True, "gated": False, "activation": "gelu"},
    "neox": {"groups": 3, "heads": 3, "kv_heads": 3, "parallel": True, "rotary_dim": 8},
    "falcon": {"groups": 2, "heads": 6, "rotary_dim": DIM, "parallel": True, "head_norms": True},
    "codegen": {
        "groups": 2,
        "kv_heads": 4,
        "values_first": True,
        "rotary_dim": 8,
        "rotary_half": False,
        "head_norms": True,
    },
    "sinks": {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0]), "rotary_dim": DIM, "window": 6},
    "olmo": {"weights": False, "centered": True, "head_norms": True, "rotary_dim": DIM},
    "one projection": {"fused": True, "rotary_dim": DIM},
    "norms everywhere": {"head_norms": True, "after": True, "rotary_dim": DIM},
    "norm of all heads": {"wide_norms": True, "rotary_dim": DIM},
    "no norms, scaled": {"before": False, "residual_scale": 0.25, "activation": "gelu_tanh"},
    "plain relu": {"gated": False, "activation": "relu"},
    "experts": {"experts": 5, "rotary_dim": DIM},
    "shared expert": {"experts": 4, "shared": 56, "rotary_dim": DIM},
    "shared expert, gelu": {
        "experts": 3,
        "shared": 90,
        "shared_gate": False,
        "activation": "gelu_tanh",
        "after": True,
    },
    "experts, gelu": {"experts": 3, "normalized": False, "activation": "gelu", "after": True},
    "alibi": {
        "alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "groups": 4,
        "kv_heads": 4,
    },
}


def make(
    dtype: torch.dtype,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    centered: bool = False,
    fused: bool = False,
    head_norms: bool = False,
    wide_norms: bool = False,
    before: bool = True,
    after: bool = False,
    weights: bool = True,
    experts: int = 0,
    chosen: int = 2,
    normalized: bool = True,
    shared: int = 0,
    shared_gate: bool = True,
    inner: int = INNER,
    **options: Any,
) -> DecoderLayer:
    q, kv = heads * DIM, kv_heads * DIM
    gated = options.get("gated", True)
    if fused or options.get("groups", 1) > 1:
        query, key, value = linear(q + 2 * kv, HIDDEN, dtype, bias), None, None
    else:
        query, key, value = (linear(n, HIDDEN, dtype, bias) for n in (q, kv, kv))
    halves = 2 if fused and gated else 1
    norms: dict[str, DecoderNorm] = {}
    if before:
        norms |= {n: norm(HIDDEN, dtype, centered) for n in ("attention_input", "mlp_input")}
    if after:
        norms |= {n: norm(HIDDEN, dtype) for n in ("attention_output", "mlp_output")}
    if head_norms or wide_norms:
        norms["query_norm"] = norm(q if wide_norms else DIM, dtype)
        norms["key_norm"] = norm(kv if wide_norms else DIM, dtype)
    if not weights:
        norms = {name: replace(n, weight=None, bias=None) for name, n in norms.items()}
    inner = shared or inner
    mlp = (
        linear(halves * inner, HIDDEN, dtype, bias),
        linear(inner, HIDDEN, dtype, bias) if gated and not fused else None,
        linear(HIDDEN, inner, dtype, bias),
    )
    if experts:
        gate = shared > 0 and shared_gate
        options["experts"] = mixture(experts, dtype, chosen, normalized, gate)
    if experts and not shared:
        mlp = None, None, None
    return DecoderLayer(
        heads,
        kv_heads,
        DIM,
        query,
        key,
        value,
        linear(HIDDEN, q, dtype, bias),
        *mlp,
        DIM**-0.5,
        **norms,
        **options,
    )


class Run:
    """Some layers over one batch, in pieces."""

    def __init__(self, layers: list[DecoderLayer], x: Tensor, int8: bool = False) -> None:
        self.layers, self.x = layers, x
        self.stack = decoder_stack(layers)
        batch, tokens, _ = x.shape
        angle = torch.randn(1, tokens, DIM)
        self.cos, self.sin = angle.cos(), angle.sin()
        # Rows in turn, so that no sequence lies in order.
        self.table = torch.arange(batch * tokens).view(tokens, batch).T.contiguous()
        kv_heads, slots = layers[0].kv_heads, batch * tokens
        self.caches: list[Tensor] = []
        for _ in layers:
            kind = torch.int8 if int8 else x.dtype
            self.caches += [torch.zeros(kv_heads, slots, DIM, dtype=kind) for _ in range(2)]
            if int8:
                self.caches += [torch.zeros(kv_heads, slots) for _ in range(2)]

    def piece(self, begin: int, end: int, rows: slice = slice(None)) -> Tensor:
        x, table = self.x[rows, begin:end], self.table[rows]
        lengths = torch.arange(len(x) + 1) * end
        slots = table[:, begin:end].flatten()
        angles = self.cos[:, begin:end], self.sin[:, begin:end]
        return functional.decoder(x, self.stack, self.caches, slots, table, lengths, *angles)

    def pieces(self, *sizes: int) -> Tensor:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return torch.cat([self.piece(e - n, e) for n, e in zip(sizes, ends, strict=True)], 1)

    def expected(self) -> Tensor:
        return reference(self.x.double(), self.layers, self.cos, self.sin)


TOLERANCE = {F32: 2e-6, BF16: 2e-2, F16: 3e-3}


@pytest.mark.parametrize("form", FORMS)
def test_reference(isa: str, dtype: torch.dtype, form: str) -> None:
    options = dict(FORMS[form])
    if "experts" in options and dtype is not F32:  # where a rounding may choose another
        options["chosen"] = options["experts"]
    run = Run([make(dtype, **options) for _ in range(2)], torch.randn(2, 19, HIDDEN).to(dtype))
    y, expected = run.pieces(19), run.expected()
    assert y.dtype is dtype
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "form",
    [
        "llama",
        "norms everywhere",
        "neox",
        "falcon",
        "codegen",
        "alibi",
        "sinks",
        "experts, gelu",
        "shared expert",
    ],
)
def test_bits_depend_on_the_row_alone(isa: str, dtype: torch.dtype, form: str) -> None:
    """Not on the batch, the piece of the prompt, or the number of threads."""
    layers = [make(dtype, **FORMS[form]) for _ in range(3)]
    run = Run(layers, torch.randn(3, 37, HIDDEN).to(dtype))
    whole = run.pieces(37)
    assert_same_bits(run.pieces(20, 1, 1, 15), whole)
    torch.set_num_threads(1)
    assert_same_bits(run.pieces(37), whole)
    alone = torch.cat([run.piece(i, i + 1, slice(1, 2)) for i in range(37)], 1)
    assert_same_bits(alone, whole[1:2])


def test_a_sequence_in_order_has_the_same_bits(dtype: torch.dtype) -> None:
    """Which is read in one piece, from the middle of the caches."""
    layers, x = [make(dtype, rotary_dim=DIM)], torch.randn(2, 300, HIDDEN).to(dtype)
    run = Run(layers, x)
    apart = run.pieces(290, 10)
    run.table = torch.arange(600).view(2, 300)
    for row in range(2):
        rows = slice(row, row + 1)
        y = torch.cat([run.piece(0, 290, rows), run.piece(290, 300, rows)], 1)
        assert_same_bits(y, apart[rows])


def test_stack_is_layer_after_layer(dtype: torch.dtype) -> None:
    layers, x = [make(dtype, rotary_dim=DIM) for _ in range(4)], torch.randn(2, 9, HIDDEN).to(dtype)
    run = Run(layers, x)
    y = run.pieces(9)
    for layer in layers:
        one = Run([layer], x)
        one.cos, one.sin = run.cos, run.sin
        x = one.pieces(9)
    assert_same_bits(y, x)


def test_transposed_weights() -> None:
    """Those of transformers' Conv1D: their bytes are the same."""
    layer, x = make(F32, fused=True), torch.randn(2, 5, HIDDEN)

    def turned(given: Any) -> DecoderLinear:
        weight = given.weight.unpack().t().contiguous()
        return replace(given, weight=pack_linear(weight, transposed=True))

    other = replace(layer, **{n: turned(getattr(layer, n)) for n in ("query", "output", "down")})
    assert_same_bits(Run([other], x).pieces(5), Run([layer], x).pieces(5))


class Mixed:
    """Layers of two kinds over one batch: some see a window, of which no more is kept, in other
    slots and with other angles than those that see all."""

    def __init__(self, dtype: torch.dtype) -> None:
        near = {"rotary_dim": DIM, "window": 6}
        self.layers = [
            make(dtype, **near),
            make(dtype, rotary_dim=DIM, kind=1),
            make(dtype, **near),
            make(dtype, kind=1),
        ]
        self.x = torch.randn(2, 300, HIDDEN).to(dtype)
        self.stack = decoder_stack(self.layers)
        whole = [replace(layer, kind=0) for layer in self.layers]
        self.alone = [Run([layer], self.x) for layer in whole]
        for one, like in ((2, 0), (3, 1)):
            self.alone[one].cos, self.alone[one].sin = self.alone[like].cos, self.alone[like].sin
        self.tables = [self.alone[0].table, self.alone[0].table.flip(1) + 5]
        self.caches = [
            torch.zeros(2, 600 + 5 * layer.kind, DIM, dtype=dtype)
            for layer in self.layers
            for _ in range(2)
        ]

    def piece(self, begin: int, end: int, rows: slice = slice(None)) -> Tensor:
        x = self.x[rows, begin:end]
        tables = [self.tables[0][rows, max(0, begin - 6) : end], self.tables[1][rows, :end]]
        lengths = [torch.arange(len(x) + 1) * table.shape[1] for table in tables]
        slots = [table[:, begin - end :].flatten() for table in tables]
        cos, sin = ([getattr(a, n)[:, begin:end] for a in self.alone[:2]] for n in ("cos", "sin"))
        return functional.decoder(x, self.stack, self.caches, slots, tables, lengths, cos, sin)

    def expected(self) -> Tensor:
        cos, sin = ([getattr(a, n) for a in self.alone[:2]] for n in ("cos", "sin"))
        return reference(self.x.double(), self.layers, cos, sin)


def test_layers_of_two_kinds(isa: str, dtype: torch.dtype) -> None:
    """The bits of layer after layer, whatever the pieces and the batch."""
    mixed = Mixed(dtype)
    whole, expected = mixed.piece(0, 300), mixed.expected()
    assert (whole.double() - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    x = mixed.x
    for one in mixed.alone:
        one.x = x
        x = one.pieces(300)
    assert_same_bits(whole, x)
    pieces = [mixed.piece(*ends) for ends in ((0, 290), (290, 291), (291, 292), (292, 300))]
    assert_same_bits(torch.cat(pieces, 1), whole)
    row = slice(1, 2)
    pieces = [mixed.piece(*ends, row) for ends in ((0, 290), (290, 291), (291, 300))]
    assert_same_bits(torch.cat(pieces, 1), whole[row])


def test_padding_on_the_left(dtype: torch.dtype) -> None:
    layers = [make(dtype, rotary_dim=DIM) for _ in range(2)]
    x = torch.randn(2, 9, HIDDEN).to(dtype)
    run = Run(layers, x)
    run.cos, run.sin = run.cos.expand(2, -1, -1).clone(), run.sin.expand(2, -1, -1).clone()
    hidden = 4  # tokens of row 0
    table = run.table.clone()
    table[0, : 9 - hidden] = run.table[0, hidden:]
    args = (
        run.stack,
        run.caches,
        run.table.flatten(),
        table,
        torch.tensor([0, 9 - hidden, 18 - hidden]),
    )
    y = functional.decoder(x, *args, run.cos, run.sin)
    short = Run(layers, x[:1, hidden:])
    short.cos, short.sin = run.cos[:1, hidden:], run.sin[:1, hidden:]
    assert_same_bits(y[:1, hidden:], short.pieces(9 - hidden))
    assert torch.isfinite(y).all()


def test_int8_cache(isa: str) -> None:
    layers, x = [make(F32, rotary_dim=DIM) for _ in range(2)], torch.randn(2, 19, HIDDEN)
    run = Run(layers, x, int8=True)
    y, expected = run.pieces(10, 9), run.expected()
    assert run.caches[0].abs().max() == 127
    assert (y - expected).abs().max() / expected.abs().max() < 3e-2
    assert_same_bits(run.pieces(19), y)


def test_caches_kept_open() -> None:
    """They are the tensors that they were made of, also where those lie elsewhere by now."""
    x = torch.randn(2, 9, HIDDEN)
    run = Run([make(F32, rotary_dim=DIM) for _ in range(2)], x)
    expected = run.pieces(9)
    tensors = run.caches
    whole = [c.clone() for c in tensors]
    kept: Any = functional.DecoderCaches(tensors)
    run.caches = kept
    for cache in tensors:
        cache.zero_()
    first = run.piece(0, 5)
    copied = copy.deepcopy(kept)
    for cache in tensors:
        cache.data = cache.clone()
    assert_same_bits(torch.cat([first, run.piece(5, 9)], 1), expected)
    assert all(map(torch.equal, tensors, whole))
    assert not any(map(torch.equal, copied.tensors, whole))
    run.caches = copied
    assert_same_bits(run.piece(5, 9), expected[:, 5:])
    run.caches = functional.DecoderCaches(tensors[:2])
    with pytest.raises(ValueError, match="for 1 layers, but there are 2"):
        run.piece(5, 9)


def test_bad_layouts() -> None:
    x = torch.randn(2, 5, HIDDEN)
    run = Run([make(F32, rotary_dim=DIM)], x)
    before = [c.clone() for c in run.caches]

    def refused(kind: type[Exception], match: str, **changed: Any) -> None:
        given = {
            "hidden_states": x,
            "stack": run.stack,
            "caches": run.caches,
            "slots": run.table.flatten(),
            "block_tables": run.table,
            "cu_seqlens": torch.tensor([0, 5, 10]),
            "cos": run.cos,
            "sin": run.sin,
        }
        with pytest.raises(kind, match=match):
            functional.decoder(**{**given, **changed})

    refused(ValueError, "hidden_states has shape", hidden_states=x[0])
    refused(TypeError, "hidden_states is torch.int64", hidden_states=x.long())
    refused(ValueError, "must have 40 features", hidden_states=torch.randn(2, 5, HIDDEN + 1))
    refused(ValueError, "the dtype of the weights", hidden_states=x.bfloat16())
    refused(ValueError, "slots has 10", slots=run.table.flatten() + 1)
    refused(ValueError, "slots has -1", slots=run.table.flatten() - 1)
    refused(ValueError, "slots has 9 elements", slots=run.table.flatten()[1:])
    refused(ValueError, r"block_tables\[1, 4\] is 10", block_tables=run.table + 1)
    refused(ValueError, "for 2 sequences", block_tables=run.table[:1])
    refused(ValueError, "the length of sequence 1 is 6", cu_seqlens=torch.tensor([0, 5, 11]))
    refused(ValueError, "the length of sequence 0 is -1", cu_seqlens=torch.tensor([0, -1, 4]))
    refused(ValueError, "cos and sin", cos=None)
    two_kinds = {
        "slots": [run.table.flatten()] * 2,
        "block_tables": [run.table] * 2,
        "cu_seqlens": [torch.tensor([0, 5, 10])] * 2,
        "cos": [run.cos] * 2,
        "sin": [run.sin] * 2,
    }
    refused(ValueError, "slots, block_tables and cu_seqlens must be given 1 times", **two_kinds)
    refused(
        ValueError,
        "block_tables has 1 tensors, but slots 2",
        **two_kinds | {"block_tables": [run.table]},
    )
    refused(TypeError, "block_tables is Tensor", slots=[run.table.flatten()])
    refused(ValueError, r"cos has shape \(1, 4, 20\)", cos=run.cos[:, :4], sin=run.sin[:, :4])
    refused(ValueError, "sin has shape", sin=run.sin[..., 1:])
    refused(ValueError, "caches must be two", caches=run.caches[:1])
    refused(ValueError, "caches is empty", caches=[])
    refused(ValueError, "caches must be CPU tensors", caches=[c[:1] for c in run.caches])
    refused(ValueError, "dtype of hidden_states", caches=[c.half() for c in run.caches])
    refused(
        TypeError,
        r"caches\[1\] is torch.float16",
        caches=[x.half() if i else x for i, x in enumerate(run.caches)],
    )
    broken = run.stack.layout.clone()
    broken[0, 1] = 99
    with pytest.raises(ValueError, match="the norm before attention is 99"):
        functional.DecoderStack(run.stack.parameters, broken, run.stack.numbers)
    with pytest.raises(ValueError, match="layout must be"):
        functional.DecoderStack(run.stack.parameters, broken[:, 1:], run.stack.numbers)
    assert all(torch.equal(a, b) for a, b in zip(run.caches, before, strict=True))
    two = [make(F32), make(F32, window=3)]
    with pytest.raises(ValueError, match="one kind must have the same window"):
        Run(two, x).pieces(5)
    with pytest.raises(ValueError, match="the same sizes and form"):
        Run([make(F32), make(F32, parallel=True)], x).pieces(5)
    with pytest.raises(ValueError, match="kind is 2, but it must be from 0 to 1"):
        decoder_stack([make(F32), make(F32, kind=2)])
    one = [make(F32), make(F32, kind=1)]
    with pytest.raises(ValueError, match="cu_seqlens must be given 2 times, once for each kind"):
        Run(one, x).pieces(5)
    for each, words in ((torch.ones(3), "has 3 elements"), (torch.ones(4).half(), "float32")):
        with pytest.raises(ValueError, match=f"alibi.*{words}"):
            decoder_stack([make(F32, alibi=each)])
        with pytest.raises(ValueError, match=f"sinks.*{words}"):
            decoder_stack([make(F32, sinks=each)])
    for groups, words in ((0, "groups is 0"), (4, "from 1 to 3"), (2, "2 groups do not divide")):
        with pytest.raises(ValueError, match=words):
            decoder_stack([make(F32, heads=6, kv_heads=3, fused=True, groups=groups)])
    with pytest.raises(ValueError, match="the norm of queries or keys has 80"):
        decoder_stack([make(F32, wide_norms=True, fused=True, groups=2)])
    with pytest.raises(ValueError, match="layers is empty"):
        decoder_stack([])
    with pytest.raises(ValueError, match="activation is 'mish'"):
        decoder_stack([make(F32, activation="mish")])
    refused(ValueError, "decoder has no backward", hidden_states=x.clone().requires_grad_())
