"""lmfuse.generation.Cache against transformers' DynamicCache, operation by operation."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from lmfuse import functional
from lmfuse.generation import Cache, Layer, SlidingLayer
from lmfuse.generation.slots import Slots

LAYERS, HEADS, DIM, WINDOW = 4, 2, 8, 6
KINDS = ["full_attention", "sliding_attention"] * (LAYERS // 2)


def config(**changed: Any) -> Any:
    return transformers.AutoConfig.for_model(
        "qwen3",
        num_hidden_layers=LAYERS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=KINDS,
        **changed,
    )


def both(dtype: torch.dtype | None = None) -> tuple[Cache, DynamicCache]:
    return Cache(config(), dtype), DynamicCache(config=config())


def states(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    # As a model makes them: [batch, tokens, heads, dim], transposed.
    key, value = torch.randn(2, batch, tokens, HEADS, DIM, generator=g).transpose(2, 3)
    return key, value


def update(ours: Cache, stock: DynamicCache, batch: int, tokens: int, seed: int) -> None:
    """The same new tokens for both; what they return is equal."""
    for layer in range(LAYERS):
        assert ours.get_mask_sizes(tokens, layer) == stock.get_mask_sizes(tokens, layer)
        new = states(batch, tokens, seed * LAYERS + layer)
        for mine, other in zip(ours.update(*new, layer), stock.update(*new, layer), strict=True):
            assert mine.shape == other.shape
            assert mine.dtype is other.dtype
            assert torch.equal(mine + 0, other)
    alike(ours, stock)


def alike(ours: Cache, stock: DynamicCache) -> None:
    for layer, (mine, other) in enumerate(zip(ours.layers, stock.layers, strict=True)):
        assert ours.get_seq_length(layer) == stock.get_seq_length(layer)
        held = min(other.keys.shape[-2], WINDOW - 1) if mine.is_sliding else None
        for part in ("keys", "values"):
            expected = getattr(other, part)
            if held is not None:
                expected = expected[:, :, expected.shape[2] - held :]
            assert torch.equal(getattr(mine, part), expected)


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_leave_what_they_leave_in_a_dynamic_cache(seed: int) -> None:
    choose = random.Random(seed)
    ours, stock = both()
    if seed % 3 == 0:
        for cache in (ours, stock):
            cache.activate_past_recording()
    batch = choose.choice([1, 3])
    update(ours, stock, batch, choose.choice([1, 9, 40]), 100)
    fresh = True  # no crop since the last update: a second one would see what is gone
    for step in range(40):
        what = choose.choice(["update"] * 4 + ["reorder", "repeat", "select", "crop", "copy"])
        if what == "reorder":
            beams = torch.tensor([choose.randrange(batch) for _ in range(batch)])
            ours.reorder_cache(beams)
            stock.reorder_cache(beams)
        elif what == "repeat" and batch < 6:
            repeats = choose.choice([1, 2, 3])
            ours.batch_repeat_interleave(repeats)
            stock.batch_repeat_interleave(repeats)
            batch *= repeats
        elif what == "select":
            batch = choose.choice([1, 2, batch])
            rows = torch.tensor([choose.randrange(ours.layers[0].batch_size) for _ in range(batch)])
            ours.batch_select_indices(rows)
            stock.batch_select_indices(rows)
        elif what == "crop":
            tokens = choose.randrange(min(4, ours.get_seq_length()))
            if ours.get_seq_length() < WINDOW or (seed % 3 == 0 and fresh):
                ours.crop(-tokens)
                stock.crop(-tokens)
                fresh = False
        elif what == "copy":
            old, ours = ours, copy.deepcopy(ours)
            update(old, copy.deepcopy(stock), batch, 2, 1000 + step)  # which leaves the copy alone
        else:
            update(ours, stock, batch, choose.choice([1, 1, 1, 2, 7]), step)
            fresh = True
        alike(ours, stock)
    ours.reset()
    stock.reset()
    update(ours, stock, 2, 5, 999)


def test_growing_past_the_first_allocation_keeps_every_token() -> None:
    ours, stock = both()
    update(ours, stock, 2, 3, 0)
    first = ours.layers[0].slots.capacity
    for step in range(1, 40):
        update(ours, stock, 2, 17, step)
        ours.reorder_cache(torch.tensor([1, step % 2]))
        stock.reorder_cache(torch.tensor([1, step % 2]))
    assert ours.layers[0].slots.capacity > first
    alike(ours, stock)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sliding_window_reuses_its_memory(batch: int) -> None:
    ours, stock = both()
    capacities = []
    for step in range(60):
        update(ours, stock, batch, 10, step)
        capacities.append(ours.layers[1].slots.capacity)
    assert max(capacities) <= 1024
    assert ours.layers[0].slots.capacity >= 600 * batch
    update(ours, stock, batch, 3000, 1000)  # a long prompt, which is soon out of the window
    assert ours.layers[1].key_arena.shape[1] >= 3000 * batch
    for step in range(10):
        update(ours, stock, batch, 200, 2000 + step)
    assert ours.layers[1].key_arena.shape[1] < 3000


def test_no_key_moves_when_rows_change() -> None:
    ours, stock = both()
    update(ours, stock, 2, 9, 0)
    arenas = [(layer.key_arena, layer.key_arena.clone()) for layer in ours.layers]
    ours.batch_repeat_interleave(4)
    ours.reorder_cache(torch.tensor([3, 3, 0, 1, 7, 7, 7, 4]))
    ours.batch_select_indices(torch.tensor([0, 1, 2]))
    ours.crop(-2)
    for layer, (arena, before) in zip(ours.layers, arenas, strict=True):
        assert layer.key_arena is arena
        held = ours.layers[0].slots._used
        assert torch.equal(arena[:, :held], before[:, :held])
    # Layers that see the same positions share their lists: once for all of them.
    assert ours.layers[0].slots is ours.layers[2].slots
    assert ours.layers[1].slots is ours.layers[3].slots
    assert ours.layers[0].slots is not ours.layers[1].slots


def test_int8_keeps_each_token_to_half_a_step_of_its_scale() -> None:
    ours, stock = both(torch.int8)
    for step, tokens in enumerate((9, 1, 4)):
        for layer in range(LAYERS):
            new = states(2, tokens, step * LAYERS + layer)
            pairs = zip(ours.update(*new, layer), stock.update(*new, layer), strict=True)
            for mine, other in pairs:
                step_of = other.abs().amax(-1, keepdim=True) / 127
                assert ((mine - other).abs() <= step_of * 0.5001).all()
    assert ours.layers[0].key_arena.dtype is torch.int8
    assert not torch.equal(ours.layers[0].keys, stock.layers[0].keys)


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("hidden", [(0, 0, 0), (0, 4, 7)])
def test_attention_reads_the_cache_where_it_lies(
    dtype: torch.dtype | None, hidden: tuple[int, ...]
) -> None:
    layer = Layer(dtype=dtype)
    layer.update(*states(3, 11, 0))
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    keys, values = layer.update(*states(3, 2, 1))
    query = torch.randn(3, 2, 4, DIM)
    mask = torch.arange(13) >= torch.tensor(hidden).unsqueeze(1)
    sinks = torch.randn(4)
    out = layer.attend(query, mask, 0.3, 5, 2.0, sinks)
    k, v = keys.clone().transpose(1, 2), values.clone().transpose(1, 2)
    expected = functional.attention(
        query,
        k,
        v,
        mask=mask[:, None, None],
        causal=True,
        scale=0.3,
        window=(4, -1),
        softcap=2.0,
        sinks=sinks,
    )
    assert out is not None
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    holes = mask & (torch.arange(13) != 8)
    assert layer.attend(query, holes, 0.3, 5, 2.0, sinks) is None


def test_a_padded_row_has_the_bits_it_has_alone() -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, HEADS, 300, DIM)
    query = torch.randn(1, 300, 4, DIM)
    alone = Layer()
    k, v = alone.update(key, value)
    q = query[:, -1:]
    expected = functional.attention(q, k.transpose(1, 2), v.transpose(1, 2), causal=True)
    together = Layer()
    pad = torch.randn(1, HEADS, 37, DIM)
    other = torch.randn(1, HEADS, 337, DIM)
    together.update(
        torch.cat([torch.cat([pad, key], 2), other]), torch.cat([torch.cat([pad, value], 2), other])
    )
    mask = torch.arange(337) >= torch.tensor([[37], [0]])
    out = together.attend(q.expand(2, -1, -1, -1).contiguous(), mask, DIM**-0.5, None, 0.0, None)
    assert out is not None
    assert torch.equal(out[:1], expected)


def test_slots_of_a_lone_row_lie_in_order() -> None:
    slots = Slots()
    slots.append(1, 5)
    slots.crop(3)
    slots.append(1, 300)
    assert slots.run(303) == (0, 303)
    assert slots.run(2) == (301, 303)
    slots.repeat(2)
    slots.append(2, 1)
    slots.select(torch.tensor([1]))
    assert slots.run(304) is None
    assert slots.rows(2).tolist() == [[302, 303 + 64]]


def test_layers_stand_alone_and_in_transformers_own_cache() -> None:
    ours = transformers.cache_utils.Cache(layers=[Layer(), SlidingLayer(Slots(WINDOW))])
    stock = DynamicCache(config=config(num_attention_heads=2))
    for step in range(9):
        for layer in range(2):
            new = states(2, 2, step * 2 + layer)
            pairs = zip(ours.update(*new, layer), stock.update(*new, layer), strict=True)
            assert all(torch.equal(a + 0, b) for a, b in pairs)
        ours.reorder_cache(torch.tensor([1, 1]))
        for layer in stock.layers[:2]:
            layer.reorder_cache(torch.tensor([1, 1]))


@pytest.mark.parametrize("batch", [1, 3])
def test_values_of_another_dtype_than_keys(batch: int) -> None:
    """Under autocast RoPE makes keys float32, and nothing values."""
    cache = Cache(config())
    key, value = states(batch, 5, 0)
    keys, values = cache.update(key, value.bfloat16(), 0)
    assert torch.equal(keys + 0, key)
    assert torch.equal(values + 0, value.bfloat16().float())


def test_inference_mode_comes_and_goes() -> None:
    ours, stock = both()
    with torch.inference_mode():
        update(ours, stock, 1, 3, 0)
    with torch.no_grad():
        for layer in range(LAYERS):
            ours.update(*states(1, 400, layer), layer)
    assert ours.get_seq_length() == 403


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.float16, but must be torch\.int8"):
        Cache(dtype=torch.float16)
    with pytest.raises(TypeError, match=r"dtype is torch\.int4"):
        Layer(dtype=torch.int4)
    cache = Cache(config())
    for layer in range(LAYERS):
        cache.update(*states(2, 20, 0), layer)
    with pytest.raises(ValueError, match=r"key_states has batch size 3.* holds a batch of 2"):
        cache.update(*states(3, 1, 0), 0)
    with pytest.raises(ValueError, match="tokens_to_remove is 2, but must be negative"):
        cache.crop(2)
    for layer in range(LAYERS):
        keys, _ = cache.update(*states(2, 1, 0), layer)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(RuntimeError, match="read after the cache changed"):
        keys.sum()
    with pytest.raises(RuntimeError, match="left the sliding window of 6"):
        cache.layers[1].crop(-9)
    cache.update(*states(2, 1, 0), 0)  # a forward that is cut short after the first layer
    with pytest.raises(ValueError, match="a forward was cut short; reset the cache"):
        cache.update(*states(2, 5, 0), 2)
    cache.reset()
    with pytest.raises(
        TypeError, match=r"key_cache is torch\.float32, but must be torch\.bfloat16"
    ):
        cache.update(*(x.bfloat16() for x in states(2, 1, 0)), 0)
