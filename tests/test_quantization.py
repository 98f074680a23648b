"""Configs, the mathematics of codes, quantize() on models, and int8 compute that can be trusted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lmfuse
from helpers import BF16, F16, F32
from lmfuse import WeightOnlyConfig, hf, modules
from lmfuse.functional import dequantize, quantized_format
from lmfuse.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    choose_compute,
    dequantize_codes,
    quality,
    quantization,
    quantize_weight,
)
from lmfuse.quantization.model import pack_weight
from lmfuse.reference.woq import NF4

SCHEMES = (("int8", True), ("int8", False), ("int4", True), ("int4", False), ("nf4", True))
SCHEMES += (("fp8", True),)


def tiny(tie: bool = True, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=tie,
        **changed,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


IDS = torch.arange(2, 20)[None]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# --- codes ----------------------------------------------------------------------------------------


def expected(w: torch.Tensor, kind: str, symmetric: bool) -> torch.Tensor:
    """The values of one group, by the table of `codes`, one element at a time."""
    lo, hi = min(0.0, float(w.min())), max(0.0, float(w.max()))
    top = torch.tensor(max(-lo, hi))
    span = torch.tensor(hi) - torch.tensor(lo)
    steps = {"int8": (127, 255), "int4": (7, 15), "nf4": (1, 1), "fp8": (448, 448)}[kind]
    s = ((top / steps[0]) if symmetric else (span / steps[1])).clamp(min=2.0**-23)
    inverse, values = 1 / s, []
    low = -128 if kind == "int8" else 0
    zero = 0 if kind == "int8" else 8
    if not symmetric:
        zero = low - round(float(torch.tensor(lo) * inverse))
    for x in w:
        ratio = x * inverse
        if kind == "nf4":
            values.append(min(NF4, key=lambda v, r=float(ratio): (abs(v - r), v)) * s)
        elif kind == "fp8":
            values.append(ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() * s)
        else:
            q = min(max(round(float(ratio)) + zero, low), low + (255 if low else 15))
            values.append((q - zero) * s)
    return torch.stack([torch.as_tensor(v) for v in values])


@pytest.mark.parametrize(("kind", "symmetric"), SCHEMES)
@pytest.mark.parametrize("group", [-1, 32])
def test_codes_are_those_of_the_table(kind: str, symmetric: bool, group: int) -> None:
    w = torch.randn(3, 75) * torch.tensor([[1e-3], [1.0], [50.0]])
    got = dequantize_codes(quantize_weight(w, kind, group, symmetric))
    size = 75 if group == -1 else group
    for row in range(3):
        parts = [expected(part, kind, symmetric) for part in w[row].split(size)]
        assert torch.allclose(got[row], torch.cat(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "symmetric"), SCHEMES)
def test_packed_weights_are_the_codes(kind: str, symmetric: bool, isa: str) -> None:
    w = torch.randn(45, 99, dtype=BF16)
    for group in (-1, 32, 64):
        config = WeightOnlyConfig(kind=kind, group_size=group, symmetric=symmetric, scales="plain")
        dtype = F32 if group == -1 else BF16
        codes = quantize_weight(w, kind, group, symmetric, scale_dtype=dtype)
        values = dequantize(pack_weight("w", w, config))
        assert torch.allclose(values, dequantize_codes(codes), rtol=1e-6, atol=0)


def test_worked_examples() -> None:
    """Specification, appendix A.3."""
    w = torch.tensor([[-1.0, 0.0, 2.0]])
    four = quantize_weight(w, "int4", symmetric=False)
    assert four.codes.tolist() == [[0, 5, 15]]
    assert four.zeros is not None
    assert four.zeros.tolist() == [[5]]
    eight = quantize_weight(w, "int8", symmetric=False)
    assert eight.codes.tolist() == [[-128, -43, 127]]


@pytest.mark.parametrize(("kind", "symmetric"), SCHEMES)
@pytest.mark.parametrize("group", [-1, 32])
def test_searched_scales_are_never_worse(kind: str, symmetric: bool, group: int) -> None:
    w = torch.randn(40, 70)
    errors = []
    for scales in ("plain", "search"):
        found = dequantize_codes(quantize_weight(w, kind, group, symmetric, scales))
        errors.append((found - w).square().sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    if kind == "int4":
        assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_search_finds_the_grid_of_weights_that_have_one(kind: str) -> None:
    """As GGUF's Q4_1, whose grids begin at the smallest weight and end at the largest."""
    levels = 256 if kind == "int8" else 16
    codes = torch.randint(levels, (40, 6, 64))
    codes[..., 3], codes[..., 60] = 0, levels - 1
    w = (codes * torch.rand(40, 6, 1) + torch.randn(40, 6, 1)).flatten(1)
    got = dequantize_codes(quantize_weight(w, kind, 64, False, "search"))
    plain = dequantize_codes(quantize_weight(w, kind, 64, False))
    assert (got - w).norm() < 1e-5 * w.norm() < 0.01 * (plain - w).norm()


