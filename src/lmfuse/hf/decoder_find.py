"""Finding out what a decoder layer computes, by its shape, and trying it on random inputs.

A layer is told apart by the names of its parts and by what its attention asks the attention
interface for. Whatever that suggests is accepted only if our op, given the same small random
weights, computes what the layer's own forward computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import DecoderLinear
from lmfuse.hf import attention, decoder_small, linear, norm, rope, swap
from lmfuse.hf.attention_modules import FusedAttention
from lmfuse.hf.decoder_form import ANGLES, Form, looked_up
from lmfuse.modules import QuantizedExperts, experts

# How the parts are called in transformers.
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("c_attn",),
)
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_MLP = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_ACT = ("act_fn", "activation_fn", "act", "gelu_impl")
_ROUTERS, _EXPERTS = ("gate", "router"), "experts"
_SHARED, _SHARED_GATE = ("shared_expert", "shared_experts", "shared_mlp"), "shared_expert_gate"
_BEFORE_ATTENTION = ("input_layernorm", "self_attn_layer_norm", "norm_1", "ln_1", "ln_attn")
_AFTER_ATTENTION = ("post_attention_layernorm", "final_layer_norm", "norm_2", "ln_2", "ln_mlp")
_AROUND_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_QUERY_KEY = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
CACHE = ("past_key_values", "layer_past")
_ALIBI = ("alibi", "position_bias")
_SINKS = "sinks"
_CODEGEN = 4  # groups of heads: so many accelerators has its weight been for

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "relu": nn.functional.relu,
}
_ROPES = {
    "rope (half)": (True, 1, 1),
    "rope (half, single table)": (True, 1, 2),
    "rope (interleaved)": (False, 1, 1),
    "rope (interleaved, doubled table)": (False, 2, 1),
}


def find(model: nn.Module, name: str, layer: nn.Module) -> Form | str | None:
    """The form of `layer`, the reason why it has none, or None if it is no decoder layer at all."""
    attn_name = next((a for a in _ATTENTION if a in layer._modules), None)
    attn = layer._modules.get(attn_name or "")
    if attn_name is None or attn is None or not hasattr(attn, "layer_idx") or not asks_ours(attn):
        return None
    if any("forward" in vars(m) for m in layer.modules()):
        return "the forward of one of its parts is replaced on the instance"
    if (reason := next(filter(None, map(swap.overrides, layer.modules())), None)) is not None:
        return reason
    try:
        parts = _parts(layer, attn_name, attn)
    except _UnknownError as reason:
        return str(reason)
    x = swap.random(swap.generator(), 1, 6, decoder_small.HIDDEN)
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    if parts.angles:
        tables = [made] if (made := looked_up(attn, positions)) is not None else []
    else:
        tables = rope._tables(model, f"{name}.{attn_name}")
    if isinstance(attn, rope.FusedRope) and not tables:
        return "no table of its RoPE was found"
    try:
        small = decoder_small.small_copy(layer, parts)
        given: dict[str, Any] = {"position_ids": positions}
        if tables and not parts.angles:
            given["position_embeddings"] = tables[0]
        expected = decoder_small.run(small, parts, x, given, _called(small, _ALIBI))
    except Exception as error:  # it is foreign code
        return f"its forward refused a test input: {error}"
    asked = vars(small.get_submodule(attn_name)).get(decoder_small.ASKED)
    pair = isinstance(expected, tuple) and len(expected) == 2 and expected[1] is None
    parts, expected = replace(parts, pair=pair), expected[0] if pair else expected
    if asked is None or not isinstance(expected, Tensor):
        return "its attention does not go through transformers' AttentionInterface"
    for form in _candidates(parts, layer, attn, asked, tables):
        if _agrees(form, small, x, expected, tables):
            return form
    return "it computes something else than the decoder op"


def asks_ours(attn: Any) -> bool:
    """Whether an attention module has lmfuse compute its attention."""
    if isinstance(attn, FusedAttention):
        return True
    config = getattr(attn, "config", None)
    return getattr(config, "_attn_implementation", None) == attention.NAME


class _UnknownError(Exception):
    pass


def _parts(layer: nn.Module, attn_name: str, attn: nn.Module) -> Form:
    """A form with all names, but without numbers.

    Raises:
        _UnknownError: there is a part that no name says what to do with.
    """
    projections = _first(attn, _PROJECTIONS, "no projections of a known name")
    output = _first(attn, [(n,) for n in _OUTPUT], "no output projection of a known name")
    inner = next((f"{name}." for name in ("mlp", "ffn") if name in layer._modules), "")
    owner = layer.get_submodule(inner[:-1]) if inner else layer
    mixed = _mixture(owner)
    mlp = _mlp(owner, mixed is not None)
    gate = inner + _SHARED_GATE if mixed and _SHARED_GATE in owner._modules else None
    around = [n if _is_norm(layer, n) else None for n in _AROUND_MLP]
    after = next((n for n in _AFTER_ATTENTION if _is_norm(layer, n)), None)
    before = next((n for n in _BEFORE_ATTENTION if _is_norm(layer, n)), None)
    if any(around):
        norms: list[str | None] = [before, after, *around]
    else:
        norms = [before, None, after or before, None]
    pair = next((p for p in _QUERY_KEY if all(_is_norm(attn, n) for n in p)), None)
    heads = [f"{attn_name}.{n}" for n in pair] if pair else [None, None]
    act = next((getattr(owner, a) for a in _ACT if hasattr(owner, a)), None)
    found = Form(
        attn_name,
        tuple(f"{attn_name}.{n}" for n in projections),
        f"{attn_name}.{output[0]}",
        tuple(inner + n for n in mlp),
        (norms[0], *heads, *norms[1:]),
        _called(layer, CACHE) or CACHE[0],
        tuple(_arguments(layer)[2:]),
        heads=0,
        kv_heads=0,
        head_dim=0,
        activation=_activation(act) if mixed is None else mixed[1],
        gated=len(mlp) != 2 or mlp[0].endswith("gate_up_proj"),
        scale=0.0,
        softcap=0.0,
        window=None,
        parallel=not any(around) and after is None,
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        type=_type(attn),
        negated=not getattr(attn, "takes_our_mask", True),
        sinks=f"{attn_name}.{_SINKS}" if _SINKS in attn._parameters else None,
        angles=isinstance(attn, FusedAttention) and ANGLES in attn._buffers,
    )
    if mixed is not None:
        router, _, chosen = mixed
        found = replace(
            found,
            router=inner + router,
            experts=inner + _EXPERTS,
            shared_gate=gate,
            chosen=chosen,
        )
    _check_complete(layer, found)
    if any(getattr(x, "clip_qkv", None) for x in (attn, getattr(attn, "config", None))):
        raise _UnknownError("it clips queries, keys and values")  # perhaps none of our numbers
    return found


def _mlp(owner: nn.Module, mixes: bool) -> tuple[str, ...]:
    """The layers of the MLP `owner`; if it mixes experts, of the one that all tokens share."""
    if not mixes:
        return _first(owner, _MLP, "no MLP of a known form")
    name = next((n for n in _SHARED if owner._modules.get(n) is not None), None)
    if name is None:
        return ()
    names = _first(owner.get_submodule(name), _MLP, "no shared expert of a known form")
    return tuple(f"{name}.{n}" for n in names)


def _mixture(owner: nn.Module) -> tuple[str, str, int] | None:
    """The router, the activation and how many experts are chosen, where `owner` is a mixture."""
    module: Any = owner._modules.get(_EXPERTS)
    name = next((n for n in _ROUTERS if owner._modules.get(n) is not None), None)
    if module is None or name is None:
        return None
    router: Any = owner._modules[name]
    chosen = getattr(router, "top_k", None)
    if not router._parameters.keys() <= {"weight", "bias"} or router._buffers or router._modules:
        return None
    if isinstance(module, QuantizedExperts):
        act: str | None = module.act
    elif isinstance(module, experts.Experts):
        act = module.experts_act
    else:
        act = experts.find(module)[0].get("")
    if act is None or type(chosen) is not int or router.weight.dim() != 2:
        return None
    return name, act, chosen


def _type(attn: Any) -> str | None:
    types = getattr(getattr(attn, "config", None), "layer_types", None)
    return types[attn.layer_idx] if types and attn.layer_idx < len(types) else None


def _called(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of `names` is a parameter of the layer's forward."""
    parameters = _arguments(layer)
    return next((name for name in names if name in parameters), None)


