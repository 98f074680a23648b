"""What modules consist of, and whether somebody looks inside, as an op in their place asks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lmfuse.functional import PackedWeight
from lmfuse.modules.quantized_experts import QuantizedExperts
from lmfuse.modules.quantized_linear import QuantizedLinear

Hooks = dict[int, Callable[..., Any]]


@contextmanager
def untraced() -> Iterator[None]:
    """Within it torch.jit records nothing: what is made is a constant of its graph."""
    trace: Any = torch._C
    state = trace._get_tracing_state()
    trace._set_tracing_state(None)
    try:
        yield
    finally:
        trace._set_tracing_state(state)


class Parts:
    """Modules as they are when this is made.

    A step of a few milliseconds has emptied the caches of all that Python looks at, so what is
    looked at before each step is as little as can be.

    Args:
        modules: whose hooks, parameters, buffers, children and forwards count.
        owners: whose children count besides.
        copied: tensors of which the op has copies, or knows more than that they are there, so that
            what is written into them counts.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        owners: Iterable[nn.Module] = (),
        copied: Iterable[Tensor] = (),
    ) -> None:
        each = list(modules)
        self.namespaces = [vars(m) for m in each]
        self.hooks: list[Hooks] = [
            h for m in each for h in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self.parents = [m._modules for m in dict.fromkeys((*owners, *each)) if m._modules]
        self.children = [dict(m) for m in self.parents]
        owned: list[tuple[dict[str, Any], str]]
        owned = [(held, n) for m in each for held in (m._parameters, m._buffers) for n in held]
        self.holders, self.names = [o for o, _ in owned], [name for _, name in owned]
        self.parameters = list(map(operator.getitem, self.holders, self.names))
        self.weights: list[Any] = [p for p in self.parameters if isinstance(p, PackedWeight)]
        self.packed = [w.packed for w in self.weights]
        self.quantized = [m for m in each if isinstance(m, (QuantizedLinear, QuantizedExperts))]
        self.bytes = list(map(_bytes, self.quantized))
        self.copied = list(copied)
        self.versions = list(map(_version, self.copied))

    def current(self) -> bool:
        """Whether children, parameters and buffers are those of before."""
        same = operator.is_
        return (
            self.parents == self.children  # modules compare by identity
            and all(map(same, map(dict.get, self.holders, self.names), self.parameters))
            and all(map(same, map(_packed, self.weights), self.packed))
            and all(map(_equal, map(_bytes, self.quantized), self.bytes))
            and list(map(_version, self.copied)) == self.versions
        )

    def watched(self, acts: Callable[[Hooks], bool] = bool) -> bool:
        """Whether somebody looks at what a module is given or gives.

        Args:
            acts: whether hooks are more than idle.
        """
        if any(map(operator.contains, self.namespaces, repeat("forward"))):
            return True
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return any(self.hooks) and any(map(acts, filter(None, self.hooks)))


_packed = operator.attrgetter("packed")


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _bytes(layer: QuantizedLinear | QuantizedExperts) -> tuple[Any, ...]:
    """What an op read of a quantized layer: whose bytes, as of when, and how it computes."""
    if isinstance(layer, QuantizedLinear):
        first, last = layer.weight, layer.weight
    else:
        first, last = layer.gate_up, layer.down
    versions = _version(first), _version(last)
    return first, last, versions, layer.compute, layer.block_scales


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] is b[0] and a[1] is b[1] and a[2:] == b[2:]
