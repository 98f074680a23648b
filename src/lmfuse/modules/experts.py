"""The experts of a mixture, as transformers keeps them: which they are, and over packed weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional.experts import ACTIVATIONS, PackedExperts
from lmfuse.modules import probe
from lmfuse.modules.linear import Packed

# Of the parameters, and how many matrices of an expert lie one below the other in each.
PARTS = {"gate_up_proj": 2, "down_proj": 1}


class Experts(Packed):
    """Parameters gate_up_proj [experts, 2 n, k] and down_proj [experts, k, n], packed.

    As `Packed`, but of these parameters, and with the stock module's forward while either of them
    is plain.
    """

    packed_names = tuple(PARTS)
    experts_act: str  # of the instance: an activation of `functional.experts`

    @classmethod
    def packed(cls, name: str, plain: Tensor, rounded: bool = False) -> nn.Parameter:
        """The parameter `name`, packed; it does not train."""
        packed = functional.pack_experts(plain, PARTS[name], rounded)
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


def find(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The activation of the experts in `model` that can be packed, and why others cannot."""
    known: dict[str, str] = {}
    against: dict[str, str] = {}
    for name, module in model.named_modules():
        weights = [module._parameters.get(parameter) for parameter in PARTS]
        if any(w is None or type(w) is not nn.Parameter or w.dim() != 3 for w in weights):
            continue
        with torch.device("cpu"):  # the model may be in the making, on meta
            act = _activation(module)
        if act is None:
            against[name] = "its experts compute more than down(act(gate(x)) · up(x))"
        else:
            known[name] = act
    return known, against


def _activation(module: nn.Module) -> str | None:
    """That of experts with this forward, given small random parameters, or None."""
    if module._parameters.keys() != PARTS.keys() or "forward" in vars(module):
        return None
    if getattr(module, "is_transposed", False) or getattr(module, "_is_expert_parallel", False):
        return None
    random, (e, k, n) = probe.generator(), (3, 8, 16)
    gate_up = nn.Parameter(probe.random(random, e, 2 * n, k))
    down = nn.Parameter(probe.random(random, e, k, n))
    weights = {"gate_up_proj": gate_up, "down_proj": down}
    x, chosen = 2 * probe.random(random, 20, k), probe.random(random, 20, e).topk(2)
    try:
        small = probe.copied(module, _parameters=weights, num_experts=e)
        expected = small.forward(x, chosen.indices, chosen.values)
    except Exception:  # it is foreign code
        return None
    packed = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    for act in ACTIVATIONS:
        ours = partial(functional.experts, gate_up=packed[0], down=packed[1], act=act)
        if probe.agrees(expected, ours, x, chosen.indices, chosen.values):
            return act
    return None