def _arguments(layer: nn.Module) -> list[str]:
    kind = getattr(type(layer), "fused_stock", type(layer))
    return list(inspect.signature(kind.forward).parameters)


def _first(owner: nn.Module, names: Any, otherwise: str) -> tuple[str, ...]:
    for each in names:
        if all(linear.computes(owner._modules.get(n)) for n in each):
            return tuple(each)
    raise _UnknownError(f"it has {otherwise}")


def _is_norm(owner: nn.Module, name: str) -> bool:
    return owner._modules.get(name) is not None


def _activation(act: Any) -> str | None:
    x = torch.linspace(-4, 4, 64)
    try:
        y = act(x)
    except Exception:  # it is foreign code
        raise _UnknownError("its activation refused a test input") from None
    for name, function in _ACTIVATIONS.items():
        if isinstance(y, Tensor) and swap.agrees(y, function, x):
            return name
    raise _UnknownError("its activation is none of silu, gelu, gelu_tanh and relu")


def _check_complete(layer: nn.Module, form: Form) -> None:
    """All parameters and buffers of `layer` belong to a part, and all norms were recognised."""
    parts = [*form.linears(layer), *(m for m in form.norm_modules(layer) if m is not None)]
    for module in form.norm_modules(layer):
        if module is None:
            continue
        if not isinstance(module, (norm.FusedNorm, norm.FusedLayerNorm)):
            raise _UnknownError("it has a norm that was not recognised")
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() != 1:
            raise _UnknownError("it has a norm with a weight for each head")
    parts += [layer.get_submodule(n) for n in (form.router, form.experts) if n is not None]
    known = {id(t) for m in parts for t in (*m.parameters(), *m.buffers())}
    known |= {id(layer.get_parameter(form.sinks))} if form.sinks is not None else set()
    known |= {id(layer.get_submodule(form.attention)._buffers[ANGLES])} if form.angles else set()
    if any(id(t) not in known for t in (*layer.parameters(), *layer.buffers())):
        raise _UnknownError("it has parameters besides those of its projections, norms and MLP")


