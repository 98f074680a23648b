"""Prompts that run once for all their beams, IPEX's decoding functions, and times of tokens."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import intel_extension_for_pytorch as ipex
import lmfuse
from lmfuse.generation.processors import quickened
from lmfuse.modules import IndirectAccessKVCacheAttention

SIZES = {
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
LENGTH = {"max_new_tokens": 12, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "min_new_tokens": 12},
    "beams that end": {"num_beams": 3, "eos_token_id": [2, 7, 50, 99], "length_penalty": 0.3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
    "beam sample": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "chunks": {"num_beams": 2, "prefill_chunk_size": 3},
}
NAMES = ("greedy_search", "beam_search", "sample", "beam_sample")


def sharpen(model: Any) -> Any:
    """Random weights whose next tokens vary."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "v_proj" in name or "embed" in name:
                parameter.mul_(5)
    return model


def make() -> Any:
    torch.manual_seed(0)
    return sharpen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval())


def batch(rows: int = 2) -> dict[str, Tensor]:
    """Prompts of nine tokens, the first one padded on the left."""
    ids = torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


ALONE = {k: v[1:] for k, v in batch().items()}


def generate(model: Any, mode: str = "greedy", **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(**{**batch(), **LENGTH, **MODES[mode], **kwargs})


def bind(model: Any) -> Any:
    """The lines of IPEX's scripts."""
    for name in NAMES:
        function = getattr(ipex.llm.generation, f"hf_{name}").__get__(model, model.__class__)
        setattr(model, name, function)
    return model


class Watch:
    """How many rows and tokens each forward of a model was given."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[int, ...]] = []
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_pre_hook(lambda _, args: self.seen.append(tuple(args[0].shape)))

    def prompt(self) -> int:
        """Rows of the forwards that saw more than the last token, tokens together."""
        return sum(rows * tokens for rows, tokens in self.seen if tokens > 1)


class TupleAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, heads * self.dim))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = IndirectAccessKVCacheAttention(64)

    def forward(self, x: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
        rows, tokens, _ = x.shape
        q = self.q_proj(x).view(rows, tokens, self.heads, self.dim)
        k = self.k_proj(x).view(rows, tokens, self.kv_heads, self.dim)
        v = self.v_proj(x).view(rows, tokens, self.kv_heads, self.dim)
        out, _, present = self.attend(q, k, v, self.dim**0.5, past, None, mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1)), present


class TupleModel(transformers.LlamaPreTrainedModel, transformers.GenerationMixin):
    """A modelling file of one's own, in the manner of IPEX's examples: its caches are tuples."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TupleAttention(config) for _ in range(2))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        x = self.embed_tokens(input_ids) + self.positions(position_ids)
        mask = attention_mask[:, None, None].bool()
        presents = []
        for i, layer in enumerate(self.layers):
            held = past_key_values[i] if past_key_values is not None else None
            out, present = layer(x, mask, held)
            x = x + out
            presents.append(present)
        assert presents[0][0].shape[2] == past + input_ids.shape[1]
        return CausalLMOutputWithPast(logits=self.lm_head(x), past_key_values=tuple(presents))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        tokens = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        new = 1 if past_key_values is not None else tokens
        return {
            "input_ids": input_ids[:, -new:],
            "attention_mask": attention_mask,
            "position_ids": positions[:, -new:],
            "past_key_values": past_key_values,
        }

    def _reorder_cache(self, past: Any, beam_idx: Tensor) -> Any:
        for layer in past:
            layer[3][layer[0].shape[2] - 1] = beam_idx
        return past


def tuple_model() -> Any:
    torch.manual_seed(0)
    return sharpen(TupleModel(transformers.LlamaConfig(**SIZES)).eval())


@pytest.mark.parametrize("mode", MODES)
def test_the_prompt_runs_once_and_ids_are_those_of_stock(mode: str) -> None:
    stock = make()
    expected = generate(stock, mode)
    for model in (lmfuse.optimize(stock), bind(copy.deepcopy(stock))):
        watch = Watch(model)
        assert torch.equal(generate(model, mode), expected)
        assert watch.prompt() == 2 * 9
    assert len(expected.unique()) > 5


@pytest.mark.parametrize("mode", ["greedy", "beams", "several", "samples"])
def test_a_model_of_ones_own_with_tuple_caches(mode: str) -> None:
    stock = tuple_model()
    watch = Watch(stock)
    expected = generate(stock, mode)
    beams = expected.shape[0] // 2 if mode == "samples" else MODES[mode].get("num_beams", 1)
    assert watch.prompt() == 2 * 9 * beams
    model = bind(copy.deepcopy(tuple_model()))
    watch = Watch(model)
    assert torch.equal(generate(model, mode), expected)
    assert watch.prompt() == 2 * 9


def test_outputs_have_the_rows_that_stock_gives_them() -> None:
    stock = make()
    model = lmfuse.optimize(stock)
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    for mode in ("several", "samples"):
        expected, out = generate(stock, mode, **asked), generate(model, mode, **asked)
        assert torch.equal(out.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for a, b in zip(out[name], expected[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
            for a, b in zip(mine, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", [[2], [2, 7, 100, 500], [-1, 3]])
def test_quick_processors_give_the_scores_of_transformers(ends: list[int]) -> None:
    scores = torch.randn(3, 128)
    before = scores.clone()
    for length in (4, 8, 9, 12):
        ids = torch.zeros(3, length, dtype=torch.long)
        theirs = [
            MinLengthLogitsProcessor(9, torch.tensor(ends)),
            MinNewTokensLengthLogitsProcessor(5, 4, torch.tensor(ends)),
            TopKLogitsWarper(5),
        ]
        ours = quickened(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a(ids, scores), b(ids, scores))
            assert isinstance(a, type(b))
        assert (type(ours[0]) is type(theirs[0])) == (-1 in ends)
        assert ours[2] is theirs[2]
    assert torch.equal(scores, before)


class Seventh(StoppingCriteria):
    """Stops a row that is odd in its last token once it is long enough."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, -1] % 2 == 1) & (input_ids.shape[1] > 12)


class Stream:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_what_else_generate_takes() -> None:
    stock = make()
    models = [lmfuse.optimize(stock), bind(copy.deepcopy(stock))]
    extras: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9]]},
        {"stopping_criteria": StoppingCriteriaList([Seventh()])},
        {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])},
        {"attention_mask": None},
        {"prompt_lookup_num_tokens": 2, **ALONE},
        {"cache_implementation": "static"},
    ]
    for extra in extras:
        for mode in ("greedy",) if "prompt_lookup_num_tokens" in extra else ("several", "samples"):
            expected = generate(stock, mode, **extra)
            for model in models:
                assert torch.equal(generate(model, mode, **extra), expected), (extra, mode)
    expected_stream = Stream()
    generate(stock, streamer=expected_stream, **ALONE)
    for model in models:
        stream = Stream()
        generate(model, streamer=stream, **ALONE)
        assert stream.got == expected_stream.got
        assert stream.ended == 1
    assistant = make()
    expected = generate(stock, **ALONE)
    for model in models:
        assert torch.equal(generate(model, assistant_model=assistant, **ALONE), expected)


@pytest.mark.parametrize("mode", ["greedy", "several", "samples"])
def test_embeddings_in_place_of_ids(mode: str) -> None:
    stock = make()
    embeds = stock.get_input_embeddings()(batch()["input_ids"]).detach()
    given = {"input_ids": None, "inputs_embeds": embeds}
    expected = generate(stock, mode, **given)
    for model in (lmfuse.optimize(stock), bind(copy.deepcopy(stock))):
        watch = Watch(model)
        assert torch.equal(generate(model, mode, **given), expected)
        assert watch.prompt() == 0


def test_generation_goes_on_from_a_cache_that_is_filled() -> None:
    ids = []
    for model in (make(), lmfuse.optimize(make())):
        first = generate(model, return_dict_in_generate=True, max_new_tokens=6, **ALONE)
        longer = torch.cat([first.sequences, torch.tensor([[9, 11]])], 1)
        ids.append(model.generate(longer, past_key_values=first.past_key_values, **LENGTH))
    assert torch.equal(*ids)


def expanded(beams: int) -> dict[str, Tensor]:
    return {k: v.repeat_interleave(beams, 0) for k, v in batch().items()}


@pytest.mark.parametrize("make_model", [make, lambda: lmfuse.optimize(make()), tuple_model])
def test_called_directly_with_the_arguments_of_ipex(make_model: Callable[[], Any]) -> None:
    model = bind(make_model())
    watch = Watch(model)
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    end = StoppingCriteriaList([MaxLengthCriteria(21)])
    greedy = generate(model, "greedy")
    assert torch.equal(model.greedy_search(ids, None, None, 21, attention_mask=mask), greedy)
    assert torch.equal(model.greedy_search(ids, None, end, attention_mask=mask), greedy)
    config = GenerationConfig(max_new_tokens=12, num_beams=3, num_return_sequences=2)
    expected = generate(model, "beams", num_return_sequences=2, min_new_tokens=None)
    watch.seen.clear()
    many = expanded(3)
    beams = model.beam_search(many.pop("input_ids"), None, None, config, False, **many)
    assert torch.equal(beams, expected)
    assert watch.prompt() == 2 * 9
    warp = LogitsProcessorList([TopKLogitsWarper(50)])
    expected = generate(model, "sampling")
    torch.manual_seed(5)
    drawn = model.sample(ids, None, None, warp, 21, attention_mask=mask)
    assert torch.equal(drawn, expected)
    config.do_sample = True
    expected = generate(model, "beam sample")
    many = expanded(3)
    torch.manual_seed(5)
    drawn = model.beam_sample(many.pop("input_ids"), warp, None, config, False, **many)
    assert torch.equal(drawn, expected)


def test_direct_calls_count_positions_from_the_padding_on() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    config = transformers.GPT2Config(**sizes, n_positions=32, eos_token_id=None, pad_token_id=0)
    stock = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        stock.transformer.wpe.weight.mul_(50)
    beams = GenerationConfig(max_new_tokens=12, num_beams=3)
    for model in (stock, lmfuse.optimize(stock)):
        inputs = batch()
        found = lmfuse.generation.hf_greedy_search(model, max_length=21, **inputs)
        assert torch.equal(found, generate(stock))
        found = lmfuse.generation.hf_beam_search(model, generation_config=beams, **expanded(3))
        assert torch.equal(found, generate(stock, num_beams=3))
    wrong = lmfuse.generation.hf_greedy_search(
        stock, max_length=21, **batch(), position_ids=torch.arange(9)[None].expand(2, -1)
    )
    assert not torch.equal(wrong, generate(stock))


def test_direct_calls_keep_to_what_they_are_given() -> None:
    model = make()
    ids = batch()["input_ids"][1:]
    greedy = lmfuse.generation.hf_greedy_search
    model.generation_config.repetition_penalty = 5.0  # which is for generate alone
    plain = greedy(model, ids, max_length=15)
    penalized = greedy(model, ids, [RepetitionPenaltyLogitsProcessor(5.0)], max_length=15)
    assert torch.equal(penalized, model.generate(ids, max_length=15, do_sample=False))
    assert not torch.equal(plain, penalized)
    ends = int(plain[0, 11])
    stopped = greedy(model, ids, max_length=15, eos_token_id=ends)
    assert torch.equal(stopped, plain[:, : plain[0].tolist().index(ends, 9) + 1])
    out = greedy(model, ids, None, [EosTokenCriteria(ends)], output_scores=True,
                 return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(out.sequences, stopped)
    assert len(out.scores) == stopped.shape[1] - 9
    rows = torch.cat([ids, ids.flip(1), ids])  # not the rows of one prompt
    config = GenerationConfig(max_length=12, num_beams=3)
    watch = Watch(model)
    lmfuse.generation.hf_beam_search(model, rows, None, None, config)
    assert watch.prompt() == 3 * 9
    sampled = lmfuse.generation.hf_sample(
        model, ids, max_length=15, generation_config=GenerationConfig(do_sample=False)
    )
    assert torch.equal(sampled, plain)


def test_refusals() -> None:
    model = make()
    ids = batch()["input_ids"]
    with pytest.raises(ValueError, match="nothing says when to stop"):
        lmfuse.generation.hf_greedy_search(model, ids)
    with pytest.raises(ValueError, match="input_ids has 2 rows, but must have a multiple of num_b"):
        lmfuse.generation.hf_beam_search(model, ids, None, None, GenerationConfig(num_beams=3))
    with pytest.raises(TypeError, match="Linear is no model that transformers generates with"):
        lmfuse.generation.hf_sample.__get__(nn.Linear(1, 1))


@pytest.mark.parametrize("optimized", [False, True])
def test_token_latency(optimized: bool) -> None:
    model = bind(make())
    if optimized:
        model = lmfuse.optimize(model)
    expected = generate(model, "beams")
    model.config.token_latency = True
    ids, seconds = generate(model, "beams")
    assert torch.equal(ids, expected)
    assert len(seconds) == 12
    assert all(s > 0 for s in seconds)
    criteria = StoppingCriteriaList([MaxLengthCriteria(11)])
    ids, seconds = generate(model, stopping_criteria=criteria)
    assert ids.shape[1] == 11
    assert len(seconds) == 2
    assert len(criteria) == 1
    ids, seconds = model.generate(ids, None, None, criteria, max_new_tokens=4, do_sample=False)
    assert len(seconds) == 1
    ids, seconds = model.greedy_search(batch()["input_ids"], max_length=12)
    assert len(seconds) == 3


def test_binding_changes_one_model_alone() -> None:
    model, other = make(), make()
    bind(model)
    assert vars(other).keys() == vars(make()).keys()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.generate.args == clone.beam_search.args == (clone,)
        assert clone.beam_search.func is lmfuse.generation.hf_beam_search
        assert torch.equal(generate(clone, "beams"), generate(model, "beams"))
    watch = Watch(other)
    generate(other, "beams")
    assert watch.prompt() == 3 * 2 * 9
