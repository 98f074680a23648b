"""How long each token took: `config.token_latency`, as in IPEX."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Stops nothing; notes when each token of the batch, or of the beams, was chosen."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        now = perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def wanted(model: Any) -> bool:
    """Whether `model.config.token_latency` is set."""
    return bool(getattr(model.config, "token_latency", False))


def timed(run: Callable[[StoppingCriteriaList], Any], criteria: Any) -> tuple[Any, list[float]]:
    """`run` with a clock among the stopping `criteria`, which may be None.

    Returns:
        What it returns, and the seconds that each step took: the first from the call on, with the
        prompt in it.
    """
    clock = Clock()
    return run(StoppingCriteriaList([*(criteria or ()), clock])), clock.seconds
