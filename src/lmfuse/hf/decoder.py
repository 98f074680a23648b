"""Decoder layers of transformers models, run whole: see `lmfuse.functional.decoder`.

The list of a model's layers takes a subclass of nn.ModuleList. To the forward of the model that
owns it, it is one layer, which runs all of them in one op; to everybody else it is the list that it
was. Where layers are of several kinds, each given a mask or angles of its own, the forward sees as
many of them as it takes to tell all kinds, and those before the last only write down what they are
given. The op is used while nobody can tell the difference: without hooks, gradients or outputs
other than the last, and with our cache, or, while torch.jit traces, with tuples. Otherwise the
layers run as the modules that they are, and each of them still is one op where its own inside is
not looked at.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from lmfuse import functional
from lmfuse.functional import PackedExperts
from lmfuse.functional.packed import is_matrix
from lmfuse.generation.cache import Cache
from lmfuse.generation.slots import Slots
from lmfuse.generation.tuples import TupleCache
from lmfuse.hf import attention, swap
from lmfuse.hf.decoder_find import CACHE, asks_ours
from lmfuse.hf.decoder_form import ANGLES, Form, looked_up
from lmfuse.modules import QuantizedExperts, QuantizedLinear
from lmfuse.modules.experts import PARTS, Experts
from lmfuse.modules.linear import Linear, Transposed
from lmfuse.modules.parts import Parts, untraced
from lmfuse.modules.siblings import SiblingLinear

_RUN = "_lmfuse_run"
_Given: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"  # to a layer, besides its input
_Tables: TypeAlias = tuple[Tensor | None, Tensor | None]  # cos and sin

# What forwards call the question whether they collect what is between layers, and what they add.
_COLLECTS = ("output_hidden_states", "output_attentions")
_ADDS = ("deepstack_visual_embeds", "deepstack_features")
# What a layer may be given besides its input: what the op takes, and what is of no consequence.
_KNOWN = {"attention_mask", "position_embeddings", *CACHE}
_KNOWN |= {"position_ids", "use_cache", "cache_position"}

# transformers leaves its recorders' hooks in place; they record while a collector asks them to.
_RECORDER = next(
    (
        code
        for code in output_capturing.install_output_capuring_hook.__code__.co_consts
        if getattr(code, "co_name", None) == "output_capturing_hook"
    ),
    None,
)


class FusedDecoder(swap.Fused):
    """A decoder layer that runs as one op where it can."""

    fused_found = (_RUN,)
    fused_form: Form

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the forward of the layer itself; where the op does the same, `functional.decoder`."""
        if not torch.compiler.is_compiling() and not attention._jit_traces():
            run = _run_of(self, [self])  # whose own hooks are called around this
            given = _named(self.fused_form, args, kwargs)
            result = None if run is None else run(hidden_states, [given])
            if result is not None:
                return (result, None) if self.fused_form.pair else result
        return super().forward(hidden_states, *args, **kwargs)


