"""No input, however odd, reads or writes outside its tensors.

Hypothesis makes shapes, strides, offsets and dtypes. Each operand lies flush with the end or the
start of its pages, between two pages that nobody may touch: one byte too far ends the process.
Under `tools/asan`, what the ops allocate themselves is watched as well.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import BF16, DTYPES, F32, assert_same_bits
from lmfuse import functional as F

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROT_NONE = 0
CANARY = 0xA5
SMALL = (torch.float8_e5m2, torch.float8_e4m3fn, torch.int8)  # what else caches may hold


class Guarded:
    """A buffer of some bytes between two inaccessible pages, at the end or the start of its own."""

    def __init__(self, size: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        pages = max(1, -(-size // page))
        self.map = mmap.mmap(-1, (pages + 2) * page)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.bytes.fill_(CANARY)
        base = self.bytes.data_ptr()
        for fence in (base, base + (pages + 1) * page):
            assert _libc.mprotect(fence, page, PROT_NONE) == 0
        inner = self.bytes[page : (pages + 1) * page]
        at = inner.numel() - size if at_end else 0
        self.tensor = inner[at : at + size]
        self.around = inner[:at], inner[at + size :]

    def intact(self) -> bool:
        return all(bool((part == CANARY).all()) for part in self.around)


class Placed:
    """A tensor of given shape and layout in guarded memory, its gaps filled with canaries."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
        order, gaps, last, at_end = layout
        strides = [last] * len(shape)
        step = shape[-1] * last + gaps[-1]
        for d in sorted(range(len(shape) - 1), key=lambda d: order[d]):
            strides[d] = step
            step = step * max(shape[d], 1) + gaps[d]
        empty = 0 in shape
        reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self.memory = Guarded(reach * dtype.itemsize, at_end)
        self.flat = self.memory.tensor.view(dtype) if reach else torch.empty(0, dtype=dtype)
        self.tensor = self.flat.as_strided(shape, strides)
        self.tensor.copy_(torch.randn(shape))
        self.owned = torch.zeros(reach, dtype=torch.bool)
        self.owned.as_strided(shape, strides).fill_(True)
        self.before = self.flat.clone()

    def check(self, written: bool = False) -> None:
        """The surroundings are untouched; so is the tensor, unless written."""
        assert self.memory.intact()
        still = ~self.owned if written else torch.ones_like(self.owned)
        assert_same_bits(self.flat[still], self.before[still])


Layout = tuple[list[int], list[int], int, bool]


@st.composite
def layouts(draw: st.DrawFn, dims: int, last: tuple[int, ...] = (1, 1, 2)) -> Layout:
    """The order of the leading dimensions, gaps, the last stride, the end or the start."""
    order = draw(st.permutations(range(dims)))
    gaps = draw(st.lists(st.sampled_from((0, 0, 1, 3, 16)), min_size=dims, max_size=dims))
    return order, gaps, draw(st.sampled_from(last)), draw(st.booleans())


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    lead = draw(st.lists(st.integers(0, 4), max_size=4))
    return (*lead, draw(st.one_of(st.integers(1, 140), st.integers(0, 1100))))


def _operand(
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: tuple[int, ...] = (1, 1, 2),
) -> Placed:
    return Placed(shape, dtype, data.draw(layouts(len(shape), last)))


def _norm(data: st.DataObject, center: bool, add: bool) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    dtypes = st.sampled_from((None, *DTYPES))
    add_back = add and data.draw(st.booleans())
    x = _operand(data, shape, dtype)
    vectors = [
        d and _operand(data, shape[-1:], d)
        for d in (data.draw(dtypes), data.draw(dtypes) if center else None)
    ]
    weight, bias = (v and v.tensor for v in vectors)
    residual = _operand(data, shape, dtype, (1,) if add_back else (1, 1, 2)) if add else None
    if residual is None:
        y = F.layer_norm(x.tensor, weight, bias) if center else F.rms_norm(x.tensor, weight)
    else:
        function = F.add_layer_norm if center else F.add_rms_norm
        y = function(residual.tensor, x.tensor, weight, bias, add_back=add_back)
        residual.check(written=add_back)
    assert y.shape == shape
    assert y.isfinite().all() or dtype is not F32
    for operand in (x, *vectors):
        if operand is not None:
            operand.check()


