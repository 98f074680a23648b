"""Graphs of whole models: torch.jit.trace as in IPEX's scripts, torch.export, torch.compile."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import intel_extension_for_pytorch as ipex
import lmfuse
from lmfuse.bench.models import quiet
from lmfuse.cli import demo
from lmfuse.generation.tuples import TupleCache, placeholders
from lmfuse.hf import tracing
from test_generation import (
    ALONE,
    MODES,
    Watch,
    batch,
    bind,
    generate,
    make,
    sharpen,
    tuple_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by torch

WINDOWS = {
    "head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": True},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gpt_oss": {"num_local_experts": 4},
}


def family(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name, **WINDOWS, **FAMILIES[name])
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    return sharpen(auto.from_config(config, attn_implementation="eager").eval())


@torch.no_grad()
def trace(model: Any, **inputs: Any) -> Any:
    """The lines of IPEX's scripts."""
    sample = tracing.sample_inputs(model, **inputs)
    graph = torch.jit.trace(model, example_kwarg_inputs=sample, strict=False, check_trace=False)
    return torch.jit.freeze(graph.eval())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_generate_over_a_trace_gives_the_ids_of_eager() -> None:
    stock = make()
    model = lmfuse.optimize(stock)
    expected = {mode: generate(stock, mode) for mode in MODES}
    graph = trace(model)
    assert ipex._set_optimized_model_for_generation(model, optimized_model=graph) is model
    assert model.trace_graph is graph
    watch = Watch(model)
    for mode in MODES:
        assert torch.equal(generate(model, mode), expected[mode]), mode
    assert not watch.seen  # the model's own embedding was never called
    ids = generate(model, "beams", input_ids=batch(5)["input_ids"], attention_mask=None)
    assert torch.equal(
        ids, generate(stock, "beams", input_ids=batch(5)["input_ids"], attention_mask=None)
    )
    model.config.token_latency = True
    ids, seconds = generate(model, "several")
    assert torch.equal(ids, expected["several"])
    assert len(seconds) > 1
    assert vars(lmfuse.restore(model)).keys() == vars(stock).keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_softcaps_and_sinks(name: str) -> None:
    stock = family(name)
    model = lmfuse.trace_for_generation(lmfuse.optimize(stock))
    watch = Watch(model)
    for mode in ("greedy", "several"):
        expected = generate(stock, mode)
        assert torch.equal(generate(model, mode), expected), mode
    assert not watch.seen


@torch.no_grad()
def test_one_graph_serves_any_batch_length_and_number_of_beams() -> None:
    model = lmfuse.optimize(make())
    graph = trace(model, batch=1, tokens=32, beams=4)
    for rows, tokens, beams in ((1, 1, 1), (3, 7, 2), (2, 70, 5)):
        sample = tracing.sample_inputs(model, rows, tokens, beams)
        sample["input_ids"] = torch.randint(3, 128, (rows, tokens))
        expected = model(**sample)
        logits, past = graph(**sample)
        assert torch.equal(logits, expected.logits)
        for step in range(3):
            many = rows * beams
            parents = torch.randint(beams, (many,)) + torch.arange(many) // beams * beams
            for held in (past, expected.past_key_values):
                for layer in held:
                    layer[3][layer[0].size(-2) - 1] = parents
            inputs = {
                "input_ids": torch.randint(3, 128, (many, step + 1)),
                "attention_mask": torch.ones((many, past[0][0].size(-2) + step + 1)).long(),
                "position_ids": (past[0][0].size(-2) + torch.arange(step + 1)).expand(many, -1),
            }
            expected = model(**inputs, past_key_values=expected.past_key_values)
            logits, past = graph(**inputs, past_key_values=past)
            assert torch.equal(logits, expected.logits)
    file = io.BytesIO()
    torch.jit.save(graph, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(**sample)[0], graph(**sample)[0])


def test_a_first_graph_and_the_last_token_alone() -> None:
    model = lmfuse.optimize(make())
    expected = generate(model, "several")
    model.config.lm_head_generation = True
    with torch.no_grad():
        assert model(**batch()).logits.shape == (2, 1, 128)
        whole = model(**batch(), logits_to_keep=9).logits
        assert whole.shape == (2, 9, 128)
        assert torch.equal(model(**batch()).logits, whole[:, -1:])
    calls = []

    def counted(name: str, graph: Any) -> Any:
        def call(**kwargs: Any) -> Any:
            calls.append(name)
            logits, past = graph(**kwargs)
            assert logits.shape[1] == 1
            return {"logits": logits, "past_key_values": past}

        return call

    first, later = counted("first", trace(model)), counted("next", trace(model, tokens=3))
    ipex._set_optimized_model_for_generation(model, later, first_token_optimized_model=first)
    assert model.trace_graph_first is first
    assert torch.equal(generate(model, "several"), expected)
    assert calls[0] == "first"
    assert set(calls[1:]) == {"next"}


