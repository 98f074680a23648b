"""Gated MLPs of any model: down(act(gate(x)) * up(x)), told apart by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.hf import swap
from lmfuse.modules.linear_fusion import concat, joinable, silu_gate_up

_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_mul": functional.silu_mul,
    "gelu_mul": functional.gelu_mul,
    "gelu_mul (tanh)": partial(functional.gelu_mul, approximate="tanh"),
}
# Where transformers' MLPs keep their activation.
_ACT = ("act_fn", "activation_fn", "act")


class FusedMLP(swap.Fused):
    """A gated MLP whose activation and product are one sweep, rounded once."""

    fused_act: str  # the attribute with the activation
    fused_gated: str  # a key of _GATED
    gate_up_proj: nn.Module  # either this one,
    gate_proj: nn.Module  # or these two
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """down_proj(act(gate_proj(x)) · up_proj(x))"""
        if _watched(getattr(self, self.fused_act)):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        if "gate_up_proj" in self._modules:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        elif self.fused_gated == "silu_mul" and joinable(self.gate_proj, self.up_proj):
            return self.down_proj(  # type: ignore[no-any-return]
                silu_gate_up(hidden_states, self.gate_proj, self.up_proj)
            )
        else:
            gate, up = concat(hidden_states, self.gate_proj, self.up_proj)
        return self.down_proj(_GATED[self.fused_gated](gate, up))  # type: ignore[no-any-return]


def _watched(activation: object) -> bool:
    """Whether somebody hooked the activation, which the fused form does not call."""
    return isinstance(activation, nn.Module) and bool(
        activation._forward_hooks or activation._forward_pre_hooks
    )


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if it is a gated MLP, the reason against it, or None."""
    children = module._modules
    two = {"gate_proj", "up_proj", "down_proj"} <= children.keys()
    if not two and not {"gate_up_proj", "down_proj"} <= children.keys():
        return None
    act_name = next((a for a in _ACT if hasattr(module, a)), None)
    if act_name is None or not swap.takes_one_input(module):
        return "no activation of its own, more than one input, or replaced on the instance"
    probe = _small(module)
    # Far enough from 0 that erf and tanh differ by 5e-4, fifty times the tolerance.
    x = 2 * swap.random(swap.generator(), 64, 8)
    try:
        expected = probe.forward(x)
    except Exception as error:  # it is foreign code
        return f"its forward refused a test input: {error}"
    for gated in _GATED:
        kind = swap.subclass(FusedMLP, type(module), fused_act=act_name, fused_gated=gated)
        ours = swap.copied(probe)
        ours.__class__ = kind
        if swap.agrees(expected, ours.forward, x):
            return swap.Swap(kind, gated)
    return "its activation is none of silu, gelu and gelu_tanh, or it computes more than these"


def _small(module: nn.Module) -> nn.Module:
    """The same module with projections of 8 -> 12 -> 8: its forward, at no cost."""
    random = swap.generator()
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "gate_up_proj": (24, 8)}
    modules = dict(module._modules)
    for name in modules.keys() & {*shapes, "down_proj"}:
        out, inputs = shapes.get(name, (8, 12))
        linear = nn.Linear(inputs, out, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.copy_(swap.random(random, out, inputs) * 0.3)
        modules[name] = linear
    return swap.copied(module, _modules=modules)
