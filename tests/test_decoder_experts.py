"""Models with mixtures of experts whose layers run in the decoder op; the op itself:
test_decoder.py, quantized: test_quantized_experts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lmfuse
from helpers import BF16, assert_same_bits
from lmfuse import hf
from lmfuse.generation import Cache
from test_decoder_models import generated, inputs
from test_hf_attention import TINY

QWEN = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
SHARED = {**QWEN, "shared_expert_intermediate_size": 48}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "qwen3_moe": ("qwen3_moe", QWEN),
    "normalized": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "one of each kind": ("qwen3_moe", {**QWEN, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "shared expert": ("qwen2_moe", SHARED),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss, yarn": ("gpt_oss", {**GPT_OSS, "num_hidden_layers": 4, "swiglu_limit": 2.0}),
    "shared expert, dense": ("qwen2_moe", {**SHARED, "mlp_only_layers": [1]}),
}


def model_of(name: str = "qwen3_moe", **changed: Any) -> Any:
    family, settings = FAMILIES[name]
    given = {k: v for k, v in TINY.items() if k != "eos_token_id"}
    config = transformers.AutoConfig.for_model(
        family, **{**given, **settings, "eos_token_id": 2, **changed}
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, runs: list[int]) -> None:
    stock = model_of(name)
    model = lmfuse.optimize(stock)
    runs.clear()
    for padded in (False, True):
        for beams in (1, 4):
            options = {"num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
            expected, found = (generated(m, padded, **options) for m in (stock, model))
            assert torch.equal(found.sequences, expected.sequences)
            if beams == 1:
                for a, b in zip(found.logits, expected.logits, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert set(runs) == {stock.config.num_hidden_layers}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("qwen3_moe", None),
        ("qwen3_moe", 8),
        ("qwen3_moe", 4),
        ("shared expert", None),
        ("shared expert, dense", 8),
        ("gpt_oss", None),
        ("gpt_oss", 4),
    ],
)
def test_a_row_has_the_same_bits_in_any_piece(
    name: str, bits: int | None, isa: str, runs: list[int]
) -> None:
    config = None if bits is None else lmfuse.WeightOnlyConfig(bits, compute="bf16")
    model = lmfuse.optimize(model_of(name).to(BF16), quantization_config=config)
    ids = torch.randint(3, 128, (2, 21))

    def logits(*sizes: int, rows: slice = slice(None)) -> torch.Tensor:
        cache, pieces = Cache(model.config), []
        for piece in torch.split(ids[rows], list(sizes), 1):
            with torch.no_grad():
                pieces.append(model(piece, past_key_values=cache).logits)
        return torch.cat(pieces, 1)

    whole = logits(21)
    assert_same_bits(logits(12, 1, 1, 7), whole)
    assert_same_bits(logits(*[1] * 21, rows=slice(1, 2)), whole[1:])
    torch.set_num_threads(1)
    assert_same_bits(logits(21), whole)
    assert 2 in runs


def test_what_is_written_into_a_router_counts(runs: list[int]) -> None:
    stock = model_of()
    model = lmfuse.optimize(stock)
    before = generated(model)
    for each in (stock, model):
        with torch.no_grad():
            each.model.layers[0].mlp.gate.weight.mul_(-1)
            each.model.layers[1].mlp.gate.weight = torch.nn.Parameter(
                each.model.layers[1].mlp.gate.weight.flip(0)
            )
    expected = generated(stock)
    assert not torch.equal(expected, before)
    assert torch.equal(generated(model), expected)
    assert 2 in runs


@pytest.mark.parametrize(
    "part", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.gate_up_proj_bias"]
)
def test_what_is_written_into_a_vector_counts(part: str, runs: list[int]) -> None:
    """Of gpt-oss, of which the op reads copies."""
    stock = model_of("gpt_oss").to(BF16)
    model = lmfuse.optimize(stock)
    before = generated(model, output_logits=True, return_dict_in_generate=True).logits[0]
    with torch.no_grad():
        for each in (stock, model):
            each.get_parameter(f"model.layers.0.{part}").copy_(
                torch.randn(
                    each.get_parameter(f"model.layers.0.{part}").shape,
                    generator=torch.Generator().manual_seed(5),
                )
                * 4
            )
    runs.clear()
    found = generated(model, output_logits=True, return_dict_in_generate=True).logits[0]
    assert set(runs) == {2}
    assert_same_bits(
        found,
        generated(lmfuse.optimize(stock), output_logits=True, return_dict_in_generate=True).logits[
            0
        ],
    )
    assert not torch.equal(found, before)


@pytest.mark.parametrize("part", ["mlp", "mlp.gate", "mlp.experts"])
def test_who_looks_inside_sees_it(part: str, runs: list[int]) -> None:
    model, seen = lmfuse.optimize(model_of()), 0

    def hook(*_: Any) -> None:
        nonlocal seen
        seen += 1

    expected = generated(model)
    runs.clear()
    handle = model.get_submodule(f"model.layers.0.{part}").register_forward_hook(hook)
    assert torch.equal(generated(model), expected)
    assert seen == 10
    handle.remove()
    assert torch.equal(generated(model), expected)
    assert seen == 10


def test_router_logits_and_restore() -> None:
    stock = model_of()
    model = lmfuse.optimize(stock)
    with torch.no_grad():
        cache = Cache(model.config)
        found = model(**inputs(False), past_key_values=cache, output_router_logits=True)
        expected = stock(**inputs(False), output_router_logits=True)
    assert len(found.router_logits) == len(expected.router_logits)
    for a, b in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    restored = lmfuse.restore(model)
    assert torch.equal(generated(restored), generated(stock))
    assert "model.layers" not in hf.report(restored).replaced
