"""The loop of `generate` with beams: what transformers' own returns, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import lmfuse
from helpers import BF16, F32, assert_same_bits
from lmfuse.generation import Cache, hf_beam_search
from lmfuse.hf import beams
from test_loop import counted_loops, generate
from test_models import batch, make


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, Any]:
    return {dtype: lmfuse.optimize(make(), dtype=dtype) for dtype in (F32, BF16)}


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted_loops(monkeypatch, beams._Search)


def ends_of(model: Any) -> list[int]:
    """Tokens that come up in many sequences, so that these end at different steps."""
    ids = generate(model, num_beams=4, num_return_sequences=4, max_new_tokens=12)[:, 9:]
    return [int(token) for token in ids.flatten().bincount().topk(3).indices]


class Turned:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype is F32
        return (-scores if input_ids.shape[1] % 2 else scores) + input_ids[:, -1:] / 99


class Forbidden:
    """Leaves few tokens, so that there are too few continuations."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[-1]) < 2, scores, -torch.inf)


class Some(StoppingCriteria):
    """Sequences whose tokens have an odd sum end late."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids.sum(1) % 2 == 1) & (input_ids.shape[1] > 14)


OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "plain": lambda _: {},
    "two beams": lambda _: {"num_beams": 2},
    "many beams": lambda _: {"num_beams": 7, "num_return_sequences": 7},
    "ends": lambda m: {"eos_token_id": ends_of(m), "pad_token_id": 3},
    "ends, padding 0": lambda m: {"eos_token_id": ends_of(m)[:1], "pad_token_id": 0},
    "early": lambda m: {"eos_token_id": ends_of(m), "early_stopping": True},
    "never": lambda m: {"eos_token_id": ends_of(m), "early_stopping": "never"},
    "never, short": lambda m: {
        "eos_token_id": ends_of(m),
        "early_stopping": "never",
        "length_penalty": -2.0,
    },
    "long": lambda m: {"eos_token_id": ends_of(m), "length_penalty": 3.0},
    "sums": lambda m: {"eos_token_id": ends_of(m), "length_penalty": 0.0},
    "beyond fp32": lambda m: {"eos_token_id": ends_of(m), "length_penalty": -60.0},
    "processors": lambda _: {"logits_processor": LogitsProcessorList([Turned()])},
    "few tokens": lambda _: {"logits_processor": LogitsProcessorList([Forbidden()])},
    "repetition": lambda _: {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "criteria": lambda _: {"stopping_criteria": StoppingCriteriaList([Some()])},
    "criteria and ends": lambda m: {
        "stopping_criteria": StoppingCriteriaList([Some()]),
        "eos_token_id": ends_of(m),
        "early_stopping": True,
    },
    "sample": lambda _: {"do_sample": True, "temperature": 2.0, "top_k": 30},
    "sample, ends": lambda m: {"do_sample": True, "eos_token_id": ends_of(m)},
    "one token": lambda _: {"max_new_tokens": 1},
    "max length": lambda _: {"max_new_tokens": None, "max_length": 15},
    "a chunked prompt": lambda _: {"prefill_chunk_size": 4},
}
RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_all_that_is_returned(
    name: str, kind: torch.dtype, models: dict[torch.dtype, Any], loops: list[int]
) -> None:
    """To the bits of what the loop of transformers returns over the same model."""
    model = models[kind]
    few = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12}
    options = {**few, **OPTIONS[name](model)}
    options["num_return_sequences"] = min(options["num_return_sequences"], options["num_beams"])
    one = {"input_ids": batch()["input_ids"][2:]}
    for inputs in (batch(), one):
        loops.clear()
        found = generate(model, inputs, **options, **RECORDED)
        ids = generate(model, inputs, **options)
        assert len(loops) == 2
        assert loops[0] == loops[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beams, "ordinary", lambda *_: False)
            expected = generate(model, inputs, **options, **RECORDED)
        assert len(loops) == 2
        assert loops[0] == len(expected.scores) - 1  # all steps but the first
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for key in ("sequences", "beam_indices"):
            assert found[key].dtype is expected[key].dtype
            assert torch.equal(found[key], expected[key])
        assert torch.equal(ids, expected.sequences)
        assert_same_bits(found.sequences_scores, expected.sequences_scores)
        for key in ("scores", "logits"):
            for a, b in zip(found[key], expected[key], strict=True):
                assert_same_bits(a, b)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_some_end_before_others(models: dict[torch.dtype, Any]) -> None:
    """Else most of the options above would say nothing."""
    model = models[F32]
    options = {"num_beams": 4, "max_new_tokens": 12, "eos_token_id": ends_of(model)}
    lengths = set()
    for more in ("early", "never", "never, short", "long"):
        given = {**options, **OPTIONS[more](model), **RECORDED}
        found = generate(model, num_return_sequences=4, **given)
        lengths |= {(more, int(n)) for n in (found.beam_indices >= 0).sum(1)}
    assert len(lengths) > 8
    assert len({n for _, n in lengths}) > 4


def test_ids_of_stock(loops: list[int]) -> None:
    stock = make()
    ours = lmfuse.optimize(stock)
    for more in ({}, {"do_sample": True}, {"eos_token_id": ends_of(ours), "early_stopping": True}):
        options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, **more}
        assert torch.equal(generate(ours, **options), generate(stock, **options))
    assert len(loops) == 4


def test_equal_sums(loops: list[int], models: dict[torch.dtype, Any]) -> None:
    """Which come in the order in which transformers has them, whatever the vocabulary."""

    class Coarse:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.round()

    model = models[F32]
    for more in ({"num_beams": 2}, {"num_beams": 5, "eos_token_id": ends_of(model)}):
        options = {"logits_processor": LogitsProcessorList([Coarse()]), **more, **RECORDED}
        found = generate(model, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beams, "ordinary", lambda *_: False)
            expected = generate(model, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.beam_indices, expected.beam_indices)
    assert loops


def test_not_a_number(models: dict[torch.dtype, Any]) -> None:
    class Nothing:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores if input_ids.shape[1] < 12 else scores * torch.nan

    options = {"logits_processor": LogitsProcessorList([Nothing()]), "num_beams": 3}
    found = generate(models[F32], **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beams, "ordinary", lambda *_: False)
        assert torch.equal(found, generate(models[F32], **options))


def test_holes_in_the_mask(models: dict[torch.dtype, Any], loops: list[int]) -> None:
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][2, 4] = 0
    inputs["position_ids"] = torch.arange(9).expand(3, 9)
    found = generate(models[F32], inputs, num_beams=4)
    assert torch.equal(found, generate(make(), inputs, num_beams=4))
    assert loops == [0]


def test_a_cache_of_the_caller(models: dict[torch.dtype, Any], loops: list[int]) -> None:
    one, model = batch()["input_ids"][2:], models[F32]
    cache = Cache(model.config)
    found = generate(model, {"input_ids": one}, past_key_values=cache, num_beams=3)
    assert torch.equal(found, generate(make(), {"input_ids": one}, num_beams=3))
    assert cache.get_seq_length() == found.shape[1] - 1
    assert loops == [8]


@pytest.mark.parametrize("name", [*beams._METHODS, "_reorder_cache"])
def test_a_loop_of_ones_own(name: str, models: dict[torch.dtype, Any], loops: list[int]) -> None:
    """Is called."""
    seen: list[int] = []
    stock = make()

    def reorder(self: Any, cache: Any, rows: Tensor) -> Any:
        cache.reorder_cache(rows)
        return cache

    method: Any = getattr(GenerationMixin, name, reorder)
    static = isinstance(vars(GenerationMixin).get(name), staticmethod)

    class Own(type(stock)):  # type: ignore[misc]
        pass

    def own(*args: Any, **kwargs: Any) -> Any:
        seen.append(0)
        return method(*args, **kwargs)

    setattr(Own, name, staticmethod(own) if static else own)
    stock.__class__ = Own
    ours = lmfuse.optimize(stock)
    expected = generate(models[F32], num_beams=3)
    loops.clear()
    assert torch.equal(generate(ours, num_beams=3), expected)
    assert seen
    assert not loops


def test_what_is_left_to_transformers(models: dict[torch.dtype, Any], loops: list[int]) -> None:
    stock, ours = make(), models[F32]
    for more in (
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        found, expected = (generate(m, num_beams=3, **more) for m in (ours, stock))
        if "return_dict_in_generate" in more:
            found, expected = found.sequences, expected.sequences
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="low_memory"):
        generate(ours, num_beams=3, low_memory=True)
    beyond = StoppingCriteriaList([MaxLengthCriteria(30)])
    for model in (stock, ours):
        with pytest.raises(IndexError):
            generate(model, num_beams=3, stopping_criteria=beyond)
    assert not loops


def test_called_directly(models: dict[torch.dtype, Any]) -> None:
    """Also over beams of one prompt that differ, as transformers allows."""
    stock, ours = make(), models[F32]
    rows = batch()["input_ids"]
    config = GenerationConfig(max_length=16, num_beams=3, do_sample=False)
    for ids in (rows, rows[2:].repeat(3, 1)):
        search = [hf_beam_search.__get__(m) for m in (ours, stock)]
        found, expected = (f(ids, generation_config=config) for f in search)
        assert torch.equal(found, expected)
