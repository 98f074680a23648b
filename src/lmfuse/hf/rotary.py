"""RoPE's tables, computed once for each position rather than for each token of each step."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmfuse.hf import swap

_TABLES = "_lmfuse_tables"
# Beyond, tables would take more than a few MB; angles are then computed as ever.
_MOST = 16384
# Whose frequencies never change. (dynamic and longrope choose them by the longest sequence.)
_STATIC = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class _Tables:
    """cos and sin of the first positions, and what they were made of."""

    dtype: torch.dtype
    frequencies: Tensor
    version: int
    cos: Tensor
    sin: Tensor

    def hold(self, dtype: torch.dtype, frequencies: Tensor) -> bool:
        same = self.dtype is dtype and self.frequencies is frequencies
        return same and self.version == frequencies._version


class FusedRotary(swap.Fused):
    """A rotary embedding that looks its angles up: 20 us for a token, and not 90."""

    fused_found = (_TABLES,)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self).pop(_TABLES, None)  # made with attention_scaling, for one
        super().__setattr__(name, value)

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """cos and sin [batch, tokens, width] of each position, in the dtype of x."""
        return self._angles(x, position_ids)

    def _angles(self, x: Tensor, position_ids: Tensor, *kind: str) -> Any:
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # type: ignore
            found = self._looked_up(x.dtype, position_ids, *kind)
            if found is not None:
                return found
        return super().forward(x, position_ids, *kind)

    def _looked_up(
        self, dtype: torch.dtype, position_ids: Tensor, *kind: str
    ) -> tuple[Tensor, Tensor] | None:
        if position_ids.dim() != 2:  # one for each of three axes of an image
            return None
        known: dict[tuple[str, ...], _Tables] = vars(self).setdefault(_TABLES, {})
        tables = known.get(kind)
        if tables is not None and tables.hold(dtype, self._frequencies(*kind)):
            try:
                return F.embedding(position_ids, tables.cos), F.embedding(position_ids, tables.sin)
            except IndexError:
                pass
        first, last = (int(i) for i in position_ids.aminmax())
        found = None if first < 0 else self.tables(dtype, last, *kind)
        if found is None:
            return None
        return F.embedding(position_ids, found[0]), F.embedding(position_ids, found[1])

    def tables(self, dtype: torch.dtype, last: int, *kind: str) -> tuple[Tensor, Tensor] | None:
        """cos and sin [positions, width] of all positions up to `last` and perhaps more; None if
        these are too many to keep."""
        known: dict[tuple[str, ...], _Tables] = vars(self).setdefault(_TABLES, {})
        tables = known.get(kind)
        held = tables is not None and tables.hold(dtype, self._frequencies(*kind))
        if last >= _MOST:
            return None
        if tables is None or not held or len(tables.cos) <= last:
            tables = known[kind] = self._made(dtype, min(_MOST, max(1024, 2 * last)), *kind)
        return tables.cos, tables.sin

    def _made(self, dtype: torch.dtype, count: int, *kind: str) -> _Tables:
        with torch.inference_mode(False):  # looked up later, perhaps outside of inference mode
            x, positions = torch.empty(0, dtype=dtype), torch.arange(count).unsqueeze(0)
            cos, sin = super().forward(x, positions, *kind)
            frequencies = self._frequencies(*kind)
            return _Tables(dtype, frequencies, frequencies._version, cos[0], sin[0])

    def _frequencies(self, *kind: str) -> Tensor:
        frequencies: Tensor = self._buffers["_".join((*kind, "inv_freq"))]  # type: ignore
        return frequencies


class FusedTypedRotary(FusedRotary):
    """One with frequencies for each type of layer."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Any:  # type: ignore
        """As `FusedRotary`, for layers of a type."""
        return self._angles(x, position_ids, layer_type)


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if its angles depend on nothing but the position, else None."""
    kind = type(module)
    if not kind.__name__.endswith("RotaryEmbedding") or "forward" in vars(module):
        return None
    types: Any = getattr(module, "rope_type", None)  # by type of layer, or of all
    rotary: type[FusedRotary] = FusedRotary
    kinds: list[tuple[str, ...]] = [()]
    parameters = list(inspect.signature(kind.forward).parameters)
    if parameters == ["self", "x", "position_ids", "layer_type"] and isinstance(types, dict):
        rotary, kinds, parameters = FusedTypedRotary, [(t,) for t in types], parameters[:-1]
    else:
        types = {"": types}
    if parameters != ["self", "x", "position_ids"] or not set(types.values()) <= set(_STATIC):
        return None
    if any("_".join((*k, "inv_freq")) not in module._buffers for k in kinds):
        return None
    fused = swap.subclass(rotary, kind)
    positions = torch.tensor([[0, 1, 2, 7, 30, 61], [5, 4, 3, 2, 1, 0]])
    for dtype, more in itertools.product((torch.float32, torch.bfloat16), kinds):
        x = torch.empty(0, dtype=dtype)
        ours = swap.copied(module)
        try:
            expected = module.forward(x, positions, *more)
        except Exception as error:  # it is foreign code
            return f"its forward refused a test input: {error}"
        ours.__class__ = fused
        if not swap.agrees(expected, partial(_called, ours, more), x, positions):
            return "its angles depend on more than the position"
    return swap.Swap(fused, "table of angles")


def _called(rotary: Any, more: tuple[str, ...], x: Tensor, positions: Tensor) -> Any:
    return rotary.forward(x, positions, *more)