class FusedStack(swap.Fused, nn.ModuleList):
    """The decoder layers of a model, which to its forward are one, or one of each type."""

    fused_found = (_RUN,)
    fused_module: str  # whose functions called forward see these

    def __iter__(self) -> Iterator[Any]:
        if torch.compiler.is_compiling():
            return super().__iter__()
        caller = sys._getframe(1)
        if (
            caller.f_code.co_name == "forward"
            and caller.f_globals.get("__name__") == self.fused_module
            and not any(map(caller.f_locals.get, _COLLECTS))
            and all(caller.f_locals.get(name) is None for name in _ADDS)
            and _ours(self._modules.values())
        ):
            return self._few()
        return super().__iter__()

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice) and idx.indices(len(self)) == (0, len(self), 1):
            return self  # a model asks for its layers so; a new list would be made at every step
        return super().__getitem__(idx)

    def _few(self) -> Iterator[Callable[..., Any]]:
        """For each layer up to the first of the last kind what is called in its place."""
        layers: list[Any] = list(self._modules.values())
        kinds, firsts = _kinds(layers)
        given: list[_Given] = []

        def noted(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append((args, kwargs))
            return (hidden_states, None) if layers[0].fused_form.pair else hidden_states

        def last(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append((args, kwargs))
            each = [given[first] for first in firsts]
            return self._run(hidden_states, layers, kinds, each)

        for _ in range(firsts[-1]):
            yield noted
        yield last

    def _run(
        self, hidden_states: Tensor, layers: list[Any], kinds: list[int], given: list[_Given]
    ) -> Any:
        """All layers, those of each kind given this."""
        pair = layers[0].fused_form.pair
        run = _run_of(self, layers)
        if run is not None:
            result = run(hidden_states, [_named(layers[0].fused_form, *each) for each in given])
            if result is not None:
                return (result, None) if pair else result
        x: Any = hidden_states
        for layer, kind in zip(layers, kinds, strict=True):
            args, kwargs = given[kind]
            x = layer(x[0] if pair and layer is not layers[0] else x, *args, **kwargs)
        return x


def _named(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer is given besides its input, all with names."""
    return {**dict(zip(form.arguments, args, strict=False)), **kwargs} if args else kwargs


def _ours(layers: Iterable[Any]) -> bool:
    """Whether none of the layers has been replaced."""
    return all(isinstance(layer, FusedDecoder) for layer in layers)


def _kinds(layers: list[Any]) -> tuple[list[int], list[int]]:
    """A number for each, and where each number comes first: layers of the same number are given the
    same, and see the same positions."""
    names = [(f.type, f.window) for f in (layer.fused_form for layer in layers)]
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names], [names.index(name) for name in order]


class _Generating(threading.local):
    """The runs that were found as they were and unwatched, since this thread began to generate."""

    seen: set[_Run] | None = None


_generating = _Generating()


@contextmanager
def generating() -> Iterator[None]:
    """Within it, layers are looked at for changes and hooks before their first step, not before
    each: that takes 0.2 ms, in which a small model reads 6 MB of weights."""
    outer = _generating.seen
    _generating.seen = set()
    try:
        yield
    finally:
        _generating.seen = outer


def _run_of(owner: nn.Module, layers: list[Any]) -> _Run | None:
    """The run of these layers, made again once they or their parts are others; None if somebody
    looks inside."""
    run: _Run | None = vars(owner).get(_RUN)
    seen = _generating.seen
    if seen is not None and run in seen:
        return run
    if run is None or not run.current(layers):
        if not _ours(layers):
            return None
        with untraced():
            run = vars(owner)[_RUN] = _Run(layers)
    if run.stack is None or run.watched():
        return None
    if seen is not None:
        seen.add(run)
    return run


class _Run:
    """Some layers as one op; for each call it says whether the op may do what they do.

    Attributes:
        kind_of: the kind of each layer.
        kinds: a form for each, that which says all that the layers of one kind have in common.
        firsts: of each kind, the place of its first layer.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.forms: list[Form] = [layer.fused_form for layer in layers]
        self.kind_of, self.firsts = _kinds(layers)
        self.kinds = [self._common(kind) for kind in range(len(self.firsts))]
        modules = [m for layer in layers for m in layer.modules()]
        if len(layers) == 1:
            modules.remove(layers[0])
        self.changes, self.hold = swap.changes.count, self._hold()
        pairs = list(zip(self.forms, layers, strict=True)) if self.hold else []
        self.attention: list[Any] = [layer.get_submodule(f.attention) for f, layer in pairs]
        copied = [t for f, x in pairs for t in f.copied(x)]
        each = zip(self.forms, self.attention, strict=False)
        self.angles = [a._buffers[ANGLES] for f, a in each if f.angles]
        self.parts = Parts(modules, layers, copied + self.angles)
        dtypes = {p.dtype for layer in layers for p in layer.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.stack = self._stack() if self.hold else None

    def _common(self, kind: int) -> Form:
        forms = [f for f, k in zip(self.forms, self.kind_of, strict=True) if k == kind]
        return next((f for f in forms if f.rotary_dim), forms[0])

    def _stack(self) -> functional.DecoderStack | None:
        """None if a linear layer, or experts, are neither packed nor quantized, parameters have
        several dtypes, or layers turn by other angles."""
        pairs = list(zip(self.forms, self.layers, strict=True))
        linears: list[Any] = [m for form, layer in pairs for m in form.linears(layer)]
        mixed = [x.get_submodule(form.experts) for form, x in pairs if form.experts is not None]
        if self.dtype is None or not all(map(_runs, linears)) or not all(map(_mixes, mixed)):
            return None
        if any(w.rounded for w in self.parts.weights):
            return None
        if any(not torch.equal(self.angles[0], table) for table in self.angles[1:]):
            return None
        described = [f.described(x, kind=k) for (f, x), k in zip(pairs, self.kind_of, strict=True)]
        return functional.decoder_stack(described)

    def current(self, layers: list[Any]) -> bool:
        """Whether the layers, their parts, parameters and numbers are those of before."""
        if layers != self.layers or not self.parts.current():  # modules compare by identity
            return False
        if self.changes != swap.changes.count:
            self.changes = swap.changes.count
            return self.hold == self._hold()
        return True

    def _hold(self) -> bool:
        """Whether the layers are what their forms say."""
        return all(f.holds(layer) for f, layer in zip(self.forms, self.layers, strict=True))

    def watched(self) -> bool:
        """Whether somebody looks at what a part of the layers is given or gives."""
        return self.parts.watched(_acts)

    def __call__(self, hidden_states: Tensor, given: list[dict[str, Any]]) -> Tensor | None:
        """The result, or None if the modules have to say it themselves.

        Args:
            given: what the layers of each kind are given besides their input.
        """
        if not _plain(hidden_states) or hidden_states.dtype is not self.dtype:
            return None
        if not asks_ours(self.attention[0]):
            return None
        owners = [self.attention[first] for first in self.firsts]
        tables = [t for t in map(_accepted, self.kinds, given, owners) if t is not None]
        cache = given[0].get(self.kinds[0].cache)
        same = all(kwargs.get(self.kinds[0].cache) is cache for kwargs in given)
        if len(tables) < len(given) or not same:
            return None
        if attention._jit_traces():
            return self._traced(hidden_states, cache, given, tables)
        masks = list(map(_mask, self.kinds, given))
        masks = [mask if attention._hides(mask) else None for mask in masks]
        shape = hidden_states.shape[:2]

        def run(arenas: Any, slots: list[Slots]) -> Tensor | None:
            found = [_padded(s, mask, shape[1]) for s, mask in zip(slots, masks, strict=True)]
            if None in found:
                return None
            rows = [(s.new, f[0], f[2]) for s, f in zip(slots, found, strict=True)]
            of_kinds: Any = rows[0] if len(rows) == 1 else zip(*rows, strict=True)
            stack: Any = self.stack
            return functional.decoder(hidden_states, stack, arenas, *of_kinds, *_angles(tables))

        result: Tensor | None = self._run(run, shape, cache)
        return result

    def _traced(
        self, x: Tensor, cache: Any, given: list[dict[str, Any]], tables: list[_Tables]
    ) -> Tensor | None:
        """For a graph, of which nothing may depend on what the tensors hold."""
        if not isinstance(cache, TupleCache) or any(f.negated for f in self.kinds):
            return None
        layers = [cache.layers[a.layer_idx] for a in self.attention]
        if layers[0].past[1].dtype.itemsize == 1:  # float8, which the layers' own ops read
            return None
        found = _angles(tables)
        cos, sin = ([] if t is None else [t] if isinstance(t, Tensor) else t for t in found)
        stack: Any = self.stack
        out, past = functional.indirect_cache_decoder(
            x,
            stack,
            [layer.past for layer in layers],
            mask=given[0].get("attention_mask"),
            cos=cos,
            sin=sin,
            text_max_length=layers[0].rows,
        )
        for layer, new in zip(layers, past, strict=True):
            layer.past = new
        return out

    def logits(
        self,
        input_ids: Tensor,
        ends: functional.DecoderEnds,
        hidden: Sequence[int],
        cache: Any,
        tables: tuple[list[Tensor], list[Tensor]],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor] | None:
        """See `functional.decoder_logits`; None as above.

        Args:
            hidden: of each row, how many of its first positions are padding.
            tables: cos and sin for each kind.
            positions: of the token of each row.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if not asks_ours(self.attention[0]):
            return None

        def run(arenas: Any, slots: list[Slots]) -> tuple[Tensor, Tensor]:
            columns = [c for each in slots for c in each.columns(hidden)]
            seen = [each.table for each in slots], columns
            stack: Any = self.stack
            given = input_ids, ends, stack, arenas, *seen, *tables, positions
            return functional.decoder_logits(*given)

        found: tuple[Tensor, Tensor] | None = self._run(run, input_ids.shape, cache)
        return found

    def _run(self, run: Callable[..., Any], shape: Sequence[int], cache: Any) -> Any:
        """Calls `run` with arenas, and with slots for new tokens of each kind; None if it does so,
        and the slots wait for the modules."""
        if not isinstance(cache, Cache):
            return None
        held = cache.together([a.layer_idx for a in self.attention], self.kind_of)
        if held is None:
            return None
        form, (batch, count) = self.kinds[0], shape
        slots = [held[first].slots for first in self.firsts]
        before, dtype = held[0].seen, self.dtype
        assert dtype is not None  # there is a stack
        try:
            arenas = cache.extend(held, batch, count, form.kv_heads, form.head_dim, dtype)
            result = run(arenas, slots)
        except BaseException:
            for each in slots:
                each.crop(before)
            raise
        if result is not None:
            for layer in held:
                layer.seen = before + count
        return result


def _angles(tables: list[_Tables]) -> Any:
    """cos and sin of each kind; those that do not turn have those of another."""
    if len(tables) == 1:
        return tables[0]
    turned = [t for t in tables if t[0] is not None]
    each = [t if t[0] is not None else turned[0] for t in tables if turned]
    return zip(*each, strict=True) if each else (None, None)


def _runs(linear: Any) -> bool:
    """Whether the op can multiply by this layer's weight."""
    if isinstance(linear, QuantizedLinear):
        return type(linear).forward in (QuantizedLinear.forward, SiblingLinear.forward)
    forwards = Linear.forward, SiblingLinear.forward, Transposed.forward
    ours = getattr(type(linear), "forward", None) in forwards
    return ours and is_matrix(linear.weight)


def _mixes(module: Any) -> bool:
    """Whether the op can run these experts."""
    if type(module) is QuantizedExperts:
        return True
    packed = isinstance(module, Experts)
    return packed and all(isinstance(getattr(module, name), PackedExperts) for name in PARTS)


def _acts(hooks: dict[int, Callable[..., Any]]) -> bool:
    """Whether one of `hooks` is more than an idle recorder of transformers."""
    return bool(
        output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
    ) or any(getattr(hook, "__code__", 0) is not _RECORDER for hook in hooks.values())


def _plain(x: Tensor) -> bool:
    """Whether x is an ordinary CPU tensor in a forward that nobody differentiates or records."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dim() == 3
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _accepted(form: Form, given: dict[str, Any], owner: Any) -> _Tables | None:
    """cos and sin for the op; None if layers of this form, with attention like `owner`, are given
    what it does not take."""
    alibi = None if form.alibi is None else form.alibi[0]
    more = given.keys() - _KNOWN - {alibi}
    if any(given[k] is not None and given[k] is not False for k in more):
        return None
    mask = _mask(form, given)
    if mask is not None and (mask.dim() != 2 or _window(mask, form) != form.window):
        return None
    if form.window == 1:
        return None
    if not form.rotary_dim:
        return None, None
    if form.angles:
        positions = given.get("position_ids")
        return None if positions is None else looked_up(owner, positions)
    tables = given.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2:
        return None
    if tables[0].shape[-1] * form.table_times != form.rotary_dim:
        return None
    if form.table_step == 1:
        return tables
    return tables[0][..., :: form.table_step], tables[1][..., :: form.table_step]


def _mask(form: Form, given: dict[str, Any]) -> Tensor | None:
    """Which keys layers of this form see; four dimensions say more."""
    mask: Tensor | None = given.get("attention_mask")
    if mask is None or not form.negated or mask.shape[1:3] != (1, 1):
        return mask
    seen = ~mask[:, 0, 0]  # of one query, which is the last
    return None if bool(seen.all()) else seen


def _padded(slots: Slots, mask: Tensor | None, count: int) -> Any:
    """See `Slots.padded`; the mask may say more than what is still in a window."""
    if mask is not None and mask.shape[1] > slots.visible:
        mask = mask[:, -slots.visible :]
    return slots.padded(mask, count)


def _window(mask: Tensor, form: Form) -> int | None:
    """The window of a forward with this mask."""
    window: int | None = getattr(mask, attention._WINDOW, form.window)
    return window
