"""`Experts`: the experts of a mixture, as transformers keeps them, over packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional.experts import PackedExperts
from lmfuse.modules.linear import Packed


class Experts(Packed):
    """Parameters gate_up_proj [experts, 2 n, k] and down_proj [experts, k, n], packed.

    As `Packed`, but of these parameters, and with the stock module's forward while either of them
    is plain.
    """

    packed_names = ("gate_up_proj", "down_proj")
    experts_act: str  # of the instance: an activation of `functional.experts`

    @classmethod
    def packed(cls, name: str, plain: Tensor, rounded: bool = False) -> nn.Parameter:
        """The parameter `name`, packed; it does not train."""
        packed = functional.pack_experts(plain, 2 if name == "gate_up_proj" else 1, rounded)
        return nn.Parameter(packed, requires_grad=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, k]; see `lmfuse.functional.experts`."""
        gate_up: Any = self.gate_up_proj
        down: Any = self.down_proj
        if type(gate_up) is PackedExperts and type(down) is PackedExperts:
            return functional.experts(
                hidden_states, top_k_index, top_k_weights, gate_up, down, self.experts_act
            )
        return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
