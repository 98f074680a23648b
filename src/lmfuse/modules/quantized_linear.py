"""`QuantizedLinear`: a linear layer whose weight is quantized."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import QuantizedFormat, _check
from lmfuse.functional.quantized import _check_bytes, packed_bytes


class QuantizedLinear(nn.Module):
    """x W^T + bias over the bytes of `lmfuse.functional.pack_quantized`.

    The bytes are a buffer, `weight`, and all that a state_dict holds besides `bias`. `to(dtype)`
    leaves them alone. `format` is what they said when the layer was made.

    Args:
        weight: from `pack_quantized`.
        bias: [out_features]; None for none.
        compute, block_scales: as for `lmfuse.functional.woq_linear`.

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight, or a bias of another size.
    """

    weight: Tensor
    bias: nn.Parameter | None
    format: QuantizedFormat

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        compute: str = "bf16",
        block_scales: bool = False,
    ) -> None:
        _check.held("weight", weight, (torch.uint8,))
        _check_bytes("weight", weight)
        f = functional.quantized_format(weight)
        _check.vector("bias", bias, f.out_features, "the result")
        self._fill(f, weight, bias, compute, block_scales)

    def _fill(
        self,
        f: QuantizedFormat,
        weight: Tensor,
        bias: Tensor | None,
        compute: str,
        block_scales: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = f.in_features, f.out_features
        self.compute, self.block_scales = compute, block_scales
        self.format = f
        self.register_buffer("weight", weight)
        given = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", given)

    @classmethod
    def placeholder(
        cls,
        format: QuantizedFormat,
        bias: torch.dtype | None = None,
        compute: str = "bf16",
        block_scales: bool = False,
    ) -> QuantizedLinear:
        """A layer on the meta device, into which `load_state_dict(assign=True)` puts the bytes.

        Args:
            format: what the bytes will say.
            bias: its dtype; None for none.
            compute, block_scales: as for the layer.
        """
        weight = torch.empty(packed_bytes(format), dtype=torch.uint8, device="meta")
        n = format.out_features
        empty = None if bias is None else torch.empty(n, dtype=bias, device="meta")
        new = cls.__new__(cls)
        new._fill(format, weight, empty, compute, block_scales)
        return new

    def dequantize(self) -> Tensor:
        """The weight, [out_features, in_features] in float32."""
        return functional.dequantize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; see `lmfuse.functional.woq_linear`."""
        return self.run(input)

    def run(self, x: Tensor, post: str | None = None, *operands: Tensor) -> Tensor:
        """post(x W^T + bias), in one kernel."""
        return functional.woq_linear(
            x,
            self.weight,
            self.bias,
            post,
            *operands,
            out_features=self.out_features,
            compute=self.compute,
            block_scales=self.block_scales,
        )

    def alike(self, other: QuantizedLinear) -> bool:
        """Whether both can be multiplied in one walk over their weights."""
        return (
            self.compute == other.compute
            and self.block_scales == other.block_scales
            and self.in_features == other.in_features
            and _form(self.format) == _form(other.format)
            and not self.format.act_order
        )

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        f = self.format
        text += f", {f.kind}" + (f", group_size={f.group_size}" if f.group_size > 0 else "")
        return f"{text}, compute={self.compute}"


def _form(f: QuantizedFormat) -> tuple[Any, ...]:
    return f.kind, f.group_size, f.scale_dtype, f.zeros, f.act_order


def gate_up(x: Tensor, gate: QuantizedLinear, up: QuantizedLinear) -> Tensor:
    """silu(gate(x)) · up(x) of layers that are `alike`, in one sweep."""
    return functional.woq_linear_gate_up(
        x,
        gate.weight,
        up.weight,
        gate.bias,
        up.bias,
        out_features=gate.out_features,
        compute=gate.compute,
        block_scales=gate.block_scales,
    )


def concat(x: Tensor, *linears: QuantizedLinear) -> tuple[Tensor, ...]:
    """linear(x) of each of some layers that are `alike`, in one walk."""
    first = linears[0]
    return functional.woq_linear_concat(
        x,
        [m.weight for m in linears],
        [cast("Tensor | None", m.bias) for m in linears],
        out_features=[m.out_features for m in linears],
        compute=first.compute,
        block_scales=first.block_scales,
    )
