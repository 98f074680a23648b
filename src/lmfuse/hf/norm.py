"""RMS norms and layer norms of any model, told apart by what they compute."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.hf import swap

# Where transformers' norms keep their epsilon.
_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# Those that are written into a forward, as OLMo's.
_CONSTANTS = (1e-5, 1e-6)


class FusedLayerNorm(swap.Fused, nn.LayerNorm):
    """nn.LayerNorm, computed in float32 and rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See `lmfuse.functional.fast_layer_norm`."""
        return functional.fast_layer_norm(
            hidden_states, self.normalized_shape, self.weight, self.bias, self.eps
        )


class FusedNorm(swap.Fused):
    """A norm over the last dimension, computed in float32 and rounded once.

    transformers rounds the normalised value before it multiplies by the weight: in bfloat16 the two
    differ by at most one more rounding, and this one is the closer.
    """

    fused_eps: str  # the attribute with the epsilon,
    fused_constant: float  # which may be this one
    fused_centered: bool  # subtract the mean: layer norm
    fused_offset: float  # added to the weight
    fused_promotes: bool  # float32 weight, bfloat16 input -> float32 (else bfloat16)
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See `lmfuse.functional.rms_norm` and `layer_norm`."""
        x, weight, eps = hidden_states, getattr(self, "weight", None), getattr(self, self.fused_eps)
        if self.fused_promotes and weight is not None and weight.dtype is not x.dtype:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        if self.fused_centered:
            return functional.layer_norm(x, weight, getattr(self, "bias", None), eps)
        return functional.rms_norm(x, weight, eps, self.fused_offset)


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if it is a norm, the reason against it, or None."""
    kind = type(module)
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        if "forward" in vars(module):
            return "its forward is replaced on the instance"
        return swap.Swap(swap.subclass(FusedLayerNorm, kind), "layer_norm")
    if not kind.__name__.endswith("Norm") or list(module.children()):
        return None
    if not swap.takes_one_input(module):
        return "its forward takes more than one input, or is replaced on the instance"
    own = dict(module.named_parameters(recurse=False))
    eps_name = next((e for e in _EPS if isinstance(getattr(module, e, None), float)), None)
    if not own.keys() <= {"weight", "bias"}:
        return "it has parameters other than weight and bias"
    if eps_name is not None:
        return _recognised(module, own, eps_name, getattr(module, eps_name))
    for eps in _CONSTANTS:
        found = _recognised(module, own, "fused_constant", eps)
        if isinstance(found, swap.Swap):
            return found
    return "no epsilon is known of it, and it computes neither rms_norm nor layer_norm"


def _recognised(
    module: nn.Module, own: dict[str, nn.Parameter], eps_name: str, eps: float
) -> swap.Swap | str:
    """The formula that gives what the module gives, for random weights and rows large and small."""
    random = swap.generator()
    shape = getattr(module, "normalized_shape", (64,))
    width = shape[-1] if isinstance(shape, (tuple, list)) else 64
    n = next((p.shape[-1] for p in own.values()), width)
    small = eps**0.5  # rows on which the epsilon decides
    x = swap.random(random, 4, n) * torch.tensor([[1.0], [30.0], [small], [small * 0.1]])
    weights = {k: nn.Parameter(swap.random(random, *p.shape)) for k, p in own.items()}
    probe = swap.copied(module, _parameters={**module._parameters, **weights})
    try:
        expected = probe.forward(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what we want to see: two dtypes
            mixed = probe.forward(x.bfloat16()).dtype
    except Exception as error:  # it is foreign code
        return f"its forward refused a test input: {error}"
    for becomes, centered, offset in (
        ("rms_norm", False, 0.0),
        ("rms_norm (weight + 1)", False, 1.0),
        ("layer_norm", True, 0.0),
    ):
        if "bias" in own and not centered:
            continue
        kind = swap.subclass(
            FusedNorm,
            type(module),
            fused_eps=eps_name,
            fused_constant=eps if eps_name == "fused_constant" else 0.0,
            fused_centered=centered,
            fused_offset=offset,
            fused_promotes=mixed is torch.float32 and "weight" in own,
        )
        ours = swap.copied(probe)
        ours.__class__ = kind
        if swap.agrees(expected, ours.forward, x):
            return swap.Swap(kind, becomes)
    return "it computes neither rms_norm nor layer_norm"
