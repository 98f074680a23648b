"""Quantized linear layers under the names and with the arguments of IPEX."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse.functional import Quantized, _check, pack_quantized, unpack_quantized
from lmfuse.functional.quantized import _group_count
from lmfuse.modules import QuantizedLinear
from lmfuse.quantization import published
from lmfuse.quantization.ipex_codes import (
    KINDS,
    WoqWeightDtype,
    pack_nibbles,
    unpack_nibbles,
    weight_kind,
)


class WoqWeightFormat(IntEnum):
    """How the words of an int4 weight lie; see `lmfuse.quantization.published`."""

    PLAIN_FORMAT = 0
    GPTQ_FORMAT = 1
    AWQ_FORMAT = 2


class QuantMethod(IntEnum):
    """Who quantized a weight of `from_weight`."""

    GPTQ_GEMM = 0
    AWQ_GEMM = 1


class QuantDtype(IntEnum):
    """What it was quantized to."""

    INT4 = 0


class WeightOnlyQuantizedLinear(QuantizedLinear):
    """`lmfuse.modules.QuantizedLinear` with the constructors and attributes of IPEX.

    Other than there, `weight` and `bias` are in the state_dict, and `bias` is the bias.
    """

    @property
    def dtype(self) -> WoqWeightDtype:
        """The `WoqWeightDtype` of the weight."""
        return next(dtype for dtype, kind in KINDS.items() if kind == self.format.kind)

    @property
    def _group_size(self) -> int:
        return self.format.group_size

    @property
    def _op_context(self) -> WoqContext:
        return WoqContext(self)

    @classmethod
    def from_float(
        cls, mod: nn.Module, scales: Tensor | None = None, zero_points: Tensor | None = None
    ) -> nn.Module:
        """The quantized form of an nn.Linear with an attribute `qconfig`; `mod` stays as it is.

        Args:
            mod: an nn.Linear; one whose qconfig is not weight-only is returned.
            scales, zero_points: [n] or [n, groups]; None: from the weight.

        Raises:
            TypeError, ValueError: not an nn.Linear, no qconfig, or scales that do not fit.
        """
        from lmfuse.quantization import ipex, ipex_codes

        if not isinstance(mod, nn.Linear):
            raise TypeError(f"mod is {type(mod).__name__}, but must be a torch.nn.Linear")
        if not hasattr(mod, "qconfig"):
            raise ValueError("mod has no qconfig: set it to a global_qconfig of a qconfig mapping")
        if not isinstance(mod.qconfig, ipex.QConfigWoq):
            return mod
        config = ipex.weight_only_config(mod.qconfig)
        size, symmetric = config.group_size, bool(config.symmetric)
        arguments = (scales, zero_points, symmetric)
        dtype = mod.qconfig.weight_dtype
        if size == -1:
            qt, scale, zeros = ipex_codes.quantize_per_channel(mod.weight, dtype, *arguments)
        else:
            qt, scale, zeros = ipex_codes.quantize_per_block(mod.weight, dtype, size, *arguments)
        return cls._made(
            mod,
            _packed(_plain_codes(qt, str(config.kind), mod.in_features), config, scale, zeros),
            mod.bias,
        )

    @classmethod
    def from_float_and_qweight(
        cls,
        mod: nn.Module,
        qweight: Tensor,
        dtype: Any,
        scales: Tensor,
        zero_points: Tensor | None,
        bias: Tensor | None = None,
        group_size: int = -1,
        g_idx: Tensor | None = None,
        weight_format: int = WoqWeightFormat.PLAIN_FORMAT,
    ) -> WeightOnlyQuantizedLinear:
        """A layer with the sizes and the qconfig of `mod`, over a weight that is quantized already.

        Args:
            qweight: PLAIN_FORMAT: [n, k] int8 or float8_e4m3fn; for four bits [n, k/2] uint8 or
                [n, k/8] int32, low bits first. GPTQ_FORMAT: [k/8, n], AWQ_FORMAT: [k, n/8], int32.
            dtype: a `WoqWeightDtype`.
            scales: [n], or [n, groups].
            zero_points: like scales, or int32 with eight to a word along the groups; None: the
                middle.
            bias: [n]; None: that of `mod`.
            g_idx: [k], the group of each column; None: in order.

        Raises:
            TypeError, ValueError: shapes or dtypes that do not fit together.
        """
        kind = weight_kind(dtype)
        n, k = _sizes(mod)
        if _check.held("qweight", qweight).dim() != 2 or not qweight.numel():
            raise ValueError(f"qweight has shape {tuple(qweight.shape)}, but must be a matrix")
        if weight_format != WoqWeightFormat.PLAIN_FORMAT:
            if kind != "int4":
                raise ValueError(f"weight_format {weight_format!r} is for INT4 weights")
            gptq = weight_format == WoqWeightFormat.GPTQ_FORMAT
            _check.held("qweight", qweight, (torch.int32,))
            codes = published.gptq_codes(qweight) if gptq else published.awq_codes(qweight)
        else:
            codes = _plain_codes(qweight, kind, k)
        if tuple(codes.shape) != (n, k):
            raise ValueError(f"qweight holds {tuple(codes.shape)} codes, but mod is ({n}, {k})")
        groups = _group_count(k, group_size)
        zero_points = None if zero_points is None else _check.held("zero_points", zero_points)
        if zero_points is not None and zero_points.dtype is torch.int32 and groups > 1:
            words = -(-groups // 8)
            if tuple(zero_points.shape) == (n, words) and words != groups:
                zero_points = published.unpack_words(zero_points, 4).reshape(n, -1)[:, :groups]
        packed = pack_quantized(
            kind, codes.contiguous(), scales, zero_points, group_size=group_size, g_idx=g_idx
        )
        return cls._made(mod, packed, getattr(mod, "bias", None) if bias is None else bias)

    @classmethod
    def from_float_and_int4_weight(
        cls, mod: nn.Module, qweight: Tensor, scales: Tensor, zero_points: Tensor, *args: Any
    ) -> WeightOnlyQuantizedLinear:
        """`from_float_and_qweight` for INT4; deprecated in IPEX."""
        dtype = WoqWeightDtype.INT4
        return cls.from_float_and_qweight(mod, qweight, dtype, scales, zero_points, *args)

    @classmethod
    def from_int4_weight(
        cls,
        qweight: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        in_features: int,
        out_features: int,
        quant_method: int = QuantMethod.GPTQ_GEMM,
        qconfig: Any = None,
        bias: Tensor | None = None,
        group_size: int = -1,
        g_idx: Tensor | None = None,
    ) -> WeightOnlyQuantizedLinear:
        """A layer over a weight as GPTQ or AWQ publishes it; see `lmfuse.quantization.published`.

        Args:
            qweight, scales, zero_points, g_idx: as published.
            in_features, out_features: not read: the sizes are those of qweight, as in IPEX.
            quant_method: a `QuantMethod`.
            qconfig: a qconfig mapping, for what the layer computes in; None: bfloat16.
            bias: [n].
            group_size: -1: as many rows as the groups have.

        Raises:
            TypeError, ValueError: shapes or dtypes that do not fit together, or another method.
        """
        from lmfuse.quantization import ipex

        if quant_method == QuantMethod.GPTQ_GEMM:
            packed = published.pack_gptq(qweight, scales, zero_points, g_idx, group_size=group_size)
        elif quant_method == QuantMethod.AWQ_GEMM:
            packed = published.pack_awq(qweight, scales, zero_points, group_size)
        else:
            raise ValueError(f"quant_method is {quant_method!r}, but must be GPTQ_GEMM or AWQ_GEMM")
        if qconfig is None:
            return cls(packed, bias)
        config = ipex.weight_only_config(qconfig)
        return cls(packed, bias, config.compute, config.block_scales)

    @classmethod
    def from_weight(
        cls,
        qweight: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        in_features: int,
        out_features: int,
        qconfig: Any = None,
        bias: Tensor | None = None,
        group_size: int = -1,
        g_idx: Tensor | None = None,
        quant_method: int = QuantMethod.GPTQ_GEMM,
        dtype: int = QuantDtype.INT4,
        **kwargs: Any,
    ) -> WeightOnlyQuantizedLinear:
        """`from_int4_weight` with its arguments in another order; `kwargs` are not read.

        Raises:
            TypeError, ValueError: as there; another dtype than INT4.
        """
        if dtype != QuantDtype.INT4:
            raise ValueError(f"dtype is {dtype!r}, but must be QuantDtype.INT4")
        rest: Any = (in_features, out_features, quant_method, qconfig, bias, group_size, g_idx)
        return cls.from_int4_weight(qweight, scales, zero_points, *rest)

    @classmethod
    def _made(
        cls, mod: nn.Module, packed: Tensor, bias: Tensor | None
    ) -> WeightOnlyQuantizedLinear:
        from lmfuse.quantization import ipex

        _check.vector("bias", bias, _sizes(mod)[0], "the result")
        bias = None if bias is None else bias.detach().clone()
        qconfig = getattr(mod, "qconfig", None)
        if not isinstance(qconfig, ipex.QConfigWoq):
            return cls(packed, bias)
        config = ipex.weight_only_config(qconfig)
        return cls(packed, bias, config.compute, config.block_scales)


class WoqContext:
    """What scripts ask of IPEX's `_op_context`: the parts of the weight, unpacked.

    Handles are not served: `get_data_handle` and `load_from_ctx` exchange addresses of memory.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer

    def _parts(self) -> Quantized:
        return unpack_quantized(self._layer.weight)

    def get_weight(self) -> Tensor:
        """The packed bytes."""
        return self._layer.weight

    def get_bias(self) -> Tensor | None:
        """The bias."""
        return self._layer.bias

    def get_scales(self) -> Tensor:
        """[n, groups], or [n] for one group."""
        return _narrow(self._parts().scales)

    def get_zero_points(self) -> Tensor | None:
        """Like the scales; None if the middle code is zero."""
        zeros = self._parts().zeros
        return None if zeros is None else _narrow(zeros)

    def get_weight_shape(self) -> list[int]:
        """[n, k]"""
        return [self._layer.out_features, self._layer.in_features]

    def get_g_idx(self) -> Tensor | None:
        """[k], or None if groups lie in order."""
        return self._parts().g_idx

    def get_cached_weight(self) -> None:
        """None: one layout serves any number of rows."""

    def get_cached_compensation(self) -> None:
        """None, for the same reason."""

    def to_public(self, t: Tensor) -> Tensor:
        """The codes of packed bytes, in the plain format of `from_float_and_qweight`."""
        parts = unpack_quantized(t)
        return pack_nibbles(parts.codes) if parts.kind in ("int4", "nf4") else parts.codes

    def pack(self, t: Tensor) -> Tensor:
        """The bytes of codes in the plain format, with the scales of this weight."""
        parts = self._parts()
        codes = _plain_codes(t, parts.kind, self._layer.in_features)
        changed = {**vars(parts), "codes": codes.contiguous()}
        return Quantized(**changed).pack()


