"""Writing keys and values into caches: layouts, padding, fp8 and int8, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lmfuse.functional import new_cache, reshape_and_cache

BF16 = torch.bfloat16
FP8 = (torch.float8_e5m2, torch.float8_e4m3fn)


def expected(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """`cache` with the rows of `x` in their slots, token by token."""
    cache, block = cache.clone(), cache.shape[2]
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[slot // block, :, slot % block] = x[t].to(cache.dtype)
    return cache


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_lie_in_their_slots(isa, dtype, block):
    """Any block size, int32 and int64 slots, padding, strided tokens and a strided cache."""
    tokens, heads, dim, value_dim = 9, 3, 21, 40
    qkv = torch.randn(tokens, heads * (dim + value_dim)).to(dtype)
    key = qkv[:, : heads * dim].view(tokens, heads, dim)
    value = qkv[:, heads * dim :].view(tokens, heads, value_dim)
    key_cache = torch.full((20, heads, block, dim), 7.0, dtype=dtype)
    value_cache = torch.full((20, block, heads, value_dim), 7.0, dtype=dtype).transpose(1, 2)
    slots = torch.randperm(20 * block)[:tokens]
    slots[2], slots[5] = -1, -(2**40)
    want = expected(key, key_cache, slots), expected(value, value_cache, slots)
    got = reshape_and_cache(key, value, key_cache, value_cache, slots)
    assert got[0] is key_cache
    assert got[1] is value_cache
    assert torch.equal(key_cache, want[0])
    assert torch.equal(value_cache, want[1])
    slots[5] = -7
    reshape_and_cache(key, value, key_cache, value_cache, slots.int())
    assert torch.equal(key_cache, want[0])


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rounds_to_even_and_saturates(isa, dtype, fp8):
    """Every finite fp8 value, every tie between neighbours, and values beyond the largest."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    finite = codes[codes.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    largest = torch.finfo(fp8).max
    x = torch.cat((finite, ties, ties * 1.001, torch.tensor([largest * 1.5, -largest * 9])))
    x = x[: x.numel() // 8 * 8].reshape(-1, 1, 8).to(dtype)
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    cache = torch.zeros(x.shape[0], 1, 1, 8).to(fp8)
    slots = torch.arange(x.shape[0])
    reshape_and_cache(x, x, cache, cache.clone(), slots, "fp8")
    want = x.float().clamp(-largest, largest).to(fp8)
    assert torch.equal(cache.float().flatten(), want.float().flatten())
    reshape_and_cache(x * 4, x, cache, cache.clone(), slots, "auto", k_scale=4.0)
    scaled = (x * 4).float().div(4).clamp(-largest, largest).to(fp8)
    assert torch.equal(cache.float().flatten(), scaled.float().flatten())


def test_fp8_keeps_nan(isa):
    x = torch.tensor([[[float("nan"), 1.0]]])
    for fp8 in FP8:
        cache = torch.zeros(1, 1, 1, 2).to(fp8)
        reshape_and_cache(x, x, cache, cache.clone(), torch.tensor([0]))
        assert cache.float().isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_a_scale_per_token_and_head(isa, dtype):
    x = torch.randn(6, 3, 70).to(dtype) * torch.logspace(-3, 3, 18).view(6, 3, 1).to(dtype)
    x[1, 2] = 0
    caches = [torch.zeros(2, 3, 4, 70, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((2, 3, 4), 9.0) for _ in range(2)]
    reshape_and_cache(x, x, *caches, torch.arange(6), key_scales=scales[0], value_scales=scales[1])
    back = (caches[0].float() * scales[0].unsqueeze(-1)).transpose(1, 2).reshape(8, 3, 70)
    limit = x.float().abs().amax(-1, keepdim=True) / 127 * 0.501 + 1e-30
    assert ((back[:6] - x.float()).abs() <= limit).all()
    assert (scales[0].transpose(1, 2).reshape(8, 3)[6:] == 9).all()
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_around_the_caches_keep_every_bit(isa, dtype):
    """From 4 MB on; NaN and infinities of any bits, an odd number of halves, rows off their lines.

    The last two dimensions of the cache in each order: IPEX's layout and that of vLLM's flash.
    """
    for dim, gap, flash in ((128, 0, False), (128, 0, True), (96, 0, False), (128, 8, False)):
        tokens, heads, block = 2 * (4 << 20) // (8 * dim * dtype.itemsize), 4, 16
        x = torch.randint(256, (tokens, heads, dim * dtype.itemsize), dtype=torch.uint8).view(dtype)
        inner = (block, heads) if flash else (heads, block)
        sizes = (-(-tokens // block), *inner)
        caches = [torch.zeros(*sizes, dim + gap, dtype=dtype)[..., :dim] for _ in range(2)]
        if flash:
            caches = [c.transpose(1, 2) for c in caches]
        slots = torch.randperm(tokens)
        slots[7] = -1
        reshape_and_cache(x, x, *caches, slots)
        for cache in caches:
            rows = cache.transpose(1, 2).reshape(-1, heads, dim)
            assert torch.equal(bits(rows[slots[8:]]), bits(x[8:]))
            assert torch.equal(bits(rows[slots[:7]]), bits(x[:7]))
            assert bits(rows).ne(0).any(-1).any(-1).sum() == tokens - 1
    odd = torch.randint(256, (5, 3, 16), dtype=torch.uint8).view(dtype)[..., :-1]
    cache = torch.zeros(2, 3, 4, odd.shape[2], dtype=dtype)
    reshape_and_cache(odd, odd, cache, cache.clone(), torch.arange(5))
    got = cache.transpose(1, 2).reshape(8, 3, -1)[:5]
    assert torch.equal(bits(got), bits(odd))


def test_new_caches_are_apart_and_in_large_pages():
    """Small ones share pages, large ones begin with one; what nobody wrote is not there."""
    large_page, shapes = 2 << 20, [(3, 5, 7), (1,), (0, 4), (1000, 130), (3, 2, 5000), (9, 1 << 20)]
    dtypes = [torch.int8, torch.bfloat16, torch.float8_e5m2, torch.float32]
    caches = [new_cache(shape, dtype) for shape in shapes * 2 for dtype in dtypes]
    for i, cache in enumerate(caches):
        cache.view(torch.uint8).fill_(i)
    for i, cache in enumerate(caches):
        shape, dtype = (shapes * 2)[i // 4], dtypes[i % 4]
        assert cache.shape == shape
        assert cache.dtype is dtype
        assert cache.is_contiguous()
        assert cache.data_ptr() % (large_page if cache.nbytes > 8 << 20 else 64) == 0
        assert (cache.view(torch.uint8) == i).all()
    small = [new_cache((1000,), torch.int8).data_ptr() for _ in range(9)]
    assert sum(abs(a - b) <= 1024 for a, b in itertools.pairwise(small)) >= 7

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    cache = new_cache((1 << 30,), torch.int8)
    cache[:9], cache[-9:] = 1, 2
    assert resident() - before < 16 << 20
    with pytest.raises(ValueError, match=r"shape is \(3, -1\), but no size may be negative"):
        new_cache((3, -1), torch.float32)
    made = torch.compile(lambda: new_cache((3,), BF16), fullgraph=True, backend="aot_eager")
    assert made().shape == (3,)


def _valid() -> dict[str, object]:
    cache = torch.zeros(4, 2, 8, 16)
    return {
        "key": torch.randn(3, 2, 16),
        "value": torch.randn(3, 2, 16),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "slot_mapping": torch.tensor([0, 5, 31]),
    }


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"slot_mapping": torch.tensor([0, 5, 32])}, ValueError, r"slot_mapping\[2\] is 32"),
        ({"slot_mapping": torch.tensor([0, 2**40, 1])}, ValueError, "slot_mapping"),
        ({"slot_mapping": torch.tensor([0, 5])}, ValueError, "slot_mapping"),
        ({"slot_mapping": torch.tensor([0.0, 5, 6])}, TypeError, "slot_mapping"),
        ({"key": torch.randn(3, 3, 16)}, ValueError, "key"),
        ({"value": torch.randn(3, 2, 15)}, ValueError, "value"),
        ({"key": torch.randn(3, 2, 16).bfloat16()}, TypeError, "value"),
        ({"value_cache": torch.zeros(4, 2, 8, 16).bfloat16()}, TypeError, "value_cache"),
        ({"value_cache": torch.zeros(4, 2, 4, 16)}, ValueError, "value_cache"),
        ({"value_cache": torch.zeros(4, 2, 16)}, ValueError, "value_cache"),
        ({"key_cache": torch.zeros(1, 2, 8, 16).expand(4, -1, -1, -1)}, ValueError, "key_cache"),
        ({"kv_cache_dtype": "fp8"}, TypeError, "kv_cache_dtype"),
        ({"kv_cache_dtype": "int4"}, TypeError, "kv_cache_dtype"),
        ({"key_scales": torch.zeros(4, 2, 8)}, TypeError, "key_scales"),
        ({"k_scale": 0.0}, ValueError, "k_scale"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(change, error, text):
    arguments = {**_valid(), **change}
    before = [bits(arguments[n].clone()) for n in ("key_cache", "value_cache")]
    with pytest.raises(error, match=text):
        reshape_and_cache(**arguments)
    after = [bits(arguments[n]) for n in ("key_cache", "value_cache")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_scales_that_share_memory_are_refused():
    cache = torch.zeros(2, 3, 4, 16, dtype=torch.int8)
    scales = torch.zeros(2, 4, 3).transpose(1, 2)
    x, shared = torch.randn(5, 3, 16), torch.zeros(2, 1, 4).expand(2, 3, 4)
    arguments = (x, x, cache, cache.clone(), torch.arange(5))
    reshape_and_cache(*arguments, key_scales=scales, value_scales=scales.clone())
    with pytest.raises(ValueError, match="value_scales is written in place, but several"):
        reshape_and_cache(*arguments, key_scales=scales, value_scales=shared)


def test_no_cache_is_named():
    with pytest.raises(TypeError, match="key_cache is NoneType"):
        reshape_and_cache(**{**_valid(), "key_cache": None}, kv_cache_dtype="fp8")


def test_compile():
    a = _valid()
    compiled = torch.compile(reshape_and_cache, fullgraph=True, backend="aot_eager")
    want = [c.clone() for c in (a["key_cache"], a["value_cache"])]
    reshape_and_cache(a["key"], a["value"], *want, a["slot_mapping"])
    compiled(**a)
    assert torch.equal(a["key_cache"], want[0])
