"""argmax against torch's, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import BF16, LAYOUTS
from lmfuse import functional

SIZES = (*range(1, 70), 127, 128, 129, 1000, 4109, 49152)


def test_every_size(isa: str, dtype: torch.dtype) -> None:
    """Coarse numbers, so that many are equal: the first of them counts."""
    for n in SIZES:
        for low, high in ((-3, 3), (-9, -5)):
            x = torch.randint(low, high, (3, n + 3)).to(dtype)[:, 1 : n + 1]
            assert torch.equal(functional.argmax(x), x.argmax(-1)), n


def test_every_place(isa: str, dtype: torch.dtype) -> None:
    for n in (1, 7, 8, 16, 17, 33, 100):
        x = torch.eye(n).to(dtype) - 2
        assert torch.equal(functional.argmax(x), torch.arange(n))
        for special in (math.nan, math.inf):
            x[0] = special
            assert torch.equal(functional.argmax(x), x.argmax(-1))
            x.fill_diagonal_(special)
            assert torch.equal(functional.argmax(x), torch.tensor([0, *range(1, n)]))


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
def test_special_values(isa: str, dtype: torch.dtype, special: float) -> None:
    x = torch.full((5, 40), special, dtype=dtype)
    assert not functional.argmax(x).any()
    x[1, 3:] = 1
    x[2, 39], x[3, 20], x[3, 30] = math.nan, math.inf, math.nan
    x[4, 25], x[4, 31] = -math.inf, 0.0
    assert torch.equal(functional.argmax(x), x.argmax(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 50).to(BF16))
    assert torch.equal(functional.argmax(x), x.argmax(-1))


def test_shapes() -> None:
    assert functional.argmax(torch.tensor([1.0, 3.0, 2.0])).item() == 1
    assert functional.argmax(torch.randn(0, 5)).shape == (0,)
    for x in (torch.randn(5, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="x "):
            functional.argmax(x)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        functional.argmax(torch.arange(3))


def test_no_gradient_is_lost() -> None:
    """Places have none."""
    x = torch.randn(2, 5, requires_grad=True)
    found = functional.argmax(x)
    assert not found.requires_grad
    assert torch.equal(found, x.argmax(-1))