class IPEXWeightOnlyQuantizedLinear(nn.Module):
    """`ipex.llm.quantization`'s layer: holds a `WeightOnlyQuantizedLinear`."""

    def __init__(self, woq_linear_impl: nn.Module) -> None:
        super().__init__()
        self.woq_linear_impl = woq_linear_impl

    @classmethod
    def from_weight(cls, *args: Any, **kwargs: Any) -> IPEXWeightOnlyQuantizedLinear:
        """See `WeightOnlyQuantizedLinear.from_weight`."""
        return cls(WeightOnlyQuantizedLinear.from_weight(*args, **kwargs))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: [..., k]; returns [..., n]. kwargs are not read."""
        result: Tensor = self.woq_linear_impl(x)
        return result


def _sizes(mod: Any) -> tuple[int, int]:
    """out_features, in_features"""
    return int(mod.out_features), int(mod.in_features)


def _narrow(x: Tensor) -> Tensor:
    return x[:, 0] if x.shape[1] == 1 else x


def _plain_codes(qweight: Tensor, kind: str, k: int) -> Tensor:
    """Codes [n, k] out of the plain format."""
    _check.held("qweight", qweight)
    if kind in ("int8", "fp8"):
        wanted = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        if qweight.dtype is not wanted:
            raise TypeError(f"qweight is {qweight.dtype}, but must be {wanted}")
        return qweight
    if qweight.dtype is torch.int32:
        qweight = qweight.resolve_neg().contiguous().view(torch.uint8)
    if qweight.dtype is not torch.uint8 or qweight.dim() != 2:
        raise TypeError(f"qweight is {qweight.dtype}, but must be uint8 or int32 for four bits")
    return unpack_nibbles(qweight, k)


def _packed(codes: Tensor, config: Any, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return pack_quantized(
        str(config.kind), codes.contiguous(), scales, zeros, group_size=config.group_size
    )
