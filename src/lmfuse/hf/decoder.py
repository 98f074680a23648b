"""Decoder layers of transformers models, run whole: see `lmfuse.functional.decoder`.

The list of a model's layers takes a subclass of nn.ModuleList. To the forward of the model that
owns it, it is one layer, which runs all of them in one op; to everybody else it is the list that it
was. The op is used while nobody can tell the difference: without hooks, gradients, tracing or
outputs other than the last, and with our cache. Otherwise the layers run as the modules that they
are, and each of them still is one op where its own inside is not looked at.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.generation.cache import Cache, Layer
from lmfuse.hf import attention, swap
from lmfuse.hf.decoder_form import CACHE, Form, find
from lmfuse.modules.linear import Linear
from lmfuse.modules.parts import Parts
from lmfuse.modules.quantized_linear import QuantizedLinear
from lmfuse.modules.siblings import SiblingLinear

_RUN = "_lmfuse_run"

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

    fused_form: Form

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the forward of the layer itself; where the op does the same, `functional.decoder`."""
        if not args and not torch.compiler.is_compiling():
            run = _run_of(self, [self])  # whose own hooks are called around this
            result = None if run is None else run(hidden_states, kwargs)
            if result is not None:
                return result
        return super().forward(hidden_states, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_run(super().__reduce__())


class FusedStack(swap.Fused, nn.ModuleList):
    """The decoder layers of a model, which to its forward are one."""

    fused_module: str  # whose functions called forward see one layer

    def __iter__(self) -> Iterator[Any]:
        if torch.compiler.is_compiling():
            return super().__iter__()
        caller = sys._getframe(1)
        if (
            caller.f_code.co_name == "forward"
            and caller.f_globals.get("__name__") == self.fused_module
        ):
            return iter((self._as_one,))
        return super().__iter__()

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice) and idx.indices(len(self)) == (0, len(self), 1):
            return self  # a model asks for its layers so; a new list would be made at every step
        return super().__getitem__(idx)

    def _as_one(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layers: list[Any] = list(self._modules.values())
        if not args:
            run = _run_of(self, layers)
            result = None if run is None else run(hidden_states, kwargs)
            if result is not None:
                return result
        for layer in layers:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_run(super().__reduce__())


def _without_run(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    make, arguments, state = reduced
    return make, arguments, {k: v for k, v in state.items() if k != _RUN}


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
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None  # a graph holds the modules
    run: _Run | None = vars(owner).get(_RUN)
    seen = _generating.seen
    if seen is not None and run in seen:
        return run
    if run is None or not run.current(layers):
        run = vars(owner)[_RUN] = _Run(layers)
    if run.stack is None or run.watched():
        return None
    if seen is not None:
        seen.add(run)
    return run


class _Run:
    """Some layers as one op; for each call it says whether the op may do what they do."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.forms: list[Form] = [layer.fused_form for layer in layers]
        # That which says all that the layers of one call have in common.
        self.form = next((f for f in self.forms if f.rotary_dim), self.forms[0])
        self.attention: list[Any] = [
            layer.get_submodule(f.attention) for f, layer in zip(self.forms, layers, strict=True)
        ]
        modules = [m for layer in layers for m in layer.modules()]
        if len(layers) == 1:
            modules.remove(layers[0])
        self.parts = Parts(modules, layers)
        dtypes = {p.dtype for layer in layers for p in layer.parameters()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.stack = self._stack()

    def _stack(self) -> functional.DecoderStack | None:
        """None if a linear layer is neither packed nor quantized, or parameters have several
        dtypes."""
        pairs = list(zip(self.forms, self.layers, strict=True))
        linears: list[Any] = [m for form, layer in pairs for m in form.linears(layer)]
        if self.dtype is None or not all(map(_runs, linears)):
            return None
        if any(w.rounded for w in self.parts.weights):
            return None
        return functional.decoder_stack([form.described(layer) for form, layer in pairs])

    def current(self, layers: list[Any]) -> bool:
        """Whether the layers, their parts and parameters are those of before."""
        return all(map(operator.is_, layers, self.layers)) and self.parts.current()

    def watched(self) -> bool:
        """Whether somebody looks at what a part of the layers is given or gives."""
        return self.parts.watched(_acts)

    def __call__(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The result, or None if the modules have to say it themselves."""
        if not _plain(hidden_states) or hidden_states.dtype is not self.dtype:
            return None
        form = self.form
        mask, cache = kwargs.get("attention_mask"), kwargs.get(form.cache)
        if any(kwargs[k] is not None and kwargs[k] is not False for k in kwargs.keys() - _KNOWN):
            return None
        if mask is not None and (mask.dim() != 2 or _window(mask, form) != form.window):
            return None
        if form.window == 1 or not isinstance(cache, Cache):
            return None
        if self.attention[0].config._attn_implementation != attention.NAME:
            return None
        tables = _tables(form, kwargs.get("position_embeddings"))
        if tables is None:
            return None
        held = cache.together([a.layer_idx for a in self.attention])
        if held is None:
            return None
        mask = mask if attention._hides(mask) else None
        return self._run(hidden_states, mask, cache, held, tables)

    def _run(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        cache: Cache,
        held: list[Layer],
        tables: tuple[Tensor | None, Tensor | None],
    ) -> Tensor | None:
        form, stack = self.form, self.stack
        assert stack is not None
        slots = held[0].slots
        before = slots.total
        try:
            arenas = cache.extend(held, hidden_states, form.kv_heads, form.head_dim)
            found = slots.padded(mask, hidden_states.shape[1])
            if found is None:
                return None  # the slots wait for the modules
            result = functional.decoder(
                hidden_states, stack, arenas, slots.new, found[0], found[2], *tables
            )
        except BaseException:
            slots.crop(before)
            raise
        for layer in held:
            layer.seen = slots.total
        return result


def _runs(linear: Any) -> bool:
    """Whether the op can multiply by this layer's weight."""
    if isinstance(linear, QuantizedLinear):
        return type(linear).forward in (QuantizedLinear.forward, SiblingLinear.forward)
    return type(linear) in (Linear, SiblingLinear) and type(linear.weight) is PackedWeight


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


def _window(mask: Tensor, form: Form) -> int | None:
    """The window of a forward with this mask."""
    window: int | None = getattr(mask, attention._WINDOW, form.window)
    return window


def _tables(form: Form, given: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """cos and sin for the op; None if they are not as expected."""
    if not form.rotary_dim:
        return None, None
    if not isinstance(given, tuple) or len(given) != 2 or given[0].shape[-1] != form.rotary_dim:
        return None
    if form.table_step == 1:
        return given
    return given[0][..., :: form.table_step], given[1][..., :: form.table_step]


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
        if _one_type(parent, forms):
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
                kind = swap.subclass(FusedDecoder, type(layer), fused_form=found)
                swap.put(layer, swap.Swap(kind, "decoder layer"))
                done.replaced[f"{name}.{i}"] = "decoder layer"
                forms.append(found)
            elif found is not None:
                done.stock[f"{name}.{i}"] = found
    return forms


def _one_type(parent: nn.Module, forms: list[Form]) -> bool:
    """Whether the forward of `parent` gives all of its layers the same, and they use the same."""
    config = getattr(parent, "config", None)
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return False
    shared = {(f.window, f.attention, f.cache, f.parallel, f.gated) for f in forms}
    turned = {(f.rotary_dim, f.table_step) for f in forms if f.rotary_dim}
    return len(shared) == 1 and len(turned) <= 1
