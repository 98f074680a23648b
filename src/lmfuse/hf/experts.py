"""Experts of any mixture that transformers keeps in two parameters, told by what they compute."""

from __future__ import annotations

from functools import partial

from torch import nn

from lmfuse import functional
from lmfuse.functional.experts import ACTIVATIONS
from lmfuse.hf import swap

_NAMES = ("gate_up_proj", "down_proj")


def find(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The activation of the experts in `model` that can be packed, and why others cannot."""
    known: dict[str, str] = {}
    against: dict[str, str] = {}
    for name, module in model.named_modules():
        weights = [module._parameters.get(parameter) for parameter in _NAMES]
        if any(w is None or type(w) is not nn.Parameter or w.dim() != 3 for w in weights):
            continue
        act = _activation(module)
        if act is None:
            against[name] = "its experts compute more than down(act(gate(x)) · up(x))"
        else:
            known[name] = act
    return known, against


def _activation(module: nn.Module) -> str | None:
    """That of experts with this forward, given small random parameters, or None."""
    if module._parameters.keys() != set(_NAMES) or "forward" in vars(module):
        return None
    if getattr(module, "is_transposed", False) or getattr(module, "_is_expert_parallel", False):
        return None
    random, (e, k, n) = swap.generator(), (3, 8, 16)
    gate_up = nn.Parameter(swap.random(random, e, 2 * n, k))
    down = nn.Parameter(swap.random(random, e, k, n))
    weights = {"gate_up_proj": gate_up, "down_proj": down}
    x, chosen = 2 * swap.random(random, 20, k), swap.random(random, 20, e).topk(2)
    try:
        probe = swap.copied(module, _parameters=weights, num_experts=e)
        expected = probe.forward(x, chosen.indices, chosen.values)
    except Exception:  # it is foreign code
        return None
    packed = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    for act in ACTIVATIONS:
        ours = partial(functional.experts, gate_up=packed[0], down=packed[1], act=act)
        if swap.agrees(expected, ours, x, chosen.indices, chosen.values):
            return act
    return None
