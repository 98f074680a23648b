"""Our attention and cache in transformers' models, against their own eager attention."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import lmfuse
from lmfuse import hf
from lmfuse.generation import Cache
from lmfuse.hf import attention

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, **MIXED},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, **MIXED},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "rope_parameters": None, **MIXED},
}
# Which say their window in the mask alone.
SILENT = {"qwen2_moe": {"use_sliding_window": True, "num_experts": 4, **MIXED}}


def make(family: str = "llama", **changed: Any) -> Any:
    """A random model whose attention and next tokens vary."""
    settings = {**TINY, **{**FAMILIES, **SILENT}[family], **changed}
    settings = {k: v for k, v in settings.items() if v is not None or k == "eos_token_id"}
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
            elif "q_proj" in name or "k_proj" in name or "v_proj" in name or "embed" in name:
                parameter.mul_(5)
    return model


def ours(model: Any) -> Any:
    """A copy of which nothing but the attention is ours."""
    attention.register()
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention.NAME)
    return model


def batch(tokens: int = 9) -> dict[str, Tensor]:
    """Three prompts, padded on the left."""
    ids = torch.randint(3, 128, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *SILENT])
@torch.no_grad()
def test_logits_are_those_of_eager_attention(family: str) -> None:
    stock = make(family)
    mine = ours(stock)
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    ids = inputs["input_ids"]
    expected = stock(**inputs).logits[seen]
    close(mine(**inputs).logits[seen], expected)
    close(mine(**inputs, past_key_values=Cache(stock.config)).logits[seen], expected)
    whole = stock(ids).logits
    close(mine(ids).logits, whole)
    close(mine(ids, use_cache=False).logits, whole)
    assert not torch.allclose(stock(**inputs).logits[seen], whole[seen], atol=1e-3)

    cache = Cache(stock.config)  # prefilled in chunks
    pieces = [mine(part, past_key_values=cache).logits for part in ids.split([4, 1, 4], dim=1)]
    close(torch.cat(pieces, 1), whole)

    right = torch.ones_like(ids)
    right[0, 7:] = right[1, 2] = 0  # padded at the right, and within
    seen = right.bool()
    close(
        mine(ids, attention_mask=right, past_key_values=Cache(stock.config)).logits[seen],
        stock(ids, attention_mask=right).logits[seen],
    )

    static = transformers.StaticCache(stock.config, max_cache_len=32)
    fixed = transformers.StaticCache(stock.config, max_cache_len=32)
    for part in ids.split([5, 1, 3], dim=1):
        close(mine(part, past_key_values=static).logits, stock(part, past_key_values=fixed).logits)


@pytest.mark.parametrize(
    ("family", "sizes"), [("diffllama", {}), ("doge", {"keep_window_size": 5})]
)
def test_values_or_masks_that_a_model_computes_with(family: str, sizes: dict[str, Any]) -> None:
    """It attends to other values than those of its cache, or adds to a mask that it asks for."""
    config = transformers.AutoConfig.for_model(family, **TINY, **sizes)
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    mine = lmfuse.optimize(stock)
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        for given in (inputs, {"input_ids": inputs["input_ids"]}):
            torch.testing.assert_close(
                mine(**given).logits[seen], stock(**given).logits[seen], rtol=1e-4, atol=1e-4
            )
    for beams in (1, 3):
        assert torch.equal(generate(mine, num_beams=beams), generate(stock, num_beams=beams))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(family: str) -> None:
    stock = make(family)
    mine = ours(stock)
    ids = batch(18)["input_ids"][2:]
    positions = torch.cat([torch.arange(8), torch.arange(3), torch.arange(7)]).unsqueeze(0)
    alone = torch.cat([stock(part).logits for part in ids.split([8, 3, 7], dim=1)], 1)
    packed = {"position_ids": positions, "use_cache": False}
    edges = torch.tensor([0, 8, 11, 18], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    for name in (attention.NAME, attention.PAGED_NAME):
        mine.config._attn_implementation = name
        close(mine(ids, **packed, **lengths).logits, alone)
        if (family, name) == ("gpt_oss", attention.NAME):  # whose mask is not told the positions
            close(mine(ids, **packed).logits, stock(ids, **packed).logits)
        else:
            close(mine(ids, **packed).logits, alone)


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_taken_as_it_is() -> None:
    stock = make("mistral")
    mine = ours(stock)
    ids = batch()["input_ids"]
    seen = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = stock(ids, attention_mask=added).logits
    close(mine(ids, attention_mask=added).logits, expected)
    close(mine(ids, attention_mask=seen).logits, expected)


@torch.no_grad()
def test_position_bias_and_attention_without_causality() -> None:
    module = nn.Module()
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 2, 7, 16)
    bias = torch.randn(1, 4, 7, 7)
    padding = torch.arange(7) >= torch.tensor([[0], [3]])
    for causal in (False, True):
        for mask in (None, padding[:, None, None], padding) if causal else (None,):
            out, _ = attention.attention(
                module, query, key, value, mask, is_causal=causal, position_bias=bias
            )
            hide = (
                torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else torch.zeros(7, 7).bool()
            )
            if mask is not None and mask.dim() == 4:
                hide = ~mask.expand(2, 1, 7, 7)
            elif mask is not None:
                hide = hide | ~mask[:, None, None]
            scores = query.double() @ key.double().repeat_interleave(2, 1).mT / 4 + bias
            weights = scores.masked_fill(hide, -torch.inf).softmax(-1).nan_to_num()
            expected = weights @ value.double().repeat_interleave(2, 1)
            close(out, expected.transpose(1, 2).float())
    with pytest.raises(ValueError, match=r"dropout is 0\.1, but must be 0"):
        attention.attention(module, query, key, value, None, dropout=0.1)


@torch.no_grad()
def test_encoders_and_encoder_decoders() -> None:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    t5: Any = transformers.AutoModelForSeq2SeqLM
    config = transformers.T5Config(**sizes, vocab_size=128, decoder_start_token_id=0)
    stock = t5.from_config(config, attn_implementation="eager").eval()
    fused = lmfuse.optimize(stock)
    inputs = batch()
    expected = stock.generate(**inputs, max_new_tokens=6, num_beams=2)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=6, num_beams=2), expected)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**settings, intermediate_size=48, vocab_size=128)
    bert = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    assert hf.report(lmfuse.optimize(bert)).replaced["attention"] == "attention"
    seen = inputs["attention_mask"].bool()
    out = lmfuse.optimize(bert)(**inputs).last_hidden_state[seen]
    close(out, bert(**inputs).last_hidden_state[seen])


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 4},
}


def generate(model: Any, mode: str = "greedy", **kwargs: Any) -> Tensor:
    torch.manual_seed(5)
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    settings = {"do_sample": False, **length, **MODES[mode], **kwargs}
    ids: Tensor = model.generate(**batch(), **settings)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_ids_of_the_stock_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make(family)
    fused = lmfuse.optimize(stock)
    assert hf.report(fused).replaced["attention"] == "attention"
    used = 0

    def counting(method: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            used += 1
            return method(*args, **kwargs)

        return counted

    # Layers append by themselves, or all of them in one step where they run whole.
    monkeypatch.setattr(Cache, "update", counting(Cache.update))
    monkeypatch.setattr(Cache, "extend", counting(Cache.extend))
    for mode in MODES:
        used = 0
        expected = generate(stock, mode)
        assert used == 0
        assert torch.equal(generate(fused, mode), expected), mode
        assert used >= 24, mode
    assert len(expected.unique()) > 5  # not one token for ever


def test_a_cache_in_int8_says_nearly_the_same() -> None:
    stock = make()
    fused = lmfuse.optimize(stock)
    with torch.no_grad():
        inputs = batch()
        seen = inputs["attention_mask"].bool()
        cache = Cache(stock.config, torch.int8)
        out = fused(**inputs, past_key_values=cache).logits[seen]
        expected = stock(**inputs).logits[seen]
    error = (out - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 0.05
    generate(fused, "beams", past_key_values=Cache(stock.config, torch.int8))


def test_caches_that_are_not_ours_and_ours_elsewhere() -> None:
    stock = make("qwen3")
    fused = lmfuse.optimize(stock)
    expected = generate(stock, "beams")
    dynamic = transformers.DynamicCache(config=stock.config)
    assert torch.equal(generate(fused, "beams", past_key_values=dynamic), expected)
    assert torch.equal(generate(fused, "beams", cache_implementation="static"), expected)
    assert torch.equal(generate(fused, "beams", use_cache=False), expected)
    for implementation in ("eager", "sdpa"):
        stock.set_attn_implementation(implementation)
        cache = Cache(stock.config)
        assert torch.equal(generate(stock, "beams", past_key_values=cache), expected)
        for layer in cache.layers:
            assert layer.get_seq_length() == 9 + 24 - 1
    prompts: dict[str, Tensor] = {"input_ids": batch()["input_ids"][:1]}
    again = {"max_new_tokens": 9, "do_sample": False, "prompt_lookup_num_tokens": 2}
    assert torch.equal(fused.generate(**prompts, **again), stock.generate(**prompts, **again))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_generate_batch_gives_the_tokens_of_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = lmfuse.optimize(make(family))
    config = transformers.GenerationConfig(
        max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (n,), generator=g).tolist() for n in (3, 40, 75, 17)]
    expected = [
        fused.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist()
        for p in prompts
    ]
    places: list[bool] = []
    in_place = attention._in_place

    def watched(*args: Any) -> Any:
        found = in_place(*args)
        places.append(found is not None)
        return found

    monkeypatch.setattr(attention, "_in_place", watched)
    settings = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 32}
    found = fused.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
    )
    assert [result.generated_tokens for result in found.values()] == expected
    assert sum(places) >= 20
    assert fused.model.config._attn_implementation == attention.NAME

    monkeypatch.setattr(attention, "_in_place", lambda *_: None)  # a transformers that hides it
    found = fused.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
    )
    assert [result.generated_tokens for result in found.values()] == expected


def test_two_models_and_two_threads_do_not_meet() -> None:
    models = [lmfuse.optimize(make("qwen3")), lmfuse.optimize(make("gemma2"))]
    models.append(models[0])  # one model, two caches
    expected = [generate(model, "beams") for model in models]
    results: list[Tensor | None] = [None] * 3

    def run(i: int) -> None:
        results[i] = models[i].generate(
            **batch(), max_new_tokens=24, min_new_tokens=24, do_sample=False, num_beams=4
        )

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, ids in zip(results, expected, strict=True):
        assert result is not None
        assert torch.equal(result, ids)


def test_restore_leaves_nothing() -> None:
    stock = make()
    fused = lmfuse.optimize(stock)
    assert type(fused).__name__ == type(stock).__name__
    assert stock.config._attn_implementation == "eager"
    again = lmfuse.optimize(fused)
    assert again.model.config._attn_implementation == attention.NAME
    for model in (fused, again):
        lmfuse.restore(model)
        assert type(model) is type(stock)
        assert vars(model).keys() == vars(stock).keys()
        assert model.config._attn_implementation == "eager"
        assert model.model.config._attn_implementation == "eager"


def test_an_exception_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()

    def broken(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setitem(hf.optimize.__globals__, "_cast", broken)
    with pytest.raises(OSError, match="no"):
        lmfuse.optimize(model, dtype=torch.bfloat16, inplace=True)
    assert model.model.config._attn_implementation == "eager"
    assert type(model) is type(make())

    monkeypatch.undo()
    lmfuse.optimize(model, inplace=True)
    monkeypatch.setitem(hf.optimize.__globals__, "_cast", broken)
    with pytest.raises(OSError, match="no"):
        lmfuse.optimize(model, dtype=torch.bfloat16, inplace=True)
    assert model.model.config._attn_implementation == attention.NAME


def test_attention_weights_come_from_eager_attention() -> None:
    stock = make("gpt_oss")
    mine = ours(stock)
    inputs = batch()
    with torch.no_grad():
        expected = stock(**inputs, output_attentions=True)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            out = mine(**inputs, output_attentions=True, past_key_values=Cache(stock.config))
    assert [str(w.message)[:17] for w in warned] == ["output_attentions"]
    rows = inputs["attention_mask"].bool()[:, None].expand(3, 4, 9)
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        close(a[rows], b[rows])
    asked = make(attn_implementation="eager", output_attentions=True)
    assert "output_attentions" in hf.report(lmfuse.optimize(asked)).stock["attention"]


def test_models_without_the_interface_keep_their_attention() -> None:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]])
    model: Any = transformers.GPTNeoForCausalLM(config).eval()
    fused = lmfuse.optimize(model)
    assert "AttentionInterface" in hf.report(fused).stock["attention"]
    assert fused.config._attn_implementation == model.config._attn_implementation
    length = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        fused.generate(**batch(), **length, past_key_values=Cache(config)),
        model.generate(**batch(), **length),
    )


def test_registering_adds_names_and_changes_none() -> None:
    names = {attention.NAME, attention.PAGED_NAME}
    before = {k: v for k, v in AttentionInterface._global_mapping.items() if k not in names}
    attention.register()
    after = dict(AttentionInterface._global_mapping)
    assert after.keys() - before.keys() == names
    assert all(after[name] is function for name, function in before.items())
    assert names <= AttentionMaskInterface._global_mapping.keys()