def _candidates(
    parts: Form, layer: nn.Module, attn: nn.Module, asked: Any, tables: list[tuple[Tensor, Tensor]]
) -> Iterator[Form]:
    query, key, options = asked
    name, slopes = _called(layer, _ALIBI), options.get("alibi")
    if (options.get("s_aux") is None) != (parts.sinks is None):
        return
    if options.get("position_bias") is not None:
        return
    dim: int = query[3]
    scale = options.get("scaling")
    form = replace(
        parts,
        heads=query[1],
        kv_heads=key[1],
        head_dim=dim,
        scale=dim**-0.5 if scale is None else float(scale),
        softcap=float(options.get("softcap") or 0.0),
        window=options.get("sliding_window"),
        alibi=None if name is None or slopes is None else (name, tuple(slopes.tolist())),
    )
    if isinstance(attn, rope.FusedRope):
        if attn.fused_form not in _ROPES:
            return
        half, step, times = _ROPES[attn.fused_form]
        width = times * tables[0][0].shape[-1]
        form = replace(form, rotary_dim=width, rotary_half=half, table_step=step, table_times=times)
    elif parts.angles:
        form = replace(form, rotary_dim=2 * tables[0][0].shape[-1], rotary_half=False)
    elif isinstance(attn, FusedAttention) and tables:
        form = replace(form, rotary_dim=tables[0][0].shape[-1])
    own = float(getattr(attn, "scaling", 1.0))
    for scale in dict.fromkeys((form.scale, form.scale * own)):  # OPT scales queries itself
        for parallel in dict.fromkeys((form.parallel, not form.parallel)):
            if parallel and (form.norms[3] or form.norms[5] or form.residual_scale != 1.0):
                continue
            for groups, values_first in _groups(form):
                for turned in dict.fromkeys((form.rotary_dim, 0)):  # some leave out RoPE here
                    for normalized in (True, False) if form.experts else (True,):
                        yield replace(
                            form,
                            scale=scale,
                            parallel=parallel,
                            groups=groups,
                            values_first=values_first,
                            rotary_dim=turned,
                            normalized=normalized,
                        )


def _groups(form: Form) -> list[tuple[int, bool]]:
    """How the heads may lie in the rows of one projection: how many groups there are of them, and
    whether values come first in each."""
    if len(form.projections) > 1:
        return [(1, False)]
    found = [(form.kv_heads, False), (1, False)]
    return found if form.kv_heads % _CODEGEN else [*found, (_CODEGEN, True)]


def _packed(plain: nn.Linear) -> DecoderLinear:
    return DecoderLinear(functional.pack_linear(plain.weight), plain.bias)


def _agrees(
    form: Form, small: nn.Module, x: Tensor, expected: Tensor, tables: list[tuple[Tensor, Tensor]]
) -> bool:
    """Whether the op gives the same, the prompt in two pieces."""
    with torch.no_grad():
        try:
            stack = functional.decoder_stack([form.described(small, _packed)])
        except (TypeError, ValueError, RuntimeError):
            return False  # such as an activation that the op has only without a gate
        tokens = x.shape[1]
        caches = [torch.zeros(form.kv_heads, tokens, form.head_dim) for _ in range(2)]
        slots = torch.arange(tokens)
        cos, sin = tables[0] if form.rotary_dim else (None, None)

        def op(x: Tensor) -> Tensor:
            pieces = []
            for begin, end in ((0, tokens - 2), (tokens - 2, tokens)):
                angles = (
                    None if t is None else t[:, begin:end, :: form.table_step] for t in (cos, sin)
                )
                lengths = torch.tensor([0, end])
                args = (x[:, begin:end], stack, caches, slots[begin:end], slots[None], lengths)
                pieces.append(functional.decoder(*args, *angles))
            return torch.cat(pieces, 1) / size

        size = expected.abs().max()  # what is added up is as large, though some sums are small
        return swap.agrees(expected / size, op, x)
