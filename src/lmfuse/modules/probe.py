"""Telling what a module computes: a copy of it with small random parameters is called, and what it
gives is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float32, from our own generator: the global one is the user's."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def generator() -> torch.Generator:
    """A generator that always starts alike."""
    return torch.Generator().manual_seed(0)


def copied(module: Module, **changed: Any) -> Module:
    """A shallow copy of `module`, with some of its attributes `changed`."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(vars(module))
    new.__dict__.update(changed)
    return new


def agrees(
    expected: Tensor | tuple[Tensor, ...], ours: Callable[..., Any], *arguments: Tensor
) -> bool:
    """Whether ours(*arguments) is what the stock code gave, up to float32 rounding."""
    try:
        result = ours(*arguments)
    except (TypeError, ValueError, RuntimeError):
        return False
    mine, stock = (x if isinstance(x, tuple) else (x,) for x in (result, expected))
    return len(mine) == len(stock) and all(map(_close, mine, stock))


def _close(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype is b.dtype
    return alike and torch.allclose(a, b, rtol=1e-5, atol=1e-5)