def test_zeros_and_constants_are_exact(isa: str) -> None:
    for kind, symmetric in SCHEMES:
        for value in (0.0, 0.25, -0.25):
            w = torch.full((3, 40), value)
            got = dequantize_codes(quantize_weight(w, kind, 32, symmetric))
            assert torch.allclose(got, w, rtol=1e-6, atol=0), (kind, symmetric, value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "symmetric"), SCHEMES)
def test_weights_that_are_not_finite_are_refused(kind: str, symmetric: bool, bad: float) -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[7, 3] = bad
    config = WeightOnlyConfig(kind=kind, symmetric=symmetric)
    with pytest.raises(ValueError, match=r"1\.weight: weight holds NaN or infinity"):
        lmfuse.quantize(model, config, inplace=True)
    assert type(model[0]) is nn.Linear


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 3},
        {"bits": True},
        {"kind": "int2"},
        {"group_size": 48},
        {"group_size": 16},
        {"group_size": 0},
        {"group_size": 32.0},
        {"scales": "best"},
        {"compute": "int4"},
        {"kind": "nf4", "symmetric": False},
        {"kind": "fp8", "compute": "int8"},
        {"scale_dtype": "float8"},
        {"layers": {"a": "b"}},
    ],
)
def test_what_no_config_can_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs"):
        WeightOnlyConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"skip": "lm_head"}, {"skip": [3]}, {"lm_head": 1}])
