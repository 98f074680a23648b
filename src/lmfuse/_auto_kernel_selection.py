"""Which kernels `lmfuse.optimize` packs linear layers for: the switches of `ipex`, and measuring.

Read while packing, never afterwards: a switch does not change a model that is already packed. They
belong to the process, as in IPEX; the arguments of `lmfuse.optimize` belong to the call.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lmfuse import functional
from lmfuse.isa import isa


class FP32MathMode(IntEnum):
    """How float32 linear layers compute: exactly, or from bfloat16-rounded operands (BF32)."""

    FP32 = 0
    TF32 = 1
    BF32 = 2


_math_mode = FP32MathMode.FP32
_tpp = False
_dnnl = False


def set_fp32_math_mode(mode: FP32MathMode = FP32MathMode.FP32, device: str = "cpu") -> None:
    """FP32, the default: exact. BF32: layers that `lmfuse.optimize` packs from now on round their
    weight and their input to bfloat16; sums, inputs and results are float32. Half the bytes, so
    about twice the speed; relative errors of 2^-9 per operand; and weights are saved as rounded.

    TF32 exists on GPUs only: it warns, and changes nothing.
    """
    global _math_mode
    if mode not in (FP32MathMode.FP32, FP32MathMode.BF32):
        warnings.warn(f"{mode!r} does not exist on CPUs: still {_math_mode!r}", stacklevel=2)
        return
    _math_mode = FP32MathMode(mode)


def get_fp32_math_mode(device: str = "cpu") -> FP32MathMode:
    """The mode in force."""
    return _math_mode


def _enable_tpp() -> None:
    """From now on, packing takes lmfuse's blocked kernels without measuring, whatever the dtype."""
    global _tpp
    _tpp = True


def _disable_tpp() -> None:
    """The default: blocked kernels too, unless `auto_kernel_selection` finds torch's faster."""
    global _tpp
    _tpp = False


def _using_tpp() -> bool:
    return _tpp


def _enable_dnnl() -> None:
    """From now on, `auto_kernel_selection=None` means True."""
    global _dnnl
    _dnnl = True


def _disable_dnnl() -> None:
    """The default: `auto_kernel_selection=None` means False."""
    global _dnnl
    _dnnl = False


def _using_dnnl() -> bool:
    return _dnnl


def rounds_fp32() -> bool:
    """Whether float32 layers are to be packed as bfloat16."""
    return _math_mode is FP32MathMode.BF32


def selection(auto_kernel_selection: bool | None) -> Callable[[Tensor], bool] | None:
    """What decides, for each weight, whether its layer stays torch's; None: none does."""
    wanted = _dnnl if auto_kernel_selection is None else auto_kernel_selection
    return _torch_is_faster if wanted and not _tpp else None


# A decoding step and a prompt. There is one copy of a weight, in one layout, so one kernel must
# serve both: the one whose geometric mean of the two times is smaller.
_ROWS = (1, 256)
# Torch's kernel must win by more than the noise of a measurement.
_MARGIN = 1.05


def _torch_is_faster(weight: Tensor) -> bool:
    return _compare(*weight.shape, weight.dtype, isa(), torch.get_num_threads())


@functools.cache
def _compare(n: int, k: int, dtype: torch.dtype, isa: str, threads: int) -> bool:
    """Measured once for each shape, dtype, instruction set and number of threads."""
    weight = torch.zeros(n, k, dtype=dtype)
    packed = functional.pack_linear(weight)
    ratio = 1.0
    with torch.inference_mode():
        for rows in _ROWS:
            x = torch.zeros(rows, k, dtype=dtype)
            ours, torchs = _times(
                partial(functional.linear, x, packed), partial(F.linear, x, weight)
            )
            ratio *= ours / torchs
    return math.sqrt(ratio) > _MARGIN


def _times(*calls: Callable[[], Tensor]) -> list[float]:
    """The best time of each, in seconds, measured in turn: for 20 ms, at least three times."""
    best = [math.inf] * len(calls)
    for call in calls:
        call()
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < 0.02 * len(calls):
        for i, call in enumerate(calls):
            before = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - before)
        rounds += 1
    return best
