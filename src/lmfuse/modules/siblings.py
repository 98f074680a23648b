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
from lmfuse.modules.linear import Linear

# How transformers' attention modules call them.
_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


@dataclass
class _Waiting:
    """What was computed and not yet asked for."""

    x: Tensor
    state: list[int]
    results: dict[int, Tensor]


class _Family:
    def __init__(self, members: Sequence[Linear]) -> None:
        self.members = list(members)
        self.apart = False  # they do not read the same input
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "apart": self.apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    def _state(self, x: Tensor) -> list[int]:
        """Differs once x or a weight was written or replaced."""
        state = [x._version]
        for member in self.members:
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
        weights: list[Any] = [m.weight for m in self.members]
        parts = functional.linear_concat(x, weights, [m.bias for m in self.members])
        rest = {i: part for i, part in enumerate(parts) if i != place}
        self._thread.waiting = _Waiting(x, state, rest)
        return parts[place]


class SiblingLinear(Linear):
    """A packed linear layer that computes together with its siblings."""

    family: _Family
    place: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; see `lmfuse.functional.linear`."""
        if not torch.compiler.is_compiling():  # a graph fuses calls better than a memory does
            found = self.family.result(self.place, input)
            if found is not None:
                return found
        return super().forward(input)


def _new() -> SiblingLinear:
    return SiblingLinear.__new__(SiblingLinear)


def join_siblings(model: nn.Module) -> int:
    """Makes families of the packed query, key and value layers of each module; says how many."""
    count = 0
    for module in model.modules():
        for names in _NAMES:
            members: list[Any] = [module._modules.get(name) for name in names]
            if all(type(m) is Linear and type(m.weight) is PackedWeight for m in members) and all(
                alike(m.weight, members[0].weight) for m in members
            ):
                family = _Family(members)
                for place, member in enumerate(members):
                    member.__class__ = SiblingLinear
                    member.family, member.place = family, place
                count += 1
    return count


def part_siblings(module: nn.Module) -> None:
    """Makes a member of a family an ordinary packed layer again."""
    if isinstance(module, SiblingLinear):
        module.__class__ = Linear  # type: ignore[assignment]
        del module.family, module.place