def test_what_has_the_wrong_type(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must"):
        WeightOnlyConfig(**wrong)


def test_a_config_survives_json() -> None:
    config = WeightOnlyConfig(bits=4, group_size=64, skip=["a", "b.c"], layers={"x": "int8"})
    assert WeightOnlyConfig.from_dict(config.to_dict()) == config
    assert config.kind == "int4"
    assert config.symmetric is False
    assert str(config) == "int4 group 64"
    with pytest.raises(ValueError, match="'colour'"):
        WeightOnlyConfig.from_dict({"colour": 1})


def test_skip_names_whole_parts() -> None:
    config = WeightOnlyConfig(skip=["mlp.up_proj", "layers.1"], modules_to_not_convert=["head"])
    for name in ("layers.0.mlp.up_proj", "model.layers.1.x", "head"):
        assert config.skips(name)
    for name in ("mlp.up", "layers.11.x", "lm_head"):
        assert not config.skips(name)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_quantize_replaces_linear_layers(inplace: bool, isa: str) -> None:
    model = tiny()
    before, plain = logits(model), copy.deepcopy(model)
    got = lmfuse.quantize(model, WeightOnlyConfig(compute="fp32"), inplace=inplace)
    assert (got is model) is inplace
    assert sum(isinstance(m, QuantizedLinear) for m in got.modules()) == 2 * 7 + 1
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(got.get_submodule(name).dequantize())
    assert torch.allclose(logits(got), logits(plain), rtol=1e-4, atol=1e-5)
    if not inplace:
        assert torch.equal(logits(model), before)
        assert not {id(p) for p in got.parameters()} & {id(p) for p in model.parameters()}


def test_choices_of_layers() -> None:
    config = WeightOnlyConfig(lm_head=False, skip=["down_proj"])
    got = lmfuse.quantize(tiny(), config)
    done = quantization(got)
    assert done.stock["lm_head"] == "lm_head is False"
    assert done.stock["model.layers.1.mlp.down_proj"] == "skip names it"
    assert len(done.quantized) == 2 * 6
    assert got.lm_head.weight is got.model.embed_tokens.weight

    tied = lmfuse.quantize(tiny(), WeightOnlyConfig(embedding=True))
    assert isinstance(tied.model.embed_tokens, QuantizedEmbedding)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    rows = tied.model.embed_tokens(IDS)
    assert torch.equal(rows, tied.lm_head.dequantize()[IDS])
    assert tied.to(BF16).model.embed_tokens(IDS).dtype is BF16


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_the_head_of_four_bits_has_eight(kind: str) -> None:
    """The layer of the logits, and an embedding; SmolLM2's perplexity rises by 9 % with four."""

    def forms(**choice: Any) -> list[tuple[str, int]]:
        config = WeightOnlyConfig(kind=kind, group_size=32, embedding=True, **choice)
        got = lmfuse.quantize(tiny(tie=False), config)
        layers: list[Any] = [got.lm_head, got.model.embed_tokens, got.model.layers[0].mlp.up_proj]
        formats = [quantized_format(layer.weight) for layer in layers]
        return [(f.kind, f.group_size) for f in formats]

    assert forms() == [("int8", -1), ("int8", -1), (kind, 32)]
    assert forms(head_bits=4) == [(kind, 32)] * 3
    with pytest.raises(ValueError, match="head_bits is 4, but must be one of None, 8"):
        WeightOnlyConfig(bits=8, head_bits=4)


def test_tied_head_alone_parts_from_the_embedding() -> None:
    got = lmfuse.quantize(tiny(), WeightOnlyConfig())
    assert isinstance(got.lm_head, QuantizedLinear)
    assert isinstance(got.model.embed_tokens, nn.Embedding)
    assert not got.config.tie_word_embeddings
    got.tie_weights()
    assert isinstance(got.lm_head, QuantizedLinear)
    assert got.lm_head.weight.dtype is torch.uint8


def test_what_stays_says_why() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 8), Own(8, 8), nn.Linear(8, 8))
    model[2].register_forward_hook(lambda *_: None)
    got = lmfuse.quantize(model)
    assert "Own" in quantization(got).stock["1"]
    assert "hooks" in quantization(got).stock["2"]
    with pytest.raises(ValueError, match=r"no linear layer to quantize \(0: it is Own"):
        lmfuse.quantize(nn.Sequential(Own(8, 8)))


def test_an_optimized_model_can_be_quantized() -> None:
    fused = lmfuse.optimize(tiny())
    got = lmfuse.quantize(fused, WeightOnlyConfig(compute="fp32"))
    assert not any(isinstance(m, modules.Linear) for m in got.modules())
    stock = lmfuse.quantize(tiny(), WeightOnlyConfig(compute="fp32"))
    assert torch.allclose(logits(got), logits(stock), rtol=1e-4, atol=1e-5)
    lmfuse.quantize(fused, WeightOnlyConfig(compute="fp32"), inplace=True)
    assert torch.equal(logits(fused), logits(got))


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before, ids = logits(model), [id(m) for m in model.modules()]

    def fail(*_: Any) -> dict[str, str]:
        raise RuntimeError("stop")

    monkeypatch.setattr("lmfuse.quantization.model.choose_compute", fail)
    with pytest.raises(RuntimeError, match="stop"):
        lmfuse.quantize(model, inplace=True)
    assert [id(m) for m in model.modules()] == ids
    assert torch.equal(logits(model), before)
    assert not hasattr(model.config, "quantization_config")


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model is int"):
        lmfuse.quantize(3)
    with pytest.raises(TypeError, match=r"config is dict"):
        lmfuse.quantize(nn.Linear(8, 8), {})
    with pytest.raises(ValueError, match="on meta"):
        lmfuse.quantize(nn.Sequential(nn.Linear(8, 8, device="meta")))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_dtype(dtype: torch.dtype) -> None:
    got = lmfuse.quantize(tiny().to(dtype), WeightOnlyConfig(bits=4, group_size=32))
    out = logits(got)
    assert out.dtype is dtype
    assert out.isfinite().all()


def test_optimize_takes_a_quantization_config() -> None:
    got = lmfuse.optimize(tiny(), quantization_config=WeightOnlyConfig(compute="fp32"))
    stock = lmfuse.quantize(tiny(), WeightOnlyConfig(compute="fp32"))
    assert torch.allclose(logits(got), logits(stock), rtol=1e-4, atol=1e-5)
    packed = hf.report(got).packed
    assert packed["model.layers.0.mlp.up_proj"] == "int8 per channel, computes in fp32"
    assert hf.report(got).replaced


