"""Where logits are largest. Inference only: no gradient flows through integers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check

_argmax = ops.argmax.default


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


def _check_x(x: Tensor) -> None:
    if not _check.row("x", x):
        raise ValueError(f"x has shape {tuple(x.shape)}, but its rows must not be empty")


@register_fake("argmax")
def _(x: Tensor) -> Tensor:
    _check_x(x)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)
