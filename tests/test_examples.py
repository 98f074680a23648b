"""The showcases in examples/: what stock transformers gives, from ordinary checkpoints."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig, OPTConfig
from transformers import GPTJForCausalLM as StockGPTJ
from transformers import LlamaForCausalLM as StockLlama
from transformers import OPTForCausalLM as StockOPT

import lmfuse

EXAMPLES = str(Path(__file__).parents[1] / "examples")
if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)

from modeling_gptj import GPTJForCausalLM  # noqa: E402
from modeling_llama import LlamaForCausalLM  # noqa: E402
from modeling_opt import OPTForCausalLM  # noqa: E402

VOCAB, EOS, PAD = 99, 2, 0
_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}


def _llama(**changed: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**_IDS, **{**sizes, **changed})


def _gptj(**changed: Any) -> GPTJConfig:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 6, "n_positions": 64}
    return GPTJConfig(**_IDS, **{**sizes, "initializer_range": 0.2, **changed})


def _opt(**changed: Any) -> OPTConfig:
    sizes = {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    }
    return OPTConfig(**_IDS, **{**sizes, **changed})


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: stock class, ours, configuration.
MODELS: dict[str, tuple[Any, Any, Callable[[], Any]]] = {
    "llama": (StockLlama, LlamaForCausalLM, _llama),
    "llama, tied, biases, wide heads, scaled RoPE": (
        StockLlama,
        LlamaForCausalLM,
        lambda: _llama(
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            head_dim=16,
            rope_parameters=_LLAMA3,
        ),
    ),
    "gptj": (StockGPTJ, GPTJForCausalLM, _gptj),
    "gptj, tied, whole heads turn": (
        StockGPTJ,
        GPTJForCausalLM,
        lambda: _gptj(tie_word_embeddings=True, rotary_dim=12, n_inner=100),
    ),
    "opt": (StockOPT, OPTForCausalLM, _opt),
    "opt, untied, norms last, narrow embedding, gelu": (
        StockOPT,
        OPTForCausalLM,
        lambda: _opt(
            tie_word_embeddings=False,
            do_layer_norm_before=False,
            word_embed_proj_dim=24,
            activation_function="gelu",
            enable_bias=False,
        ),
    ),
}


def _randomized(model: nn.Module) -> nn.Module:
    """Norms and biases begin as ones and zeros, which hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(0.5, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stock model, and ours from the folder that the stock one was saved to."""
    stock_class, our_class, config = MODELS[request.param]
    torch.manual_seed(0)
    stock = _randomized(stock_class(config()))
    folder = tmp_path_factory.mktemp("model")
    stock.save_pretrained(folder)
    ours, info = our_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert ours.state_dict().keys() == stock.state_dict().keys()
    return stock, ours.eval()


@pytest.fixture(params=["plain", "optimized"])
def models(pair: Any, request: pytest.FixtureRequest) -> Any:
    stock, ours = pair
    return stock, lmfuse.optimize(ours) if request.param == "optimized" else ours


def _prompt(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids[:1], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    seen = torch.ones_like(ids)
    seen[0, :3] = seen[1, :1] = 0
    return {"input_ids": ids * seen, "attention_mask": seen}


@torch.no_grad()
def test_logits(models: Any) -> None:
    stock, ours = models
    inputs = _prompt(padded=True)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    seen = inputs["attention_mask"].bool()
    expected = stock(**inputs).logits[seen]
    torch.testing.assert_close(ours(**inputs).logits[seen], expected, rtol=0, atol=1e-4)
    whole = _prompt(padded=False)["input_ids"]
    last = ours(whole, logits_to_keep=1).logits
    torch.testing.assert_close(last, stock(whole).logits[:, -1:], rtol=0, atol=1e-4)


WAYS = {
    "greedy": {"do_sample": False},
    "4 beams": {"num_beams": 4, "do_sample": False, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "4 beams, sampling": {"num_beams": 4, "do_sample": True},
}


@pytest.mark.parametrize(
    ("way", "padded"),
    [("greedy", False), ("4 beams", True), ("sampling", True), ("4 beams, sampling", False)],
)
def test_generates_the_same_ids(pair: Any, way: str, padded: bool) -> None:
    stock, ours = pair
    found = []
    for model in (stock, lmfuse.optimize(ours)):
        torch.manual_seed(3)
        found.append(model.generate(**_prompt(padded), max_new_tokens=7, **WAYS[way]))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_prompt_in_two_parts(pair: Any) -> None:
    _, ours = pair
    inputs = _prompt(padded=False)["input_ids"]
    whole = ours(inputs).logits
    first = ours(inputs[:, :4])
    rest = ours(inputs[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=0, atol=1e-5)


def test_a_cache_that_grows(pair: Any) -> None:
    """Beyond text_max_length, which the caches begin with, without optimize."""
    stock, ours = pair
    ours = copy.deepcopy(ours)
    for module in ours.modules():
        if isinstance(module, lmfuse.modules.IndirectAccessKVCacheAttention):
            module.text_max_length = 8
    inputs = _prompt(padded=False)
    ids = [model.generate(**inputs, max_new_tokens=12, num_beams=2) for model in (stock, ours)]
    assert torch.equal(*ids)


def test_only_the_head_of_the_last_token(pair: Any) -> None:
    _, ours = pair
    ids = _prompt(padded=False)["input_ids"]
    with torch.no_grad():
        expected = ours(ids).logits[:, -1:]
        ours.config.lm_head_generation = True
        try:
            torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
        finally:
            del ours.config.lm_head_generation


@pytest.mark.parametrize(
    ("model", "config", "text"),
    [
        (LlamaForCausalLM, lambda: _llama(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (GPTJForCausalLM, lambda: _gptj(activation_function="relu"), "gelu_new"),
        (OPTForCausalLM, lambda: _opt(activation_function="silu"), "one of relu, gelu"),
    ],
)
def test_refuses_what_it_is_not(model: Any, config: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model(config())


def test_needs_ids_or_embeddings(pair: Any) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        pair[1]()
