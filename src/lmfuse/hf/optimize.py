"""`optimize(model)` and `restore(model)`: what is swapped in, and back."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from lmfuse.hf import activation, linear, norm, rope, rotary, swap
from lmfuse.modules.pack import unpack_model
from lmfuse.quantization.model import quantization, quantize

Model = TypeVar("Model", bound=nn.Module)
# The swap for a module of a model, found under a name; why there is none; or None.
Pass = Callable[[nn.Module, str, nn.Module], swap.Swap | str | None]

_PASSES: tuple[Pass, ...] = (norm.plan, activation.plan, rope.plan, rotary.plan)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_REPORT = "_lmfuse_report"


def optimize(
    model: Model,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    quantization_config: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = False,
    *,
    weights_prepack: bool = True,
    auto_kernel_selection: bool | None = None,
    concat_linear: bool = True,
) -> Model:
    """The same model, its linear layers packed and its norms, MLPs, RoPE and attention fused.

    Modules are found by their shape, and accepted only if the fused form gives what the module's
    own forward gives on random inputs; all others stay stock, and `lmfuse.hf.report` tells why. A
    replaced module takes a subclass of its class: parameter names, state_dict, save_pretrained and
    config are unchanged, and other models of the process are not touched. transformers models get
    the attention implementation "lmfuse", and `generate` uses `lmfuse.generation.Cache` unless it
    is given a cache or told to prepare one. Optimizing an optimized model changes nothing. In
    float32 results agree up to rounding; in bfloat16 and float16 the fused forms round once where
    stock modules round two or three times.

    What is done to the model afterwards counts: weights written or loaded, hooks, forwards, layers
    and modules replaced, numbers set. Not seen are numbers of modules that kept their class (as
    attention of GPT-2 and OPT does), and what is written through `.data` into routers, sinks and
    the biases of experts: then restore the model, and optimize it again.

    Args:
        model: any nn.Module in eval mode, with its parameters on the CPU.
        dtype: cast the floating parameters to float32, bfloat16 or float16. Buffers, such as RoPE's
            frequencies, and what transformers itself keeps in float32, stay as they are.
        inplace: change and return `model` itself rather than a deep copy. Only so do the model and
            its packed form never exist together: the plain weight of a layer is freed before the
            next is packed.
        quantization_config: how to quantize weights, first of all: see `lmfuse.quantize`. A
            `WeightOnlyConfig`, or a qconfig mapping of `ipex.quantization`.
        sample_inputs, deployment_mode: accepted, as IPEX traced the model with them: here the
            model as it is is as fast as a trace of it, and the packed layout depends on no input.
        weights_prepack: pack the linear layers (`lmfuse.modules.Linear`).
        auto_kernel_selection: measure, once for each shape, dtype and number of threads, lmfuse's
            kernel and torch's on one and on 256 rows, and leave layers whose times torch's kernel
            makes shorter in the geometric mean as they are: there is one copy of a weight, in one
            layout, so one kernel for any number of rows. None for False, or what
            `_auto_kernel_selection._enable_dnnl` said; without effect after its `_enable_tpp`.
        concat_linear: compute query, key and value in one walk over their packed weights, which
            stay where they are. Gate and up are always read so.

    Returns:
        The optimized model. `restore` undoes it, except for `dtype`.

    Raises:
        TypeError: not an nn.Module, or a dtype other than the three.
        ValueError: a model in training mode, with parameters elsewhere than on the CPU, or
            quantized by another library and given a dtype; a weight that cannot be quantized. After
            any exception `model` is as before (but cast to `dtype`, if it was packing that failed).
    """
    _check(model, dtype)
    config = None if quantization_config is None else linear.weight_only(quantization_config)
    if config is not None and not inplace:
        model, config = quantize(model, config), None
    elif not inplace:
        model = copy.deepcopy(model)
    before = {module: type(module) for module in model.modules()}
    first = _REPORT not in vars(model)
    try:
        done = _swap_all(model)
        if (joints := _joints()) is not None:
            joints.join(model, done)
        if dtype is not None:
            _cast(model, dtype)  # late: all before it can be undone
        if config is not None:
            quantize(model, config, inplace=True)
        if weights_prepack:
            linear.pack(model, done, auto_kernel_selection, concat_linear)
    except BaseException:
        for module, kind in before.items():
            module.__class__ = kind
        if first and (joints := _joints()) is not None:
            joints.leave(model)
        raise
    setattr(model, _REPORT, done)
    if not done.replaced and not done.packed:
        warnings.warn(
            f"lmfuse.optimize found nothing to replace in {type(model).__name__}: it stays stock",
            stacklevel=2,
        )
    return model


def restore(model: Model) -> Model:
    """Undoes `optimize` on `model` itself: every module has its stock class and plain weight again.

    Weights come back bit for bit, in the dtype that they had when they were packed: a model that
    `optimize` cast keeps that dtype. They no longer require grad: call `requires_grad_()` to train.

    Returns:
        `model`.

    Raises:
        TypeError: not an nn.Module.
    """
    _check_module(model)
    unpack_model(model)
    if (joints := _joints()) is not None:
        joints.leave(model)
    swap.give_back(model)
    vars(model).pop(_REPORT, None)
    return model


def report(model: nn.Module) -> swap.Report:
    """What `optimize` replaced and `quantize` quantized, and why other modules stayed stock."""
    found = vars(model).get(_REPORT)
    found = found if found is not None else swap.Report()
    weights = quantization(model)
    return swap.Report(
        found.replaced, {**found.packed, **weights.quantized}, {**weights.stock, **found.stock}
    )


def _joints() -> ModuleType | None:
    """What joins transformers models; without transformers there is none of them."""
    if "transformers" not in sys.modules:
        return None
    from lmfuse.hf import generation

    return generation


def _passes() -> tuple[Pass, ...]:
    if "transformers" not in sys.modules:
        return _PASSES
    from lmfuse.hf import attention_modules

    return (attention_modules.plan, *_PASSES)


def _swap_all(model: nn.Module) -> swap.Report:
    """Plans for the whole model, then swaps."""
    done, passes = copy.deepcopy(vars(model).get(_REPORT)) or swap.Report(), _passes()
    swaps: list[tuple[nn.Module, swap.Swap]] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, swap.Fused):
                continue
            for plan in passes:
                found = plan(model, name, module)
                if isinstance(found, swap.Swap) and plan is not rope.plan:  # which calls all of it
                    found = swap.overrides(module) or found
                if isinstance(found, swap.Swap):
                    swaps.append((module, found))
                    done.replaced[name] = found.becomes
                    done.stock.pop(name, None)
                    break
                if found is not None:
                    done.stock[name] = found
    for module, found in swaps:
        swap.put(module, found)
    return done


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")


def _check(model: nn.Module, dtype: torch.dtype | None) -> None:
    _check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a TorchScript module: optimize it before it is traced")
    if model.training:
        raise ValueError(
            "model is in training mode, but lmfuse is for inference: call model.eval()"
        )
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype is {dtype}, but must be float32, bfloat16 or float16")
    if dtype is not None and _is_quantized(model):
        raise ValueError("dtype must be None: model is quantized, and casting would break it")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"parameter {name} is on {parameter.device}, but lmfuse computes on the CPU"
            )
        known = parameter.dtype in _FLOATS or (dtype and parameter.dtype is torch.float64)
        if parameter.is_floating_point() and not known:
            raise TypeError(
                f"parameter {name} is {parameter.dtype}, but must be float32, bfloat16 or float16"
            )


def _is_quantized(model: nn.Module) -> bool:
    """Whether weights are held in another form than plain; those of a GGUF file are expanded."""
    if getattr(model, "hf_quantizer", None) is None:
        return False
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method) != "gguf"


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating parameters to `dtype`, as from_pretrained(dtype=...) does: some stay in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(re.search(rf"\b{k}\b", name) for k in kept):
            parameter.data = parameter.data.to(dtype)
