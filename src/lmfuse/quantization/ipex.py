"""Weight-only quantization as `ipex.quantization` spells it: a qconfig, prepare, convert."""

from __future__ import annotations

import copy
import warnings
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.ao.quantization import PlaceholderObserver, QConfigMapping

from lmfuse.modules import QuantizedLinear
from lmfuse.quantization.config import WeightOnlyConfig, check_group_size
from lmfuse.quantization.ipex_codes import (
    WoqWeightDtype,
    dequantize_per_block,
    dequantize_per_channel,
    quantize_per_block,
    quantize_per_channel,
    weight_kind,
)
from lmfuse.quantization.ipex_linear import WeightOnlyQuantizedLinear
from lmfuse.quantization.model import quantize

__all__ = [
    "QConfigWoq",
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "convert",
    "dequantize_per_block",
    "dequantize_per_channel",
    "get_weight_only_quant_qconfig_mapping",
    "prepare",
    "quantize_per_block",
    "quantize_per_channel",
]

Model = TypeVar("Model", bound=nn.Module)


class WoqLowpMode(IntEnum):
    """What layers compute in; NONE and FP16 in float32."""

    NONE = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3


class WoqActQuantMode(IntEnum):
    """How inputs are quantized where layers compute in int8.

    lmfuse gives each row a scale of its own, and with IC_BLOCK each block of columns of each row:
    as fine as PER_BATCH says, finer than PER_TENSOR, and what a row gives does not depend on the
    others. The modes without _SYM compute as those with it: zero points are for values that lie to
    one side, because of a few that are large, and the eight largest of a row are not quantized at
    all. Int8 compute changes the next tokens of SmolLM2-135M by a KL divergence of 0.0183 with zero
    points and a scale for each row, of 0.0085 with one for 256 columns and 0.0025 with one for 64,
    and of 0.0012 without zero points, but with the eight, and a scale for each row.
    """

    NONE = -1
    PER_TENSOR = 0
    PER_IC_BLOCK = 1
    PER_BATCH = 2
    PER_BATCH_IC_BLOCK = 3
    PER_TENSOR_SYM = 4
    PER_IC_BLOCK_SYM = 5
    PER_BATCH_SYM = 6
    PER_BATCH_IC_BLOCK_SYM = 7


class WoqWeightQScheme(IntEnum):
    """Whether weights have zero points."""

    UNDEFINED = 0
    ASYMMETRIC = 1
    SYMMETRIC = 2


class QConfigWoq(NamedTuple):
    """How to quantize weights; `get_weight_only_quant_qconfig_mapping` makes it."""

    activation: Any
    weight: Any
    lowp_mode: WoqLowpMode
    act_quant_mode: WoqActQuantMode
    weight_dtype: WoqWeightDtype
    group_size: int
    cache_weight_for_large_batch: bool = False
    weight_qscheme: WoqWeightQScheme = WoqWeightQScheme.UNDEFINED


_COMPUTE = {
    WoqLowpMode.NONE: "fp32",
    WoqLowpMode.FP16: "fp16",
    WoqLowpMode.BF16: "bf16",
    WoqLowpMode.INT8: "int8",
}
_BLOCKS = {mode for mode in WoqActQuantMode if "IC_BLOCK" in mode.name}
_OLD = {torch.qint8: WoqWeightDtype.INT8, torch.quint4x2: WoqWeightDtype.INT4}


def get_weight_only_quant_qconfig_mapping(
    *,
    weight_dtype: Any = WoqWeightDtype.INT8,
    lowp_mode: int = WoqLowpMode.NONE,
    act_quant_mode: int = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
    group_size: int = -1,
    weight_qscheme: int = WoqWeightQScheme.UNDEFINED,
) -> QConfigMapping:
    """What `prepare` takes.

    Args:
        weight_dtype: a `WoqWeightDtype`; torch.qint8 and torch.quint4x2 warn, and mean INT8, INT4.
        lowp_mode: a `WoqLowpMode`.
        act_quant_mode: a `WoqActQuantMode`, for lowp_mode INT8.
        group_size: -1, or a power of two from 32 on.
        weight_qscheme: UNDEFINED: SYMMETRIC for NF4, FP8, and INT8 with lowp_mode INT8, which must
            be symmetric; ASYMMETRIC otherwise.

    Returns:
        A mapping of torch.ao, with one global `QConfigWoq`.

    Raises:
        ValueError: a value that no enum has, a group size that cannot be, or ASYMMETRIC where it
            must be symmetric.
    """
    if isinstance(weight_dtype, torch.dtype) and weight_dtype in _OLD:
        warnings.warn(
            f"{weight_dtype} is deprecated: say WoqWeightDtype.{_OLD[weight_dtype].name}",
            DeprecationWarning,
            stacklevel=2,
        )
        weight_dtype = _OLD[weight_dtype]
    dtype = _member("weight_dtype", weight_dtype, WoqWeightDtype)
    lowp = _member("lowp_mode", lowp_mode, WoqLowpMode)
    act = _member("act_quant_mode", act_quant_mode, WoqActQuantMode)
    scheme = _member("weight_qscheme", weight_qscheme, WoqWeightQScheme)
    check_group_size(group_size)
    if lowp is WoqLowpMode.INT8 and dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8):
        raise ValueError(f"lowp_mode INT8 needs INT8 or INT4 weights, not {dtype.name}")
    must = dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8) or (
        dtype is WoqWeightDtype.INT8 and lowp is WoqLowpMode.INT8
    )
    if must and scheme is WoqWeightQScheme.ASYMMETRIC:
        raise ValueError(
            f"weight_qscheme must be SYMMETRIC for {dtype.name} weights and lowp_mode {lowp.name}"
        )
    if scheme is WoqWeightQScheme.UNDEFINED:
        scheme = WoqWeightQScheme.SYMMETRIC if must else WoqWeightQScheme.ASYMMETRIC
    qconfig = QConfigWoq(
        activation=PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=False),
        weight=PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=False),
        lowp_mode=lowp,
        act_quant_mode=act if lowp is WoqLowpMode.INT8 else WoqActQuantMode.NONE,
        weight_dtype=dtype,
        group_size=group_size,
        weight_qscheme=scheme,
    )
    return QConfigMapping().set_global(qconfig)  # type: ignore[arg-type]