@pytest.mark.parametrize("bits", [8, 4])
def test_query_key_and_value_compute_in_one_walk(bits: int, isa: str) -> None:
    config = WeightOnlyConfig(bits=bits, group_size=32, compute="bf16")
    apart = lmfuse.optimize(tiny(), quantization_config=config, concat_linear=False)
    joined = lmfuse.optimize(tiny(), quantization_config=config)
    attention = joined.model.layers[0].self_attn
    assert {type(attention.get_submodule(n)).__name__ for n in ("q_proj", "k_proj", "v_proj")} == {
        "SiblingQuantizedLinear"
    }
    assert torch.equal(logits(joined), logits(apart))
    again = copy.deepcopy(joined)
    again.model.layers[0].self_attn.k_proj.compute = "fp32"
    apart.model.layers[0].self_attn.k_proj.compute = "fp32"
    assert torch.equal(logits(again), logits(apart))
    lmfuse.restore(joined)
    assert type(attention.q_proj) is QuantizedLinear


# --- int8 compute ---------------------------------------------------------------------------------


class Outliers(nn.Module):
    """Layers; the inputs of the second have twelve columns that are huge, too many to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 9)
        self.scale = nn.Parameter(torch.ones(64))
        with torch.no_grad():
            self.scale[:12] = 3e4
            self.bad.weight[:, :12] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bad(self.good(x) * self.scale))


def test_layers_with_outliers_stay_at_bf16() -> None:
    got = lmfuse.quantize(Outliers(), WeightOnlyConfig(compute="auto"), sample=torch.randn(6, 64))
    assert got.good.compute == "int8"
    assert got.bad.compute == "bf16"
    done = quantization(got).quantized
    assert "its inputs have many outliers" in done["bad"]
    assert "computes in int8: which changes its result by" in done["good"]


def test_without_a_sample_nothing_is_int8() -> None:
    got = lmfuse.quantize(Outliers())
    assert {got.good.compute, got.bad.compute} == {"bf16"}
    assert "no sample" in quantization(got).quantized["good"]


def test_the_next_token_of_bf16_is_kept() -> None:
    model = tiny()
    got = lmfuse.quantize(model)
    ids = torch.randint(128, (1, 48), generator=torch.Generator().manual_seed(0))
    computes = {m.compute for m in got.modules() if isinstance(m, QuantizedLinear)}
    assert "int8" in computes
    chosen = logits(got, ids)
    for module in got.modules():
        if isinstance(module, QuantizedLinear):
            module.compute = "bf16"
    assert chosen[0, -1].argmax() == logits(got, ids)[0, -1].argmax()


def test_layers_go_back_until_the_token_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose next token any int8 layer would change."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            any_int8 = float(self.a.compute == "int8" or self.b.compute == "int8")
            return self.b(self.a(x)) * 0 + torch.tensor([any_int8, 0.5])

    got = lmfuse.quantize(Fragile(), sample=torch.randn(3, 64))
    assert got.a.compute == got.b.compute == "bf16"
    assert "with other layers, the next token" in choose_compute(got, torch.randn(3, 64))["a"]


# --- quality --------------------------------------------------------------------------------------


def test_quality_of_a_model_beside_itself() -> None:
    model = tiny()
    rows = quality.windows(torch.randint(128, (100,)), 60, 32)
    assert rows.shape == (2, 32)
    found = quality.compare(model, model, rows)
    assert found.tokens == 2 * 31
    assert found.change == 0
    assert found.agreement == 1
    assert abs(found.divergence) < 1e-6
    two = lmfuse.quantize(model, WeightOnlyConfig(bits=4, head_bits=4))
    found = quality.compare(model, two, rows)
    assert 0 < found.divergence < 1
    loss = nn.functional.cross_entropy(
        logits(two, rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    )
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    errors = quality.layer_errors(model, two, rows[0])
    assert len(errors) == 2 * 7 + 1
    assert all(0.02 < e.weight < 0.3 and 0 < e.output < 0.5 for e in errors)
    with pytest.raises(ValueError, match="the text has 5 tokens"):
        quality.windows(torch.zeros(5), 60, 32)
