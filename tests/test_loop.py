"""The loop of `generate` that takes one token after the other: what transformers' own returns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import lmfuse
from helpers import BF16, F32, assert_same_bits
from lmfuse.generation import Cache, hf_greedy_search
from lmfuse.hf import loop, step
from test_models import batch, make


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    stock = make()
    return stock, lmfuse.optimize(stock)


def counted_loops(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[int]:
    """For each loop of this class that runs, how many steps were one op."""
    found: list[int] = []
    run, next_step = kind.run, step.Run.next

    def counted_run(*args: Any) -> Any:
        found.append(0)
        return run(*args)

    def counted_step(*args: Any) -> Any:
        logits, largest = next_step(*args)
        found[-1] += largest is not None
        return logits, largest

    monkeypatch.setattr(kind, "run", counted_run)
    monkeypatch.setattr(step.Run, "next", counted_step)
    return found


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted_loops(monkeypatch, loop._Loop)


def generate(model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(**(batch() if inputs is None else inputs), **options)


def ends_of(model: Any) -> list[int]:
    """Tokens that end the rows of the batch after different steps."""
    ids = generate(model)
    return [int(ids[0, 11]), int(ids[1, 14])]


class Doubled(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.is_contiguous()
        assert scores.dtype is F32
        return -scores if input_ids.shape[1] % 2 else scores


class AfterFour(StoppingCriteria):
    """The last row ends after four tokens; the others do if it is asked again."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[-1] = input_ids.shape[1] == 13
        return done


OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "greedy": lambda _: {},
    "sample": lambda _: {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several sequences": lambda _: {"do_sample": True, "num_return_sequences": 2},
    "processors": lambda _: {"logits_processor": LogitsProcessorList([Doubled()])},
    "repetition": lambda _: {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "at least": lambda m: {"min_new_tokens": 6, "eos_token_id": ends_of(m)},
    "ends": lambda m: {"eos_token_id": ends_of(m), "pad_token_id": 3},
    "criteria": lambda _: {"stopping_criteria": StoppingCriteriaList([AfterFour()])},
    "criteria and ends": lambda m: {
        "stopping_criteria": StoppingCriteriaList([AfterFour()]),
        "eos_token_id": ends_of(m),
        "pad_token_id": 3,
    },
    "one token": lambda _: {"max_new_tokens": 1},
    "max length": lambda _: {"max_new_tokens": None, "max_length": 15},
    "max time": lambda _: {"max_time": 1000.0},
    "a chunked prompt": lambda _: {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ids(name: str, models: tuple[Any, Any], loops: list[int]) -> None:
    stock, ours = models
    options = OPTIONS[name](stock)
    one = {"input_ids": batch()["input_ids"][2:]}
    for inputs in (batch(), one):
        expected = generate(stock, inputs, **options)
        loops.clear()
        found = generate(ours, inputs, **options)
        assert torch.equal(found, expected)
        assert found.dtype is expected.dtype
        assert loops == [found.shape[1] - 10]


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_everything_that_is_recorded(kind: torch.dtype, loops: list[int]) -> None:
    """To the bits of what the loop of transformers records over the same model."""
    model = lmfuse.optimize(make(), dtype=kind)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for more in ({}, {"do_sample": True}, {"logits_processor": LogitsProcessorList([Doubled()])}):
        found = generate(model, **options, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "ordinary", lambda *_: False)
            expected = generate(model, **options, **more)
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for a, b in zip(found[name], expected[name], strict=True):
                assert_same_bits(a, b)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert loops == [8, 8, 8]


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.seen.append(tokens.clone())

    def end(self) -> None:
        self.seen.append(None)


def test_streamer(models: tuple[Any, Any], loops: list[int]) -> None:
    one = {"input_ids": batch()["input_ids"][2:]}
    told = []
    for model in models:
        streamer = Streamer()
        ends = {"eos_token_id": [int(generate(models[0], one)[0, -2])], "pad_token_id": 0}
        generate(model, one, streamer=streamer, **ends)
        told.append(streamer.seen)
    expected, found = told
    assert len(found) == len(expected)
    assert found[-1] is None
    assert expected[-1] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))


def test_an_exception_in_a_streamer(models: tuple[Any, Any]) -> None:
    class Broken(Streamer):
        def put(self, tokens: Tensor) -> None:
            super().put(tokens)
            if len(self.seen) == 4:
                raise InterruptedError

    stock, ours = models
    one = {"input_ids": batch()["input_ids"][2:]}
    with pytest.raises(InterruptedError):
        generate(ours, one, streamer=Broken())
    assert torch.equal(generate(ours, one), generate(stock, one))


def test_holes_in_the_mask(models: tuple[Any, Any], loops: list[int]) -> None:
    """Which no column says, so the steps are those of modules."""
    stock, ours = models
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][2, 4] = 0
    inputs["position_ids"] = torch.arange(9).expand(3, 9)
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))
    assert loops == [0]


