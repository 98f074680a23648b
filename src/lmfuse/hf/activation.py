"""MLPs of any model, down(act(gate(x)) * up(x)) or down(act(up(x))), told by what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.hf import swap
from lmfuse.modules.linear_fusion import concat, fused_linear, joinable, silu_gate_up

_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_mul": functional.silu_mul,
    "gelu_mul": functional.gelu_mul,
    "gelu_mul (tanh)": partial(functional.gelu_mul, approximate="tanh"),
}
_PLAIN = ("gelu_tanh", "gelu", "relu", "silu")  # posts of `functional.linear`
# Where transformers' MLPs keep their activation,
_ACT = ("act_fn", "activation_fn", "act", "gelu_impl")
# and, if they have no gate, their two layers.
_LAYERS = (
    ("fc_in", "fc_out"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)


class FusedMLP(swap.Fused):
    """A gated MLP whose activation and product are one sweep, rounded once."""

    fused_act: str  # the attribute with the activation
    fused_kind: str  # its class
    fused_gated: str  # a key of _GATED
    gate_up_proj: nn.Module  # either this one,
    gate_proj: nn.Module  # or these two
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """down_proj(act(gate_proj(x)) · up_proj(x))"""
        if _watched(self):
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


class FusedPlainMLP(swap.Fused):
    """An MLP without a gate, whose activation (and residual) are computed with the products."""

    fused_layers: tuple[str, str]  # the attributes with its layers
    fused_act: str  # and with the activation
    fused_kind: str  # of this class
    fused_post: str  # one of _PLAIN

    def forward(self, hidden_states: Tensor, *residual: Tensor) -> Tensor:
        """down(act(up(x))) + residual, if there is one"""
        if self.training or _watched(self):  # there may be a dropout
            return super().forward(hidden_states, *residual)  # type: ignore[no-any-return]
        up, down = (getattr(self, name) for name in self.fused_layers)
        hidden = fused_linear(up, hidden_states, self.fused_post)
        return fused_linear(down, hidden, "add", *residual) if residual else down(hidden)


def _watched(mlp: Any) -> bool:
    """Whether the activation of `mlp`, not called by its fused form, is hooked or another."""
    activation = getattr(mlp, mlp.fused_act)
    if not isinstance(activation, nn.Module):
        return False
    hooked = bool(activation._forward_hooks or activation._forward_pre_hooks)
    return hooked or swap.kind_of(activation) != mlp.fused_kind


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if it is an MLP, the reason against it, or None."""
    children = module._modules.keys()
    gated = {"gate_proj", "up_proj", "down_proj"} <= children or {
        "gate_up_proj",
        "down_proj",
    } <= children
    layers = next((names for names in _LAYERS if children >= set(names)), None)
    act_name = next((a for a in _ACT if hasattr(module, a)), None)
    inputs = swap.inputs(module)
    if not gated and (layers is None or act_name is None or inputs not in (1, 2)):
        return None
    if act_name is None or (inputs != 1 and gated):
        return "no activation of its own, more than one input, or replaced on the instance"
    probe = _small(module, () if layers is None else layers)
    # Far enough from 0 that erf and tanh differ by 5e-4, fifty times the tolerance.
    random = swap.generator()
    x = [2 * swap.random(random, 64, 8) for _ in range(inputs)]
    try:
        expected = probe.forward(*x)
    except Exception as error:  # it is foreign code
        return f"its forward refused a test input: {error}"
    act = {"fused_act": act_name, "fused_kind": swap.kind_of(getattr(module, act_name))}
    for becomes, kind in _candidates(type(module), act, None if gated else layers):
        ours = swap.copied(probe)
        ours.__class__ = kind
        if swap.agrees(expected, ours.forward, *x):
            return swap.Swap(kind, becomes)
    known = "silu, gelu and gelu_tanh" if gated else "relu, silu, gelu and gelu_tanh"
    return f"its activation is none of {known}, or it computes more than these"


def _candidates(
    stock: type[nn.Module], act: dict[str, str], layers: tuple[str, str] | None
) -> Iterator[tuple[str, type[swap.Fused]]]:
    """What an MLP may be, gated if it has no two `layers`, and the class for that."""
    if layers is None:
        for gated in _GATED:
            yield gated, swap.subclass(FusedMLP, stock, **act, fused_gated=gated)
    else:
        for post in _PLAIN:
            settings = {"fused_layers": layers, "fused_post": post}
            yield f"linear + {post}", swap.subclass(FusedPlainMLP, stock, **act, **settings)


def _small(module: nn.Module, layers: tuple[str, ...]) -> nn.Module:
    """The same module with projections of 8 -> 12 -> 8: its forward, at no cost."""
    random = swap.generator()
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "gate_up_proj": (24, 8)}
    shapes |= dict.fromkeys(layers[:1], (12, 8))
    modules = dict(module._modules)
    for name in sorted(modules.keys() & {*shapes, "down_proj", *layers}):
        out, inputs = shapes.get(name, (8, 12))
        linear = nn.Linear(inputs, out, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.copy_(swap.random(random, out, inputs) * 0.3)
        modules[name] = linear
    return swap.copied(module, _modules=modules)