class Flat(torch.nn.Module):
    """A model of one's own as its script traces it: a flat tuple of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any
    ) -> Any:
        out = self.model(input_ids, attention_mask, position_ids, past_key_values)
        return out.logits, out.past_key_values


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mode", ["greedy", "several", "samples"])
def test_a_model_of_ones_own(mode: str) -> None:
    expected = generate(tuple_model(), mode)
    model = bind(lmfuse.optimize(tuple_model()))
    with torch.no_grad():
        sample = tracing.sample_inputs(model)
        graph = torch.jit.trace(
            Flat(model).eval(), example_kwarg_inputs=sample, strict=False, check_trace=False
        )
        graph = torch.jit.freeze(graph)
    ipex._set_optimized_model_for_generation(model, optimized_model=graph)
    watch = Watch(model)
    assert torch.equal(generate(model, mode), expected)
    assert not watch.seen
    clone = copy.deepcopy(model)
    assert clone.forward.__self__ is clone


def showcases() -> dict[str, Any]:
    from test_examples import GPTJForCausalLM, LlamaForCausalLM, OPTForCausalLM, _gptj, _llama, _opt

    return {
        "llama": (LlamaForCausalLM, _llama),
        "gptj": (GPTJForCausalLM, _gptj),
        "opt": (OPTForCausalLM, _opt),
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["llama", "gptj", "opt"])
def test_the_showcases_share_prompts_and_are_traced(name: str) -> None:
    kind, config = showcases()[name]
    torch.manual_seed(0)
    stock = kind(config()).eval()
    inputs = {
        "input_ids": batch()["input_ids"] % 97 + 2,
        "attention_mask": batch()["attention_mask"],
    }
    inputs["input_ids"] *= inputs["attention_mask"]
    length = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": 3}
    expected = stock.generate(**inputs, **length)
    model = bind(lmfuse.optimize(stock))
    watch = Watch(model)
    assert torch.equal(model.generate(**inputs, **length), expected)
    assert watch.seen[0] == (2, 9)
    model = ipex._set_optimized_model_for_generation(model, optimized_model=trace(model))
    watch.seen.clear()
    assert torch.equal(model.generate(**inputs, **length), expected)
    assert not watch.seen


@torch.no_grad()
def test_what_a_graph_cannot_answer_the_model_does() -> None:
    stock = make()
    model = lmfuse.trace_for_generation(lmfuse.optimize(stock))
    inputs = batch()
    out = model(**inputs)
    assert isinstance(out, CausalLMOutputWithPast)
    assert isinstance(out.past_key_values, TupleCache)
    close(out.logits, stock(**inputs).logits[:, -1:])
    assert isinstance(model(**inputs, return_dict=False), tuple)
    tuples = placeholders(model.config, 2)
    assert isinstance(model(**inputs, past_key_values=tuples).past_key_values, tuple)
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    others: list[tuple[str, dict[str, Any]]] = [
        ("output_hidden_states", inputs),
        ("use_cache=False", inputs),
        ("past_key_values=DynamicCache", inputs),
        ("inputs_embeds", {"inputs_embeds": embeds}),
    ]
    for why, given in others:
        extra: dict[str, Any] = {}
        if "hidden" in why:
            extra = {"output_hidden_states": True}
        elif "use_cache" in why:
            extra = {"use_cache": False}
        elif "Dynamic" in why:
            extra = {"past_key_values": DynamicCache(config=stock.config)}
        with pytest.warns(UserWarning, match=f"cannot answer for {why}: this forward is the"):
            logits = model(**given, **extra).logits
        if "Dynamic" in why:
            assert extra["past_key_values"].get_seq_length() == 9
        assert logits.shape[1] == 9
    assistant = make()
    expected = generate(stock, **ALONE)
    with pytest.warns(UserWarning, match="cannot answer"):
        assert torch.equal(generate(model, assistant_model=assistant, **ALONE), expected)
    again = lmfuse.trace_for_generation(model)
    assert torch.equal(generate(again, **ALONE), expected)


def test_refusals() -> None:
    stock = make()
    model = lmfuse.optimize(stock)
    with pytest.raises(TypeError, match="LlamaForCausalLM cannot be traced: optimize it first"):
        lmfuse.trace_for_generation(stock)
    with pytest.raises(TypeError, match="optimized_model is int, but must be callable"):
        tracing.set_optimized_model_for_generation(model, 3)
    with pytest.raises(TypeError, match="model is int, but must be a torch"):
        tracing.set_optimized_model_for_generation(3, model)
    pairs = tuple((torch.zeros(2, 2, 3, 16),) * 2 for _ in range(2))
    with pytest.raises(TypeError, match=r"past_key_values is a tuple, but not of a \(seq_info"):
        model(**batch(), past_key_values=pairs)
    sample = tracing.sample_inputs(model)
    sample["past_key_values"] = (sample["past_key_values"][0],) * 2
    with pytest.raises(ValueError, match="same tensor in several places"), torch.no_grad():
        torch.jit.trace(model, example_kwarg_inputs=sample, strict=False, check_trace=False)


def test_tracing_warns_of_nothing_but_torch_jit() -> None:
    model = lmfuse.optimize(make())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trace(model)
    ours = [w for w in found if "torch.jit" not in str(w.message)]
    assert [str(w.message) for w in ours if "is_gradient_checkpointing" not in str(w.message)] == []


def held(model: Any, rows: int, tokens: int, new: int) -> dict[str, Any]:
    """Inputs for `new` tokens after `tokens` that tuples hold."""
    with torch.no_grad():
        sample = tracing.sample_inputs(model, rows, tokens, 1)
        sample["input_ids"] = torch.randint(3, 128, (rows, tokens))
        past = model(**sample).past_key_values
    return {
        "input_ids": torch.randint(3, 128, (rows, new)),
        "attention_mask": torch.ones((rows, tokens + new), dtype=torch.long),
        "position_ids": torch.arange(tokens, tokens + new).repeat(rows, 1),
        "past_key_values": past,
    }


@torch.no_grad()
def test_torch_compile_without_graph_breaks() -> None:
    model = lmfuse.optimize(make())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 14):
        ids = torch.randint(3, 128, (2, tokens))
        close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        cache, other = (DynamicCache(config=model.config) for _ in range(2))
        for part in (ids, ids[:, :1], ids[:, :1]):
            close(
                compiled(part, past_key_values=cache).logits,
                model(part, past_key_values=other).logits,
            )
    for rows, tokens in ((2, 5), (3, 11)):
        inputs = held(model, rows, tokens, 2)
        again = copy.deepcopy(inputs)
        out = compiled(**inputs)
        expected = model(**again)
        close(out.logits, expected.logits)
        for a, b in zip(out.past_key_values, expected.past_key_values, strict=True):
            assert a[0].size(-2) == b[0].size(-2) == tokens + 2
            assert torch.equal(a[3], b[3])


def export(model: Any, inputs: dict[str, Any]) -> Any:
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    info = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    shapes = dict.fromkeys(inputs, free)
    shapes["past_key_values"] = tuple((info, free, free, free) for _ in range(2))
    flat = Flat(model).eval()
    with torch.no_grad():
        return torch.export.export(flat, (), inputs, dynamic_shapes=shapes, strict=False).module()


def test_torch_export_for_any_batch_and_length() -> None:
    model = lmfuse.optimize(make())
    graph = export(model, held(model, 2, 5, 3))
    for rows, tokens, new in ((2, 5, 3), (3, 8, 2), (4, 21, 6)):
        inputs = held(model, rows, tokens, new)
        again = copy.deepcopy(inputs)
        with torch.no_grad():
            logits, past = graph(**inputs)
            expected = model(**again)
        close(logits, expected.logits)
        assert past[1][0].size(-2) == tokens + new
        assert torch.equal(past[1][1][:tokens], expected.past_key_values[1][1][:tokens])
    ids = generate(model, "beams")
    first, later = (
        export(model, tracing.sample_inputs(model, 2)),
        export(model, held(model, 6, 9, 1)),
    )
    tracing.set_optimized_model_for_generation(model, later, first)
    watch = Watch(model)
    assert torch.equal(generate(model, "beams"), ids)
    assert not watch.seen


def test_the_lines_of_the_mission_on_a_real_model() -> None:
    with quiet():
        stock, tokenizer = demo._load(torch.float32)
    inputs = tokenizer(["The sky is blue because", "Once upon a time, in a land far away"],
                       return_tensors="pt", padding=True, padding_side="left")  # fmt: skip
    length = {"max_new_tokens": 8, "do_sample": False}
    modes: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 4}}
    expected = {m: stock.generate(**inputs, **length, **modes[m]) for m in modes}

    model = ipex.optimize(stock.eval(), inplace=True)  # GGUF: it has its dtype
    hf_beam_search = ipex.llm.generation.hf_beam_search.__get__(model, model.__class__)
    setattr(model, "beam_search", hf_beam_search)  # noqa: B010  (the script's own words)
    eager = {m: model.generate(**inputs, **length, **modes[m]) for m in modes}
    model.config.lm_head_generation = True
    sample_inputs = tracing.sample_inputs(model)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        trace_model = torch.jit.trace(
            model, example_kwarg_inputs=sample_inputs, strict=False, check_trace=False
        )
        trace_model = torch.jit.freeze(trace_model)
        model = ipex._set_optimized_model_for_generation(model, optimized_model=trace_model)
    for mode in modes:
        assert torch.equal(eager[mode], expected[mode]), mode
        traced = model.generate(**inputs, **length, **modes[mode])
        assert torch.equal(traced, expected[mode]), mode
