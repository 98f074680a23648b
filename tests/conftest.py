"""What every test shares: the instruction sets of this CPU, the dtypes, two threads, one seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import lmfuse
from helpers import DTYPES

_forced = os.environ.get("LMFUSE_ISA", "").strip()
ISAS = (_forced,) if _forced else lmfuse.available_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level that this CPU can run, active during the test; LMFUSE_ISA narrows them to one."""
    with lmfuse.use_isa(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _two_threads_and_one_seed() -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
