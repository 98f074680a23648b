"""optimize and restore on tiny models of many families, and on a real one."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import lmfuse
from lmfuse import hf
from lmfuse.bench.models import quiet
from lmfuse.cli import demo
from lmfuse.hf import swap

LAYERS = 2
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPTJ = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8}
HEAD = {"head_dim": 16}
RMS, OFFSET, LAYER_NORM = "rms_norm", "rms_norm (weight + 1)", "layer_norm"
SILU, GELU_TANH = "silu_mul", "gelu_mul (tanh)"
HALF, GLM, COHERE = "rope (half)", "rope (interleaved)", "rope (interleaved, doubled table)"
ATTENTION, TANH_MLP = "attention", "linear + gelu_tanh"


def _counts(norm: str, norms: int, *others: str) -> dict[str, int]:
    """So many norms in each layer and one at the end; each of the others once in each layer."""
    return {norm: norms * LAYERS + 1, **dict.fromkeys(others, LAYERS)}


# family: (config, what must be replaced, and how often)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, _counts(RMS, 2, SILU, HALF)),
    "mistral": ({"sliding_window": 6}, _counts(RMS, 2, SILU, HALF)),
    "qwen2": ({}, _counts(RMS, 2, SILU, HALF)),
    "qwen3": (HEAD, _counts(RMS, 4, SILU, HALF)),
    "gemma": (HEAD, _counts(OFFSET, 2, GELU_TANH, HALF)),
    "gemma2": (HEAD, _counts(OFFSET, 4, GELU_TANH, HALF)),
    "gemma3_text": (
        {**HEAD, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
        _counts(OFFSET, 6, GELU_TANH, HALF),
    ),
    "phi3": ({}, _counts(RMS, 2, SILU, HALF)),
    "granite": ({}, _counts(RMS, 2, SILU, HALF)),
    "stablelm": ({}, _counts(LAYER_NORM, 2, SILU, HALF)),
    "olmo": ({}, _counts(LAYER_NORM, 2, SILU, HALF)),
    "olmo2": ({}, _counts(RMS, 4, SILU, HALF)),
    "starcoder2": ({}, _counts(LAYER_NORM, 2, HALF, TANH_MLP)),
    "gpt_neox": ({}, _counts(LAYER_NORM, 2, HALF, "linear + gelu")),
    "phi": ({}, _counts(LAYER_NORM, 1, HALF, TANH_MLP)),
    "glm": (HEAD, _counts(RMS, 2, SILU, GLM)),
    "cohere": ({}, _counts(LAYER_NORM, 1, SILU, COHERE)),
    "gptj": (GPTJ, _counts(LAYER_NORM, 1, ATTENTION, TANH_MLP)),
    "codegen": (GPTJ, _counts(LAYER_NORM, 1, ATTENTION, TANH_MLP)),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, _counts(LAYER_NORM, 2)),
    "gpt2": ({"n_embd": 64, "n_layer": LAYERS, "n_head": 4}, _counts(LAYER_NORM, 2, TANH_MLP)),
}


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**TINY, **FAMILIES[family][0], **changed})
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # all norm weights 1 would hide a lost weight
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, torch.Tensor]:
    """Three prompts, padded on the left to 9 tokens."""
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the tokens that are not padding."""
    inputs = batch()
    out: torch.Tensor = model(**inputs).logits[inputs["attention_mask"].bool()]
    return out


def greedy(model: Any, new: int = 8) -> torch.Tensor:
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    ids: torch.Tensor = model.generate(**batch(), **length)
    return ids


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def replaced(model: nn.Module) -> Counter[str]:
    """Of modules; of the attention of the whole model tell the tests in test_hf_attention.py, of
    whole layers and their angles those in test_decoder_models.py."""
    others = ("decoder layer", "stack of decoder layers", "table of angles")
    found = hf.report(model).replaced.items()
    return Counter(v for k, v in found if k != "attention" and v not in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_stock_does_and_comes_back(family: str) -> None:
    model = make(family)
    before, keys, expected, ids = (
        classes(model),
        list(model.state_dict()),
        logits(model),
        greedy(model),
    )

    assert lmfuse.optimize(model, inplace=True) is model
    assert replaced(model) == FAMILIES[family][1]
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, stock) for m, stock in zip(model.modules(), before, strict=True))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model), ids)

    assert lmfuse.restore(model) is model
    assert classes(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)
    assert hf.report(model) == hf.Report()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "cohere", "gptj", "opt"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_float32_as_stock(family: str, kind: torch.dtype) -> None:
    model = make(family, kind)
    exact = logits(copy.deepcopy(model).float())
    out, stock = logits(lmfuse.optimize(model)), logits(model)
    assert out.dtype is kind
    assert (out - exact).abs().mean() <= 1.25 * (stock - exact).abs().mean()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_autocast_gives_the_dtype_and_values_of_stock(family: str) -> None:
    model = make(family)
    fused = lmfuse.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, stock = logits(fused), logits(model)
    assert out.dtype is stock.dtype
    torch.testing.assert_close(out, stock, rtol=0.05, atol=0.02)


