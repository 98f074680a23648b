"""What a user of IPEX's module level writes, line by line as the guide has it, and its effect.

The lines that trace are in test_tracing.py.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import intel_extension_for_pytorch as ipex
from helpers import BF16, F32, assert_close
from intel_extension_for_pytorch.cpu._auto_kernel_selection import _disable_tpp, _enable_tpp
from lmfuse.bench.models import smollm2_file
from lmfuse.functional import dequantize
from lmfuse.modules import QuantizedLinear
from lmfuse.reference.activation import gelu_mul, silu_mul

EXAMPLES = Path(__file__).parents[1] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

from modeling_llama import LlamaForCausalLM  # noqa: E402

SMOLLM2 = {"gguf_file": smollm2_file().name, "local_files_only": True}


# --- 1. modules and functions --------------------------------------------------------------------


def gelu(z: Tensor) -> Tensor:
    return F.gelu(z)


def new_gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


LINEARS: dict[str, tuple[Any, int]] = {  # name -> what follows the linear layer, its other operands
    "linearMul": (lambda z, y: z * y, 1),
    "linearGelu": (gelu, 0),
    "linearNewGelu": (new_gelu, 0),
    "linearAdd": (lambda z, y: z + y, 1),
    "linearAddAdd": (lambda z, y, w: z + y + w, 2),
    "linearSilu": (F.silu, 0),
    "linearSiluMul": (lambda z, y: F.silu(z) * y, 1),
    "linearRelu": (F.relu, 0),
}


@pytest.fixture
def linears() -> list[nn.Linear]:
    """Two layers of a model that `ipex.optimize` packs."""
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(40, 24)).eval()
    return list(ipex.optimize(model, dtype=F32, inplace=True))


def double(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.double(), linear.weight.double(), linear.bias.double())


@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_linear_fusions(linears: list[nn.Linear], name: str) -> None:
    formula, operands = LINEARS[name]
    capital = name[0].upper() + name[1:]
    assert getattr(ipex.llm.modules, name) is getattr(ipex.llm.modules, capital)
    x, others = torch.randn(2, 3, 40), [torch.randn(2, 3, 24) for _ in range(operands)]
    found = getattr(ipex.llm.modules, name)(linears[0])(x, *others)
    expected = formula(double(linears[0], x), *(y.double() for y in others))
    assert_close(found, expected, ulps=30, scale=1.0)


@torch.no_grad()
def test_linear_2_silu_mul(linears: list[nn.Linear]) -> None:
    x = torch.randn(2, 3, 40)
    for fused in (ipex.llm.modules.linear2SiluMul, ipex.llm.modules.Linear2SiluMul):
        expected = F.silu(double(linears[0], x)) * double(linears[1], x)
        assert_close(fused(*linears)(x), expected, ulps=60, scale=1.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@torch.no_grad()
def test_norms() -> None:
    x, weight, bias = torch.randn(2, 5, 64), torch.randn(64), torch.randn(64)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert_close(ipex.llm.modules.RMSNorm(64, eps=1e-6, weight=weight)(x), exact, ulps=8)
    assert_close(ipex.llm.modules.RMSNorm.apply_function(x, weight, 1e-6), exact, ulps=8)
    assert_close(ipex.llm.functional.rms_norm(x, weight, 1e-6), exact, ulps=8)
    exact = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-5)
    layer = ipex.llm.modules.FastLayerNorm((64,), 1e-5, weight, bias)
    assert_close(layer(x), exact, ulps=8, scale=1.0)
    applied = ipex.llm.modules.FastLayerNorm.apply_function(x, (64,), weight, bias, 1e-5)
    assert_close(applied, exact, ulps=8, scale=1.0)
    found = ipex.llm.functional.fast_layer_norm(x, (64,), weight, bias, 1e-5)
    assert_close(found, exact, ulps=8, scale=1.0)


@pytest.mark.parametrize("add_back", [False, True])
@torch.no_grad()
def test_norms_with_a_residual(add_back: bool) -> None:
    residual, x, weight, bias = (torch.randn(*s) for s in ((5, 64), (5, 64), (64,), (64,)))
    total = residual.double() + x.double()
    kept = residual.clone()
    found = ipex.llm.functional.add_rms_norm(residual, x, weight, None, 1e-6, add_back)
    assert_close(found, rms_norm(total, weight.double(), 1e-6), ulps=8)
    assert torch.equal(residual, kept + x if add_back else kept)
    residual = kept.clone()
    found = ipex.llm.functional.add_layer_norm(residual, x, weight, bias, 1e-5, add_back)
    exact = F.layer_norm(total, (64,), weight.double(), bias.double(), 1e-5)
    assert_close(found, exact, ulps=8, scale=1.0)
    assert torch.equal(residual, kept + x if add_back else kept)


@torch.no_grad()
def test_gated_activations() -> None:
    x, y = torch.randn(3, 70), torch.randn(3, 70)
    assert_close(ipex.llm.functional.silu_mul(x, y), silu_mul(x.double(), y.double()), ulps=8)
    out = torch.empty_like(x)
    for approximate in ("none", "tanh"):
        ipex.llm.functional.gelu_mul(x, y, out, approximate)
        exact = gelu_mul(x.double(), y.double(), approximate)
        assert_close(out, exact, ulps=16, scale=1e-2)


def turned(x: Tensor) -> Tensor:
    """Heads [1, seq, heads, 8] rotated by their position, in halves."""
    angle = torch.arange(x.shape[1]).double()[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    a, b = x.double().chunk(2, dim=-1)
    sin, cos = (f(angle)[None, :, None] for f in (torch.sin, torch.cos))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@torch.no_grad()
def test_rotary_embedding() -> None:
    query, key = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    expected = [turned(query), turned(key)]
    positions = torch.arange(6)[None]
    rope = ipex.llm.modules.RotaryEmbedding(64, 8, 10000, "LlamaForCausalLM")
    for x, heads, exact in ((query, 4, expected[0]), (key, 2, expected[1])):
        assert_close(rope(x, positions, heads, 8, 4, 8, 6), exact, ulps=64, scale=1.0)
    angle = torch.arange(64)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    table = (angle.sin().repeat(1, 2), angle.cos().repeat(1, 2))
    for function in (
        ipex.llm.functional.rotary_embedding,
        ipex.llm.modules.RotaryEmbedding.apply_function,
    ):
        q, k = function(query.clone(), key.clone(), *table, 8, True, positions)
        assert_close(q, expected[0], ulps=64, scale=1.0)
        assert_close(k, expected[1], ulps=64, scale=1.0)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, seq, heads, dim], as [batch, heads, seq, dim], in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize(
    "call",
    [
        ipex.llm.modules.IndirectAccessKVCacheAttention(text_max_length=16),
        ipex.llm.functional.indirect_access_kv_cache_attention,
    ],
    ids=["module", "function"],
)
@torch.no_grad()
def test_indirect_access_kv_cache_attention(call: Any) -> None:
    q, k, v = (torch.randn(2, 7, heads, 8) for heads in (4, 2, 2))
    mask, past, outs = torch.zeros(2, 1, 1, 1), None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7)):  # a prompt, then token by token
        new = (x[:, part] for x in (q, k, v))
        out, weights, past = call(*new, 8**0.5, past, None, mask)
        assert weights is None
        outs.append(out)
        past[3][past[0].size(-2) - 1] = torch.tensor([0, 1])  # beams stay where they are
    assert past[0].size(-2) == 7
    assert_close(torch.cat(outs, dim=2), attend(q, k, v), ulps=32, scale=1.0)


@pytest.mark.parametrize(
    "call",
    [
        ipex.llm.modules.VarlenAttention(),
        ipex.llm.modules.VarlenAttention.apply_function,
        ipex.llm.functional.varlen_attention,
    ],
    ids=["module", "apply_function", "function"],
)
@torch.no_grad()
def test_varlen_attention(call: Any) -> None:
    q, k, v = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    out, ends = torch.empty_like(q), torch.tensor([0, 4, 9], dtype=torch.int32)
    call(q, k, v, out, ends, ends, None, 5, 5, 0.0, 8**-0.5, False, True, False, None)
    for part in (slice(0, 4), slice(4, 9)):
        exact = attend(*(x[None, part] for x in (q, k, v)))[0].transpose(0, 1)
        assert_close(out[part], exact, ulps=32, scale=1.0)


@torch.no_grad()
def test_paged_attention() -> None:
    q, k, v = torch.randn(1, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    key_cache, value_cache = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)
    slots = torch.tensor([8, 9, 10, 11, 0, 1])  # block 2, then block 0
    ipex.llm.modules.PagedAttention.reshape_and_cache(k, v, key_cache, value_cache, slots)
    out, tables = torch.empty_like(q), torch.tensor([[2, 0]], dtype=torch.int32)
    lengths, heads = torch.tensor([6], dtype=torch.int32), torch.tensor([0, 0, 1, 1])
    ipex.llm.modules.PagedAttention.single_query_cached_kv_attention(
        out, q, key_cache, value_cache, heads, 8**-0.5, tables, lengths, 4, 6, None
    )
    exact = attend(q[None], k[None], v[None])[0].transpose(0, 1)
    assert_close(out, exact, ulps=32, scale=1.0)


# --- 2. showcases --------------------------------------------------------------------------------


def run_py(*words: str) -> str:
    """`OMP_NUM_THREADS=2 numactl -m 0 -C 0-1 python run.py ...`, where there is numactl."""
    place = ["numactl", "-m", "0", "-C", "0-1"] if shutil.which("numactl") else []
    done = subprocess.run(
        [*place, sys.executable, "run.py", *words],
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_py_help() -> None:
    text = run_py("--help")
    for option in (
        "--model-id",
        "--dtype",
        "--input-tokens",
        "--max-new-tokens",
        "--prompt",
        "--greedy",
        "--profile",
        "--token-latency",
        "--num-iter",
        "--num-warmup",
        "--batch-size",
    ):
        assert option in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_py(dtype: str) -> None:
    few = ("--num-iter", "2", "--num-warmup", "1", "--max-new-tokens", "4", "--greedy")
    text = run_py("-m", "smollm2", "--dtype", dtype, *few)
    assert "The processor in the corner" in text
    assert "Inference latency:" in text


# --- 3. the entry script's lines, on a real model ------------------------------------------------


@pytest.fixture(scope="module")
def stock() -> Any:
    model = AutoModelForCausalLM.from_pretrained(smollm2_file().parent, dtype=F32, **SMOLLM2)
    return model.eval()


@pytest.fixture(scope="module")
def inputs() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_file().parent, **SMOLLM2)
    return tokenizer("The capital of France is", return_tensors="pt")


NEW = {"max_new_tokens": 8, "min_new_tokens": 8}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "4 beams": {"do_sample": False, "num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 0.9},
}


def written(model: Any, inputs: Any, way: str) -> Tensor:
    torch.manual_seed(7)
    ids: Tensor = model.generate(**inputs, **NEW, **WAYS[way])
    return ids


@pytest.fixture(scope="module")
def expected(stock: Any, inputs: Any) -> dict[str, Tensor]:
    """What stock transformers writes."""
    return {way: written(stock, inputs, way) for way in WAYS}


def test_the_showcase_is_the_model(expected: dict[str, Tensor], inputs: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(smollm2_file().parent, dtype=F32, **SMOLLM2).eval()
    model.config.lm_head_generation = True
    model = ipex.optimize(model.eval(), dtype=F32, inplace=True)
    for way, ids in expected.items():
        assert torch.equal(written(model, inputs, way), ids)


def test_optimize_fp32(stock: Any, expected: dict[str, Tensor], inputs: Any) -> None:
    model = copy.deepcopy(stock)
    _disable_tpp()
    model = ipex.optimize(
        model.eval(), dtype=torch.float32, inplace=True, auto_kernel_selection=True
    )
    for way, ids in expected.items():
        assert torch.equal(written(model, inputs, way), ids)


def test_optimize_bf16(stock: Any, inputs: Any) -> None:
    model = copy.deepcopy(stock)
    _enable_tpp()
    try:
        model = ipex.optimize(model.eval(), dtype=torch.bfloat16, inplace=True)
    finally:
        _disable_tpp()
    assert model.dtype is BF16
    with torch.no_grad():
        found = model(**inputs).logits[0, -1].float()
        expected = stock(**inputs).logits[0, -1]
    assert found.argmax() == expected.argmax()
    assert (found - expected).square().mean().sqrt() < 0.06 * expected.square().mean().sqrt()


# --- 3. prompt sharing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "attribute", "way"),
    [
        ("hf_greedy_search", "greedy_search", {"do_sample": False}),
        ("hf_beam_search", "beam_search", {"do_sample": False, "num_beams": 4}),
        ("hf_sample", "sample", {"do_sample": True, "num_return_sequences": 3}),
        ("hf_beam_sample", "beam_sample", {"do_sample": True, "num_beams": 4}),
    ],
)
@pytest.mark.parametrize("showcase", [False, True], ids=["optimized", "showcase"])
def test_prompt_sharing(
    stock: Any, inputs: Any, function: str, attribute: str, way: dict[str, Any], showcase: bool
) -> None:
    if showcase:
        model = LlamaForCausalLM.from_pretrained(smollm2_file().parent, dtype=F32, **SMOLLM2).eval()
        model = ipex.optimize(model, dtype=F32, inplace=True)
    else:
        model = ipex.optimize(stock.eval(), dtype=F32)
    bound = getattr(ipex.llm.generation, function).__get__(model, model.__class__)
    setattr(model, attribute, bound)
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, out: rows.append(out.shape[0])
    )
    torch.manual_seed(7)
    found = model.generate(**inputs, **NEW, **way)
    hook.remove()
    torch.manual_seed(7)
    assert torch.equal(found, stock.generate(**inputs, **NEW, **way))
    assert rows[0] == 1  # the prompt, once; then a row for each beam
    assert set(rows[1:]) == {max(way.get("num_beams", 1), way.get("num_return_sequences", 1))}


def test_token_latency(stock: Any, inputs: Any) -> None:
    model = ipex.optimize(stock.eval(), dtype=F32)
    hf_greedy_search = ipex.llm.generation.hf_greedy_search.__get__(model, model.__class__)
    setattr(model, "greedy_search", hf_greedy_search)  # noqa: B010
    model.config.token_latency = True
    _, seconds = model.generate(**inputs, **NEW, do_sample=False)
    assert len(seconds) == NEW["max_new_tokens"]
    assert all(s > 0 for s in seconds)


# --- 4. weight-only quantization ------------------------------------------------------------------


def dequantized(model: nn.Module, stock: nn.Module) -> nn.Module:
    """A copy of `stock` with the values that the linear layers of `model` hold."""
    copied = copy.deepcopy(stock)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            copied.get_submodule(name).weight = nn.Parameter(dequantize(module.weight))
    return copied


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("dtype", "group_size"), [("INT8", -1), ("INT4", 64)])
@torch.no_grad()
def test_weight_only_quantization(stock: Any, inputs: Any, dtype: str, group_size: int) -> None:
    from intel_extension_for_pytorch.quantization import WoqWeightDtype, convert, prepare

    qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=getattr(WoqWeightDtype, dtype),
        lowp_mode=ipex.quantization.WoqLowpMode.BF16,
        group_size=group_size,
    )
    prepared_model = prepare(stock, qconfig)
    with torch.no_grad(), torch.cpu.amp.autocast(enabled=True):
        converted_model = convert(prepared_model).to(torch.bfloat16)
        found = converted_model(**inputs).logits
    reference = dequantized(converted_model, stock)
    assert not torch.equal(reference.lm_head.weight, stock.lm_head.weight)
    expected = reference(**inputs).logits
    assert found[0, -1].argmax() == expected[0, -1].argmax()
    # What bfloat16 alone costs, in thirty layers, varies with every rounding.
    stock_error = error(reference.to(BF16)(**inputs).logits, expected)
    assert error(found, expected) < 2 * stock_error < 0.1


@pytest.mark.parametrize(("dtype", "group_size"), [("INT8", -1), ("INT4", 64)])
@torch.no_grad()
def test_weight_only_quantization_in_float32(
    stock: Any, inputs: Any, dtype: str, group_size: int
) -> None:
    quantization = ipex.quantization
    qconfig = quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=getattr(quantization.WoqWeightDtype, dtype), group_size=group_size
    )
    converted = quantization.convert(quantization.prepare(stock, qconfig))
    expected = dequantized(converted, stock)(**inputs).logits
    assert error(converted(**inputs).logits, expected) < 1e-4
