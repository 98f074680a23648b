"""Which quantized layers may compute in int8: those whose results it hardly changes.

int8 compute gives all columns of a row one scale, that of the largest but for eight outliers, which
it takes as they are. Where more columns than that are much larger than the rest (arXiv:2208.07339),
the rest is rounded away. So each layer is tried on a few sample tokens, and so is the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse.modules import QuantizedExperts, QuantizedLinear

QuantizedLayer = QuantizedLinear | QuantizedExperts

# A layer whose result int8 compute changes by more than this part of its norm stays at bf16. Those
# of SmolLM2-135M are changed by up to 1.4 %; with outliers in the scale, 183 of 211 by more.
LIMIT = 0.015
# Where the most probable next token leads by less than a factor of e^0.5, any rounding decides.
_LEAD = 0.5
_TOKENS = 48


def choose_compute(model: nn.Module, sample: Any = None) -> dict[str, str]:
    """Sets `compute` of the layers and experts of int8 or int4 weights in `model`; says why.

    Each layer is called with the inputs that `sample` brings it, in bf16 and in int8; where the
    results differ by more than 1.5 % of their norm it stays at bf16. Then the whole model runs:
    while the most probable next token is not that of bf16 compute, at the end of the sample or
    where bf16 compute prefers it by a factor of at least e^0.5, a quarter of the layers, those with
    the largest differences, goes back to bf16.

    Args:
        model: quantized, on the CPU; changed in place.
        sample: what the model is called with: token ids, or a mapping of arguments. None: 48 tokens
            drawn at random for a model with a vocabulary, and bf16 throughout for any other.

    Returns:
        Layer -> "int8: ..." or "bf16: ...", the reason in words.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and module.format.kind in ("int8", "int4")
    }
    for layer in layers.values():
        layer.compute = "bf16"
    inputs = _inputs(model, sample)
    if inputs is None or not layers:
        return dict.fromkeys(layers, "bf16: no sample to try int8 on")
    with torch.no_grad():
        errors, logits = _errors(model, layers, inputs)
        expected = logits.argmax(-1)
        best = logits.float().topk(2).values
        counts = best[..., 0] - best[..., 1] > _LEAD
        counts[..., -1:] = True
        order = sorted((n for n in layers if errors.get(n, 1.0) <= LIMIT), key=errors.__getitem__)
        while order:
            for name in layers:
                layers[name].compute = "bf16"
            for name in order:
                layers[name].compute = "int8"
            if bool((_run(model, inputs).argmax(-1) == expected)[counts].all()):
                break
            order = order[: len(order) * 3 // 4]
        else:
            for layer in layers.values():
                layer.compute = "bf16"
    return {name: _why(layers[name], errors.get(name)) for name in layers}


def _why(layer: QuantizedLayer, error: float | None) -> str:
    if error is None:
        return "bf16: the sample does not reach it"
    changed = f"int8 changes its result by {error:.1%}"
    if layer.compute == "int8":
        return f"int8: {changed.replace('int8 ', 'which ')}"
    if error <= LIMIT:
        return f"bf16: {changed}, and, with other layers, the next token"
    return f"bf16: {changed}, more than {LIMIT:.1%}: its inputs have many outliers"


def _inputs(model: nn.Module, sample: Any) -> dict[str, Any] | None:
    if isinstance(sample, Mapping):
        return dict(sample)
    if sample is None:
        config: Any = getattr(model, "config", None)
        size = getattr(config, "vocab_size", None)
        if not isinstance(size, int) or getattr(model, "main_input_name", "") != "input_ids":
            return None
        random = torch.Generator().manual_seed(0)
        sample = torch.randint(size, (1, _TOKENS), generator=random)
    return {"input_ids" if hasattr(model, "main_input_name") else "": sample}


def _run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(inputs[""]) if "" in inputs else model(**inputs)
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model gave {type(found).__name__}, but a model whose compute is to be chosen "
            "must give logits"
        )
    return found


def _errors(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], inputs: dict[str, Any]
) -> tuple[dict[str, float], Tensor]:
    """How much int8 compute changes the result of each layer, relatively; and the logits."""
    errors: dict[str, float] = {}

    def watch(name: str, layer: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            layer.compute = "int8"
            try:
                difference = layer.run(*args).float() - result.float()
            finally:
                layer.compute = "bf16"
            error = float(difference.norm() / result.float().norm().clamp(min=1e-30))
            errors[name] = max(errors.get(name, 0.0), error)

        return layer.register_forward_hook(hook)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        return errors, _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
