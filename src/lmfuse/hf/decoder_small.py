"""Small copies of decoder layers, with random weights: what they compute, and what their attention
asks for."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.hf import attention, swap
from lmfuse.hf.attention_modules import FusedAttention
from lmfuse.hf.linear import features
from lmfuse.modules.experts import CLAMPED

if TYPE_CHECKING:
    from lmfuse.hf.decoder_form import Form

# Under this name the attention interface knows a function that writes down what it is asked for.
_PROBE = "lmfuse_probe"
ASKED = "_lmfuse_asked"

HIDDEN, _INNER = 8, 12


def small_copy(layer: nn.Module, form: Form) -> nn.Module:
    """A copy with few hidden features and random weights, whose forwards are the stock ones (but
    for norms, which `hf.norm` has tried)."""
    random = swap.generator()
    count = len(form.projections)
    sizes: dict[int, tuple[int | None, int | None]] = {}  # out, in; None: as it is
    for i, linear in enumerate(form.linears(layer)):
        if i < count or i > count + len(form.mlp):
            sizes[id(linear)] = None, HIDDEN
        elif i == count:
            sizes[id(linear)] = HIDDEN, None
        elif i == count + len(form.mlp):
            sizes[id(linear)] = HIDDEN, _INNER
        else:
            halves = 2 if form.mlp[0].endswith("gate_up_proj") else 1
            sizes[id(linear)] = halves * _INNER, HIDDEN
    instead = _small_mixture(random, layer, form)
    norms = form.norm_modules(layer)
    norm_ids, over_heads = {id(m) for m in norms}, {id(m) for m in norms[1:3]}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in sizes:
            return _random_linear(random, module, *sizes[id(module)])
        if id(module) in instead:
            return instead[id(module)]
        new = swap.copied(module, _modules={})
        whose = isinstance(module, FusedAttention)  # there is no other form that asks
        if isinstance(new, swap.Fused) and id(module) not in norm_ids and not whose:
            new.__class__ = type(new).fused_stock  # type: ignore[assignment]
        if module._parameters:
            n = HIDDEN if id(module) in norm_ids - over_heads else None
            new.__dict__["_parameters"] = {
                k: None if p is None else nn.Parameter(swap.random(random, n or p.numel()))
                for k, p in module._parameters.items()
            }
            if n is not None and hasattr(module, "normalized_shape"):
                new.__dict__["normalized_shape"] = (n,)
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else copied(child)
        if module is layer.get_submodule(form.attention) and whose:
            new.__dict__["_attend"] = partial(_attended, new)
        elif module is layer.get_submodule(form.attention):
            config = copy.copy(module.config)
            vars(config)["_attn_implementation_internal"] = _PROBE
            new.__dict__["config"] = config
        return new

    return copied(layer)


class _Experts(nn.Module):
    """Few features; what the experts compute was tried before."""

    def __init__(self, random: torch.Generator, count: int, act: str, like: Any) -> None:
        super().__init__()
        gate_up = swap.random(random, count, 2 * _INNER, HIDDEN)
        down = swap.random(random, count, HIDDEN, _INNER)
        self.gate_up_proj = nn.Parameter(functional.pack_experts(gate_up, 2), requires_grad=False)
        self.down_proj = nn.Parameter(functional.pack_experts(down), requires_grad=False)
        self.act = act
        self.like: dict[str, Any] = {}
        if act == CLAMPED:
            biases = (swap.random(random, count, n) for n in (2 * _INNER, HIDDEN))
            self.like = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
            self.like |= {"slope": float(like.alpha), "limit": float(like.limit)}

    def more(self) -> dict[str, Any]:
        """See `lmfuse.modules.experts.Experts.more`."""
        return self.like

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        args = x, index, weights, self.gate_up_proj, self.down_proj, self.act
        return functional.experts(*args, **self.like)


def _small_mixture(random: torch.Generator, layer: nn.Module, form: Form) -> dict[int, nn.Module]:
    """What stands in a small copy for the router and the experts."""
    if form.router is None or form.experts is None:
        return {}
    router: Any = layer.get_submodule(form.router)
    count, hidden = router.weight.shape
    sizes = {k: HIDDEN for k, v in vars(router).items() if type(v) is int and v == hidden}
    parameters: dict[str, Any] = {"weight": nn.Parameter(swap.random(random, count, HIDDEN))}
    if getattr(router, "bias", None) is not None:
        parameters["bias"] = nn.Parameter(swap.random(random, count))
    small = swap.copied(router, _parameters=parameters, **sizes)
    replaced = {id(router): small}
    module = layer.get_submodule(form.experts)
    replaced[id(module)] = _Experts(random, count, str(form.activation), module)
    return replaced


def _random_linear(
    random: torch.Generator, like: Any, out: int | None, inputs: int | None
) -> nn.Linear:
    out, inputs = (a or b for a, b in zip((out, inputs), features(like), strict=True))
    biased = like.bias is not None
    linear = nn.Linear(inputs, out, bias=biased, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(swap.random(random, out, inputs) * inputs**-0.5)
        if biased:
            linear.bias.copy_(swap.random(random, out))
    return linear


def _probed(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the attention interface calls for small copies."""
    vars(module)[ASKED] = (query.shape, key.shape, kwargs)
    return attention.attention(module, query, key, *args, **kwargs)


def _attended(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    mask: Any,
    scale: float,
    output_attentions: bool = False,
    **bias: Any,
) -> Any:
    """The same for those that ask for themselves."""
    options: dict[str, Any] = {"scaling": scale, **bias}
    vars(module)[ASKED] = (*(x.transpose(1, 2).shape for x in (query, key)), options)
    return type(module)._attend(module, query, key, value, cache, mask, scale, **bias)


def run(
    small: nn.Module,
    form: Form,
    x: Tensor,
    given: dict[str, Any],
    alibi: str | None,
) -> Any:
    """The forward of a copy, given this; `alibi`: what it calls biases by distance, if it takes
    them."""
    transformers.AttentionInterface.register(_PROBE, _probed)
    kwargs: dict[str, Any] = {"attention_mask": None, form.cache: None, **given}
    if alibi is not None:  # Falcon has it or RoPE
        wanted = getattr(getattr(small, "config", None), "alibi", True)
        heads = getattr(small.get_submodule(form.attention), "num_heads", 1)
        kwargs[alibi] = torch.zeros(heads, 1, x.shape[1]) if wanted else None
    return small.forward(x, **kwargs)
