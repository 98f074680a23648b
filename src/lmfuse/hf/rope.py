"""RoPE in attention modules that call their modeling file's `apply_rotary_pos_emb`.

transformers has some 170 attention forwards with that call. We rewrite none of them: the swapped-in
class runs the same code with one global, that function, bound to ours. The modeling file itself
stays as it is. (The other globals are those of the moment of the swap.)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.hf import swap

_CALLED = "apply_rotary_pos_emb"
# Its parameters, in Llama and most others.
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


class FusedRope(swap.Fused):
    """An attention module that rotates query and key in one sweep, rounded once."""

    fused_form: str  # a key of _FORMS
    fused_promotes: bool  # bfloat16 heads and float32 tables -> float32 (else bfloat16)

    def __init_subclass__(cls) -> None:
        rotate = _pair(cls.fused_promotes, *_FORMS[cls.fused_form])
        forward = _rebound(cls.fused_stock.forward, rotate)
        assert forward is not None  # plan made it once before
        cls.forward = forward


_ALL, _EVERY_OTHER = slice(None), slice(None, None, 2)
# The halves of a head are turned together, or its pairs; which columns of a table are its distinct
# ones; and how many times its width is rotated.
_FORMS: dict[str, tuple[bool, slice, int]] = {
    "rope (half)": (True, _ALL, 1),
    "rope (half, single table)": (True, _ALL, 2),
    "rope (interleaved)": (False, _ALL, 1),
    "rope (interleaved, doubled table)": (False, _EVERY_OTHER, 1),
}


def _pair(
    promotes: bool, rotary_half: bool, columns: slice, times: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Our `apply_rotary_pos_emb`, of a form and with a result as `FusedRope` says."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if promotes:
            wide = torch.promote_types(q.dtype, cos.dtype)  # they differ under autocast
            q, k = q.to(wide), k.to(wide)
        return functional.rotate_qk(
            q,
            k,
            sin[..., columns],
            cos[..., columns],
            times * cos.shape[-1],
            rotary_half,
            heads_first=unsqueeze_dim == 1,
        )

    return apply_rotary_pos_emb


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if its forward applies RoPE, the reason against it, or None."""
    inner = inspect.unwrap(type(module).forward)
    if not isinstance(inner, FunctionType) or _CALLED not in inner.__code__.co_names:
        return None
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    stock = inner.__globals__.get(_CALLED)
    if not callable(stock) or _rebound(type(module).forward, stock) is None:
        return f"its forward is wrapped in a way that hides the call of {_CALLED}"
    tables = _tables(model, name)
    if list(inspect.signature(stock).parameters) != _PARAMETERS or not tables:
        return "its RoPE has other arguments than Llama's, or no table was found"
    probes = _probes(tables, 1)
    try:
        expected = [stock(*a) for a in probes]
    except Exception:  # it is foreign code; perhaps its tables hold each angle once
        probes = _probes(tables, 2)
        try:
            expected = [stock(*a) for a in probes]
        except Exception as error:
            return f"its RoPE refused a test input: {error}"
    promotes = _promotes(stock, *probes[0])
    for form, how in _FORMS.items():
        ours = _pair(promotes, *how)
        if all(swap.agrees(e, ours, *a) for e, a in zip(expected, probes, strict=True)):
            settings = {"fused_form": form, "fused_promotes": promotes}
            return swap.Swap(swap.subclass(FusedRope, type(module), **settings), form)
    return "its RoPE is neither the half nor the interleaved one"


def _promotes(stock: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether bfloat16 heads come back in float32, the dtype of the tables, as OLMo's do not."""
    try:
        result: Tensor = stock(q.bfloat16(), k.bfloat16(), cos, sin)[0]
    except Exception:  # it is foreign code
        return True
    return result.dtype is torch.float32


def _probes(tables: list[tuple[Tensor, Tensor]], times: int) -> list[tuple[Tensor, ...]]:
    """Arguments to try both functions on: random heads, so many times as wide as the tables."""
    random = swap.generator()
    found: list[tuple[Tensor, ...]] = []
    for cos, sin in tables:
        batch, seq, width = cos.shape
        query, key = (swap.random(random, batch, heads, seq, times * width) for heads in (3, 2))
        found.append((query, key, cos, sin))
    return found


def _tables(model: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    """cos and sin as the rotary embedding nearest above module `name` makes them, a pair for each
    type of layer; empty if there is none or it is of an unknown sort."""
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        for child in model.get_submodule(".".join(path[:depth])).children():
            if type(child).__name__.endswith("RotaryEmbedding"):
                # A copy, for dynamic RoPE keeps what it is called with.
                buffers = {k: copy.copy(b) for k, b in child._buffers.items()}
                return _made(swap.copied(child, _buffers=buffers))
    return []


def _made(rotary: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x, positions = torch.zeros(1), torch.tensor([[0, 1, 2, 7, 30, 61]])
    arguments: list[tuple[Any, ...]] = [(x, positions)]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        types = set(getattr(getattr(rotary, "config", None), "layer_types", ()))
        arguments = [(x, positions, t) for t in sorted(types)]
    try:
        tables = [rotary.forward(*a) for a in arguments]
    except Exception:  # it is foreign code
        return []
    whole = all(len(t) == 2 and t[0].dim() == 3 and t[0].dtype is torch.float32 for t in tables)
    return tables if whole else []


def _rebound(forward: Any, rotate: Callable[..., Any]) -> FunctionType | None:
    """`forward` with the global name `apply_rotary_pos_emb` bound to `rotate`, or None.

    A decorated forward is made again around the new one, if it keeps the old in its closure.
    """
    if not isinstance(forward, FunctionType):
        return None
    names, closure = forward.__globals__, forward.__closure__
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        names = {**names, _CALLED: rotate}
        # Dynamo looks globals up in the module of this name, where the function is the stock one.
        del names["__name__"]
    else:
        cells = closure or ()
        new = _rebound(inner, rotate)
        if new is None or not any(_holds(cell, inner) for cell in cells):
            return None
        closure = tuple(CellType(new) if _holds(cell, inner) else cell for cell in cells)
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    made.__kwdefaults__ = forward.__kwdefaults__
    made.__dict__.update(forward.__dict__)
    if inner is not None:
        made.__wrapped__ = new  # type: ignore[attr-defined]
    for attribute in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(made, attribute, getattr(forward, attribute))
    return made


def _holds(cell: CellType, function: object) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # an empty cell
        return False
