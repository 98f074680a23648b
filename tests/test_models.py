"""optimize on tiny models of all families: the same logits and tokens, and everything back."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lmfuse
from lmfuse import hf
from lmfuse.functional import packed
from lmfuse.generation import Cache

experts = sys.modules["lmfuse.functional.experts"]  # the name is that of the function

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
# Which layers run whole is a matter of test_decoder_models.py.
WHOLE = {"decoder layer", "stack of decoder layers", "table of angles"}

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
    "olmo": ("olmo", {}, (2, LN), {SILU, HALF}),
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
FAMILIES["qwen2_moe"] = (
    "qwen2_moe",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    (2, RMS),
    {SILU, HALF},
)
FAMILIES["gpt_oss"] = (
    "gpt_oss",
    {**HEAD, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    (2, RMS),
    {"rope (half, single table)"},
)
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
    replaced = {k: v for k, v in report.replaced.items() if k != ATTENTION and v not in WHOLE}
    assert Counter(replaced.values()) == wanted
    assert report.replaced[ATTENTION] == ATTENTION
    assert all(re.fullmatch(r"[a-z.]*\.(h|layers|blocks)\.\d", k) for k in report.stock)

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


# --- encoder-decoders ----------------------------------------------------------------------------


def seq2seq(family: str) -> tuple[Any, dict[str, Tensor]]:
    """A model and its inputs."""
    g = torch.Generator().manual_seed(1)
    if family == "t5":
        sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": LAYERS}
        config: Any = transformers.T5Config(**sizes, vocab_size=96, decoder_start_token_id=0)
        model: Any = transformers.T5ForConditionalGeneration(config)
        return model.eval(), batch()
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": LAYERS, "decoder_layers": LAYERS}
    ids = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    length = {"max_source_positions": 30, "max_target_positions": 32, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **heads, **layers, **ids, **length)
    model = transformers.WhisperForConditionalGeneration(config)
    return model.eval(), {"input_features": torch.randn(3, 8, 60, generator=g)}


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_encoder_decoders_are_unharmed_and_packed(family: str) -> None:
    torch.manual_seed(0)
    stock, inputs = seq2seq(family)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(2)
    kinds = [type(module) for module in stock.modules()]
    fused = lmfuse.optimize(stock)
    linears = sum(isinstance(m, torch.nn.Linear) for m in stock.modules())
    assert (
        len([k for k in hf.report(fused).packed if "embed" not in k and "shared" not in k])
        == linears
    )
    start = torch.tensor([[1, 5, 7, 9]] * 3)
    with torch.no_grad():
        close(
            fused(**inputs, decoder_input_ids=start).logits,
            stock(**inputs, decoder_input_ids=start).logits,
        )
    for beams in (1, 4):
        length = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        assert torch.equal(fused.generate(**inputs, **length), stock.generate(**inputs, **length))
    assert [type(module) for module in lmfuse.restore(fused).modules()] == kinds


# --- other masks, caches and calls ---------------------------------------------------------------

OWN = ("gptj", "codegen", "falcon", "falcon new", "falcon alibi", "bloom", "mpt")


@pytest.mark.parametrize("name", OWN)
def test_attention_of_our_own_under_all_masks_and_caches(name: str) -> None:
    stock = make(name)
    stock.set_attn_implementation("eager")
    fused = lmfuse.optimize(stock)
    ids = batch()["input_ids"]
    for hidden in ([(0, slice(6, 9))], [(1, slice(3, 5)), (2, slice(0, 2))]):  # right, and within
        mask = torch.ones_like(ids)
        for row, columns in hidden:
            mask[row, columns] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        close(logits(fused, **inputs), logits(stock, **inputs))
        cache = Cache(fused.config)
        with torch.no_grad():
            first = {"input_ids": ids[:, :8], "attention_mask": mask[:, :8]}
            fused(**first, past_key_values=cache)
            last = fused(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
            seen = mask[:, 8].bool()
            close(last[seen, 0], stock(**inputs).logits[seen, 8])
    for beams in (1, 3):
        expected = generate(stock, beams)
        assert torch.equal(generate(fused, beams, cache_implementation="dynamic"), expected)
        assert torch.equal(generate(fused, beams, use_cache=False), expected)


# Of Falcon with ALiBi, transformers' eager attention adds the bias twice.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"falcon alibi"}))
def test_attention_weights_for_who_asks(name: str) -> None:
    stock = make(name)
    stock.config._attn_implementation = "eager"  # Falcon refuses the function that sets it
    fused = lmfuse.optimize(stock)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = stock(ids, output_attentions=True)
        with pytest.warns(UserWarning, match="output_attentions asks for"):
            out = fused(ids, output_attentions=True)
    close(out.logits, expected.logits)
    assert len(out.attentions) == LAYERS
    for mine, theirs in zip(out.attentions, expected.attentions, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_generates_in_half_precision(name: str, kind: torch.dtype) -> None:
    fused = lmfuse.optimize(make(name), dtype=kind)
    assert generate(fused, 3).shape == (3, 17)
    out = logits(fused)
    assert out.dtype is kind
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["llama", "olmo", "olmo2", "gptj", "bloom", "gpt2", "mixtral"])
def test_half_precision_is_as_near_to_float32_as_stock(name: str) -> None:
    model = make(name).bfloat16()
    exact = logits(make(name).bfloat16().float())
    out, stock = logits(lmfuse.optimize(model)), logits(model)
    assert out.dtype is torch.bfloat16
    assert (out - exact).abs().mean() <= 1.25 * (stock - exact).abs().mean()


def test_conv1d_is_packed_and_keeps_its_shape() -> None:
    stock = make("gpt2")
    fused = lmfuse.optimize(stock)
    layer, plain = fused.transformer.h[0].attn.c_attn, stock.transformer.h[0].attn.c_attn
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 96), torch.float32)
    assert torch.equal(layer.weight + 0, plain.weight)
    again = copy.deepcopy(fused)
    other = {k: v * 2 for k, v in stock.state_dict().items()}
    again.load_state_dict(other)
    stock.load_state_dict(other)
    close(logits(again), logits(stock))
    assert torch.equal(layer.weight + 0, plain.weight / 2)
    assert again.to(torch.bfloat16).transformer.h[0].attn.c_attn.weight.shape == (32, 96)
    assert torch.equal(logits(pickle.loads(pickle.dumps(fused))), logits(fused))


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(name: str, tied: bool) -> None:
    stock = make(name, tie_word_embeddings=tied)
    fused = lmfuse.optimize(stock)
    generate(fused)
    for size in (110, 97):
        for model in (stock, fused):
            torch.manual_seed(4)
            model.resize_token_embeddings(size, mean_resizing=False)
        assert logits(fused).shape[-1] == size
        close(logits(fused), logits(stock))
        assert torch.equal(generate(fused, 3), generate(stock, 3))


# --- bad input -----------------------------------------------------------------------------------


def test_inputs_that_cannot_be_are_refused_in_words() -> None:
    ids = batch()["input_ids"]
    legacy = tuple((torch.zeros(3, 2, 4, 8),) * 2 for _ in range(LAYERS))
    fused = lmfuse.optimize(make())
    with pytest.raises(TypeError, match="past_key_values is a tuple, but not of"):
        fused(ids, past_key_values=legacy)
    with pytest.raises(ValueError, match=r"input_ids has shape \(3, 0\), but must have at least"):
        fused(ids[:, :0])
    with pytest.raises(ValueError, match=r"input_ids has shape \(3, 0\), but must have at least"):
        fused.generate(ids[:, :0], max_new_tokens=2)
    fused.register_forward_pre_hook(lambda *_: {}["nothing"])
    with pytest.raises(KeyError):  # what is not the input's fault comes through
        fused(ids)
    loss = lmfuse.optimize(make()).train()(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match=r"no backward: lmfuse is for inference"):
        loss.backward()
    with pytest.raises(ValueError, match=r"in training mode, but lmfuse is for inference"):
        lmfuse.optimize(make("gptj")).train()(ids)


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt2", "opt", "bloom", "mpt"])
def test_prompts_beyond_the_position_limit(name: str) -> None:
    """As stock, or refused where stock fails with an index error."""
    stock = make(name)
    fused = lmfuse.optimize(stock)
    ids = torch.arange(70)[None] % 90 + 3
    if name in ("llama", "bloom"):
        close(logits(fused, input_ids=ids), logits(stock, input_ids=ids))
    elif name == "mpt":  # ALiBi knows no limit; stock's table does
        assert torch.isfinite(logits(fused, input_ids=ids)).all()
    else:
        with pytest.raises(ValueError, match="70 tokens are more than this model has positions"):
            fused(ids)
        with pytest.raises(ValueError, match="65 tokens are more than this model has positions"):
            fused.generate(ids[:, :60], max_new_tokens=9, min_new_tokens=9)
        assert torch.equal(generate(fused), generate(stock))


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_batch_sizes_may_change_between_calls(name: str) -> None:
    stock = make(name)
    fused = lmfuse.optimize(stock)
    whole = batch()
    for rows, beams in ((3, 1), (1, 4), (2, 1), (3, 3), (1, 1)):
        part = {key: value[:rows] for key, value in whole.items()}
        assert torch.equal(generate(fused, beams, **part), generate(stock, beams, **part))


def test_two_models_and_two_threads_do_not_meet() -> None:
    stock = make("gptj")
    models = [lmfuse.optimize(make(name)) for name in ("gptj", "bloom", "mixtral")]
    models += [models[0], stock]  # one model with two caches; one that is stock
    expected = [generate(model, 4) for model in models]
    assert torch.equal(expected[0], expected[4])
    with ThreadPoolExecutor(len(models)) as pool:
        results = list(pool.map(lambda model: generate(model, 4), models))
    assert all(map(torch.equal, results, expected))
    assert torch.equal(generate(make("gptj"), 4), expected[4])  # made afterwards, and stock


def test_a_model_that_another_library_quantized_keeps_its_layers() -> None:
    model = make()
    linears = {torch.nn.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, linears, torch.qint8)
    fused = lmfuse.optimize(quantized)
    assert not hf.report(fused).packed
    close(logits(fused), logits(quantized))


@pytest.mark.parametrize("name", ["gptj", "gpt2", "mixtral"])
@pytest.mark.parametrize("after", [0, 3, 8])
def test_an_exception_while_packing_leaves_the_model_as_before(
    name: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    kinds, expected = [type(module) for module in model.modules()], logits(model)
    calls, pack = iter(range(after)), packed._pack_bytes

    def failing(*args: Any) -> Tensor:
        if next(calls, None) is None:
            raise MemoryError("no more")
        return pack(*args)

    monkeypatch.setattr(packed, "_pack_bytes", failing)
    monkeypatch.setattr(experts, "_pack_bytes", failing)
    with pytest.raises(MemoryError, match="no more"):
        lmfuse.optimize(model, inplace=True)
    assert [type(module) for module in model.modules()] == kinds
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert hf.report(model) == hf.Report()
    assert torch.equal(logits(model), expected)
