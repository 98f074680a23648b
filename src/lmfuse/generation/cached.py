"""`Cached`: what a layer of a cache returns in place of keys and values that it need not gather."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from lmfuse.generation.cache import Layer


class Cached(Tensor):
    """Keys or values [batch, kv_heads, visible, dim] that still lie in a cache.

    Every operation of torch on it gathers them first, so code that knows nothing of lmfuse gets
    what it expects.
    """

    layer: Layer
    part: str
    version: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(layer: Layer, part: str) -> Cached:
        """The `part`, "keys" or "values", that the last update of `layer` made visible."""
        arena = getattr(layer, part[:-1] + "_arena")
        shape = (layer.slots.batch, arena.shape[0], layer.slots.visible, arena.shape[2])
        new: Cached = torch.Tensor._make_wrapper_subclass(Cached, shape, dtype=layer.dtype)
        new.layer, new.part, new.version = layer, part, layer.slots.version
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_gathered, (args, kwargs or {}))
        return func(*args, **kwargs)

    def held_with(self, values: Tensor) -> Layer | None:
        """The layer whose keys and values these are, as it holds them now; None if they are others,
        such as a model makes of them."""
        mine = self.layer if self.version == self.layer.slots.version else None
        same = isinstance(values, Cached) and values.layer is self.layer
        both = same and (self.part, values.part) == ("keys", "values")  # type: ignore[attr-defined]
        return mine if both else None

    def gathered(self) -> Tensor:
        """A plain tensor with these keys or values.

        Raises:
            RuntimeError: the cache has changed since `update` returned them.
        """
        if self.version != self.layer.slots.version:
            raise RuntimeError(
                f"the {self.part} that a cache's update returned were read after the cache changed"
            )
        return self.layer.gather(self.part, self.layer.slots.visible)


def _gathered(x: Any) -> Any:
    return x.gathered() if isinstance(x, Cached) else x
