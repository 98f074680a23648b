"""Decoder layers of one's own, run whole: all of them in one op."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lmfuse import functional
from lmfuse.functional import DecoderLayer, PackedWeight
from lmfuse.functional._indirect import LayerPast
from lmfuse.modules.decoder_cache import Presents, Step, UnlikeError


class DecoderLayers(nn.ModuleList):
    """A list of decoder layers over the caches of `IndirectAccessKVCacheAttention`.

    To its model it is a ModuleList. `whole` runs all layers in one op, `functional.decoder`, where
    that gives what they give one after the other. For that each layer has a method `described`,
    which returns a `functional.DecoderLayer`, what its forward computes, or None if that is
    nothing that the op computes.

    Args:
        layers: the layers.
        text_max_length: rows of new caches; see `IndirectAccessKVCacheAttention`.
    """

    def __init__(self, layers: Iterable[nn.Module] = (), text_max_length: int = 2048) -> None:
        super().__init__(layers)
        self.text_max_length = text_max_length
        self._run: _Run | None = None

    def __getstate__(self) -> dict[str, Any]:  # a copy looks at its own layers
        return {**self.__dict__, "_run": None}

    def whole(
        self,
        hidden_states: Tensor,
        past: Sequence[LayerPast] | None,
        mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Presents] | None:
        """What the layers give, and their caches for the next call.

        Args:
            hidden_states: [batch, tokens, hidden].
            past: the cache of each layer, written in place until it grows; None, or placeholders,
                before the first token.
            mask: [batch, length + tokens] bool (True: seen); None: nothing is hidden. A query sees
                nothing behind its own position.
            angles: sin and cos of the new tokens, from `RotaryEmbedding.angles`; None without RoPE.

        Returns:
            None where the layers have to run as the modules that they are: in grad mode, under
            autocast or tracing, with hooks or a replaced forward inside of them, over weights that
            are not packed, with caches of another dtype than hidden_states, or with a mask that
            hides positions behind others that are seen.
        """
        run = self._found(hidden_states)
        if run is None or run.stack is None:
            return None
        try:
            step = Step(hidden_states, past, run.like, self.text_max_length)
        except UnlikeError:
            return None
        seen = step.seen(mask)
        if seen is None:
            return None
        sin, cos = angles or (None, None)
        args = (hidden_states, run.stack, step.present.arenas, step.new, *seen)
        return functional.decoder(*args, cos, sin), step.present

    def _found(self, x: Tensor) -> _Run | None:
        """The layers as the op reads them; None if somebody looks inside."""
        if (
            type(x) is not Tensor
            or not x.is_cpu
            or x.dim() != 3
            or not x.numel()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        ):
            return None
        if self._run is None or not self._run.current(self):
            self._run = _Run(self)
        run = self._run
        return None if run.dtype is not x.dtype or run.watched() else run


class _Run:
    """The layers as one op, and what they consist of."""

    def __init__(self, layers: DecoderLayers) -> None:
        modules: list[Any] = [m for layer in layers for m in layer.modules()]
        self.namespaces = [vars(m) for m in modules]
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.parents = [m._modules for m in (layers, *modules) if m._modules]
        self.children = [dict(m) for m in self.parents]
        owned = [(m._parameters, name) for m in modules for name in m._parameters]
        self.owners, self.names = [o for o, _ in owned], [name for _, name in owned]
        self.parameters: list[Any] = list(map(operator.getitem, self.owners, self.names))
        self.weights: list[Any] = [p for p in self.parameters if isinstance(p, PackedWeight)]
        self.packed = [w.packed for w in self.weights]
        dtypes = {p.dtype for p in self.parameters if p is not None}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.like = (0, 0, 0)
        self.stack = self._stack(layers)

    def _stack(self, layers: DecoderLayers) -> functional.DecoderStack | None:
        """None if a linear layer is not packed, or a layer is none that the op computes."""
        if self.dtype is None or any(w.rounded for w in self.weights):
            return None
        described: list[DecoderLayer | None] = [layer.described() for layer in layers]  # type: ignore[operator]
        known = [d for d in described if d is not None and _packed(d)]
        if not known or len(known) != len(described):
            return None
        self.like = (len(known), known[0].kv_heads, known[0].head_dim)
        return functional.decoder_stack(known)

    def current(self, layers: DecoderLayers) -> bool:
        """Whether the layers, their parts and parameters are those of before."""
        same = operator.is_
        return (
            self.parents[:1] == [layers._modules]
            and self.parents == self.children  # modules compare by identity
            and all(map(same, map(dict.get, self.owners, self.names), self.parameters))
            and all(map(same, map(_bytes, self.weights), self.packed))
        )

    def watched(self) -> bool:
        """Whether somebody looks at what a part of the layers is given or gives."""
        return (
            any(map(operator.contains, self.namespaces, repeat("forward")))
            or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
            or any(self.hooks)
        )


_bytes = operator.attrgetter("packed")


def _packed(layer: DecoderLayer) -> bool:
    linears = (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
    return all(type(m.weight) is PackedWeight for m in linears if m is not None)
