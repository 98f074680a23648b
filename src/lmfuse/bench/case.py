"""One benchmark: an op of lmfuse, the formula it replaces, and the truth in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Inputs = tuple[Tensor, ...]
Formula = Callable[..., Tensor | tuple[Tensor, ...]]

# How many elements of an output are compared, about: all of a prompt, and some rows of a stream.
_COMPARED = 4 << 20


@dataclass(frozen=True)
class Case:
    """What to run, and what to compare it with; each formula takes what `inputs` returns.

    Attributes:
        name: of the op.
        kind: "stream" (far larger than the caches), "prompt" (some hundred tokens), "decode" (a
            few rows over a large weight) or "row" (one row, where the call itself counts).
        shape, dtype: of the first input.
        make: (shape, dtype) -> inputs. A tensor of as many dimensions as `shape` has rows of its
            own for each entry of the first dimension; all others are shared.
        run: through lmfuse.
        stock: as transformers or torch compute it.
        reference: the formula, for float64; of the last rows only where all would take too long.
        limit: what bounds it: "copy" or "read" (bandwidth of the memory), "cached" (of reading the
            same bytes again and again), "roof" (reading or arithmetic, whichever takes longer
            here); None if the data stay in a cache.
        flops: multiplications and additions of one run, where they are what counts.
        accuracy: the relative error that fp32 arithmetic may have.
        unit: whose peak counts, "fp32", "bf16" or "int8"; by default that of dtype.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[tuple[int, ...], torch.dtype], Inputs]
    run: Formula
    stock: Formula
    reference: Formula
    limit: str | None = None
    flops: int = 0
    accuracy: float = 4e-6
    unit: str | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {list(self.shape)} {dtype}"

    def inputs(self) -> Inputs:
        """The tensors to run on, the same in each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(self.shape, self.dtype)

    def small(self) -> Case:
        """The same case on a few rows of the same length (or one batch of heads), for tests."""
        few = 5 if len(self.shape) == 2 else 1
        return replace(self, shape=(min(self.shape[0], few), *self.shape[1:]))

    def bytes(self, inputs: Inputs) -> int:
        """Bytes that one run must read and write."""
        outputs = _tuple(self.run(*inputs))
        return sum(t.nbytes for t in (*inputs, *outputs))

    @property
    def tolerance(self) -> float:
        """The largest `error` allowed: one rounding to the dtype, or the fp32 arithmetic."""
        return max(0.51 * torch.finfo(self.dtype).eps, self.accuracy)

    def error(self, inputs: Inputs) -> float:
        """max |y - r| / (|r| + rms(r)), with y of lmfuse and r of the float64 formula."""
        rows = inputs[0].shape[0]

        def has_rows(x: Tensor) -> bool:
            return x.dim() == len(self.shape) and x.shape[0] == rows

        step = max(1, max(x.numel() for x in inputs if has_rows(x)) // _COMPARED)

        def sample(x: Tensor) -> Tensor:
            return x[::step] if has_rows(x) else x

        exact = _tuple(self.reference(*(sample(x).double() for x in inputs)))
        worst = 0.0
        for y, r in zip(_tuple(self.run(*inputs)), exact, strict=True):
            last = sample(y)[tuple(slice(-n, None) for n in r.shape)]
            distance = (last.double() - r).abs() / (r.abs() + r.square().mean().sqrt())
            worst = max(worst, float(distance.max()) if bool(distance.isfinite().all()) else 1e9)
        return worst

    def check(self, inputs: Inputs) -> None:
        """Raises `MismatchError` if the op does not compute its formula."""
        error = self.error(inputs)
        if error > self.tolerance:
            raise MismatchError(
                f"{self} is wrong: its error is {error:.2g}, but may be {self.tolerance:.2g}"
            )


class MismatchError(Exception):
    """An op that does not compute its formula; it is not timed."""


def _tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normally distributed; rows repeat after the first thousand, to be there sooner."""
    distinct = min(shape[0], 1024)
    rows = torch.randn(distinct, *shape[1:]).to(dtype)
    copies = -(-shape[0] // distinct)
    return rows.repeat(copies, *(1 for _ in shape[1:]))[: shape[0]]


# Of one tensor: the endless walks over its copies, which go with it.
_walks = WeakIdKeyDictionary()


def walk(x: Tensor, copies: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """The next of so many `make(x)`, in turn: so each call finds its data in memory."""
    if x not in _walks:
        _walks[x] = {}
    walks: dict[Callable[[Tensor], Tensor], Iterator[Tensor]] = _walks[x]
    if make not in walks:
        walks[make] = cycle([make(x) for _ in range(copies)])
    return next(walks[make])
