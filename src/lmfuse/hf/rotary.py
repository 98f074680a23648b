"""RoPE's tables, computed once for each position rather than for each token of each step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
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

    inv_freq: Tensor

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """cos and sin [batch, tokens, width] of each position, in the dtype of x."""
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # type: ignore
            found = self._looked_up(x.dtype, position_ids)
            if found is not None:
                return found
        return super().forward(x, position_ids)

    def _looked_up(self, dtype: torch.dtype, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        tables: _Tables | None = vars(self).get(_TABLES)
        if tables is not None and tables.hold(dtype, self.inv_freq):
            try:
                return F.embedding(position_ids, tables.cos), F.embedding(position_ids, tables.sin)
            except IndexError:
                pass
        first, last = (int(i) for i in position_ids.aminmax())
        if first < 0 or last >= _MOST:
            return None
        tables = vars(self)[_TABLES] = self._made(dtype, min(_MOST, max(1024, 2 * last)))
        return F.embedding(position_ids, tables.cos), F.embedding(position_ids, tables.sin)

    def _made(self, dtype: torch.dtype, count: int) -> _Tables:
        with torch.inference_mode(False):  # looked up later, perhaps outside of inference mode
            x, positions = torch.empty(0, dtype=dtype), torch.arange(count).unsqueeze(0)
            cos, sin = super().forward(x, positions)
            return _Tables(dtype, self.inv_freq, self.inv_freq._version, cos[0], sin[0])

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, state = super().__reduce__()
        return make, arguments, {k: v for k, v in state.items() if k != _TABLES}


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if its angles depend on nothing but the position, else None."""
    kind = type(module)
    if not kind.__name__.endswith("RotaryEmbedding") or "forward" in vars(module):
        return None
    if list(inspect.signature(kind.forward).parameters) != ["self", "x", "position_ids"]:
        return None
    if getattr(module, "rope_type", None) not in _STATIC or list(module._buffers)[:1] != [
        "inv_freq"
    ]:
        return None
    fused = swap.subclass(FusedRotary, kind)
    positions = torch.tensor([[0, 1, 2, 7, 30, 61], [5, 4, 3, 2, 1, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(0, dtype=dtype)
        ours = swap.copied(module)
        try:
            expected = module.forward(x, positions)
        except Exception as error:  # it is foreign code
            return f"its forward refused a test input: {error}"
        ours.__class__ = fused
        if not swap.agrees(expected, ours.forward, x, positions):
            return "its angles depend on more than the position"
    return swap.Swap(fused, "table of angles")
