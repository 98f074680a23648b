"""Results are rounded as torch rounds them, whatever instruction does it."""

from __future__ import annotations

import pytest
import torch

import lmfuse
from lmfuse.functional import silu_mul


@pytest.mark.parametrize("isa", lmfuse.available_isas())
@pytest.mark.parametrize("up", [1.0, 2.0**-6, 1e-30], ids=str)
def test_every_bf16_value(isa: str, up: float) -> None:
    """A gate of 64 passes unchanged (64 / (1 + e^-64) = 64), so y = round(64 · up) of each bf16
    value: subnormals, infinities and NaN included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = (x.float() * up).to(torch.bfloat16)
    with lmfuse.use_isa(isa):
        y = silu_mul(torch.full_like(x, 64.0), x)
    expected = (x.float() * 64.0).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", lmfuse.available_isas())
def test_results_between_bf16_values(isa: str) -> None:
    """Products of two bf16 values have 16 bits of mantissa; near 2^-126 they become subnormal."""
    gate = torch.full((4096,), 67.0, dtype=torch.bfloat16)
    up = (torch.logspace(-42, -34, 4096, dtype=torch.float64)).to(torch.bfloat16)
    with lmfuse.use_isa(isa):
        y = silu_mul(gate, up)
    expected = (gate.float() * up.float()).to(torch.bfloat16)
    assert torch.equal(y, expected)
