"""Linear layers of any model: packed in place; see `lmfuse.modules.pack`."""

from __future__ import annotations

from torch import nn

from lmfuse import _auto_kernel_selection as kernels
from lmfuse.hf import swap
from lmfuse.modules.pack import pack_model
from lmfuse.modules.siblings import join_siblings


def pack(
    model: nn.Module, done: swap.Report, auto_kernel_selection: bool | None, concat: bool
) -> None:
    """Packs the linear layers of `model`, and writes into `done` which, and which not."""
    packing = pack_model(model, kernels.rounds_fp32(), kernels.selection(auto_kernel_selection))
    done.packed.update(packing.packed)
    done.stock.update(packing.stock)
    if concat:
        join_siblings(model)
