"""Graphs of whole models: tuple caches through `forward`, and graphs in place of it.

    trace = torch.jit.freeze(torch.jit.trace(model, example_kwarg_inputs=sample_inputs(model), …))
    model = set_optimized_model_for_generation(model, optimized_model=trace)

An optimized model takes IPEX's tuple caches besides transformers' own, and gives tuples back: then
its inputs and outputs are tensors. A graph of torch.jit has all layers in one op where `optimize`
has found out what they compute (`functional.indirect_cache_decoder`); elsewhere, and for
torch.compile and torch.export, every layer appends and attends in one. No length, batch or number
of beams is written into either. Save a graph after `torch.jit.freeze` only: one that is not frozen
gives a file that does not load.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as AnyCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmfuse.generation.tuples import ROWS, TupleCache, placeholders

Model = TypeVar("Model", bound=nn.Module)

_GRAPH, _FIRST = "trace_graph", "trace_graph_first"
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
# Arguments of a forward that a graph can do without, whatever they are.
_IDLE = ("use_cache", "return_dict", "logits_to_keep", "cache_position", "token_type_ids")


def set_optimized_model_for_generation(
    model: Model,
    optimized_model: Callable[..., Any],
    first_token_optimized_model: Callable[..., Any] | None = None,
) -> Model:
    """Lets `optimized_model` answer for `model`, in `generate` and when it is called.

    Args:
        model: stays what it is but for its attributes `trace_graph` and `trace_graph_first`. It
            still answers calls that the graph cannot: with another cache than ours, for hidden
            states, labels or inputs_embeds.
        optimized_model: called with input_ids, attention_mask, position_ids and past_key_values,
            tuples as in `sample_inputs`, or those of them that its schema names; returns (logits,
            past_key_values) or a dict with these. It was traced by torch.jit, compiled or exported
            (`ExportedProgram.module()`).
        first_token_optimized_model: another for the first token; None: the same.

    Returns:
        `model`.

    Raises:
        TypeError: what is no module, or cannot be called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    graphs = {"optimized_model": optimized_model}
    if first_token_optimized_model is not None:
        graphs["first_token_optimized_model"] = first_token_optimized_model
    for name, graph in graphs.items():
        if not callable(graph):
            raise TypeError(f"{name} is {type(graph).__name__}, but must be callable")
    # Not as submodules: a graph has constants of its own, which are not this model's to save.
    vars(model).pop(_FIRST, None)
    vars(model).update(zip((_GRAPH, _FIRST), graphs.values(), strict=False))
    if not isinstance(model, TakesTuples):
        vars(model)["forward"] = MethodType(taking_tuples(type(model).forward), model)
    return model


def forget_graphs(model: nn.Module) -> None:
    """Undoes `set_optimized_model_for_generation`."""
    if vars(model).pop(_GRAPH, None) is not None:
        vars(model).pop(_FIRST, None)
        vars(model).pop("forward", None)


def sample_inputs(model: Any, batch: int = 1, tokens: int = 32, beams: int = 4) -> dict[str, Any]:
    """Inputs to trace `model` with, those of IPEX's scripts: a prompt and caches without tokens."""
    ids = torch.ones((batch, tokens), dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(tokens).expand(batch, tokens),
        "past_key_values": placeholders(model.config, batch * beams),
    }


def trace_for_generation(model: Model) -> Model:
    """Traces `model`, which `lmfuse.optimize` returned, and lets the graph answer for it.

    The graph computes the logits of the last token alone. torch.jit, which makes it, is deprecated
    by torch, and says so.

    Returns:
        `model`.

    Raises:
        TypeError: not a model that `lmfuse.optimize` returned, or one without lmfuse's attention.
    """
    if not isinstance(model, TakesTuples):
        raise TypeError(
            f"{type(model).__name__} cannot be traced: optimize it first (lmfuse.optimize), and "
            "see in lmfuse.hf.report whether its attention was replaced"
        )
    forget_graphs(model)
    config: Any = model.config
    before = vars(config).get("lm_head_generation")
    config.lm_head_generation = True
    try:
        with torch.no_grad():
            graph = torch.jit.trace(
                model, example_kwarg_inputs=sample_inputs(model), strict=False, check_trace=False
            )
            graph = torch.jit.freeze(graph.eval())
    finally:
        if before is None:
            del config.lm_head_generation
        else:
            config.lm_head_generation = before
    return set_optimized_model_for_generation(model, graph)


_set_optimized_model_for_generation = set_optimized_model_for_generation  # as IPEX spells it


class TakesTuples:
    """Mixin for transformers' models: `forward` takes tuple caches, and may be a graph's.

    With `config.lm_head_generation` it gives the logits of the last token alone, unless
    `logits_to_keep` says otherwise.
    """

    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = getattr(cls, "fused_stock", None)
        if stock is not None:
            cls.forward = taking_tuples(stock.forward)  # type: ignore[attr-defined]