SCALED_ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
]


@pytest.mark.parametrize("rope", SCALED_ROPES, ids=lambda rope: rope["rope_type"])
def test_scaled_rope_within_and_beyond_the_original_length(rope: dict[str, Any]) -> None:
    model = make(
        rope_parameters={"rope_theta": 10000.0, **rope},
        max_position_embeddings=12 if rope["rope_type"] == "dynamic" else 256,
    )
    fused = lmfuse.optimize(model)
    assert replaced(fused)[HALF] == LAYERS
    for length in (5, 40, 6):  # there and back: dynamic and longrope keep state
        ids = torch.arange(length)[None] % 100 + 3
        with torch.no_grad():
            torch.testing.assert_close(fused(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(fused, 20), greedy(model, 20))


def test_hidden_states_attentions_and_hooks_are_still_seen() -> None:
    model = make()
    model.set_attn_implementation("eager")
    fused = lmfuse.optimize(model)
    seen: list[str] = []
    fused.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append("act"))
    fused.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    with torch.no_grad():
        out = fused(**batch(), output_hidden_states=True, output_attentions=True)
        stock = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (LAYERS + 1, LAYERS)
    torch.testing.assert_close(out.attentions, stock.attentions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.hidden_states, stock.hidden_states, rtol=1e-4, atol=1e-4)
    assert seen == ["act", "norm"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_compiles_and_exports_without_a_break(family: str) -> None:
    model = make(family)
    fused = lmfuse.optimize(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        out = compiled(ids, use_cache=False).logits  # type: ignore[no-untyped-call]
        exported = torch.export.export(fused, (ids,), {"use_cache": False}, strict=False)
        run: Any = exported.module()
        again = run(ids, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert any("lmfuse" in str(node.target) for node in exported.graph.nodes)


def test_saved_and_pickled(tmp_path: Any) -> None:
    model = make()
    fused = lmfuse.optimize(model)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)  # our own file
    assert classes(again) == classes(fused)
    assert torch.equal(logits(again), logits(fused))

    fused.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert classes(stock) == classes(model)
    assert stock.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value)


def test_a_copy_unless_inplace_and_two_models_at_once() -> None:
    model, before = make(), classes(make())
    expected = logits(model)
    fused = lmfuse.optimize(model)
    assert fused is not model
    assert classes(model) == before
    fused.model.norm.weight.data.zero_()
    assert torch.equal(logits(model), expected)
    assert not logits(fused).any()
    assert torch.equal(logits(make()), expected)  # made, of the same classes, after the swap
    assert hf.report(model) == hf.Report()


def test_optimizing_twice_is_once() -> None:
    fused = lmfuse.optimize(make(), inplace=True)
    kinds, report = classes(fused), hf.report(fused)
    assert lmfuse.optimize(fused, inplace=True) is fused
    assert classes(fused) == kinds
    assert hf.report(fused) == report
    assert classes(lmfuse.optimize(fused)) == kinds
    assert classes(lmfuse.restore(fused)) == classes(make())
    assert classes(lmfuse.restore(fused)) == classes(make())


def test_dtype_casts_parameters_and_leaves_the_frequencies() -> None:
    model = make()
    fused = lmfuse.optimize(model, dtype=torch.bfloat16)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert fused.model.rotary_emb.inv_freq.dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(fused).float(), logits(model), rtol=0.05, atol=0.02)
    assert lmfuse.restore(fused).dtype is torch.bfloat16


