"""What every test shares: the instruction sets of this CPU, the dtypes, two threads, one seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lmfuse
from helpers import DTYPES
from lmfuse import functional

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


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the decoder op had, or of that from tokens to logits."""
    calls: list[int] = []

    def counting(stock: Any, place: int) -> Any:
        def counted(*args: Any) -> Any:
            result = stock(*args)
            calls.append(len(args[place]))
            return result

        return counted

    for name, place in (("decoder", 1), ("decoder_logits", 2)):  # of the stack
        monkeypatch.setattr(functional, name, counting(getattr(functional, name), place))
    return calls
