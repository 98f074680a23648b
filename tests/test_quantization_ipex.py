"""Weight-only quantization under IPEX's names: the mission's lines, values, defaults and orders."""

from __future__ import annotations

import inspect
from enum import IntEnum
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping

import intel_extension_for_pytorch as ipex
from helpers import BF16
from intel_extension_for_pytorch.llm.quantization import (
    IPEXWeightOnlyQuantizedLinear,
    QuantDtype,
    QuantMethod,
)
from intel_extension_for_pytorch.nn.modules import WeightOnlyQuantizedLinear
from intel_extension_for_pytorch.quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    convert,
    dequantize_per_block,
    dequantize_per_channel,
    get_weight_only_quant_qconfig_mapping,
    prepare,
    quantize_per_block,
    quantize_per_channel,
)
from lmfuse.modules import LinearSilu
from lmfuse.quantization.ipex_linear import WoqWeightFormat
from test_quantization import IDS, logits, tiny

mapping = get_weight_only_quant_qconfig_mapping


def test_the_lines_of_the_mission() -> None:
    """Section 4, as it stands."""
    model = tiny()
    before = logits(model)
    qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT8,
        lowp_mode=ipex.quantization.WoqLowpMode.BF16,
        group_size=-1,
    )
    prepared_model = prepare(model, qconfig)
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        converted_model = convert(prepared_model).to(torch.bfloat16)
        got = converted_model(IDS).logits
    assert got.dtype is BF16
    assert torch.allclose(got.float(), before, atol=0.05)
    linears = [m for m in converted_model.modules() if isinstance(m, WeightOnlyQuantizedLinear)]
    assert len(linears) == 2 * 7 + 1
    assert {m.compute for m in linears} == {"bf16"}
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "q_config")


def test_enums() -> None:
    def members(kind: type[IntEnum]) -> dict[str, int]:
        return {member.name: member.value for member in kind}

    assert members(WoqWeightDtype) == {"INT8": 1, "INT4": 2, "NF4": 3, "FP8": 4}
    assert members(WoqLowpMode) == {"NONE": 0, "FP16": 1, "BF16": 2, "INT8": 3}
    assert members(WoqWeightQScheme) == {"UNDEFINED": 0, "ASYMMETRIC": 1, "SYMMETRIC": 2}
    modes = ("PER_TENSOR", "PER_IC_BLOCK", "PER_BATCH", "PER_BATCH_IC_BLOCK")
    expected = {name: i for i, name in enumerate(modes)}
    expected |= {f"{name}_SYM": i + 4 for i, name in enumerate(modes)}
    assert members(WoqActQuantMode) == {"NONE": -1, **expected}
    assert members(QuantMethod) == {"GPTQ_GEMM": 0, "AWQ_GEMM": 1}
    assert members(QuantDtype) == {"INT4": 0}
    assert members(WoqWeightFormat) == {"PLAIN_FORMAT": 0, "GPTQ_FORMAT": 1, "AWQ_FORMAT": 2}


def test_defaults_of_the_qconfig() -> None:
    found = mapping()
    assert isinstance(found, QConfigMapping)
    q: Any = found.global_qconfig
    assert q._fields == (
        "activation", "weight", "lowp_mode", "act_quant_mode", "weight_dtype", "group_size",
        "cache_weight_for_large_batch", "weight_qscheme",
    )  # fmt: skip
    assert (q.weight_dtype, q.lowp_mode, q.group_size) == (1, 0, -1)
    assert q.act_quant_mode == WoqActQuantMode.NONE
    assert q.weight_qscheme == WoqWeightQScheme.ASYMMETRIC
    q = mapping(lowp_mode=WoqLowpMode.INT8).global_qconfig
    assert q.act_quant_mode == WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    assert q.weight_qscheme == WoqWeightQScheme.SYMMETRIC
    assert mapping(weight_dtype=WoqWeightDtype.NF4).global_qconfig.weight_qscheme == 2
    with pytest.warns(DeprecationWarning, match="INT4"):
        assert mapping(weight_dtype=torch.quint4x2).global_qconfig.weight_dtype == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_dtype": torch.float32},
        {"weight_dtype": 9},
        {"group_size": 33},
        {"lowp_mode": 7},
        {"act_quant_mode": "x"},
        {"weight_dtype": WoqWeightDtype.NF4, "weight_qscheme": 1},
        {"lowp_mode": WoqLowpMode.INT8, "weight_qscheme": 1},
        {"weight_dtype": WoqWeightDtype.FP8, "lowp_mode": WoqLowpMode.INT8},
    ],
)
def test_qconfigs_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs"):
        mapping(**wrong)


