"""What the forward of a model does around its layers, told by layers that only write down what they
are given."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse.generation.cache import Cache
from lmfuse.hf import swap

IDS = torch.tensor([[1, 0]])
POSITIONS = torch.tensor([[3, 4]])


@dataclass
class Told:
    """A forward, seen from its layers.

    Attributes:
        copy: of the model, without hooks, whose forward it was.
        inputs, kwargs: what each layer was given, with names; made: what it answered.
        result: of the forward.
    """

    copy: Any
    inputs: list[Tensor]
    kwargs: list[dict[str, Any]]
    made: list[Tensor]
    result: Any

    def unbroken(self, layers: int) -> bool:
        """Whether so many layers were called, each with what the one before had answered."""
        broken = any(map(operator.is_not, self.inputs[1:], self.made))
        return len(self.inputs) == layers and not broken


def told(model: Any, layers: nn.ModuleList) -> Told:
    """A forward of a copy of `model` over IDS at POSITIONS, with an empty cache of ours, in which
    those that take the place of `layers` answer with random numbers."""
    found = Told(None, [], [], [], None)
    random = swap.generator()

    each: list[Any] = list(layers._modules.values())

    def layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.inputs.append(hidden_states)
        found.kwargs.append(
            {**dict(zip(each[0].fused_form.arguments, args, strict=False)), **kwargs}
        )
        found.made.append(swap.random(random, *hidden_states.shape).to(hidden_states.dtype))
        return (found.made[-1], None) if each[0].fused_form.pair else found.made[-1]

    spies = list(map(_bare, each))
    for spy in spies:
        vars(spy)["forward"] = layer
    found.copy = _copied(model, layers, nn.ModuleList(spies))
    cache = Cache(model.config.get_text_config(decoder=True))
    given = {"input_ids": IDS, "past_key_values": cache}
    if "position_ids" in inspect.signature(found.copy.forward).parameters:
        given["position_ids"] = POSITIONS
    found.result = found.copy.forward(**given, use_cache=True, return_dict=True)
    return found


def _copied(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A copy of `module` and of all within, but `new` in the place of `old`."""
    if module is old:
        return new
    made: nn.Module = _bare(module)
    for key, child in module._modules.items():
        if child is not None:
            made._modules[key] = _copied(child, old, new)
    return made


def _bare(module: Any) -> Any:
    """A copy without hooks."""
    none: Any = OrderedDict
    return swap.copied(
        module,
        _forward_hooks=none(),
        _forward_pre_hooks=none(),
        _modules=dict(module._modules),
    )
