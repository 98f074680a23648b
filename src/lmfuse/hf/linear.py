"""Linear layers of any model: packed in place; see `lmfuse.modules.pack`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from lmfuse import _auto_kernel_selection as kernels
from lmfuse.hf import swap
from lmfuse.modules.pack import pack_model
from lmfuse.modules.siblings import join_siblings

# What `ipex.optimize` offers and a language model on a CPU has no use for.
_WITHOUT_EFFECT = {
    "conv_bn_folding": "folds convolutions, which lmfuse leaves alone",
    "linear_bn_folding": "folds batch norms, which lmfuse leaves alone",
    "optimize_lstm": "replaces LSTMs, which lmfuse leaves alone",
    "split_master_weight_for_bf16": "is for training",
    "fuse_update_step": "is for training",
    "graph_mode": "is not needed: torch.compile, torch.export and torch.jit.trace take the model",
}


def check_arguments(level: str, optimizer: object, options: Mapping[str, object]) -> None:
    """Refuses what trains, and warns once of all options that were asked for without effect."""
    if optimizer is not None:
        raise ValueError("optimizer must be None: lmfuse is for inference")
    if level not in ("O0", "O1"):
        raise ValueError(f'level is {level!r}, but must be "O0" or "O1"')
    idle = [f"{name} {_WITHOUT_EFFECT[name]}" for name, value in options.items() if value]
    if idle:
        warnings.warn(f"lmfuse.optimize ignores: {'; '.join(idle)}", stacklevel=3)


def pack(
    model: nn.Module, done: swap.Report, auto_kernel_selection: bool | None, concat: bool | None
) -> None:
    """Packs the linear layers of `model`, and writes into `done` which, and which not."""
    packing = pack_model(model, kernels.rounds_fp32(), kernels.selection(auto_kernel_selection))
    done.packed.update(packing.packed)
    done.stock.update(packing.stock)
    if concat is not False:
        join_siblings(model)
