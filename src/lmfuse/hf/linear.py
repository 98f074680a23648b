"""Linear layers of any model: packed in place; see `lmfuse.modules.pack`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lmfuse import _auto_kernel_selection as kernels
from lmfuse.hf import swap
from lmfuse.modules import experts
from lmfuse.modules.linear import Packed, Transposed
from lmfuse.modules.pack import pack_model
from lmfuse.modules.quantized_linear import QuantizedLinear
from lmfuse.modules.siblings import join_siblings
from lmfuse.quantization.config import WeightOnlyConfig


def weight_only(config: Any) -> WeightOnlyConfig:
    """The config, or what a qconfig mapping of `ipex.quantization` says.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(config, WeightOnlyConfig):
        return config
    from lmfuse.quantization.ipex import weight_only_config

    return weight_only_config(config)


def pack(
    model: nn.Module, done: swap.Report, auto_kernel_selection: bool | None, concat: bool
) -> None:
    """Packs the linear layers of `model`, and writes into `done` which, and which not."""
    with torch.no_grad():
        alike = _alike(model)
        known, against = experts.find(model)
    select = kernels.selection(auto_kernel_selection)
    packing = pack_model(model, kernels.rounds_fp32(), select, alike, known)
    done.stock.update(against)
    done.packed.update(packing.packed)
    done.stock.update(packing.stock)
    if concat:
        join_siblings(model)


def _alike(model: nn.Module) -> set[type[nn.Module]]:
    """The classes in `model` that compute what nn.Linear does, or that with a transposed weight."""
    found: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in found and kind is not nn.Linear and not isinstance(module, Packed):
            found[kind] = _is_linear(module)
    return {kind for kind, known in found.items() if known}


def computes(module: nn.Module | None) -> bool:
    """Whether `module` is a linear layer: plain, packed, quantized or one with another name."""
    known = isinstance(module, (nn.Linear, QuantizedLinear, Transposed))
    return known or (module is not None and _is_linear(module))


def features(linear: Any) -> tuple[int, int]:
    """How many a linear layer gives and takes."""
    if isinstance(linear, (nn.Linear, QuantizedLinear)):
        return linear.out_features, linear.in_features
    inputs, out = linear.weight.shape
    return out, inputs


def _is_linear(module: nn.Module) -> bool:
    """Whether `module`, given small random parameters, computes as a linear layer."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 2 or not own.keys() <= {"weight", "bias"}:
        return False
    if module._modules or module._buffers or not swap.takes_one_input(module):
        return False
    random, sizes = swap.generator(), dict(zip(weight.shape, (12, 8), strict=True))
    w = swap.random(random, *(sizes[size] for size in weight.shape))
    matrix = w if isinstance(module, nn.Linear) else w.t()
    x, b = swap.random(random, 3, matrix.shape[1]), swap.random(random, matrix.shape[0])
    small = {"weight": nn.Parameter(w), "bias": None if bias is None else nn.Parameter(b)}
    known = {k: sizes[v] for k, v in vars(module).items() if type(v) is int and v in sizes}
    try:
        result = swap.copied(module, _parameters=small, **known).forward(x)
    except Exception:  # it is foreign code
        return False
    return swap.agrees(result, F.linear, x, matrix, *([] if bias is None else [b]))
