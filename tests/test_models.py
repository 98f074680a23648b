"""optimize on tiny models of all families: the same logits and tokens, and everything back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lmfuse
from lmfuse import hf

LAYERS = 2
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
HEAD = {"head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MPT = {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
RMS, OFFSET, LN = "rms_norm", "rms_norm (weight + 1)", "layer_norm"
SILU, TANH, HALF = "silu_mul", "gelu_mul (tanh)", "rope (half)"
ATTENTION, GELU_MLP, TANH_MLP = "attention", "linear + gelu", "linear + gelu_tanh"

# name: (family, config, norms in each layer and their kind, what else each layer has fused)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, str], set[str]]] = {
    "llama": ("llama", {}, (2, RMS), {SILU, HALF}),
    "mistral": ("mistral", {"sliding_window": 6}, (2, RMS), {SILU, HALF}),
    "qwen2": ("qwen2", {}, (2, RMS), {SILU, HALF}),
    "qwen3": ("qwen3", HEAD, (4, RMS), {SILU, HALF}),
    "phi": ("phi", {}, (1, LN), {TANH_MLP, HALF}),
    "phi3": ("phi3", {}, (2, RMS), {SILU, HALF}),
    "gemma": ("gemma", HEAD, (2, OFFSET), {TANH, HALF}),
    "gemma2": ("gemma2", {**HEAD, **MIXED}, (4, OFFSET), {TANH, HALF}),
    "gemma3": ("gemma3_text", {**HEAD, **MIXED}, (6, OFFSET), {TANH, HALF}),
    "granite": ("granite", {"attention_multiplier": 0.3}, (2, RMS), {SILU, HALF}),
    "stablelm": ("stablelm", {}, (2, LN), {SILU, HALF}),
    "olmo2": ("olmo2", {}, (4, RMS), {SILU, HALF}),
    "starcoder2": ("starcoder2", {}, (2, LN), {TANH_MLP, HALF}),
    "gpt_neox": ("gpt_neox", {}, (2, LN), {GELU_MLP, HALF}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}, (1, LN), {TANH_MLP, ATTENTION}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, (2, LN), set()),
    "gpt2": ("gpt2", GPT, (2, LN), {TANH_MLP}),
    "gpt_bigcode": ("gpt_bigcode", GPT, (2, LN), {TANH_MLP}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4}, (1, LN), {TANH_MLP, ATTENTION}),
    "falcon": ("falcon", {"num_kv_heads": None}, (1, LN), {GELU_MLP, ATTENTION}),
    "falcon new": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        (2, LN),
        {GELU_MLP, ATTENTION},
    ),
    "falcon alibi": (
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": None},
        (2, LN),
        {GELU_MLP, ATTENTION},
    ),
    "bloom": ("bloom", {"n_layer": LAYERS, "n_head": 4}, (2, LN), {TANH_MLP, ATTENTION}),
    "mpt": ("mpt", {**MPT, "n_heads": 6, "d_model": 48}, (2, LN), {GELU_MLP, ATTENTION}),
    "cohere": ("cohere", {}, (1, LN), {SILU, "rope (interleaved, doubled table)"}),
    "mixtral": ("mixtral", {"num_local_experts": 4}, (2, RMS), {HALF}),
    "qwen3_moe": (
        "qwen3_moe",
        {**HEAD, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        (4, RMS),
        {HALF},
    ),
}
EXTRA_NORMS = {"bloom": 2}  # besides the last one


def make(name: str = "llama", **changed: Any) -> Any:
    """A random model whose attention, experts and next tokens vary."""
    family, settings, _, _ = FAMILIES[name]
    config = transformers.AutoConfig.for_model(family, **{**TINY, **settings, **changed})
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:  # biases 0 and norms 1 would hide a lost one
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(tokens: int = 9) -> dict[str, Tensor]:
    """Three prompts, padded on the left."""
    ids = torch.randint(3, 96, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    """Of the tokens that are not padding."""
    inputs = inputs or batch()
    out: Tensor = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def generate(model: Any, beams: int = 1, **kwargs: Any) -> Tensor:
    settings = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "no_repeat_ngram_size": 1,  # or a random model may say one token for ever
    }
    ids: Tensor = model.generate(**{**batch(), **settings, **kwargs})
    return ids


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_and_generates_what_stock_does(name: str) -> None:
    stock = make(name)
    fused = lmfuse.optimize(stock)
    close(logits(fused), logits(stock))
    ids = batch()["input_ids"]
    close(logits(fused, input_ids=ids), logits(stock, input_ids=ids))
    close(logits(fused, input_ids=ids[:1]), logits(stock, input_ids=ids[:1]))
    assert torch.equal(generate(fused), generate(stock))
    assert torch.equal(generate(fused, 4), generate(stock, 4))
    one = {"input_ids": ids[:1], "attention_mask": None}
    assert torch.equal(generate(fused, **one), generate(stock, **one))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_fused_and_comes_back(name: str, tmp_path: Path) -> None:
    stock, model = make(name), make(name)
    kinds = [type(module) for module in model.modules()]
    expected, state = logits(stock), stock.state_dict()
    assert lmfuse.optimize(model, inplace=True) is model
    report = hf.report(model)
    _, _, (count, norm), others = FAMILIES[name]
    wanted = {norm: count * LAYERS + EXTRA_NORMS.get(name, 1), **dict.fromkeys(others, LAYERS)}
    replaced = {k: v for k, v in report.replaced.items() if k != ATTENTION}
    assert Counter(replaced.values()) == wanted
    assert report.replaced[ATTENTION] == ATTENTION
    assert not report.stock

    fused = [type(module) for module in model.modules()]
    assert lmfuse.optimize(model, inplace=True) is model
    assert [type(module) for module in model.modules()] == fused
    assert hf.report(model) == report

    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for found in (model.state_dict(), again.state_dict()):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())

    assert lmfuse.restore(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), expected)
