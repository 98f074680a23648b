"""Linear layers that read one input, such as query, key and value, computed in one call.

The first that is called computes all, and the others hand out what is theirs. They do so only for
the very same tensor, unchanged since, in the same thread and with unchanged weights: so the result
is what the layer alone would give, bit for bit. Siblings that turn out to read different inputs
(cross attention) go back to working alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.functional.packed import alike
from lmfuse.modules import quantized_linear
from lmfuse.modules.linear import Linear
from lmfuse.modules.quantized_linear import QuantizedLinear

# How transformers' attention modules call them.
_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


@dataclass
class _Waiting:
    """What was computed and not yet asked for."""

    x: Tensor
    state: list[int]
    results: dict[int, Tensor]


class _Family:
    def __init__(self, members: Sequence[Linear | QuantizedLinear]) -> None:
        self.members = list(members)
        self.apart = False  # they do not read the same input
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "apart": self.apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    def _state(self, x: Tensor) -> list[Any]:
        """Differs once x or a weight was written or replaced."""
        state: list[Any] = [x._version]
        for member in self.members:
            if isinstance(member, QuantizedLinear):
                bytes_ = member.weight
                version = -1 if bytes_.is_inference() else bytes_._version
                state += (id(bytes_), version, member.compute)
                continue
            weight: Any = member._parameters["weight"]
            state += (id(weight), weight.packed._version if type(weight) is PackedWeight else -1)
        return state

    def result(self, place: int, x: Tensor) -> Tensor | None:
        """What the member gives for x; None if it has to find out alone."""
        if self.apart or torch.is_grad_enabled() or x.is_inference():
            return None
        waiting: _Waiting | None = getattr(self._thread, "waiting", None)
        state = self._state(x)
        if waiting is not None:
            if waiting.x is x and waiting.state == state and place in waiting.results:
                found = waiting.results.pop(place)
                if not waiting.results:
                    self._thread.waiting = None
                return found
            self._thread.waiting = None
            self.apart = waiting.x is not x
        if self.apart or -1 in state:
            return None
        parts = self._all(x)
        if parts is None:
            return None
        rest = {i: part for i, part in enumerate(parts) if i != place}
        self._thread.waiting = _Waiting(x, state, rest)
        return parts[place]

    def _all(self, x: Tensor) -> Sequence[Tensor] | None:
        """What all members give for x; None if they are no longer alike."""
        members: list[Any] = self.members
        if not isinstance(members[0], QuantizedLinear):
            weights = [m.weight for m in members]
            return functional.linear_concat(x, weights, [m.bias for m in members])
        if all(m.alike(members[0]) for m in members):
            return quantized_linear.concat(x, *members)
        return None


class _Sibling(nn.Module):
    """Mixin of linear layers that compute together with their siblings."""

    family: _Family
    place: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (type(self).__mro__[2],), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; see `lmfuse.functional.linear`."""
        if not torch.compiler.is_compiling():  # a graph fuses calls better than a memory does
            found = self.family.result(self.place, input)
            if found is not None:
                return found
        return super().forward(input)  # type: ignore[no-any-return]


class SiblingLinear(_Sibling, Linear):
    """A packed linear layer that computes together with its siblings."""


_kinds: dict[type[nn.Module], type[_Sibling]] = {Linear: SiblingLinear}


def _kind(stock: type[nn.Module]) -> type[_Sibling]:
    """The class of a sibling that is a `stock`."""
    if stock not in _kinds:
        _kinds[stock] = type(f"Sibling{stock.__name__}", (_Sibling, stock), {})
    return _kinds[stock]


def _new(stock: type[nn.Module]) -> _Sibling:
    kind = _kind(stock)
    return kind.__new__(kind)


def join_siblings(model: nn.Module) -> int:
    """Makes families of the packed or quantized query, key and value layers of each module; says
    how many."""
    count = 0
    for module in model.modules():
        for names in _NAMES:
            members: list[Any] = [module._modules.get(name) for name in names]
            if _alike(members):
                family = _Family(members)
                for place, member in enumerate(members):
                    member.__class__ = _kind(type(member))
                    member.family, member.place = family, place
                count += 1
    return count


def _alike(members: Sequence[Any]) -> bool:
    """Whether these can compute in one call, and belong to no family yet."""
    first = members[0]
    if isinstance(first, _Sibling) or not all(type(m) is type(first) for m in members):
        return False
    if isinstance(first, QuantizedLinear):
        return all(m.alike(first) for m in members)
    packed = type(first) is Linear and all(type(m.weight) is PackedWeight for m in members)
    return packed and all(alike(m.weight, first.weight) for m in members)


def part_siblings(module: nn.Module) -> None:
    """Makes a member of a family an ordinary packed layer again."""
    if isinstance(module, _Sibling):
        module.__class__ = type(module).__mro__[2]
        del module.family, module.place