def test_right_padding(models: tuple[Any, Any]) -> None:
    stock, ours = models
    inputs = batch()
    inputs = {name: x.flip(1).contiguous() for name, x in inputs.items()}
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))


def test_a_cache_of_the_caller_goes_on(models: tuple[Any, Any], loops: list[int]) -> None:
    stock, ours = models
    one = batch()["input_ids"][2:]
    expected = generate(stock, {"input_ids": one})
    cache = Cache(ours.config)
    first = generate(ours, {"input_ids": one}, past_key_values=cache, max_new_tokens=4)
    again = generate(ours, {"input_ids": first}, past_key_values=cache, max_new_tokens=5)
    assert torch.equal(again, expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert loops == [3, 4]


def test_positions_beyond_the_tables(monkeypatch: pytest.MonkeyPatch, loops: list[int]) -> None:
    """Which are made anew, and where they would be too many, angle by angle."""
    from lmfuse.hf import rotary

    stock = make(max_position_embeddings=32)
    ours = lmfuse.optimize(stock)
    monkeypatch.setattr(rotary, "_MOST", 14)
    inputs = {"input_ids": batch()["input_ids"][2:]}
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))
    assert loops == [5]


def test_a_model_that_is_called_meanwhile(models: tuple[Any, Any]) -> None:
    """By a criterion, with a cache of its own."""
    stock, ours = models
    one = {"input_ids": batch()["input_ids"][2:]}

    class Nosy(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                ours(input_ids=input_ids)
            generate(ours, one, max_new_tokens=2)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = generate(ours, one, stopping_criteria=StoppingCriteriaList([Nosy()]))
    assert torch.equal(found, generate(stock, one))


def test_two_threads(models: tuple[Any, Any]) -> None:
    stock, ours = models
    inputs = [{"input_ids": batch()["input_ids"][i : i + 1]} for i in (1, 2)]
    expected = [generate(stock, each, max_new_tokens=20) for each in inputs]
    found: list[Any] = [None, None]

    def run(i: int) -> None:
        found[i] = generate(ours, inputs[i], max_new_tokens=20)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", loop._METHODS)
def test_a_loop_of_ones_own(name: str, models: tuple[Any, Any], loops: list[int]) -> None:
    """Is called: on the class of the model, or as an attribute that transformers would find."""
    seen: list[int] = []
    stock = make()
    method = getattr(GenerationMixin, name)

    class Own(type(stock)):  # type: ignore[misc]
        pass

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(0)
        return method(self, *args, **kwargs)

    setattr(Own, name, own)
    stock.__class__ = Own
    ours = lmfuse.optimize(stock)
    assert torch.equal(generate(ours), generate(models[0]))
    assert seen
    assert not loops


def test_what_is_left_to_transformers(models: tuple[Any, Any], loops: list[int]) -> None:
    stock, ours = models
    for options in (
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        found, expected = generate(ours, **options), generate(stock, **options)
        if "return_dict_in_generate" in options:
            found, expected = found.sequences, expected.sequences
        assert torch.equal(found, expected)
    assert not loops


def test_called_directly(models: tuple[Any, Any]) -> None:
    stock, ours = models
    ids = batch()["input_ids"][2:]
    config = GenerationConfig(max_length=15, do_sample=False)
    found = hf_greedy_search.__get__(ours)(ids, generation_config=config)
    assert torch.equal(found, stock.generate(ids, generation_config=config))