def test_prepare_and_convert_refuse() -> None:
    with pytest.raises(ValueError, match="call prepare"):
        convert(tiny())
    with pytest.raises(TypeError, match="get_weight_only_quant_qconfig_mapping"):
        prepare(tiny(), QConfigMapping())
    with pytest.raises(TypeError, match="model is int"):
        prepare(3, mapping())


def test_prepare_shares_memory_but_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    prepared = prepare(model, mapping())
    assert prepared[0].weight is not model[0].weight
    assert prepared[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert convert(prepare(model, mapping(), inplace=True), inplace=True) is model
    assert isinstance(model[0], WeightOnlyQuantizedLinear)


DTYPES = tuple(WoqWeightDtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [64, 75])
def test_helpers_agree_with_layers(dtype: WoqWeightDtype, symmetric: bool, k: int) -> None:
    w = torch.randn(9, k)
    if dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8) and not symmetric:
        with pytest.raises(ValueError, match="sym_quant must be True"):
            quantize_per_channel(w, dtype)
        return
    scheme = WoqWeightQScheme.SYMMETRIC if symmetric else WoqWeightQScheme.ASYMMETRIC
    for group in (-1, 32):
        if group == -1:
            qt, scales, zps = quantize_per_channel(w, dtype, sym_quant=symmetric)
            values = dequantize_per_channel(qt, scales, zps, dtype, w.shape)
            assert scales.shape == (9,)
        else:
            qt, scales, zps = quantize_per_block(w, dtype, group, sym_quant=symmetric)
            values = dequantize_per_block(qt, scales, zps, dtype, group, w.shape)
            assert scales.shape == (9, -(-k // group))
        assert (zps is None) is symmetric
        if dtype in (WoqWeightDtype.INT4, WoqWeightDtype.NF4):
            assert qt.shape == (9, (k + 1) // 2)
        linear = nn.Linear(k, 9)
        linear.weight.data = w
        linear.qconfig = mapping(
            weight_dtype=dtype, group_size=group, weight_qscheme=scheme
        ).global_qconfig
        layer = WeightOnlyQuantizedLinear.from_float(linear)
        assert torch.allclose(layer.dequantize(), values, rtol=1e-6, atol=0)
        assert layer.dtype is dtype
        assert (layer.compute, layer._group_size) == ("fp32", group)
        x = torch.randn(3, k)
        assert torch.allclose(layer(x), x @ values.T + linear.bias, atol=1e-4)
        again = WeightOnlyQuantizedLinear.from_float_and_qweight(
            linear, qt, dtype, scales, zps, linear.bias, group
        )
        assert torch.equal(again(x), layer(x))


def test_bytes_of_the_worked_example() -> None:
    """Specification, appendix A.3."""
    w = torch.tensor([[-1.0, 0.0, 2.0]])
    qt, scales, zps = quantize_per_channel(w, WoqWeightDtype.INT4)
    assert qt.tolist() == [[0x50, 0x0F]]
    assert scales.tolist() == pytest.approx([0.2])
    assert zps is not None
    assert zps.tolist() == [5]
    again, _, _ = quantize_per_channel(w, WoqWeightDtype.INT4, scales, zps)
    assert torch.equal(again, qt)
    via = dequantize_per_channel(
        torch.tensor([[0x0F]], dtype=torch.uint8), torch.ones(1), None, WoqWeightDtype.NF4, (1, 2),
        dequant_nf4_via_int8=True,
    )  # fmt: skip
    assert via.tolist() == [[1.0, -1.0]]


def test_lowp_modes_reach_the_layer() -> None:
    for mode, compute in (("NONE", "fp32"), ("FP16", "fp16"), ("BF16", "bf16"), ("INT8", "int8")):
        model = nn.Sequential(nn.Linear(64, 32))
        layer = convert(prepare(model, mapping(lowp_mode=WoqLowpMode[mode])))[0]
        assert layer.compute == compute
        assert layer.block_scales is (mode == "INT8")
    q = mapping(lowp_mode=WoqLowpMode.INT8, act_quant_mode=WoqActQuantMode.PER_TENSOR)
    assert not convert(prepare(nn.Sequential(nn.Linear(64, 32)), q))[0].block_scales


def test_converted_layers_fuse_and_keep_state() -> None:
    model = convert(prepare(nn.Sequential(nn.Linear(64, 32)), mapping()))
    x = torch.randn(5, 64)
    assert torch.equal(LinearSilu(model[0])(x), nn.functional.silu(model(x))) or torch.allclose(
        LinearSilu(model[0])(x), nn.functional.silu(model(x)), atol=1e-6
    )
    other = convert(prepare(nn.Sequential(nn.Linear(64, 32)), mapping()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_op_context() -> None:
    linear = nn.Linear(64, 9)
    linear.qconfig = mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32).global_qconfig
    layer = WeightOnlyQuantizedLinear.from_float(linear)
    context = layer._op_context
    qt, scales, zps = quantize_per_block(linear.weight, WoqWeightDtype.INT4, 32)
    assert torch.equal(context.to_public(context.get_weight()), qt)
    assert torch.equal(context.pack(qt), layer.weight)
    assert torch.equal(context.get_scales(), scales)
    assert torch.equal(context.get_zero_points().int(), zps)
    assert context.get_weight_shape() == [9, 64]
    assert context.get_bias() is layer.bias
    assert context.get_g_idx() is None
    assert not hasattr(context, "get_data_handle")


def test_from_float_refuses() -> None:
    with pytest.raises(TypeError, match=r"mod is ReLU"):
        WeightOnlyQuantizedLinear.from_float(nn.ReLU())
    with pytest.raises(ValueError, match="no qconfig"):
        WeightOnlyQuantizedLinear.from_float(nn.Linear(4, 4))
    linear = nn.Linear(4, 4)
    linear.qconfig = None
    assert WeightOnlyQuantizedLinear.from_float(linear) is linear
    with pytest.raises(ValueError, match="dtype"):
        quantize_per_channel(torch.ones(2, 2), torch.float32)
    with pytest.raises(ValueError, match="qweight holds"):
        WeightOnlyQuantizedLinear.from_float_and_qweight(
            nn.Linear(64, 9), torch.zeros(9, 60, dtype=torch.int8), 1, torch.ones(9), None
        )


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes along the last dimension to an int32, the j-th of them code order[j]."""
    parts = codes.long().unflatten(-1, (-1, 8))[..., list(order)]
    total = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def test_from_weight_tolerates_wrong_sizes() -> None:
    """As IPEX's own test: 786 and 1024 are said for a [2304, 768] weight."""
    k, n, group = 768, 2304, 128
    codes = torch.randint(16, (n, k))
    zeros = torch.randint(1, 16, (k // group, n))
    scales = torch.rand(k // group, n).half() * 0.01 + 0.001
    qweight, qzeros = words(codes).T.contiguous(), words(zeros - 1)
    layer = IPEXWeightOnlyQuantizedLinear.from_weight(
        qweight, scales, qzeros, 786, 1024, mapping(weight_dtype=WoqWeightDtype.INT4),
        torch.ones(n), group,
    )  # fmt: skip
    w = (codes - zeros.T.repeat_interleave(group, 1)) * scales.float().T.repeat_interleave(group, 1)
    x = torch.randn(3, k)
    assert torch.allclose(layer(x, ignored=1), x @ w.T + 1, rtol=1e-4, atol=1e-3)
    parameters = list(inspect.signature(WeightOnlyQuantizedLinear.from_weight).parameters)
    assert parameters[:5] == ["qweight", "scales", "zero_points", "in_features", "out_features"]
    assert parameters[5:] == [
        "qconfig", "bias", "group_size", "g_idx", "quant_method", "dtype", "kwargs"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="dtype is 3"):
        WeightOnlyQuantizedLinear.from_weight(qweight, scales, qzeros, k, n, dtype=3)
    with pytest.raises(ValueError, match="quant_method is 5"):
        WeightOnlyQuantizedLinear.from_weight(qweight, scales, qzeros, k, n, quant_method=5)
