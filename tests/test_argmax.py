"""argmax and top_sums against torch's, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import BF16, LAYOUTS, assert_same_bits
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


def top_sums(x: Tensor, add: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, places = torch.topk((x + add.unsqueeze(-1)).flatten(1), k)
    return values, places


@pytest.mark.parametrize("coarse", [True, False])
def test_sums_of_every_size(isa: str, coarse: bool) -> None:
    """Whatever way torch goes for such a k; coarse numbers are equal often, also among the k."""
    for n in (1, 2, 7, 16, 33, 100, 640, 4109):
        for rows, k in ((1, 1), (3, 2), (4, 8), (4, 13)):
            x, add = 9 * torch.randn(2, rows, n), 4 * torch.randn(2, rows)
            if coarse:
                x, add = x.round(), add.round()
            if k <= rows * n:
                found, expected = functional.top_sums(x, add, k), top_sums(x, add, k)
                assert_same_bits(found[0], expected[0])
                assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
def test_special_sums(isa: str, special: float) -> None:
    for n in (60, 300):
        x, add = torch.randn(3, 4, n).round(), torch.tensor([[0.0, -1e9, special, 1.0]] * 3)
        x[0, 3, 7], x[0, 1, n - 1] = special, special
        x[1, :, 3:] = special
        x[2] = special
        found = functional.top_sums(x, add, 8)
        for a, b in zip(found, top_sums(x, add, 8), strict=True):
            assert torch.equal(a.nan_to_num(5e9), b.nan_to_num(5e9))


def test_sums_that_cannot_be() -> None:
    x, add = torch.randn(2, 3, 10), torch.randn(2, 3)
    for k in (0, -1, 31):
        with pytest.raises(ValueError, match=f"k is {k}, but must be between 1 and 30"):
            functional.top_sums(x, add, k)
    with pytest.raises(ValueError, match="add has shape"):
        functional.top_sums(x, add[:1], 2)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16"):
        functional.top_sums(x.to(BF16), add, 2)
    strided = torch.randn(3, 10, 2).permute(2, 0, 1)
    found, expected = functional.top_sums(strided, add, 5), top_sums(strided, add, 5)
    assert all(map(torch.equal, found, expected))
