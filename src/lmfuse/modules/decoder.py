"""Decoder layers of one's own, run whole: all of them in one op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import DecoderLayer, DecoderLinear
from lmfuse.functional._decoder_cache import Step, UnlikeError
from lmfuse.functional._indirect import LayerPast
from lmfuse.functional.packed import is_matrix
from lmfuse.modules.parts import Parts, untraced
from lmfuse.modules.quantized_linear import QuantizedLinear


class DecoderLayers(nn.ModuleList):
    """A list of decoder layers over the caches of `IndirectAccessKVCacheAttention`.

    To its model it is a ModuleList. `whole` runs all layers in one op, `functional.decoder`, where
    that gives what they give one after the other. For that each layer has a method `described`,
    which returns a `functional.DecoderLayer`, what its forward computes, or None if that is
    nothing that the op computes; of a linear layer `described_linear` says it.

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
    ) -> tuple[Tensor, tuple[LayerPast, ...]] | None:
        """What the layers give, and their caches for the next call.

        While torch.jit traces, the graph gets one op, `functional.indirect_cache_decoder`.

        Args:
            hidden_states: [batch, tokens, hidden].
            past: the cache of each layer, written in place until it grows; None, or placeholders,
                before the first token.
            mask: [batch, length + tokens] bool (True: seen); None: nothing is hidden. A query sees
                nothing behind its own position.
            angles: sin and cos of the new tokens, from `RotaryEmbedding.angles`; None without RoPE.

        Returns:
            None where the layers have to run as the modules that they are: in grad mode, under
            autocast or torch.compile, with hooks or a replaced forward inside of them, over weights
            that are neither packed nor quantized, with caches of another dtype than hidden_states,
            or with a mask that hides positions behind others that are seen.
        """
        run = self._found(hidden_states)
        if run is None or run.stack is None:
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self._traced(hidden_states, run.stack, past, mask, angles)
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

    def _traced(
        self,
        x: Tensor,
        stack: functional.DecoderStack,
        past: Sequence[LayerPast] | None,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[LayerPast, ...]] | None:
        """For a graph, of which nothing may depend on what the tensors hold."""
        if past is None or past[0][1].dtype.itemsize == 1 or (mask is not None and mask.dim() != 2):
            return None
        sin, cos = ((), ()) if angles is None else (angles[:1], angles[1:])
        return functional.indirect_cache_decoder(
            x, stack, past, mask=mask, cos=cos, sin=sin, text_max_length=self.text_max_length
        )

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
        ):
            return None
        if self._run is None or not self._run.parts.current():
            with untraced():
                self._run = _Run(self)
        run = self._run
        return None if run.dtype is not x.dtype or run.parts.watched() else run


class _Run:
    """The layers as one op, and what they consist of."""

    def __init__(self, layers: DecoderLayers) -> None:
        self.parts = Parts((m for layer in layers for m in layer.modules()), [layers])
        dtypes = {p.dtype for p in layers.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.like = (0, 0, 0)
        self.stack = self._stack(layers)

    def _stack(self, layers: DecoderLayers) -> functional.DecoderStack | None:
        """None if a linear layer is neither packed nor quantized, or a layer is none that the op
        computes."""
        if self.dtype is None or any(w.rounded for w in self.parts.weights):
            return None
        described: list[DecoderLayer | None] = [layer.described() for layer in layers]  # type: ignore[operator]
        known = [d for d in described if d is not None and all(map(_runs, d.linears()))]
        if not known or len(known) != len(described):
            return None
        self.like = (len(known), known[0].kv_heads, known[0].head_dim)
        return functional.decoder_stack(known)


def described_linear(linear: Any) -> DecoderLinear:
    """What a linear layer, packed or quantized, computes: for `described` of `DecoderLayers`."""
    if isinstance(linear, QuantizedLinear):
        return DecoderLinear(linear.weight, linear.bias, linear.compute, linear.block_scales)
    return DecoderLinear(linear.weight, linear.bias)


def _runs(linear: DecoderLinear) -> bool:
    """Whether the op can multiply by this weight."""
    return is_matrix(linear.weight) or linear.weight.dtype is torch.uint8
