"""The prompt runs once, however many beams or sequences continue it.

transformers repeats each prompt for its beams before the first forward. Here only the first row of
each group runs; then the cache is told that the group shares it, and the outputs are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lmfuse.generation.cache import Layer, SlidingLayer
from lmfuse.generation.tuples import TupleCache, placeholders
from lmfuse.modules import IndirectAccessKVCacheAttention

# Layers whose `batch_repeat_interleave` repeats all that they hold.
_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer, Layer, SlidingLayer)


def prefill(
    model: Any,
    stock: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **options: Any,
) -> Any:
    """What `stock`, the `_prefill` of transformers, returns, but computed on fewer rows.

    Args:
        stock: bound to `model`; runs on all rows where the cache cannot be shared.
        input_ids: [rows, tokens], of which each max(num_beams, num_return_sequences) that follow
            one another should be equal.
        model_kwargs: for the model; a tensor has rows as well, or one for all.
        options: what else `stock` is given.
    """
    settings = generation_config
    repeats = max(settings.num_beams or 1, settings.num_return_sequences or 1)
    cache = model_kwargs.get("past_key_values")
    few = None
    if repeats > 1 and not model.config.is_encoder_decoder:
        few = _first_of_each(repeats, {**model_kwargs, "input_ids": input_ids})
    if few is None:
        return stock(input_ids, settings, model_kwargs, **options)
    whole = settings.prefill_chunk_size is None  # tuples share only what comes in one piece
    if _shareable(cache):
        outputs = stock(few.pop("input_ids"), settings, few, **options)
        outputs.past_key_values.batch_repeat_interleave(repeats)
    elif whole and isinstance(cache, TupleCache) and cache.get_seq_length() == 0:
        cache.batch_repeat_interleave(repeats)
        outputs = stock(few.pop("input_ids"), settings, few, **options)
    elif whole and cache is None and uses_tuples(model):
        inputs = model.prepare_inputs_for_generation(**few, **options)
        inputs["past_key_values"] = placeholders(model.config, input_ids.shape[0])
        outputs = model(**inputs, return_dict=True)
    else:
        return stock(input_ids, settings, model_kwargs, **options)
    return _repeated(outputs, repeats)


def uses_tuples(model: nn.Module) -> bool:
    """Whether the caches of `model` are the tuples of `IndirectAccessKVCacheAttention`."""
    return any(isinstance(m, IndirectAccessKVCacheAttention) for m in model.modules())


def _shareable(cache: Any) -> bool:
    return (
        isinstance(cache, DynamicCache)
        and cache.get_seq_length() == 0
        and all(type(layer) in _REPEATABLE for layer in cache.layers)
    )


def _first_of_each(repeats: int, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """`inputs` with every `repeats`-th row of what has rows; None if the others are not equal."""
    rows = inputs["input_ids"].shape[0]
    few = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.shape[:1] == (1,):
                continue
            if value.shape[:1] != (rows,) or rows % repeats:
                return None
            groups = value.view(rows // repeats, repeats, *value.shape[1:])
            if not torch.equal(groups, groups[:, :1].expand_as(groups)):
                return None
            few[name] = groups[:, 0]
        elif isinstance(value, (list, tuple, dict)) and value and name != "past_key_values":
            return None  # there may be rows in it
    return few


def _repeated(outputs: Any, repeats: int) -> Any:
    """`outputs` for all rows; of the logits the last alone, as nobody asks for the others."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(repeats, 0)
        return tuple(map(repeat, value)) if isinstance(value, tuple) else value

    outputs.logits = outputs.logits[:, -1:]
    for name, value in outputs.items():
        if name != "past_key_values":
            outputs[name] = repeat(value)
    return outputs
