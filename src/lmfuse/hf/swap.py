"""The class swap: a module takes a subclass of its own class, and gives it back.

isinstance, parameter names, state_dict, hooks and transformers' output recorders stay as they were,
and the class remembers what it replaced, so there is nothing else to keep. A swap is proposed only
after `agrees` has seen it compute what the stock code computes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lmfuse.modules.probe import agrees as agrees
from lmfuse.modules.probe import copied as copied
from lmfuse.modules.probe import generator as generator
from lmfuse.modules.probe import random as random


class Changes:
    """How often an attribute of a module that lmfuse swapped was set."""

    count = 0


changes = Changes()


class Fused(nn.Module):
    """What every class that lmfuse swaps in derives from; see `subclass`."""

    # Names that no module of a model has: class attributes hide parameters.
    fused_stock: type[nn.Module]
    fused_settings: tuple[tuple[str, Any], ...]
    fused_found: tuple[str, ...] = ()  # attributes that a copy finds out for itself

    def __setattr__(self, name: str, value: Any) -> None:
        changes.count += name != "training"  # of all modules, as model.eval() does
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, but ours are made on the fly: make it again there.
        state = {k: v for k, v in self.__dict__.items() if k not in self.fused_found}
        return _new, _recipe(type(self)), state


def _recipe(kind: type[Fused]) -> tuple[type[Fused], Any, dict[str, Any]]:
    """The arguments of `subclass`; the class that it replaced may be one of ours, too."""
    stock = kind.fused_stock
    from_ours = _recipe(stock) if issubclass(stock, Fused) else stock
    return kind.__mro__[1], from_ours, dict(kind.fused_settings)


def _new(mixin: type[Fused], stock: Any, settings: dict[str, Any]) -> nn.Module:
    made = _kind(mixin, stock, settings)
    return made.__new__(made)


def _kind(mixin: type[Fused], stock: Any, settings: dict[str, Any]) -> type[Fused]:
    return subclass(mixin, _kind(*stock) if isinstance(stock, tuple) else stock, **settings)


def subclass(mixin: type[Fused], stock: type[nn.Module], **settings: Any) -> type[Fused]:
    """The class (mixin, stock), with `settings` as class attributes; made once."""
    key = (mixin, stock, tuple(sorted(settings.items())))
    if key not in _made:
        _made[key] = _make(*key)
    return _made[key]


_made: dict[tuple[type[Fused], type[nn.Module], tuple[tuple[str, Any], ...]], type[Fused]] = {}


def _make(
    mixin: type[Fused], stock: type[nn.Module], settings: tuple[tuple[str, Any], ...]
) -> type[Fused]:
    attributes = {
        "__module__": mixin.__module__,
        "__doc__": mixin.__doc__,
        "fused_stock": stock,
        "fused_settings": settings,
        **dict(settings),
    }
    return type(f"Fused{stock.__name__}", (mixin, stock), attributes)


@dataclass(frozen=True)
class Swap:
    """A class for a module, and in a few words what the module then computes."""

    kind: type[Fused]
    becomes: str


@dataclass
class Report:
    """What `optimize` did: module name -> what it became, how packed, or why it stayed stock."""

    replaced: dict[str, str] = field(default_factory=dict)
    packed: dict[str, str] = field(default_factory=dict)
    stock: dict[str, str] = field(default_factory=dict)


def put(module: nn.Module, swap: Swap) -> None:
    """Gives `module` the class of `swap`."""
    module.__class__ = swap.kind


def overrides(module: nn.Module) -> str | None:
    """In words, that somebody derived the class of `module` from another's to change its forward,
    perhaps by what is told to it later; or None."""
    kinds = [k for k in type(module).__mro__ if "forward" in vars(k) and not issubclass(k, Fused)]
    own = [k for k in kinds if not k.__module__.startswith(("torch.", "lmfuse."))]
    if len(own) < 2 or own[0].__module__ == own[1].__module__:
        return None
    return f"its forward is {own[0].__name__}'s own, in place of {own[1].__name__}'s"


def kind_of(x: object) -> str:
    """The class of x, by a name that is the same in another process."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def give_back(model: nn.Module) -> None:
    """Gives every module of `model` its stock class."""
    for module in model.modules():
        while isinstance(module, Fused):
            for name in module.fused_found:
                vars(module).pop(name, None)
            module.__class__ = type(module).fused_stock  # type: ignore[assignment]


def takes_one_input(module: nn.Module) -> bool:
    """Whether the forward of `module` has exactly one parameter, and is that of its class."""
    return inputs(module) == 1


def inputs(module: nn.Module) -> int:
    """How many parameters the forward of `module` has; 0 if it is not that of its class."""
    try:
        parameters = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return 0
    return 0 if "forward" in vars(module) else len(parameters) - 1
