"""Where logits are largest. Inference only: no gradient flows."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check

_argmax = ops.argmax.default
_top_sums = ops.top_sums.default


def argmax(x: Tensor) -> Tensor:
    """The place of the largest element of each row: torch.argmax(x, -1)

    Args:
        x: [..., n], float32, bfloat16 or float16, n > 0.

    Returns:
        [...] int64. Of equal elements the first counts, and NaN is larger than all.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    with torch.no_grad():
        return cast(Tensor, call(_argmax, x, check=_check_x))


def top_sums(x: Tensor, add: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest sums of a matrix, bit for bit and in the order of torch's:

        torch.topk((x + add.unsqueeze(-1)).flatten(1), k)

    Args:
        x: [batch, rows, n] float32; in a beam search the logarithms of probabilities.
        add: [batch, rows] float32.
        k: from 1 to rows * n.

    Returns:
        sums [batch, k] float32, the largest first, and their places in rows * n, [batch, k] int64.
        Of equal sums those come first that torch takes, and NaN is larger than all.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    with torch.no_grad():
        sums, places = call(_top_sums, x, add, k, check=_check_sums)
        return sums, places


def _check_x(x: Tensor) -> None:
    if not _check.row("x", x):
        raise ValueError(f"x has shape {tuple(x.shape)}, but its rows must not be empty")


def _check_sums(x: Tensor, add: Tensor, k: int) -> None:
    for name, given, dims in (("x", x, 3), ("add", add, 2)):
        _check.tensor(name, given)
        if given.dtype is not torch.float32:
            raise TypeError(f"{name} is {given.dtype}, but must be float32")
        if given.dim() != dims:
            raise ValueError(f"{name} has {given.dim()} dimensions, but must have {dims}")
    if add.shape != x.shape[:2]:
        raise ValueError(f"add has shape {tuple(add.shape)}, but must have {tuple(x.shape[:2])}")
    if not 1 <= k <= x.shape[1] * x.shape[2]:
        raise ValueError(f"k is {k}, but must be between 1 and {x.shape[1] * x.shape[2]}")


@register_fake("argmax")
def _(x: Tensor) -> Tensor:
    _check_x(x)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@register_fake("top_sums")
def _(x: Tensor, add: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check_sums(x, add, k)
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)
