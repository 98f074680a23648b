"""`QuantizedExperts`: the experts of a mixture, whose weights are quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import QuantizedFormat, _check
from lmfuse.functional.experts import panel_rows
from lmfuse.functional.quantized import _check_bytes
from lmfuse.modules import experts


class QuantizedExperts(nn.Module):
    """Each token through its experts; see `lmfuse.functional.experts`.

    The bytes are two buffers, and all that a state_dict holds. They are not called as the plain
    parameters are, which transformers takes apart, expert by expert, when it saves them.

    Args:
        gate_up, down: from `pack_quantized` of `expert_rows`.
        act: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
        compute, block_scales: as for `lmfuse.functional.woq_linear`.
        biases: gate_up_proj_bias [experts, 2 inner], gate's and up's elements in turn, and
            down_proj_bias [experts, hidden], as gpt-oss keeps them; or None.
        alpha, limit: slope and limit of "clamped_swiglu".

    Raises:
        TypeError, ValueError: not the bytes of quantized weights, or of such as do not fit.
    """

    gate_up: Tensor
    down: Tensor
    format: QuantizedFormat  # of gate_up

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        act: str = "silu",
        compute: str = "bf16",
        block_scales: bool = False,
        biases: tuple[Tensor, Tensor] | None = None,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            _check.held(name, weight, (torch.uint8,))
            _check_bytes(name, weight)
        f, d = functional.quantized_format(gate_up), functional.quantized_format(down)
        self.hidden_features, self.inner_features = f.in_features, d.in_features
        rows = [panel_rows(n) for n in (self.hidden_features, self.inner_features)]
        self.num_experts = d.out_features // rows[0]
        sizes = (self.num_experts * 2 * rows[1], self.num_experts * rows[0])
        if (f.out_features, d.out_features) != sizes or not self.num_experts:
            raise ValueError(
                f"gate_up is {f.out_features} by {f.in_features} and down {d.out_features} by "
                f"{d.in_features}, which are not the matrices of as many experts"
            )
        self.act, self.compute, self.block_scales = act, compute, block_scales
        self.format = f
        self.register_buffer("gate_up", gate_up)
        self.register_buffer("down", down)
        self.alpha, self.limit = alpha, limit
        for name, bias in zip(experts.BIASES, biases or (None, None), strict=True):
            kept = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.register_parameter(name, kept)

    def more(self) -> dict[str, Any]:
        """What `functional.experts` is told besides the weights."""
        return {} if self.gate_up_proj_bias is None else experts.told(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; see `lmfuse.functional.experts`."""
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As forward, which may have hooks."""
        return functional.experts(
            x,
            index,
            weights,
            self.gate_up,
            self.down,
            self.act,
            inner_features=self.inner_features,
            compute=self.compute,
            block_scales=self.block_scales,
            **self.more(),
        )

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """gate_up [experts, 2 inner, hidden] and down [experts, hidden, inner], in float32."""
        found = []
        for weight, rows in (
            (self.gate_up, self.inner_features),
            (self.down, self.hidden_features),
        ):
            values = functional.dequantize(weight)
            matrices = values.view(-1, panel_rows(rows), values.shape[1])[:, :rows]
            found.append(matrices.reshape(self.num_experts, -1, values.shape[1]))
        return found[0], found[1]

    def extra_repr(self) -> str:
        f = self.format
        text = f"{self.num_experts}, {self.hidden_features}, {self.inner_features}, {f.kind}"
        text += f", group_size={f.group_size}" if f.group_size > 0 else ""
        return f"{text}, act={self.act}, compute={self.compute}"
