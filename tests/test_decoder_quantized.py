"""Decoder layers over quantized weights: the op against the single ops, and models in it."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lmfuse
from helpers import F16, F32, assert_same_bits
from lmfuse import functional
from lmfuse.functional import DecoderLayer, DecoderLinear, decoder_stack, pack_linear
from lmfuse.generation import Cache
from lmfuse.hf import decoder as joint
from lmfuse.modules import QuantizedLinear
from lmfuse.quantization import WeightOnlyConfig
from test_decoder import DIM, HIDDEN, INNER, Run, make
from test_decoder_models import generated, inputs, model_of

_NAMES = ("query", "key", "value", "output", "gate", "up", "down")


def quantized(
    n: int, k: int, kind: str, compute: str, group: int = -1, zeros: str | None = None, **how: Any
) -> DecoderLinear:
    groups = 1 if group == -1 else -(-k // group)
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    elif kind == "fp8":
        codes = torch.randn(n, k).mul(60).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(16, (n, k), dtype=torch.uint8)
    span = {"int8": 70.0, "fp8": 60.0, "int4": 5.0, "nf4": 0.5}[kind] * k**0.5
    scales = (0.5 + torch.rand(n, groups)) / span
    order = None
    if how.pop("act_order", False):
        order = torch.arange(k)[torch.randperm(k)] // group
    extra: dict[str, Tensor] = {}
    if zeros == "zeros":
        extra["zeros"] = torch.randint(4, 9, (n, groups)).float()
    elif zeros == "offsets":
        extra["offsets"] = torch.randn(n, groups) / span
    if group != -1:
        scales = scales.bfloat16()
    packed = functional.pack_quantized(kind, codes, scales, group_size=group, g_idx=order, **extra)
    bias = torch.randn(n) if how.pop("bias", False) else None
    return DecoderLinear(packed, bias, compute, how.pop("block_scales", False))


# For all linear layers of a layer, or for some of them; the others are packed.
FORMATS: dict[str, dict[str, Any]] = {
    "int8, int8": {"kind": "int8", "compute": "int8"},
    "int8, bf16, bias": {"kind": "int8", "compute": "bf16", "bias": True},
    "int8 g32 zeros, int8": {"kind": "int8", "compute": "int8", "group": 32, "zeros": "zeros"},
    "int4 g32, int8": {"kind": "int4", "compute": "int8", "group": 32},
    "int4 g32, int8 blocks": {
        "kind": "int4",
        "compute": "int8",
        "group": 32,
        "block_scales": True,
    },
    "int4 g64 offsets, bf16": {"kind": "int4", "compute": "bf16", "group": 64, "zeros": "offsets"},
    "int4 act-order, int8": {"kind": "int4", "compute": "int8", "group": 32, "act_order": True},
    "int4, fp32": {"kind": "int4", "compute": "fp32", "group": 32, "zeros": "zeros"},
    "nf4, bf16": {"kind": "nf4", "compute": "bf16", "group": 64},
    "fp8, bf16": {"kind": "fp8", "compute": "bf16"},
    "fp8, fp16": {"kind": "fp8", "compute": "fp16", "group": 32},
}
MIXTURES: dict[str, dict[str, str | None]] = {
    "computes": dict(
        zip(_NAMES, ["int8, int8", "int8, bf16, bias"] * 3 + ["int8, int8"], strict=True)
    ),
    "kinds": {
        "query": "int4 g32, int8",
        "key": "int4 g32, int8",
        "value": "nf4, bf16",
        "output": "fp8, bf16",
        "gate": "int4 act-order, int8",
        "up": "int4 act-order, int8",
        "down": "int4, fp32",
    },
    "packed and quantized": {
        "query": "int8, int8",
        "key": None,
        "value": "int8, int8",
        "output": None,
        "gate": "int8, int8",
        "up": None,
        "down": "int4 g32, int8",
    },
}
ALL: dict[str, dict[str, str | None]] = {
    **{name: dict.fromkeys(_NAMES, name) for name in FORMATS},
    **MIXTURES,
}


def layer_of(dtype: torch.dtype, formats: dict[str, str | None], **form: Any) -> DecoderLayer:
    made = make(dtype, **form)
    changed: dict[str, DecoderLinear] = {}
    for name, format in formats.items():
        linear = getattr(made, name)
        if format is not None and linear is not None:
            n, k = linear.weight.shape
            changed[name] = quantized(n, k, **FORMATS[format])
    return replace(made, **changed)


def linear(x: Tensor, given: DecoderLinear, post: str | None = None, *operands: Tensor) -> Tensor:
    """The single op."""
    if isinstance(given.weight, functional.PackedWeight):
        return functional.linear(x, given.weight, given.bias, post, *operands)
    return functional.woq_linear(
        x,
        given.weight,
        given.bias,
        post,
        *operands,
        out_features=functional.quantized_format(given.weight).out_features,
        compute=given.compute,
        block_scales=given.block_scales,
    )


def step_by_step(x: Tensor, layer: DecoderLayer, joined: bool) -> Tensor:
    """A layer of the form of Llama without RoPE, in single ops, all tokens at once."""
    batch, tokens, _ = x.shape

    def normed(x: Tensor, norm: Any) -> Tensor:
        return functional.rms_norm(x, norm.weight, norm.eps)

    z = normed(x, layer.attention_input)
    q, k, v = (
        linear(z, p).view(batch, tokens, -1, DIM)
        for p in (layer.query, layer.key, layer.value)
        if p is not None
    )
    attended = functional.attention(q, k, v, causal=True, scale=layer.scale).flatten(2)
    h = linear(attended, layer.output, "add", x)
    z = normed(h, layer.mlp_input)
    gate, up = layer.gate, layer.up
    assert up is not None
    if joined:
        n = functional.quantized_format(gate.weight).out_features
        how = {"compute": gate.compute, "block_scales": gate.block_scales}
        inner = functional.woq_linear_gate_up(
            z, gate.weight, up.weight, gate.bias, up.bias, out_features=n, **how
        )
    else:
        inner = functional.silu_mul(linear(z, gate), linear(z, up))
    return linear(inner, layer.down, "add", h)


@pytest.mark.parametrize("formats", ALL)
def test_has_the_bits_of_the_single_ops(isa: str, dtype: torch.dtype, formats: str) -> None:
    layers = [layer_of(dtype, ALL[formats]) for _ in range(2)]
    x = torch.randn(2, 19, HIDDEN).to(dtype)
    joined = formats in FORMATS and "act-order" not in formats
    run = Run(layers, x)
    y = run.pieces(19)
    assert torch.isfinite(y).all()
    for layer in layers:
        x = step_by_step(x, layer, joined)
    assert_same_bits(y, x)


@pytest.mark.parametrize("formats", ["int8, int8", "int4 act-order, int8", *MIXTURES])
def test_bits_depend_on_the_row_alone(isa: str, dtype: torch.dtype, formats: str) -> None:
    layers = [layer_of(dtype, ALL[formats], rotary_dim=DIM) for _ in range(2)]
    run = Run(layers, torch.randn(2, 21, HIDDEN).to(dtype))
    whole = run.pieces(21)
    assert_same_bits(run.pieces(10, 1, 1, 9), whole)
    torch.set_num_threads(1)
    assert_same_bits(run.pieces(21), whole)
    alone = torch.cat([run.piece(i, i + 1, slice(1, 2)) for i in range(21)], 1)
    assert_same_bits(alone, whole[1:2])


@pytest.mark.parametrize(
    "form",
    [
        {"rotary_dim": DIM, "bias": True},
        {"parallel": True, "centered": True, "gated": False, "activation": "gelu"},
        {"groups": 3, "heads": 3, "kv_heads": 3, "parallel": True, "rotary_dim": 8},
        {"fused": True, "rotary_dim": DIM},
        {"head_norms": True, "after": True, "rotary_dim": DIM},
        {"before": False, "residual_scale": 0.25, "activation": "gelu_tanh"},
        {"gated": False, "activation": "relu"},
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
def test_fp32_compute_is_the_dequantized_layer(isa: str, kind: str, form: dict[str, Any]) -> None:
    """Bit for bit, in float32, whatever the form of the layer."""
    plain = make(F32, **form)
    changed: dict[str, dict[str, DecoderLinear]] = {"quantized": {}, "packed": {}}
    for name in _NAMES:
        given = getattr(plain, name)
        if given is None:
            continue
        n, k = given.weight.shape
        made = replace(quantized(n, k, kind, "fp32", 32), bias=given.bias)
        changed["quantized"][name] = made
        weight = functional.dequantize(made.weight)
        changed["packed"][name] = DecoderLinear(pack_linear(weight), given.bias)
    x = torch.randn(2, 9, HIDDEN)
    run = Run([replace(plain, **changed["quantized"])], x)
    other = Run([replace(plain, **changed["packed"])], x)
    other.cos, other.sin = run.cos, run.sin
    assert_same_bits(run.pieces(8, 1), other.pieces(9))


def test_bad_weights() -> None:
    plain = make(F32)

    def refused(kind: type[Exception], match: str, **changed: DecoderLinear) -> None:
        with pytest.raises(kind, match=match):
            decoder_stack([replace(plain, **changed)])

    refused(ValueError, 'compute "int8" is for', gate=quantized(INNER, HIDDEN, "nf4", "int8", 32))
    refused(ValueError, "compute is 'int9'", gate=quantized(INNER, HIDDEN, "int8", "int9"))
    refused(ValueError, "gate is 72 by 41", gate=quantized(INNER, HIDDEN + 1, "int8", "bf16"))
    refused(TypeError, "neither packed nor quantized", down=DecoderLinear(torch.randn(40, 72)))
    bytes_ = quantized(INNER, HIDDEN, "int8", "bf16").weight
    refused(ValueError, "gate has .* bytes", gate=DecoderLinear(bytes_[:-1]))
    refused(ValueError, "gate has 3 elements", gate=DecoderLinear(bytes_, torch.randn(3)))
    stack = decoder_stack([plain])
    layout = stack.layout.clone()
    layout[0, 18 + 1] = 9  # how query computes
    with pytest.raises(ValueError, match="the compute of a linear layer is 9"):
        functional.DecoderStack(stack.parameters, layout, stack.numbers)
    layout[0, 18 + 1] = 0
    with pytest.raises(ValueError, match="query is not a weight that this version of lmfuse quant"):
        functional.DecoderStack(stack.parameters, layout, stack.numbers)
    mixed = replace(plain, gate=quantized(INNER, HIDDEN, "int8", "bf16"))
    with pytest.raises(ValueError, match="the dtype of the weights"):
        Run([mixed], torch.randn(1, 3, HIDDEN).to(F16)).pieces(3)


# --- models ------------------------------------------------------------------------------------

CONFIGS: dict[str, WeightOnlyConfig] = {
    "int8": WeightOnlyConfig(8),
    "int8 in int8": WeightOnlyConfig(8, compute="int8"),
    "int4": WeightOnlyConfig(4, group_size=32),
    "int4 in int8": WeightOnlyConfig(4, group_size=32, compute="int8", lm_head=True),
    "all but down": WeightOnlyConfig(8, compute="int8", skip=["down_proj"]),
}


def of_modules(model: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    """What `run(model)` gives while layers run as modules."""
    with monkeypatch.context() as patch:
        patch.setattr(joint, "_run_of", lambda *_: None)
        return run(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        cache = Cache(model.config.get_text_config())
        ids = inputs(False)["input_ids"]
        parts = [model(p, past_key_values=cache).logits for p in ids.split((6, 1, 2), 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("inplace", [False, True])
def test_models(
    config: str, inplace: bool, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where modules round as little as the op does: bit for bit."""
    ours = lmfuse.optimize(
        model_of(hidden_size=64), quantization_config=CONFIGS[config], inplace=inplace
    )
    runs.clear()
    expected = of_modules(ours, monkeypatch, logits)
    assert not runs
    assert_same_bits(logits(ours), expected)
    assert runs == [2] * 3
    runs.clear()
    for options in ({"padded": True}, {"num_beams": 4}):
        run = functools.partial(generated, **options)
        assert torch.equal(run(ours), of_modules(ours, monkeypatch, run))
    assert runs == [2] * 20


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt_neox", "opt", "gemma2"])
def test_families(family: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = WeightOnlyConfig(8, compute="int8")
    ours = lmfuse.optimize(model_of(family), quantization_config=config)
    runs.clear()
    expected = of_modules(ours, monkeypatch, logits)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert runs == [ours.config.num_hidden_layers] * 3


def test_bfloat16_is_as_near_as_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WeightOnlyConfig(8, compute="bf16")
    ours = lmfuse.optimize(model_of().bfloat16(), quantization_config=config)
    exact = lmfuse.optimize(model_of().bfloat16().float(), quantization_config=config)
    for module in exact.modules():
        if isinstance(module, QuantizedLinear):
            module.compute = "fp32"
    a = of_modules(ours, monkeypatch, logits).float()
    b, e = logits(ours).float(), logits(exact)
    assert (b - e).norm() <= 1.05 * (a - e).norm()


def test_what_is_changed_counts(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = lmfuse.optimize(model_of(), quantization_config=WeightOnlyConfig(8, compute="bf16"))
    other = lmfuse.optimize(model_of().half().float(), quantization_config=WeightOnlyConfig(8))
    before = logits(ours)
    down = ours.model.layers[1].mlp.down_proj

    def follows() -> None:
        runs.clear()
        now = logits(ours)
        assert runs == [2] * 3
        assert not torch.equal(now, before)
        assert_same_bits(now, of_modules(ours, monkeypatch, logits))

    down.compute = "int8"
    follows()
    down.compute = "bf16"
    assert_same_bits(logits(ours), before)
    kept = down.weight.clone()
    down.weight.copy_(other.model.layers[0].mlp.down_proj.weight)
    follows()
    down.weight = kept
    assert_same_bits(logits(ours), before)
    ours.model.layers[0].self_attn.q_proj = copy.deepcopy(other.model.layers[1].self_attn.q_proj)
    follows()


def test_who_looks_inside_sees_modules(runs: list[int]) -> None:
    ours = lmfuse.optimize(model_of(), quantization_config=WeightOnlyConfig(8, compute="int8"))
    seen: list[nn.Module] = []
    module = ours.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda m, *_: seen.append(m))
    runs.clear()
    logits(ours)
    assert seen == [module] * 3
    assert runs == [1] * 3  # layer 0
    handle.remove()
    runs.clear()
    logits(ours)
    assert runs == [2] * 3


def test_another_layer_class_runs_as_modules(runs: list[int]) -> None:
    """A subclass whose forward is its own."""

    class Doubled(QuantizedLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    ours = lmfuse.optimize(model_of(), quantization_config=WeightOnlyConfig(8, compute="int8"))
    before = logits(ours)
    runs.clear()
    ours.model.layers[0].mlp.down_proj.__class__ = Doubled
    vars(ours.model.layers).pop(joint._RUN)
    after = logits(ours)
    assert not torch.equal(before, after)
    assert runs == [1] * 3


def test_a_loaded_checkpoint(tmp_path: Any, runs: list[int]) -> None:
    config = WeightOnlyConfig(4, group_size=32, compute="int8")
    made = lmfuse.quantize(model_of(), config)
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = lmfuse.optimize(loaded.eval())
    expected = logits(lmfuse.optimize(made))
    runs.clear()
    assert_same_bits(logits(ours), expected)
    assert runs == [2] * 3