def prepare(
    model: Model,
    configure: Any,
    example_inputs: Any = None,
    inplace: bool = False,
    bn_folding: bool = True,
    example_kwarg_inputs: Any = None,
) -> Model:
    """The model with `configure` attached, for `convert`: nothing is observed or measured.

    Args:
        configure: from `get_weight_only_quant_qconfig_mapping`.
        example_inputs, bn_folding, example_kwarg_inputs: accepted: there is nothing to trace.
        inplace: attach to `model` itself, rather than to a copy (which shares the memory of the
            weights that `convert` replaces).

    Raises:
        TypeError, ValueError: not an nn.Module, or a config that is not weight-only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    qconfig = _qconfig(configure)
    if not inplace:
        memo: dict[int, Any] = {}
        for module in model.modules():
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
                weight = module.weight
                memo[id(weight)] = nn.Parameter(weight.data, weight.requires_grad)
        model = copy.deepcopy(model, memo)
    vars(model)["q_config"] = qconfig
    return model


def convert(model: Model, inplace: bool = False) -> Model:
    """The prepared model with every torch.nn.Linear, lm_head included, quantized.

    They become `ipex.nn.modules.WeightOnlyQuantizedLinear`s, whose weights state_dict holds.

    Args:
        model: from `prepare`.
        inplace: change and return `model` itself, rather than a copy.

    Raises:
        TypeError, ValueError: a model that was not prepared, has no linear layer, or has weights
            that hold NaN or infinity. `model` is then as before.
    """
    qconfig = getattr(model, "q_config", None)
    if qconfig is None:
        raise ValueError("model has no q_config: call prepare(model, qconfig_mapping) first")
    model = quantize(model, weight_only_config(qconfig), inplace)
    for module in model.modules():
        if type(module) is QuantizedLinear:
            module.__class__ = WeightOnlyQuantizedLinear
    vars(model).pop("q_config", None)
    return model


def weight_only_config(qconfig: Any) -> WeightOnlyConfig:
    """The `WeightOnlyConfig` that says what a qconfig (mapping) says."""
    q = _qconfig(qconfig)
    kind = weight_kind(q.weight_dtype)
    bits = 8 if kind in ("int8", "fp8") else 4
    return WeightOnlyConfig(
        bits=bits,
        head_bits=bits,
        scales="plain",
        kind=kind,
        group_size=q.group_size,
        symmetric=q.weight_qscheme is not WoqWeightQScheme.ASYMMETRIC,
        compute=_COMPUTE[q.lowp_mode],
        block_scales=q.act_quant_mode in _BLOCKS,
        scale_dtype="float32",
    )


def _qconfig(configure: Any) -> QConfigWoq:
    if isinstance(configure, QConfigWoq):
        return configure
    found = getattr(configure, "global_qconfig", None)
    if not isinstance(found, QConfigWoq):
        raise TypeError(
            f"configure is {type(configure).__name__}, but must come from "
            "get_weight_only_quant_qconfig_mapping: lmfuse serves weight-only quantization"
        )
    return found


E = TypeVar("E", bound=IntEnum)


def _member(name: str, value: Any, kind: type[E]) -> E:
    if not isinstance(value, bool) and isinstance(value, int):
        try:
            return kind(value)
        except ValueError:
            pass
    names = ", ".join(member.name for member in kind)
    raise ValueError(f"{name} is {value!r}, but must be a {kind.__name__}: {names}")