class _OddRMSNorm(nn.Module):
    """Named like an RMS norm, but it computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class _TalkativeRMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not self.weight.dtype:
            warnings.warn("mismatch", stacklevel=1)  # as torch does, but once in a process
        return super().forward(x)


def test_optimize_does_not_warn_of_its_own_experiments(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(_TalkativeRMSNorm(64, eps=1e-6), nn.Linear(64, 64)).eval()
    assert replaced(lmfuse.optimize(model)) == {RMS: 1}
    assert not recwarn.list


class _ChoosyRMSNorm(_OddRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise KeyError("only 3-D")
        return super().forward(x)


def test_what_only_looks_alike_stays_stock_and_the_report_says_why() -> None:
    model = make()
    model.model.norm = _OddRMSNorm().eval()
    model.model.layers[0].mlp.act_fn = nn.Mish()
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    model.model.layers[1].input_layernorm = _ChoosyRMSNorm().eval()
    expected = logits(model)
    fused = lmfuse.optimize(model, inplace=True)
    assert hf.report(fused).stock == {
        "model.norm": "it computes neither rms_norm nor layer_norm",
        "model.layers.0.mlp": (
            "its activation is none of silu, gelu and gelu_tanh, or it computes more than these"
        ),
        "model.layers.1.input_layernorm": "its forward refused a test input: 'only 3-D'",
        "model.layers.1.self_attn": "its forward is replaced on the instance",
        "model.layers.0": "its activation is none of silu, gelu, gelu_tanh and relu",
        "model.layers.1": "the forward of one of its parts is replaced on the instance",
    }
    torch.testing.assert_close(logits(fused), expected, rtol=1e-4, atol=1e-4)


def test_refusals(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(TypeError, match=r"model is str, but must be a torch\.nn\.Module"):
        lmfuse.optimize("llama")  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"model is str, but must be a torch\.nn\.Module"):
        lmfuse.restore("llama")  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\)"):
        lmfuse.optimize(make().train())
    with pytest.raises(TypeError, match=r"dtype is torch\.int8, but must be float32"):
        lmfuse.optimize(make(), dtype=torch.int8)
    with pytest.raises(TypeError, match=r"parameter .* is torch\.float64"):
        lmfuse.optimize(make().double())
    with pytest.raises(ValueError, match=r"parameter .* is on meta"):
        lmfuse.optimize(make().to("meta"))
    quantized = make()
    quantized.hf_quantizer = object()
    with pytest.raises(ValueError, match="dtype must be None: model is quantized"):
        lmfuse.optimize(quantized, dtype=torch.bfloat16)
    quantized.quantization_method = "gguf"  # transformers has expanded such weights
    assert lmfuse.optimize(quantized, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert not recwarn.list
    with pytest.warns(UserWarning, match="found nothing to replace in Identity") as warned:
        lmfuse.optimize(nn.Identity().eval())
    assert len(warned) == 1


@pytest.mark.parametrize("after", [0, 5])
def test_an_exception_half_way_leaves_the_model_as_before(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    model = make()
    before, expected, put, calls = classes(model), logits(model), swap.put, iter(range(after))

    def failing(module: nn.Module, found: swap.Swap) -> None:
        if next(calls, None) is None:
            raise MemoryError("no more")
        put(module, found)

    monkeypatch.setattr(swap, "put", failing)
    with pytest.raises(MemoryError, match="no more"):
        lmfuse.optimize(model, dtype=torch.bfloat16, inplace=True)
    assert classes(model) == before
    assert hf.report(model) == hf.Report()
    assert torch.equal(logits(model), expected)


def test_a_decorated_forward_is_made_again() -> None:
    def counted(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return forward(self, *args, **kwargs)

        return wrapper

    class Attention(modeling_llama.LlamaAttention):
        forward = counted(modeling_llama.LlamaAttention.forward)

    model = make()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    fused = lmfuse.optimize(model)
    assert replaced(fused)[HALF] == LAYERS
    torch.testing.assert_close(logits(fused), logits(model), rtol=1e-4, atol=1e-4)
    assert fused.model.layers[0].self_attn.calls == 1


def test_nothing_global_changes() -> None:
    model, before = make(), dict(vars(modeling_llama))
    random = torch.random.get_rng_state()
    lmfuse.optimize(model)
    assert dict(vars(modeling_llama)) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_importing_lmfuse_does_not_import_transformers() -> None:
    code = "import lmfuse, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


PROMPTS = [
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France?",
    "Write a haiku about autumn rain.",
    "List three uses of a hash table.",
    "Translate to Spanish: the library opens at nine.",
    "Who wrote Pride and Prejudice, and when?",
    "What is 17 times 23?",
    "Give me a recipe for pancakes.",
]


def test_a_real_model_says_the_same() -> None:
    """SmolLM2-135M-Instruct in fp32: 64 greedy tokens of 8 chat prompts, padded on the left."""
    with quiet():
        model, tokenizer = demo._load(torch.float32)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left")
    length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    stock = model.generate(**inputs, **length)
    fused = lmfuse.optimize(model, inplace=True)
    assert replaced(fused) == {RMS: 61, SILU: 30, HALF: 30}
    assert torch.equal(fused.generate(**inputs, **length), stock)