def _gated(data: st.DataObject, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x, y = _operand(data, shape, dtype), _operand(data, shape, dtype)
    result = function(x.tensor, y.tensor)
    assert result.shape == shape
    x.check()
    y.check()


def _heads(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Placed:
    return _operand(data, shape, dtype, (1,))


def _refused(call: Callable[[], object]) -> bool:
    """Runs `call`, which may find that indices are out of range."""
    try:
        call()
    except ValueError:
        return True
    return False


def _integers(data: st.DataObject, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """From low to high; often one of them, now and then something far beyond."""
    count = torch.Size(shape).numel()
    number = st.one_of(
        *(st.integers(low, high) for _ in range(9)), st.sampled_from((low - 1, high + 1, 2**31 - 1))
    )
    numbers = data.draw(st.lists(number, min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.int64).view(shape)


def _attention(data: st.DataObject) -> None:
    batch, q_len, kv_len, kv_heads, group = (
        data.draw(st.integers(1, n)) for n in (2, 9, 300, 2, 5)
    )
    dim, value_dim = (data.draw(st.sampled_from((1, 17, 32, 64, 80))) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    query = _heads(data, (batch, q_len, kv_heads * group, dim), dtype)
    key = _heads(data, (batch, kv_len, kv_heads, dim), dtype)
    value = _heads(data, (batch, kv_len, kv_heads, value_dim), dtype)
    sizes = tuple(data.draw(st.sampled_from((1, n))) for n in (batch, 1, q_len, kv_len))
    mask = _operand(data, sizes, data.draw(st.sampled_from(DTYPES)))
    causal = data.draw(st.booleans())
    y = F.attention(query.tensor, key.tensor, value.tensor, mask=mask.tensor, causal=causal)
    assert y.isfinite().all()
    for operand in (query, key, value, mask):
        operand.check()


def _caches(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> list[Placed]:
    """Keys and values, of `dtype`, fp8 or int8, and with int8 their scales."""
    kind = data.draw(st.sampled_from((dtype, dtype, *SMALL)))
    caches = [_heads(data, shape, kind) for _ in range(2)]
    scales = [_heads(data, shape[:-1], F32) for _ in range(2)] if kind is torch.int8 else []
    return caches + scales


def _named(caches: list[Placed]) -> dict[str, Tensor]:
    names = ("key_cache", "value_cache", "key_scales", "value_scales")
    return {name: c.tensor for name, c in zip(names, caches, strict=False)}


def _misses(tables: Tensor, lens: Tensor, blocks: int, block: int) -> bool:
    """Whether a sequence needs blocks that its row of the tables, or the cache, does not have."""
    room = tables.shape[1] * block
    if bool((lens < 0).any() or (lens > room).any()):
        return True
    rows = zip(tables.tolist(), lens.tolist(), strict=True)
    return any(not 0 <= entry < blocks for row, n in rows for entry in row[: -(-n // block)])


def _paged_attention(data: st.DataObject) -> None:
    """Also with wrong block tables and lengths, which are refused before anything is read."""
    blocks, block, kv_heads, group = (data.draw(st.integers(1, n)) for n in (5, 40, 2, 4))
    batch, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dim = data.draw(st.sampled_from((8, 32, 64)))
    dtype = data.draw(st.sampled_from(DTYPES))
    query = _heads(data, (batch, kv_heads * group, dim), dtype)
    caches = _caches(data, (blocks, kv_heads, block, dim), dtype)
    out = _heads(data, (batch, kv_heads * group, dim), dtype)
    tables = _integers(data, (batch, width), 0, blocks - 1)
    lens = _integers(data, (batch,), 0, width * block)
    bad = _misses(tables, lens, blocks, block)
    call = functools.partial(
        F.single_query_cached_kv_attention, out.tensor, query.tensor, **_named(caches),
        head_mapping=None, scale=0.2, block_tables=tables, context_lens=lens, block_size=block,
        max_context_len=9, alibi_slopes=None,
    )  # fmt: skip
    assert _refused(call) == bad
    out.check(written=not bad)
    for operand in (query, *caches):
        operand.check()


def _paged_prompt(data: st.DataObject) -> None:
    """As `_paged_attention`, of several tokens for each sequence."""
    blocks, block, batch, width = (data.draw(st.integers(1, n)) for n in (5, 40, 3, 4))
    tokens, dtype = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(DTYPES))
    query, out = (_heads(data, (tokens, 4, 32), dtype) for _ in range(2))
    caches = _caches(data, (blocks, 2, block, 32), dtype)
    tables = _integers(data, (batch, width), 0, blocks - 1)
    ends, lens = _integers(data, (batch,), 0, tokens), _integers(data, (batch,), 0, width * block)
    cu_q = torch.cat((torch.zeros(1).long(), ends.sort().values))
    cu_kv = torch.cat((torch.zeros(1).long(), lens.cumsum(0)))
    bad = _misses(tables, lens, blocks, block) or bool((ends < 0).any() or (ends > tokens).any())
    call = functools.partial(
        F.flash_attn_varlen_func, out.tensor, query.tensor, **_named(caches), cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv, max_seqlen_q=9, max_seqlen_kv=9, scale=0.2,
        is_cusal=data.draw(st.booleans()), block_tables=tables, alibi_slopes=None,
    )  # fmt: skip
    assert _refused(call) == bad
    out.check(written=not bad)
    for operand in (query, *caches):
        operand.check()


def _varlen_attention(data: st.DataObject) -> None:
    tokens, keys, batch = (data.draw(st.integers(1, n)) for n in (12, 300, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    query = _heads(data, (tokens, 2, 32), dtype)
    key, value = (_heads(data, (keys, 1, 32), dtype) for _ in range(2))
    out = _heads(data, (tokens, 2, 32), dtype)
    cu_q, cu_k = (
        torch.cat((torch.zeros(1).long(), _integers(data, (batch,), 0, n).sort().values))
        for n in (tokens, keys)
    )
    bad = any(bool((cu < 0).any()) or cu[-1] > n for cu, n in ((cu_q, tokens), (cu_k, keys)))
    arguments = (query.tensor, key.tensor, value.tensor, out.tensor, cu_q, cu_k, None, 1, 1, 0.0)
    rest = (0.2, False, data.draw(st.booleans()), False, None)
    assert _refused(lambda: F.varlen_attention(*arguments, *rest)) == bad
    out.check(written=not bad)
    for operand in (query, key, value):
        operand.check()


def _indirect_attention(data: st.DataObject) -> None:
    """One new token over a cache whose beam indices may be wrong."""
    prompts, beams, past = (data.draw(st.integers(1, n)) for n in (2, 3, 40))
    batch, rows, dim = prompts * beams, past + 3, 32
    dtype = data.draw(st.sampled_from(DTYPES))
    query = _heads(data, (batch, 1, 4, dim), dtype)
    new = [_heads(data, (batch, 1, 2, dim), dtype) for _ in range(2)]
    caches = [_heads(data, (rows, batch, 2, dim), dtype) for _ in range(2)]
    parents = _integers(data, (rows + 2, batch), 0, batch - 1)
    parents[rows, 0], parents[rows + 1, 0] = data.draw(st.integers(-1, past + 9)), prompts
    info = torch.zeros(()).long().expand(1, past, past, 1)
    layer_past = (info, caches[0].tensor, caches[1].tensor, parents)
    k, v = (x.tensor for x in new)
    refused = _refused(
        lambda: F.indirect_access_kv_cache_attention(query.tensor, k, v, 5.0, layer_past),
    )
    assert (
        not refused
        or bool((parents < 0).any() or (parents[:rows] >= batch).any())
        or (parents[rows, 0] > rows)
    )
    for operand in (query, *new):
        operand.check()
    for cache in caches:
        cache.check(written=True)


def _cache_write(data: st.DataObject) -> None:
    tokens, blocks, block, heads = (data.draw(st.integers(1, n)) for n in (5, 4, 9, 3))
    dim = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    key, value = (_operand(data, (tokens, heads, dim), dtype) for _ in range(2))
    caches = _caches(data, (blocks, heads, block, dim), dtype)
    slots = _integers(data, (tokens,), -1, blocks * block - 1)
    bad = bool((slots >= blocks * block).any())
    call = functools.partial(
        F.reshape_and_cache, key.tensor, value.tensor, slot_mapping=slots, **_named(caches)
    )
    assert _refused(call) == bad
    for cache in caches:
        cache.check(written=not bad)
    key.check()
    value.check()


def _large_cache_write(data: st.DataObject) -> None:
    """So many rows that they go around the caches, if they begin where lines do."""
    tokens, heads, dtype = 1100, 8, data.draw(st.sampled_from((BF16, F32)))
    dim = data.draw(st.sampled_from((120, 128, 160)))
    layout: Layout = ([1, 0, 2, 3], [0, 0, data.draw(st.sampled_from((0, 32))), 0], 1, True)
    rows = torch.randn(tokens, heads, dim).to(dtype)
    caches = [Placed((tokens // 10, heads, 10, dim), dtype, layout) for _ in range(2)]
    slots = torch.randperm(tokens)
    F.reshape_and_cache(rows, rows, *(c.tensor for c in caches), slots)
    for cache in caches:
        cache.check(written=True)
        assert_same_bits(cache.tensor.transpose(1, 2).reshape(rows.shape)[slots], rows)


def _linear(data: st.DataObject) -> None:
    """The weight is lmfuse's own memory; all else lies between fences."""
    rows, n, k = data.draw(st.integers(0, 40)), *(data.draw(st.integers(1, 100)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    weights = [F.pack_linear(torch.randn(n, k).to(dtype)) for _ in range(2)]
    x = _operand(data, (rows, k), dtype)
    bias = _operand(data, (n,), data.draw(st.sampled_from(DTYPES)))
    others = [_operand(data, (rows, n), dtype) for _ in range(2)]
    y = F.linear(x.tensor, weights[0], bias.tensor, "add_add", *(o.tensor for o in others))
    assert y.shape == F.linear_gate_up(x.tensor, *weights, bias.tensor).shape == (rows, n)
    assert y.isfinite().all() or dtype is not F32
    for operand in (x, bias, *others):
        operand.check()


# Every op: a function that draws operands, calls it and checks them. Other stems add theirs.
CALLS: dict[str, Callable[[st.DataObject], None]] = {
    "rms_norm": lambda data: _norm(data, center=False, add=False),
    "layer_norm": lambda data: _norm(data, center=True, add=False),
    "add_rms_norm": lambda data: _norm(data, center=False, add=True),
    "add_layer_norm": lambda data: _norm(data, center=True, add=True),
    "silu_mul": lambda data: _gated(data, F.silu_mul),
    "gelu_mul": lambda data: _gated(data, F.gelu_mul),
    "attention": _attention,
    "attention paged": _paged_attention,
    "attention paged prompt": _paged_prompt,
    "attention varlen": _varlen_attention,
    "attention indirect": _indirect_attention,
    "cache_write": _cache_write,
    "cache_write large": _large_cache_write,
    "linear": _linear,
    "gelu_mul tanh": lambda data: _gated(data, lambda x, y: F.gelu_mul(x, y, approximate="tanh")),
}


@pytest.mark.parametrize("call", CALLS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_nothing_outside_is_touched(isa: str, call: str, data: st.DataObject) -> None:
    with torch.no_grad():
        CALLS[call](data)


@pytest.mark.parametrize("n", range(1, 70))
def test_every_tail(isa: str, n: int) -> None:
    """Rows that end where the page ends, at every length of a tail."""
    for dtype in DTYPES:
        for at_end in (True, False):
            layout: Layout = ([0, 1], [0, 0], 1, at_end)
            x, residual = (Placed((2, n), dtype, layout) for _ in range(2))
            weight = Placed((n,), BF16, ([0], [0], 1, at_end))
            F.rms_norm(x.tensor, weight.tensor)
            F.silu_mul(x.tensor, x.tensor)
            F.add_layer_norm(residual.tensor, x.tensor, weight.tensor, None, add_back=True)
            x.check()
            weight.check()
            residual.check(written=True)


def test_the_fence_holds() -> None:
    """The page behind a guarded buffer cannot be read: the tests above can fail."""
    code = (
        "import ctypes, test_memory as t; g = t.Guarded(8, True);"
        "ctypes.string_at(g.tensor.data_ptr(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert done.returncode != 0
