"""The steps of `generate`: with our preparation and parts, what the forward of the model gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import lmfuse
from helpers import assert_same_bits
from lmfuse.generation import Cache
from lmfuse.hf import generation, step
from test_models import batch, make

# Families whose forward is embedding, angles, layers, norm and head, and little in between.
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "olmo2", "gpt_neox")
PLAIN += ("granite", "cohere", "gemma2", "gemma3", "falcon", "falcon new", "olmo")
PLAIN += ("gptj", "codegen", "qwen2_moe", "gpt_oss")
# And rows for positions, a norm before the layers, or biases by distance and no positions.
PLAIN += ("opt", "gpt2", "gpt_bigcode", "bloom", "mpt")
# Numbers that are not 1.
CHANGED: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0},
    "mpt": {"use_cache": True},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},  # of every family
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
}


def generate(model: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(**(batch() if inputs is None else inputs), **options)


class Counting:
    """Counts the steps that were run here, and those of them that were one op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.whole = 0
        for name in ("__call__", "whole"):
            monkeypatch.setattr(
                step.StepParts, name, self.counted(getattr(step.StepParts, name), name)
            )

    def counted(self, call: Any, name: str) -> Any:
        def run(*args: Any) -> Any:
            found = call(*args)
            self.count += found is not None
            self.whole += found is not None and name == "whole"
            return found

        return run


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((f, "greedy") for f in PLAIN),
        *((f, m) for f in ("llama", "opt", "bloom") for m in MODES),
    ],
)
def test_steps(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    stock = make(family, **CHANGED.get(family, {}))
    ours = lmfuse.optimize(stock)
    assert type(ours).fused_step is not None
    one = {"input_ids": batch()["input_ids"][2:], "attention_mask": torch.ones(1, 9, dtype=int)}
    for inputs in (batch(), one, {"input_ids": one["input_ids"]}):
        counting.count = counting.whole = 0
        found, expected = (generate(m, inputs, **MODES[mode]) for m in (ours, stock))
        if mode == "hidden states":
            found, expected = found.sequences, expected.sequences
        assert torch.equal(found, expected)
        assert counting.count == (8 if mode in ("greedy", "beams", "sample") else 0)
        assert counting.whole == counting.count


def test_what_is_more_than_its_parts_has_no_form() -> None:
    """Products before the layers, and no last norm."""
    for changed in ({"word_embed_proj_dim": 16}, {"do_layer_norm_before": False}):
        stock = make("opt", **changed)
        model = lmfuse.optimize(stock)
        assert type(model).fused_step is None
        assert torch.equal(generate(model), generate(stock))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_bigcode", "bloom", "mpt"])
def test_bits_of_the_forward(
    family: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    model = lmfuse.optimize(make(family, **CHANGED.get(family, {})), dtype=kind)
    found = logits_of(model)
    assert counting.whole == 8
    handle = model.register_forward_hook(lambda *_: None)
    assert_same_bits(logits_of(model), found)
    handle.remove()
    assert counting.whole == 8


def test_rows_for_positions_that_come_later() -> None:
    """Of a model that is optimized while they are zero."""
    stock, other = make("gpt2"), make("gpt2")
    stock.transformer.wpe.weight.data.zero_()
    model = lmfuse.optimize(stock, inplace=True)
    model.load_state_dict(other.state_dict())
    assert torch.equal(generate(model), generate(other))


def test_rows_for_positions_of_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)

    class Turned(torch.nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(self.num_embeddings - 1 - ids)

    stock = make("gpt2")
    model = lmfuse.optimize(stock)
    for each in (stock, model):
        table = Turned(*each.transformer.wpe.weight.shape)
        table.weight = each.transformer.wpe.weight
        each.transformer.wpe = table
    assert torch.equal(generate(model), generate(stock))
    assert not counting.count


def test_positions_beyond_their_rows() -> None:
    for family, most in (("opt", 64), ("gpt2", 64)):
        stock = make(family)
        model = lmfuse.optimize(stock)
        ids = {"input_ids": torch.arange(most - 4)[None] % 90 + 3}
        assert torch.equal(
            generate(model, ids, max_new_tokens=5), generate(stock, ids, max_new_tokens=5)
        )
        with pytest.raises(ValueError, match="positions"):
            generate(model, ids, max_new_tokens=8, min_new_tokens=8)


def logits_of(model: Any) -> Tensor:
    options = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(generate(model, **options).logits)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_numbers_between_the_parts(
    family: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the model's own forward, which runs where a number is another."""
    counting = Counting(monkeypatch)
    model = lmfuse.optimize(make(family, **CHANGED.get(family, {})), dtype=kind)
    names = {"granite": "logits_scaling", "cohere": "logit_scale"}
    name = names.get(family, "final_logit_softcapping")
    holder = model if family == "cohere" else model.config
    found = logits_of(model)
    assert counting.count == 8
    handle = model.register_forward_hook(lambda *_: None)
    assert_same_bits(logits_of(model), found)
    handle.remove()
    assert counting.count == 8
    setattr(holder, name, 0.7)
    assert not torch.equal(logits_of(model), found)
    assert counting.count == 8


LOOKED_AT = [("llama", w) for w in ("", "model", "lm_head", "model.norm", "model.embed_tokens")]
LOOKED_AT += [("gpt2", f"transformer.{w}") for w in ("wpe", "drop", "wte")]
LOOKED_AT += [("opt", f"model.decoder{w}") for w in ("", ".embed_positions")]
LOOKED_AT += [("bloom", "transformer.word_embeddings_layernorm")]


@pytest.mark.parametrize(("family", "where"), LOOKED_AT)
def test_whoever_looks_sees_every_step(family: str, where: str) -> None:
    model = lmfuse.optimize(make(family))
    expected = generate(model)
    seen: list[tuple[int, ...]] = []
    module = model.get_submodule(where)
    hook = module.register_forward_hook(lambda *_: seen.append(()))
    assert torch.equal(generate(model), expected)
    assert len(seen) == 9
    hook.remove()
    seen.clear()
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(())
        return forward(*args, **kwargs)

    module.forward = watched
    assert torch.equal(generate(model), expected)
    assert len(seen) == 9


def test_a_forward_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lmfuse.optimize(make())
    expected = generate(model)
    kind = type(model.model)
    forward, seen = kind.forward, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    assert torch.equal(generate(model), expected)
    assert len(seen) == 9


def test_a_streamer_that_generates_with_another_model() -> None:
    """Inner and outer steps do not meet."""
    one, two = (lmfuse.optimize(make(f)) for f in ("llama", "qwen3"))
    expected = generate(one), generate(two)

    class Nosy(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            for model, ids in zip((one, two), expected, strict=True):
                assert torch.equal(generate(model, max_new_tokens=3), ids[:, :12])
            return scores

    processors = LogitsProcessorList([Nosy()])
    assert torch.equal(generate(one, logits_processor=processors), expected[0])


def test_a_cache_goes_on_and_copies_do_not_share_it() -> None:
    model = lmfuse.optimize(make())
    ids = batch()["input_ids"][2:]
    expected = generate(model, {"input_ids": ids})
    cache = Cache(model.config)
    first = generate(model, {"input_ids": ids}, past_key_values=cache, max_new_tokens=4)
    others = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for held in (cache, *others):
        again = generate(model, {"input_ids": first}, past_key_values=held, max_new_tokens=5)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_cache_of_fixed_length(family: str) -> None:
    """Its masks are made before the forward, by a config that must say whose they are."""
    stock = make(family)
    ours = lmfuse.optimize(stock)
    one = {"input_ids": batch()["input_ids"][2:]}
    for inputs in (batch(), one):
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generate(ours, inputs, **options), generate(stock, inputs, **options))


def test_a_compiled_forward_has_no_graph_breaks() -> None:
    model = lmfuse.optimize(make())
    expected = generate(model, max_new_tokens=4)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(model, max_new_tokens=4), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_is_compiled() -> None:
    linear = torch.nn.Linear(1, 1)
    assert not generation._compiled(linear)
    assert generation._compiled(torch.compile(linear))
    linear.forward = torch.compile(linear.forward)
    assert generation._compiled(linear)
    del linear.forward
    linear.compile()
    assert generation._compiled(linear)
