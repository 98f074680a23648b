"""The experts of a mixture, as transformers keeps them: which they are, and over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional.experts import ACTIVATIONS, PackedExperts
from lmfuse.modules import probe
from lmfuse.modules.linear import Packed, packed_class

# Of the parameters, and how many matrices of an expert lie one below the other in each.
PARTS = {"gate_up_proj": 2, "down_proj": 1}
BIASES = tuple(f"{name}_bias" for name in PARTS)
CLAMPED = "clamped_swiglu"
_PLAIN = tuple(act for act in ACTIVATIONS if act != CLAMPED)
MADE = "_lmfuse_bias"  # of instances: a bias, when it was read, and what was made of it


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

    def more(self) -> dict[str, Any]:
        """What `functional.experts` is told besides the weights."""
        return {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, k]; see `lmfuse.functional.experts`."""
        gate_up: Any = self.gate_up_proj
        down: Any = self.down_proj
        if isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
            args = hidden_states, top_k_index, top_k_weights, gate_up, down, self.experts_act
            return functional.experts(*args, **self.more())
        return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


class TransposedExperts(Experts):
    """Those of gpt-oss: gate_up_proj [experts, k, 2 n], whose columns are gate's and up's in turn,
    and down_proj [experts, n, k], each with a bias; alpha and limit of the activation."""

    @classmethod
    def packed(cls, name: str, plain: Tensor, rounded: bool = False) -> nn.Parameter:
        """The parameter `name`, packed; it does not train."""
        packed = functional.pack_experts(plain, PARTS[name], rounded, transposed=True)
        return nn.Parameter(packed, requires_grad=False)

    def more(self) -> dict[str, Any]:
        """What `functional.experts` is told besides the weights."""
        return told(self)


def told(module: Any) -> dict[str, Any]:
    """What gpt-oss's experts tell `functional.experts` besides the weights."""
    bias: Any = module.gate_up_proj_bias
    version = 0 if torch.compiler.is_compiling() or bias.is_inference() else bias._version
    made = vars(module).get(MADE)
    if made is None or made[0] is not bias or made[1] != version:
        made = bias, version, halves(bias)
        if not torch.compiler.is_compiling():
            vars(module)[MADE] = made
    return {
        "gate_up_bias": made[2],
        "down_bias": module.down_proj_bias,
        "slope": float(module.alpha),
        "limit": float(module.limit),
    }


def halves(bias: Tensor) -> Tensor:
    """[experts, 2 n], gate's and up's elements in turn, as those of gate and then those of up."""
    return torch.cat((bias[:, ::2], bias[:, 1::2]), 1).detach()


def packed_kind(act: str) -> type[Experts]:
    """Of experts with this activation."""
    return TransposedExperts if act == CLAMPED else Experts


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


def _activation(module: Any) -> str | None:
    """That of experts with this forward, given small random parameters, or None."""
    if "forward" in vars(module) or getattr(module, "_is_expert_parallel", False):
        return None
    names = module._parameters.keys()
    if names == PARTS.keys() and not getattr(module, "is_transposed", False):
        return next((act for act in _PLAIN if _computes(module, act)), None)
    numbers = (type(getattr(module, name, None)) in (int, float) for name in ("alpha", "limit"))
    if names == {*PARTS, *BIASES} and all(numbers) and _computes(module, CLAMPED):
        return CLAMPED
    return None


def _computes(module: nn.Module, act: str) -> bool:
    """Whether a small copy does the same with packed weights and this activation."""
    random, (e, k, n) = probe.generator(), (3, 8, 16)
    kind = packed_kind(act)
    shapes = {"gate_up_proj": (2 * n, k), "down_proj": (k, n)}
    plain: dict[str, nn.Parameter] = {}
    for name, shape in shapes.items():
        shape = shape[::-1] if kind is TransposedExperts else shape
        plain[name] = nn.Parameter(probe.random(random, e, *shape))
    for name, width in zip(BIASES, (2 * n, k), strict=True):
        if name in module._parameters:
            plain[name] = nn.Parameter(probe.random(random, e, width))
    x, chosen = 2 * probe.random(random, 20, k), probe.random(random, 20, e).topk(2)
    packed = {name: kind.packed(name, plain[name]) for name in PARTS}
    try:
        expected = probe.copied(module, _parameters=plain, num_experts=e).forward(x, *chosen[::-1])
    except Exception:  # it is foreign code
        return False
    ours: Any = probe.copied(module, _parameters={**plain, **packed}, experts_act=act)
    ours.__class__ = packed_class(type(module), kind)
    return probe.agrees(expected, ours.forward, x, *chosen[::-1])
