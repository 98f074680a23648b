"""What the import name `intel_extension_for_pytorch` needs beside the names it hands on.

That package holds no logic; the little there is, is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any, TypeVar

import torch
from torch import nn

import lmfuse
from lmfuse import __version__

Model = TypeVar("Model", bound=nn.Module)

# The release of Intel Extension for PyTorch whose calls lmfuse follows. Scripts compare it with the
# version they need; what comes after the plus sign says whose it is, and PEP 440 ignores it there.
VERSION = f"2.10.0+lmfuse.{__version__}"


def refuse_beside_ipex() -> None:
    """Raises ImportError if Intel Extension for PyTorch itself is installed.

    Both own the folder `intel_extension_for_pytorch`: whichever came second has overwritten files
    of the first, so that neither can be trusted.
    """
    try:
        theirs = metadata.version("intel_extension_for_pytorch")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"Intel Extension for PyTorch {theirs} and lmfuse {__version__} are both installed, and "
        "both own the folder intel_extension_for_pytorch, where each may have overwritten the "
        "other. Keep one. For lmfuse: pip uninstall intel_extension_for_pytorch lmfuse, then "
        "pip install lmfuse. Or, with both installed: import lmfuse instead."
    )


def names(
    package: str, late: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module-level `__getattr__` and `__dir__` of the alias package `package`.

    Args:
        package: its `__name__`.
        late: name -> the module that has it, or is it, for names that import transformers: they
            are looked up when somebody asks for them.
    """
    late = late or {}

    def get(name: str) -> Any:
        if name in late:
            found = import_module(late[name])
            return found if late[name].endswith(f".{name}") else getattr(found, name)
        raise AttributeError(
            f"{package} has no attribute {name!r}: lmfuse {__version__} serves the CPU part of "
            "ipex.llm, as far as its README lists it under 'Coming from IPEX'"
        )

    def names_of() -> list[str]:
        return sorted({*vars(import_module(package)), *late})

    return get, names_of


# What `ipex.optimize` offers and a language model on a CPU has no use for.
_WITHOUT_EFFECT = {
    "conv_bn_folding": "folds convolutions, which lmfuse leaves alone",
    "linear_bn_folding": "folds batch norms, which lmfuse leaves alone",
    "optimize_lstm": "replaces LSTMs, which lmfuse leaves alone",
    "split_master_weight_for_bf16": "is for training",
    "fuse_update_step": "is for training",
    "graph_mode": "is not needed: torch.compile, torch.export and torch.jit.trace take the model",
}


def optimize(
    model: Model,
    dtype: torch.dtype | None = None,
    optimizer: None = None,
    level: str = "O1",
    inplace: bool = False,
    conv_bn_folding: bool | None = None,
    linear_bn_folding: bool | None = None,
    weights_prepack: bool | None = None,
    replace_dropout_with_identity: bool | None = None,
    optimize_lstm: bool | None = None,
    split_master_weight_for_bf16: bool | None = None,
    fuse_update_step: bool | None = None,
    auto_kernel_selection: bool | None = None,
    sample_input: Any = None,
    graph_mode: bool | None = None,
    concat_linear: bool | None = None,
) -> Model:
    """`lmfuse.optimize` with the arguments of `ipex.optimize`, in its order.

    Args:
        optimizer: must be None; lmfuse is for inference.
        level: "O1", or "O0", which packs nothing unless weights_prepack is True.
        weights_prepack, concat_linear: None for what level says, and for True.
        replace_dropout_with_identity, sample_input: accepted: dropout does nothing in eval mode,
            and the packed layout depends on no input.
        conv_bn_folding, linear_bn_folding, optimize_lstm, split_master_weight_for_bf16,
            fuse_update_step, graph_mode: ignored, with one warning if True.

    Returns:
        The optimized model; a TorchScript model as it is, as in IPEX.

    Raises:
        TypeError, ValueError: as `lmfuse.optimize`; an optimizer or an unknown level.
    """
    _check_optimizer(optimizer)
    if level not in ("O0", "O1"):
        raise ValueError(f'level is {level!r}, but must be "O0" or "O1"')
    _ignore(
        conv_bn_folding=conv_bn_folding,
        linear_bn_folding=linear_bn_folding,
        optimize_lstm=optimize_lstm,
        split_master_weight_for_bf16=split_master_weight_for_bf16,
        fuse_update_step=fuse_update_step,
        graph_mode=graph_mode,
    )
    if isinstance(model, torch.jit.ScriptModule):
        return model
    return lmfuse.optimize(
        model,
        dtype,
        inplace,
        sample_inputs=sample_input,
        weights_prepack=level == "O1" if weights_prepack is None else weights_prepack,
        auto_kernel_selection=auto_kernel_selection,
        concat_linear=concat_linear is not False,
    )


def llm_optimize(
    model: Model,
    optimizer: None = None,
    dtype: torch.dtype = torch.float,
    inplace: bool = False,
    device: str = "cpu",
    quantization_config: Any = None,
    qconfig_summary_file: str | None = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    cache_weight_for_large_batch: bool = False,
) -> Model:
    """`lmfuse.optimize` with the arguments of `ipex.llm.optimize`, in its order.

    Args:
        optimizer: must be None; lmfuse is for inference.
        dtype: bfloat16 or float16 to cast to; float32, as in IPEX, leaves every dtype as it is.
        device: must be "cpu".
        qconfig_summary_file, low_precision_checkpoint: must be None.
        cache_weight_for_large_batch: accepted: one packed layout serves any number of rows.

    Returns:
        The optimized model; a TorchScript model as it is, as in IPEX.

    Raises:
        TypeError, ValueError: as `lmfuse.optimize`; an argument that must be None and is not.
    """
    _check_optimizer(optimizer)
    if torch.device(device).type != "cpu":
        raise ValueError(f'device is {device!r}, but must be "cpu"')
    if qconfig_summary_file is not None:
        raise ValueError("qconfig_summary_file must be None: lmfuse has no static int8 recipes")
    if low_precision_checkpoint is not None:
        raise ValueError("low_precision_checkpoint must be None: lmfuse does not load them yet")
    if isinstance(model, torch.jit.ScriptModule):
        return model
    return lmfuse.optimize(
        model,
        None if dtype is torch.float else dtype,
        inplace,
        quantization_config,
        sample_inputs,
        deployment_mode,
    )


def _check_optimizer(optimizer: object) -> None:
    if optimizer is not None:
        raise ValueError("optimizer must be None: lmfuse is for inference")


def _ignore(**options: object) -> None:
    """Warns once of all options that were asked for without effect."""
    idle = [f"{name} {_WITHOUT_EFFECT[name]}" for name, value in options.items() if value]
    if idle:
        warnings.warn(f"ipex.optimize ignores: {'; '.join(idle)}", stacklevel=3)
