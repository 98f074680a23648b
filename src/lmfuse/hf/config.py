"""The config as the parts of an optimized model see it: the caller's, but with our attention.

transformers keeps the name of the attention in the config, and the config is the caller's: other
models share it, or are made from it later, and some families know no names but their own. So the
parts of a model get a `View`, which has everything in common with the config but that name.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_NAME, _PUBLIC = "_attn_implementation_internal", "_attn_implementation"


class View:
    """Mixin for a class of configs. An instance reads and writes the attributes of another config,
    `lmfuse_stock`, except for the name of the attention, which is its own, `lmfuse_name`, and for
    configs within that have views, `lmfuse_parts`.
    """

    lmfuse_kind: type[PreTrainedConfig]
    lmfuse_stock: PreTrainedConfig
    lmfuse_name: str | None
    lmfuse_parts: dict[str, View]

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, (self.lmfuse_stock, self.lmfuse_name, self.lmfuse_parts)

    def __copy__(self) -> PreTrainedConfig:
        """Independent of both, so an ordinary config."""
        new = copy.copy(self.lmfuse_stock)
        vars(new)[_NAME] = self.lmfuse_name
        return new


def give(root: PreTrainedModel, name: str, everywhere: bool = False) -> None:
    """Gives the parts of `root` views with the attention `name`; `take` undoes it.

    `root.config` stays what it is, if another model within asks it for the attention.

    Args:
        everywhere: also to models within `root` that transformers would not give it to.
    """
    models = [m for m in root.modules() if isinstance(m, PreTrainedModel)]
    stay = [m for m in models if not (everywhere or m._can_set_attn_implementation())]
    seen: dict[int, Any] = {id(m.config): m.config for m in stay}
    for model in models:
        _seen(model.config, name, seen)
    for module in root.modules():
        config = vars(module).get("config")
        if id(config) in seen and (module is not root or root.base_model is root):
            module.config = seen[id(config)]


def rename(root: PreTrainedModel, name: str) -> None:
    """Changes the name in all views that the parts of `root` have."""
    for _, view in _views(root):
        for one in (view, *view.lmfuse_parts.values()):
            _rename(one, name)


def tell(root: PreTrainedModel, ours: Collection[str]) -> None:
    """Writes the names in the views into the configs that they are of, but for `ours`."""
    for _, view in _views(root):
        if view.lmfuse_name not in ours:
            vars(view.lmfuse_stock)[_NAME] = view.lmfuse_name


def name(root: PreTrainedModel) -> str | None:
    """What the parts of `root` call their attention."""
    first = next(_views(root), None)
    return root.config._attn_implementation if first is None else first[1].lmfuse_name


def take(root: nn.Module) -> None:
    """Gives every part of `root` the config whose view it has."""
    for module, view in list(_views(root)):
        module.config = view.lmfuse_stock  # type: ignore[assignment]


def _views(root: nn.Module) -> Iterator[tuple[nn.Module, View]]:
    for module in root.modules():
        config = vars(module).get("config")
        if isinstance(config, View):
            yield module, config


def _seen(stock: PreTrainedConfig, name: str, seen: dict[int, Any]) -> Any:
    """`stock` as a part with this config is to see it, noted in `seen` under its id."""
    if id(stock) not in seen:
        inner = {key: vars(stock).get(key) for key in type(stock).sub_configs}
        configs = {k: c for k, c in inner.items() if isinstance(c, PreTrainedConfig)}
        parts = {key: _seen(config, name, seen) for key, config in configs.items()}
        views = {key: part for key, part in parts.items() if isinstance(part, View)}
        seen[id(stock)] = _view(stock, name, views)
    return seen[id(stock)]


def _view(stock: PreTrainedConfig, name: str | None, parts: dict[str, View]) -> Any:
    kind: Any = _kind(type(stock), name)
    new = kind.__new__(kind)
    object.__setattr__(new, "__dict__", vars(stock))
    new.lmfuse_stock, new.lmfuse_parts = stock, parts
    return new


def _rename(view: View, name: str | None) -> None:
    view.__class__ = _kind(view.lmfuse_kind, name)


_kinds: dict[tuple[type[PreTrainedConfig], str | None], type[Any]] = {}


def _kind(stock: type[PreTrainedConfig], name: str | None) -> type[Any]:
    """The class of the views of a `stock` with this name, made once. The name is the class's, for
    of an instance Dynamo sees no more than `__dict__`."""
    if (stock, name) not in _kinds:
        attributes: dict[str, Any] = {
            "__slots__": ("lmfuse_stock", "lmfuse_parts"),
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "lmfuse_kind": stock,
            "lmfuse_name": name,
            _NAME: property(lambda self: name, _rename),
            _PUBLIC: property(lambda self: name, getattr(PreTrainedConfig, _PUBLIC).fset),
            **{key: _part(key) for key in stock.sub_configs},
        }
        _kinds[stock, name] = type(stock.__name__, (View, stock), attributes)
    return _kinds[stock, name]


def _part(key: str) -> property:
    """The config within that is called `key`: its view, if it is still the same."""

    def get(self: Any) -> Any:
        # transformers makes one with defaults, which is no view of another, to compare with.
        found, part = vars(self)[key], getattr(self, "lmfuse_parts", {}).get(key)
        return part if part is not None and part.lmfuse_stock is found else found

    def put(self: Any, value: Any) -> None:
        vars(self)[key] = value

    return property(get, put)