def taking_tuples(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, the forward of a class, for tuple caches as well; see `TakesTuples`."""
    names = list(inspect.signature(stock).parameters)[1:]
    place = names.index("past_key_values") if "past_key_values" in names else len(names)
    keeps = "logits_to_keep" in names

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        past = args[place] if len(args) > place else kwargs.get("past_key_values")
        tuples = isinstance(past, (tuple, list))
        graph = vars(self).get(_GRAPH)
        last = getattr(self.config, "lm_head_generation", False)
        if not tuples and graph is None and not last:
            return stock(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        if graph is not None and (inputs := _for_graph(self, kwargs)) is not None:
            return _answer(self, inputs, kwargs)
        if last and keeps and not _given(kwargs.get("logits_to_keep")):
            kwargs["logits_to_keep"] = 1
        outputs = _with_tuples(self, stock, kwargs) if tuples else stock(self, **kwargs)
        return outputs if keeps or not last else _cut(outputs)

    return forward


def _given(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)


def _cut(outputs: Any) -> Any:
    """The logits of the last token, of a model that has no `logits_to_keep`."""
    if isinstance(outputs, tuple):
        return outputs[0][:, -1:], *outputs[1:]
    outputs.logits = outputs.logits[:, -1:]
    return outputs


def _with_tuples(model: Any, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """`stock` with tuple caches; what is traced returns (logits, tuples)."""
    past = kwargs["past_key_values"]
    if not past or any(len(layer) != 4 for layer in past):
        raise TypeError(
            "past_key_values is a tuple, but not of a (seq_info, keys, values, beam_idx) for each "
            "layer, as IndirectAccessKVCacheAttention has it: give a transformers Cache, or None"
        )
    if not isinstance(model, TakesTuples):  # its own forward is made for them
        return stock(model, **kwargs)
    cache = TupleCache(past, getattr(model.config, "text_max_length", ROWS))
    kwargs |= {"past_key_values": cache, "use_cache": True}
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not tracing:
        outputs = stock(model, **kwargs)
    else:
        states = [x.data_ptr() for layer in past for x in layer[1:3]]
        if len(set(states)) < len(states):
            raise ValueError(
                "past_key_values has the same tensor in several places, which torch.jit.trace "
                "takes for one input: make a new one for each (lmfuse.hf.tracing.sample_inputs)"
            )
        kwargs["return_dict"] = True
        with warnings.catch_warnings():
            # Of every check of a shape that transformers and we make: none is in the graph.
            warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
            outputs = stock(model, **kwargs)
        return outputs.logits, cache.past
    if isinstance(outputs, tuple):
        return tuple(cache.past if x is cache else x for x in outputs)
    outputs.past_key_values = cache.past
    return outputs


def _for_graph(model: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What the graph of `model` is given for a forward's `kwargs`; None if it cannot answer."""
    given = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    past, ids = given.get("past_key_values"), given.get("input_ids")
    why = set(given) - {*_INPUTS, *_IDLE}
    if isinstance(past, AnyCache) and not isinstance(past, TupleCache):
        # `generate` gives a model of ours tuples, and others an empty cache to be replaced.
        theirs = isinstance(model, TakesTuples) or getattr(past, "_is_user_defined", False)
        if theirs or past.get_seq_length():
            why.add(f"past_key_values={type(past).__name__}")
        past = None
    if kwargs.get("use_cache") is False:
        why.add("use_cache=False")
    if isinstance(given.get("logits_to_keep"), Tensor):
        why.add("logits_to_keep")
    if ids is None or why:
        warnings.warn(
            f"the traced graph cannot answer for {', '.join(sorted(why)) or 'no input_ids'}: this "
            "forward is the model's own",
            stacklevel=3,
        )
        return None
    batch, tokens = ids.shape
    past = placeholders(model.config, batch) if past is None else past
    held = _tuples(past)[0][0].size(-2)
    if isinstance(past, TupleCache) and not held and past.layers[0].batch_size % batch:
        past.past = placeholders(model.config, batch)  # prompts that are not shared after all
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None:
        mask = torch.ones((batch, held + tokens), dtype=torch.int64)
    if positions is None:
        positions = torch.arange(held, held + tokens).unsqueeze(0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions.expand(batch, -1),
        "past_key_values": past,
    }


def _tuples(past: Any) -> Any:
    return past.past if isinstance(past, TupleCache) else past


def _answer(model: Any, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The graph's logits and tuples as a forward returns them."""
    past = inputs["past_key_values"]
    tuples = _tuples(past)
    first = tuples[0][0].size(-2) == 0 and _FIRST in vars(model)
    graph = vars(model)[_FIRST if first else _GRAPH]
    names = _names(graph)
    asked = {**inputs, "past_key_values": tuples}
    found = graph(**{k: v for k, v in asked.items() if names is None or k in names})
    logits, tuples = (
        (found["logits"], found["past_key_values"]) if isinstance(found, dict) else found[:2]
    )
    if kwargs.get("logits_to_keep"):
        logits = logits[:, -kwargs["logits_to_keep"] :]
    if isinstance(past, TupleCache):
        past.past = tuples
    elif isinstance(kwargs.get("past_key_values"), (tuple, list)) or not isinstance(
        model, TakesTuples
    ):
        past = tuples
    else:
        past = TupleCache(tuples)
    if kwargs.get("return_dict") is False:
        return logits, past
    return CausalLMOutputWithPast(logits=logits, past_key_values=past)


def _names(graph: Any) -> list[str] | None:
    """The inputs of a graph by name, if they are known."""
    if isinstance(graph, torch.jit.ScriptModule):
        return [a.name for a in cast(Any, graph.forward).schema.arguments]
    return None
