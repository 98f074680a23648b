"""Hostile arguments of what quantizes and reads quantized weights, as `hostile` has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hostile import HOSTILE, Arguments, Call, check_numbers, check_tensors
from lmfuse.modules import QuantizedLinear
from lmfuse.quantization import ipex_codes
from lmfuse.quantization.codes import quantize_weight
from lmfuse.quantization.gguf import pack_gguf
from lmfuse.quantization.ipex_codes import WoqWeightDtype
from lmfuse.quantization.ipex_linear import WeightOnlyQuantizedLinear
from lmfuse.quantization.published import pack_awq, pack_gptq

INT8, INT4 = WoqWeightDtype.INT8, WoqWeightDtype.INT4


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def _weight() -> Tensor:
    return torch.randn(64, 64)


def _given() -> Arguments:
    """Codes of 4 bits, with scales and zero points for groups of 32."""
    codes = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 2), torch.randint(0, 16, (64, 2), dtype=torch.int32)
    return {"qweight": codes, "scales": scales, "zero_points": zeros, "group_size": 32}


def _layer() -> Arguments:
    return _given() | {
        "mod": nn.Linear(64, 64), "dtype": INT4, "bias": torch.randn(64),
        "g_idx": torch.arange(64) % 2,
    }  # fmt: skip


def _dequantize() -> Arguments:
    names = {"qweight": "qt", "scales": "scales", "zero_points": "zps", "group_size": "group_size"}
    return {names[n]: x for n, x in _given().items()} | {"dtype": INT4}


def _published(sizes: tuple[int, int], zeros: tuple[int, int], name: str = "qzeros") -> Arguments:
    words, stored = _words(*sizes), _words(*zeros)
    return {"qweight": words, "scales": torch.rand(2, 64), name: stored, "group_size": 32}


def _bytes() -> Tensor:
    return torch.ones(64, 36, dtype=torch.uint8)


CALLS: dict[str, Call] = {
    "quantize_weight": (
        quantize_weight,
        lambda: {"weight": _weight(), "kind": "int8", "group_size": 32},
    ),
    "quantize_per_channel": (
        ipex_codes.quantize_per_channel,
        lambda: (
            {"t": _weight(), "dtype": INT8}
            | {"scales": torch.rand(64) + 1, "zero_points": torch.zeros(64).int()}
        ),
    ),
    "quantize_per_block": (
        ipex_codes.quantize_per_block,
        lambda: {"input": _weight(), "dtype": INT4, "group_size": 32},
    ),
    "dequantize_per_block": (ipex_codes.dequantize_per_block, _dequantize),
    "pack_gptq": (
        pack_gptq,
        lambda: _published((8, 64), (2, 8)) | {"g_idx": torch.arange(64) % 2, "bits": 4},
    ),
    "pack_awq": (pack_awq, lambda: _published((64, 8), (2, 8))),
    "pack_gguf": (pack_gguf, lambda: {"blocks": _bytes(), "type": 2}),
    "from_float_and_qweight": (WeightOnlyQuantizedLinear.from_float_and_qweight, _layer),
    "from_weight": (
        WeightOnlyQuantizedLinear.from_weight,
        lambda: (
            _published((8, 64), (2, 8), "zero_points")
            | {"in_features": 64, "out_features": 64, "bias": torch.randn(64)}
        ),
    ),
    "QuantizedLinear": (
        QuantizedLinear,
        lambda: {"weight": pack_gguf(_bytes(), 2), "bias": torch.randn(64)},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_tensors(call: str) -> None:
    with torch.no_grad():
        check_tensors(
            CALLS[call], HOSTILE, also=("weight", "zeros", "packed")
        )  # as those below say it


@pytest.mark.parametrize("call", CALLS)
def test_numbers(call: str) -> None:
    check_numbers(CALLS[call])
