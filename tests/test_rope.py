"""Rotary embedding against float64, over dtypes, widths, strides, position forms and every ISA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lmfuse
from lmfuse.functional import rotary_embedding, rotate, rotate_qk, rotate_qkv

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half an ulp of each dtype, and fp32 its three operations.
RELATIVE = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=lmfuse.available_isas())
def isa(request):
    with lmfuse.use_isa(request.param):
        yield request.param


def reference(x: Tensor, sin: Tensor, cos: Tensor, rotary_dim: int, half: bool) -> Tensor:
    """x [batch, seq, heads, head_dim], sin and cos [batch or 1, seq, width]; in float64."""
    n = rotary_dim // 2
    y = x.double().clone()
    sin, cos = (t.double()[..., None, :n] for t in (sin, cos))
    first = slice(0, n) if half else slice(0, rotary_dim, 2)
    second = slice(n, rotary_dim) if half else slice(1, rotary_dim, 2)
    a, b = y[..., first].clone(), y[..., second].clone()
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return y


def assert_rotated(actual: Tensor, x: Tensor, expected: Tensor) -> None:
    assert actual.dtype == x.dtype
    assert actual.shape == x.shape
    assert not actual.isnan().any()
    # The length of a pair is kept, so the largest input bounds every sum that was rounded.
    limit = RELATIVE[x.dtype] * expected.abs() + 4e-7 * x.double().abs().amax(-1, keepdim=True)
    assert ((actual.double() - expected).abs() <= limit).all()


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def table(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, width) * 6.28
    return angles.sin().to(dtype), angles.cos().to(dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


WIDTHS = (2, 6, 10, 30, 32, 34, 48, 64, 80, 96, 126, 128)


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(isa, dtype, half):
    for rotary_dim in WIDTHS:
        for head_dim in {rotary_dim, rotary_dim + 1, 131}:
            q, k = heads(2, 3, 4, head_dim, dtype=dtype), heads(2, 3, 1, head_dim, dtype=dtype)
            sin, cos = table(3, rotary_dim // 2)
            for actual, x in zip(rotate_qk(q, k, sin, cos, rotary_dim, half), (q, k), strict=True):
                assert_rotated(actual, x, reference(x, sin[None], cos[None], rotary_dim, half))
                assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_table_dtypes(isa, table_dtype, dtype, half):
    x = heads(2, 5, 3, 48, dtype=dtype)
    for width in (20, 24, 40, 48):  # half of rotary_dim, half of head_dim, and both in full
        sin, cos = table(5, width, table_dtype)
        expected = reference(x, sin[None], cos[None], 40, half)
        assert_rotated(rotate(x, sin, cos, 40, half), x, expected)


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("width", [48, 80])
def test_no_element_is_left_unwritten(isa, width, half):
    """IPEX leaves garbage in bf16, interleaved, at widths over 32 that are no multiple of it."""
    x = heads(1, 7, 2, width, dtype=torch.bfloat16)
    sin, cos = table(7, width // 2)
    for _ in range(3):
        torch.full((7 * 2 * width,), 1e38)  # what a new tensor may find in its memory
        y = rotate(x, sin, cos, width, half)
        assert_rotated(y, x, reference(x, sin[None], cos[None], width, half))


POSITIONS = {
    "none": (None, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    "each": ([[3, 1, 0, 8], [5, 6, 7, 2]], [[3, 1, 0, 8], [5, 6, 7, 2]]),
    "shared": ([[2, 4, 6, 8]], [[2, 4, 6, 8], [2, 4, 6, 8]]),
    "row": ([2, 4, 6, 8], [[2, 4, 6, 8], [2, 4, 6, 8]]),
    "start": ([[5]], [[5, 6, 7, 8], [5, 6, 7, 8]]),
    "start-1d": ([5], [[5, 6, 7, 8], [5, 6, 7, 8]]),
    "start-0d": (5, [[5, 6, 7, 8], [5, 6, 7, 8]]),
}


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("form", POSITIONS)
def test_positions(form, integers):
    given, rows = POSITIONS[form]
    rows = torch.tensor(rows)
    positions = None if given is None else torch.tensor(given, dtype=integers)
    q, k = heads(2, 4, 3, 16), heads(2, 4, 1, 16)
    sin, cos = table(9, 8)
    expected = [reference(x, sin[rows], cos[rows], 16, True) for x in (q, k)]
    packed = torch.cat([q.flatten(2), k.flatten(2), k.flatten(2)], 2)
    results = (
        rotate_qk(q, k, sin, cos, 16, True, positions),
        rotate_qkv(packed, sin, cos, 3, 16, 16, True, positions)[:2],
        rotary_embedding(q.clone(), k.clone(), sin, cos, 16, True, positions),
    )
    for result in results:
        for actual, x, right in zip(result, (q, k), expected, strict=True):
            assert_rotated(actual, x, right)
    assert_rotated(rotate(q, sin, cos, 16, True, positions), q, expected[0])


def test_strided_positions():
    x, (sin, cos) = heads(3, 4, 2, 8), table(9, 4)
    positions = torch.randint(9, (4, 6)).t()[::2]
    expected = reference(x, sin[positions], cos[positions], 8, True)
    assert_rotated(rotate(x, sin, cos, 8, True, positions), x, expected)
    one = positions[:1].expand(3, 4)
    assert_rotated(rotate(x, sin, cos, 8, True, one), x, reference(x, sin[one], cos[one], 8, True))


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(isa, dtype, half):
    for batch, head_dim, rotary_dim in ((1, 64, 64), (3, 80, 80), (2, 50, 34)):
        qkv = heads(batch, 5, 7, head_dim, dtype=dtype)
        before = qkv.clone()
        q, k, v = qkv.split((4, 2, 1), 2)
        sin, cos = table(5, head_dim)
        result = rotary_embedding(q, k, sin, cos, rotary_dim, half)
        assert result[0] is q
        assert result[1] is k
        expected = reference(before, sin[None], cos[None], rotary_dim, half)
        assert_rotated(qkv[:, :, :6], before[:, :, :6], expected[:, :, :6])
        assert torch.equal(v, before[:, :, 6:])


def test_in_place_three_dimensions():
    q, k, (sin, cos) = heads(6, 4, 16), heads(6, 2, 16), table(40, 16)
    for positions in (None, torch.tensor([9, 3, 3, 0, 39, 1]), torch.tensor([[7]])):
        rows = torch.arange(6) if positions is None else positions.flatten()
        rows = rows + torch.arange(6) if rows.numel() == 1 else rows
        a, b = q.clone(), k.clone()
        result = rotary_embedding(a, b, sin[:, None], cos[:, None], 16, True, positions)
        assert result[0] is a
        assert result[1] is b
        for actual, x in ((a, q), (b, k)):
            right = reference(x[None], sin[rows][None], cos[rows][None], 16, True)
            assert_rotated(actual, x, right[0])


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
def test_strides(isa, half):
    batch, seq, n, dim = 2, 5, 3, 20
    sin, cos = table(seq, 10)
    padded = torch.stack(table(2 * seq, 33), 0)[:, ::2, :10]  # rows apart
    layouts = {
        "heads first": heads(batch, n, seq, dim).transpose(1, 2),
        "sequence first": heads(seq, batch, n, dim).transpose(0, 1),
        "slice of the last": heads(batch, seq, n, dim + 7)[..., 3 : 3 + dim],
        "every other": heads(2 * batch, 2 * seq, 2 * n, dim)[::2, ::2, ::2],
        "expanded": heads(1, seq, 1, dim).expand(batch, seq, n, dim),
        "last not contiguous": heads(batch, seq, dim, n).transpose(2, 3),
    }
    for name, x in layouts.items():
        for s, c in ((sin, cos), (padded[0], padded[1]), (sin.t().contiguous().t(), cos)):
            expected = reference(x, s[None], c[None], dim, half)
            assert_rotated(rotate(x, s, c, dim, half), x, expected)
            if name in ("expanded", "last not contiguous"):
                continue
            q, k = x.clone(memory_format=torch.preserve_format), x.clone()
            rotary_embedding(q, k, s, c, dim, half)
            assert_rotated(q, x, expected)
            assert_rotated(k, x, expected)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 70)),
    around=st.tuples(*[st.integers(0, 3)] * 4),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
    half=st.booleans(),
    data=st.data(),
)
def test_nothing_around_is_touched(sizes, around, order, dtype, half, data):
    rotary_dim = 2 * data.draw(st.integers(0, sizes[3] // 2))
    inner = tuple(slice(n, n + size) for n, size in zip(around, sizes, strict=True))
    base = torch.full([size + 2 * n for size, n in zip(sizes, around, strict=True)], 7.0).to(dtype)
    base = base.permute(*order, 3).contiguous().permute(*(order.index(d) for d in range(3)), 3)
    x = base[inner]
    x.normal_()
    before, (sin, cos) = base.clone(), table(sizes[1], rotary_dim // 2)
    expected = reference(x, sin[None], cos[None], rotary_dim, half)
    assert_rotated(rotate(x, sin, cos, rotary_dim, half), x, expected)
    assert torch.equal(base, before)
    rotary_embedding(x, x.clone(), sin, cos, rotary_dim, half)
    assert_rotated(x, before[inner], expected)
    before[inner] = x
    assert torch.equal(base, before)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
def test_a_row_for_each_token(isa, shared):
    """What transformers hands to apply_rotary_pos_emb."""
    q, k = heads(2, 4, 5, 32), heads(2, 2, 5, 32)
    angles = torch.rand(1 if shared else 2, 5, 16).repeat(1, 1, 2)
    sin, cos = angles.sin(), angles.cos()
    result = rotate_qk(q, k, sin, cos, 32, True, heads_first=True)
    for actual, x in zip(result, (q, k), strict=True):
        x = x.transpose(1, 2)
        assert_rotated(actual.transpose(1, 2), x, reference(x, sin, cos, 32, True))
        assert actual.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_qkv(isa, dtype, kv_heads):
    for half, rotary_dim in ((True, 24), (False, 24), (True, 10)):
        wide = heads(2, 3, (4 + 2 * kv_heads) * 24 + 5, dtype=dtype)
        x = wide[..., :-5]
        sin, cos = table(3, 12)
        q, k, v = rotate_qkv(x, sin, cos, 4, 24, rotary_dim, half)
        parts = x.unflatten(2, (-1, 24)).split((4, kv_heads, kv_heads), 2)
        for actual, part in zip((q, k), parts[:2], strict=True):
            assert_rotated(actual, part, reference(part, sin[None], cos[None], rotary_dim, half))
        assert torch.equal(v, parts[2])


def test_many_tokens_on_threads():
    x, (sin, cos) = heads(2, 700, 9, 64), table(700, 32)
    right = reference(x, sin[None], cos[None], 64, True)
    assert_rotated(rotate(x, sin, cos, 64, True), x, right)
    q, k = x.clone(), x.clone()
    rotary_embedding(q, k, sin, cos, 64, True)
    assert_rotated(q, x, right)
    assert torch.equal(q, k)


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
def test_larger_than_the_caches(isa, half):
    """From 32 MiB on, stores go around the caches, in whole lines where the width allows it."""
    for head_dim, rotary_dim, dtype in ((128, 128, F32), (96, 80, F32), (256, 192, BF16)):
        x = heads(2, 2**23 // (16 * head_dim) + 1, 16, head_dim, dtype=dtype)
        sin, cos = table(x.shape[1], rotary_dim // 2)
        last = x[:, -9:]  # a small tensor goes another way
        y = rotate(x, sin, cos, rotary_dim, half)
        assert torch.equal(y[:, -9:], rotate(last, sin[-9:], cos[-9:], rotary_dim, half))
        q, k = x.clone(), x[:, :, :1].clone()
        rotary_embedding(q, k, sin, cos, rotary_dim, half)
        assert torch.equal(y, q)


def test_empty():
    sin, cos = table(4, 8)
    for shape in ((0, 3, 2, 16), (2, 0, 2, 16), (2, 3, 0, 16)):
        q, k = torch.empty(shape), torch.empty(shape)
        assert rotate_qk(q, k, sin, cos, 16, True)[1].shape == shape
        assert rotary_embedding(q, k, sin, cos, 16, False)[0] is q
    x = heads(1, 3, 2, 16)
    assert torch.equal(rotate(x, sin, cos, 0, True), x)
    assert rotate(x[:, :0], sin[:0], cos[:0], 16, True).shape == (1, 0, 2, 16)
    assert rotate(x[..., :0], sin, cos, 0, True).shape == (1, 3, 2, 0)


def bad(**changed):
    sin, cos = table(5, 8)
    good = {
        "query": heads(2, 5, 4, 16),
        "key": heads(2, 5, 2, 16),
        "sin": sin,
        "cos": cos,
        "rotary_dim": 16,
        "rotary_half": True,
        "position_ids": None,
    }
    return {**good, **changed}


BAD = {
    "odd rotary_dim": (bad(rotary_dim=7), ValueError, "rotary_dim is 7.*even"),
    "negative rotary_dim": (bad(rotary_dim=-2), ValueError, "rotary_dim is -2"),
    "rotary_dim over head_dim": (bad(rotary_dim=18), ValueError, "at most head_dim, 16"),
    "narrow table": (bad(sin=torch.ones(5, 7), cos=torch.ones(5, 7)), ValueError, "7 columns.*8"),
    "sin and cos apart": (bad(cos=torch.ones(5, 9)), ValueError, "cos has shape"),
    "table dtypes apart": (bad(cos=torch.ones(5, 8).half()), TypeError, "cos is torch.float16"),
    "table of doubles": (bad(sin=torch.ones(5, 8).double()), TypeError, "sin is torch.float64"),
    "no table": (bad(sin=None), TypeError, "sin is NoneType"),
    "short table": (bad(sin=torch.ones(4, 8), cos=torch.ones(4, 8)), ValueError, "4 rows.*5"),
    "vector as table": (bad(sin=torch.ones(8), cos=torch.ones(8)), ValueError, r"\(8,\)"),
    "position too high": (
        bad(position_ids=torch.tensor([[0, 1, 2, 3, 5]])),
        ValueError,
        r"position_ids\[0, 4\] is 5.* 5 rows",
    ),
    "position negative": (
        bad(position_ids=torch.tensor([[0, 1, 2, 3, 4], [0, 1, -1, 3, 4]])),
        ValueError,
        r"position_ids\[1, 2\] is -1",
    ),
    "start too high": (bad(position_ids=torch.tensor(1)), ValueError, "start at 1"),
    "start negative": (bad(position_ids=torch.tensor([[-1]])), ValueError, "start at -1"),
    "positions of floats": (bad(position_ids=torch.ones(2, 5)), TypeError, "position_ids is"),
    "positions a list": (bad(position_ids=[0]), TypeError, "position_ids is list"),
    "positions misshapen": (
        bad(position_ids=torch.zeros(2, 4, dtype=torch.int64)),
        ValueError,
        r"position_ids has shape \(2, 4\).*\[2, 5\]",
    ),
    "other batch": (bad(key=torch.ones(1, 5, 2, 16)), ValueError, "key has shape"),
    "other head_dim": (bad(key=torch.ones(2, 5, 2, 8)), ValueError, "key has shape"),
    "other dimensions": (bad(key=torch.ones(5, 2, 16)), ValueError, "key has shape"),
    "other dtype": (bad(key=torch.ones(2, 5, 2, 16).half()), TypeError, "key is torch.float16"),
    "integers": (bad(query=torch.ones(2, 5, 4, 16).int()), TypeError, "query is torch.int32"),
    "two dimensions": (bad(query=torch.ones(5, 16)), ValueError, "query has shape"),
    "expanded": (bad(query=torch.ones(1, 1, 1, 16).expand(2, 5, 4, 16)), ValueError, "expanded"),
    "last dimension": (
        bad(key=torch.ones(2, 5, 16, 2).transpose(2, 3)),
        ValueError,
        "key is written in place.*contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, text = BAD[case]
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(error, match=text):
        rotary_embedding(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value)
    if case not in ("expanded", "last dimension"):
        with pytest.raises(error, match=text):
            rotate_qk(**arguments)


def test_bad_input_of_one_function():
    x, (sin, cos) = heads(2, 5, 4, 16), table(5, 8)
    with pytest.raises(ValueError, match="same tensor"):
        rotary_embedding(x, x, sin, cos, 16, True)
    row = sin[None].expand(2, 5, 8)
    with pytest.raises(ValueError, match="position_ids must be None"):
        rotate(x, row, row, 16, True, torch.tensor(0))
    with pytest.raises(ValueError, match=r"\[2 or 1, 5, width\]"):
        rotate(x, row[:, :4], row[:, :4], 16, True)
    with pytest.raises(ValueError, match=r"x has 60 features.*multiple of 32"):
        rotate_qkv(torch.ones(2, 5, 60), sin, cos, 2, 16, 16, True)
    with pytest.raises(ValueError, match="num_heads is 0"):
        rotate_qkv(torch.ones(2, 5, 64), sin, cos, 0, 16, 16, True)
    with pytest.raises(ValueError, match="x has shape"):
        rotate_qkv(x, sin, cos, 2, 16, 16, True)
