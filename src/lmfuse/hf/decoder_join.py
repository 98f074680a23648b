"""How the decoder layers of a model come to run whole (`hf/decoder.py`): which have a form, and
which are a stack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lmfuse.hf import spies, swap
from lmfuse.hf.decoder import FusedDecoder, FusedStack, _kinds
from lmfuse.hf.decoder_find import find
from lmfuse.hf.decoder_form import Form, modules
from lmfuse.hf.linear import features
from lmfuse.modules import QuantizedExperts


def join(model: nn.Module, done: swap.Report) -> None:
    """Makes the decoder layers in `model` whose attention is ours run whole."""
    for name, layers in list(model.named_modules()):
        if (
            not isinstance(layers, nn.ModuleList)
            or isinstance(layers, swap.Fused)
            or not len(layers)
        ):
            continue
        forms = _forms(model, name, layers, done)
        if not forms or type(layers) is not nn.ModuleList or len(forms) != len(layers):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if _alike(layers, forms) and _told_by_kind(parent, layers):
            module = type(parent).__mro__
            owner = next(k for k in module if "forward" in vars(k)).__module__
            swap.put(
                layers, swap.Swap(swap.subclass(FusedStack, nn.ModuleList, fused_module=owner), "")
            )
            done.replaced[name] = "stack of decoder layers"


def _forms(model: nn.Module, name: str, layers: nn.ModuleList, done: swap.Report) -> list[Form]:
    """The forms of those layers that have one; they are swapped."""
    forms: list[Form] = []
    with torch.no_grad():
        for i, layer in enumerate(layers):
            if isinstance(layer, FusedDecoder):
                forms.append(layer.fused_form)
                continue
            found = find(model, f"{name}.{i}", layer)
            if isinstance(found, Form):
                found = replace(found, modules=modules(layer, found))
                kind = swap.subclass(FusedDecoder, type(layer), fused_form=found)
                swap.put(layer, swap.Swap(kind, "decoder layer"))
                done.replaced[f"{name}.{i}"] = "decoder layer"
                forms.append(found)
            elif found is not None:
                done.stock[f"{name}.{i}"] = found
    return forms


def _told_by_kind(parent: Any, layers: nn.ModuleList) -> bool:
    """Whether the forward of `parent` gives layers of one kind the same, and does nothing between
    layers: tried, but where there is one kind and it cannot be."""
    kinds, firsts = _kinds(list(layers))
    try:
        with torch.no_grad():
            told = spies.told(parent, layers)
    except Exception:  # it is foreign code
        return len(firsts) == 1
    of_kind = [told.kwargs[first] for first in firsts] if told.unbroken(len(layers)) else []
    return bool(of_kind) and all(
        kwargs.keys() == of_kind[kind].keys()
        and all(kwargs[key] is of_kind[kind][key] for key in kwargs)
        for kind, kwargs in zip(kinds, told.kwargs, strict=True)
    )


def _alike(layers: nn.ModuleList, forms: list[Form]) -> bool:
    """Whether attention in layers of these forms has the same sizes, and so have mixtures; and
    those of a kind have the same angles."""
    shared: set[Any] = set()
    mixtures: set[Any] = set()
    turned: dict[Any, set[Any]] = {}
    for form, layer in zip(forms, layers, strict=True):
        names = (*form.projections, form.output)
        sizes = tuple(features(layer.get_submodule(name)) for name in names)
        heads = form.heads, form.kv_heads, form.head_dim, form.groups
        called = form.attention, form.cache, form.pair, form.alibi and form.alibi[0]
        shared.add((sizes, heads, called, form.parallel))
        if form.router is not None and form.experts is not None:
            router, experts = map(layer.get_submodule, (form.router, form.experts))
            mixtures.add((router.weight.shape, form.chosen, _inner(experts)))
        if form.rotary_dim:
            turned.setdefault((form.type, form.window), set()).add(
                (form.rotary_dim, form.table_step)
            )
    one = len(shared) == 1 and len(mixtures) <= 1
    return one and all(len(angles) == 1 for angles in turned.values())


def _inner(experts: Any) -> int:
    """How many weights each expert has for its result."""
    if isinstance(experts, QuantizedExperts):
        return experts.inner_features * experts.hidden_features
    return int(experts.down_proj.numel() // len(experts.down_proj))
