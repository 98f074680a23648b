"""Attention of any transformers model that asks its AttentionInterface for it.

Two names are added there, and a mask function for each: without one, padded rows would be silently
wrong. `lmfuse` is for every ordinary forward; transformers' continuous batching takes names with
"flash" only, so `lmfuse_flash` is the same with a paged cache.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import output_capturing

from lmfuse import functional
from lmfuse.generation.cached import Cached
from lmfuse.generation.tuples import Appended

NAME, PAGED_NAME = "lmfuse", "lmfuse_flash"

# What a 2-D mask says besides which keys are padding: how many positions a query sees.
_WINDOW = "lmfuse_window"

# A family that asks for a whole mask, to add ALiBi to it, which its attention here does itself.
_ADDS_ITSELF = "falcon"

# The functions within transformers' functions that a causal mask with a window is made of.
_AND: CodeType = masking_utils.and_masks().__code__
_NEAR: CodeType = masking_utils.sliding_window_overlay(1).__code__
# And that with which a mask for packed sequences begins.
_PACKED: CodeType = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__


def register() -> None:
    """Adds the two names to transformers' registries; what is there stays as it is."""
    for name, function, mask_function in ((NAME, attention, mask), (PAGED_NAME, paged, paged_mask)):
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, mask_function)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention` is given, as small as it can be.

    Returns:
        None: causal, nothing else is hidden. [batch, kv_length] bool: causal, and these keys are
        seen (True), in the window that the tensor carries. Otherwise, and for models that read it
        (allow_is_causal_skip=False), what transformers makes for scaled_dot_product_attention:
        [batch, 1, q_length, kv_length] bool, or None where there is nothing to hide.
    """
    bidirectional = mask_function is masking_utils.bidirectional_mask_function
    window = _window(mask_function)
    end = kv_offset + kv_length
    # Causal masks are aligned at the lower right, which these keys must be as well.
    if isinstance(q_offset, Tensor):  # of a SymInt, int() would make a constant
        q_offset = int(q_offset)
    aligned = q_offset + q_length == end
    read = kwargs.get("allow_is_causal_skip") is False and not _only_handed_on(kwargs.get("config"))
    if not read and window != 0 and kv_offset == 0 and attention_mask is not None and _jit_traces():
        return _windowed(attention_mask, window)  # whole: a graph must not keep these lengths
    short = attention_mask is not None and attention_mask.shape[1] < end
    if read or window == 0 or not aligned or short:
        if not bidirectional:
            kwargs["allow_is_causal_skip"] = False
        whole: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            **kwargs,
        )
        return whole
    hides = window is not None and window < kv_length
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset:end]
        if not hides and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    elif hides:
        attention_mask = torch.ones((), dtype=torch.bool).expand(batch_size, kv_length)
    return attention_mask if attention_mask is None else _windowed(attention_mask, window)


def _only_handed_on(config: Any) -> bool:
    """Whether a model that asks for a whole mask gives it to attention alone."""
    return getattr(config, "model_type", None) == _ADDS_ITSELF


def _jit_traces() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _windowed(attention_mask: Tensor, window: int | None) -> Tensor:
    if window is not None:
        attention_mask = attention_mask.view_as(attention_mask)  # the caller's has no window
        setattr(attention_mask, _WINDOW, window)
    return attention_mask


def paged_mask(
    *, attention_mask: Tensor | None = None, q_offset: int | Tensor = 0, **kwargs: Any
) -> Tensor | None:
    """`mask`, but for continuous batching, whose tokens are packed and have no cache here, None."""
    parts = _closed_over(kwargs.get("mask_function"), _AND)
    if attention_mask is None and parts and _closed_over(parts[0], _PACKED) is not None:
        return None
    return mask(attention_mask=attention_mask, q_offset=q_offset, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    alibi: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers; see `lmfuse.functional.attention` for the formula.

    Args:
        module: of which `is_causal` counts, where the argument is None.
        query: [batch, heads, q_len, dim].
        key, value: [batch, kv_heads, kv_len, dim], or what a cache's update returned.
        attention_mask: what `mask` gives; four dimensions say all, and are bool (True: seen) or
            added to the scores.
        dropout: must be 0.
        position_bias: added to the scores, as in T5.
        alibi: slopes, as in `lmfuse.functional.attention`.
        kwargs: cu_seq_lens_q, cu_seq_lens_k: cumulative lengths of sequences packed into one row.
            output_attentions, or a forward that collects the weights: the model's own eager
            attention answers, which has them.

    Returns:
        [batch, q_len, heads, dim], and None in place of the weights.

    Raises:
        ValueError: dropout.
    """
    if dropout:
        raise ValueError(f"dropout is {dropout}, but must be 0: lmfuse is for inference")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is not None and attention_mask.dim() == 4
    if attention_mask is not None and not whole:
        causal = True
        sliding_window = getattr(attention_mask, _WINDOW, sliding_window)
        attention_mask = attention_mask if _hides(attention_mask) else None
    window = sliding_window if causal and not whole else None
    if isinstance(key, Appended) and isinstance(value, Appended):
        return _appended(query, key, value, attention_mask, scaling, window, softcap, s_aux), None
    if kwargs.get("output_attentions") or _weights_wanted():
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
        options |= {} if alibi is None else {"alibi": alibi}
        seen = _dense(attention_mask, query, key, causal, window)
        return _eager(module, query, key, value, seen, position_bias, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cap = softcap or 0.0
    layer = key.held_with(value) if isinstance(key, Cached) else None
    if layer is not None and causal and not whole and position_bias is None:
        rows = query.transpose(1, 2)
        out = layer.attend(rows, attention_mask, scale, window, cap, s_aux, alibi)
        if out is not None:
            return out, None
    if attention_mask is not None and not whole:
        attention_mask = attention_mask[:, None, None]
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask)
    options = {
        "causal": causal and not whole,
        "scale": scale,
        "window": (-1 if window is None else window - 1, -1),
        "softcap": cap,
        "sinks": s_aux,
        "alibi": alibi,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if attention_mask is None and cu_q is not None and cu_k is not None:
        return _packed(q, k, v, cu_q, cu_k, options), None
    return functional.attention(q, k, v, mask=attention_mask, **options), None


def paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `attention`; in continuous batching over `cache`, which is written and read in place.

    Args:
        query, key, value: [1, heads, tokens, dim], the requests' new tokens one after the other.
        cache: transformers' paged cache, or None for an ordinary forward.
        kwargs: in continuous batching: cu_seq_lens_q, cu_seq_lens_k, read_index, write_index.
    """
    if cache is None:
        if not _hides(attention_mask) and kwargs.get("cu_seq_lens_q") is None:
            kwargs |= _restarts(kwargs.get("position_ids"), query, key)
        kwargs |= {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = _in_place(cache, layer, key, value, kwargs)
    if found is not None:
        key_cache, value_cache, tables, cu_k = found
        q = query[0].transpose(0, 1)
        out = q.new_zeros((*q.shape[:2], value.shape[3]))  # batches may end in padding
        functional.flash_attn_varlen_func(
            out,
            q,
            key_cache,
            value_cache,
            kwargs["cu_seq_lens_q"],
            cu_k,
            0,
            sys.maxsize,
            scale,
            True,
            tables,
            None,
            window_size_left=-1 if sliding_window is None else sliding_window - 1,
            softcap=softcap or 0.0,
            sinks=s_aux,
        )
        return out.unsqueeze(0), None
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    window = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    packed = {
        "causal": True,
        "scale": scale,
        "window": (window, -1),
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    return _packed(q, k, v, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], packed), None


def _appended(
    query: Tensor,
    key: Appended,
    value: Appended,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over a tuple cache, which appends the new keys and values itself."""
    if mask is not None and mask.dim() != 2:
        raise ValueError("a tuple cache takes no mask but [batch, tokens], of what is padding")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = key.states, value.states
    return key.layer.attend(query, *states, mask, scale, window, softcap or 0.0, sinks)


def _weights_wanted() -> bool:
    """Whether transformers collects attention weights, or `wanting_weights` says so, of a forward
    whose attention is not told."""
    if torch.compiler.is_compiling():
        return False
    collects: dict[str, Any] | None
    collects = output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
    return _wanting.weights or (
        collects is not None and any(key.endswith("attentions") for key in collects)
    )


class _Wanting(threading.local):
    weights = False


_wanting = _Wanting()


@contextmanager
def wanting_weights() -> Iterator[None]:
    """Within it, attention gives the weights as well."""
    before, _wanting.weights = _wanting.weights, True
    try:
        yield
    finally:
        _wanting.weights = before


def _hides(seen: Tensor | None) -> bool:
    """Whether a mask is more than the one True for all that `mask` names a window with."""
    return seen is not None and seen.stride() != (0, 0)


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask without anything else; None for all, 0 if it is no such mask."""
    if mask_function is causal_mask_function:
        return None
    if torch.compiler.is_compiling():
        return 0  # dynamo cannot look into closures
    parts = _closed_over(mask_function, _AND)
    if parts is None or len(parts) != 2 or parts[1] is not causal_mask_function:
        return 0
    size = _closed_over(parts[0], _NEAR)
    return size if isinstance(size, int) else 0


def _closed_over(function: Any, code: CodeType) -> Any:
    """What `function`, if its code is this, closes over."""
    if getattr(function, "__code__", None) is not code:
        return None
    return function.__closure__[0].cell_contents


def _dense(
    seen: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None
) -> Tensor | None:
    """All that hides keys, as one mask that broadcasts to [batch, heads, q_len, kv_len]."""
    if seen is not None and seen.dim() == 4:
        return seen
    q_len, kv_len = query.shape[2], key.shape[2]
    behind = torch.arange(kv_len - q_len, kv_len).unsqueeze(1) - torch.arange(kv_len)
    near = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        near = behind >= 0
    if window is not None:
        near = near & (behind < window)
    return near[None, None] if seen is None else near & seen[:, None, None]


def _biased(position_bias: Tensor, seen: Tensor | None) -> Tensor:
    if seen is None:
        return position_bias
    if seen.dtype is torch.bool:
        return position_bias.masked_fill(~seen, -torch.inf)
    return position_bias + seen


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: dict[str, Any]
) -> Tensor:
    """Attention within each of the sequences that follow one another in [1, tokens, heads, dim]."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    for a, b, c, d in zip(*(_pairs(cu_q)), *(_pairs(cu_k)), strict=True):
        if b > a:
            out[:, a:b] = functional.attention(q[:, a:b], k[:, c:d], v[:, c:d], **options)
    return out


def _pairs(cumulative: Tensor) -> tuple[list[int], list[int]]:
    at: list[int] = cumulative.tolist()
    return at[:-1], at[1:]


def _restarts(position_ids: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """Where packed sequences begin, as their positions tell; empty if there is only one."""
    tokens = query.shape[2]
    if position_ids is None or position_ids.shape != (1, tokens) or key.shape[2] != tokens:
        return {}
    (first,) = torch.where(position_ids[0].diff() != 1)
    if not first.numel():
        return {}
    edges = torch.nn.functional.pad(first + 1, (1, 1))
    edges[-1] = tokens
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}


def _in_place(
    cache: Any, layer: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Writes the new tokens and returns the caches, block tables and cumulative lengths.

    None, and nothing written, if the layer does not keep all of its tokens, if there is nothing to
    read but the new ones, or if this transformers keeps its paged cache in another way.
    """
    try:
        allocator = cache.layer_to_allocator[layer]
        key_pages, value_pages = allocator._kv_page_views[layer]
        read, write = (kwargs[f"{i}_index"][allocator.index] for i in ("read", "write"))
        cu_k = kwargs["cu_seq_lens_k"][allocator.layer_type]
        page = allocator.tokens_per_page
        usable = allocator.layer_type == "full_attention" and kwargs.get("block_table") is None
    except (AttributeError, KeyError, TypeError):
        return None
    if not usable or read.numel() == 0 or int(cu_k[-1]) > read.numel():
        return None
    key_cache, value_cache = key_pages.transpose(1, 2), value_pages.transpose(1, 2)
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    functional.reshape_and_cache(new_keys, new_values, key_cache, value_cache, write)
    lengths = cu_k.diff()
    blocks = torch.arange(0, max(1, int(lengths.max())), page)
    first = (cu_k[:-1].unsqueeze(1) + blocks).clamp_(max=read.numel() - 1)
    return key_cache, value_cache, read[first.long()] // page, cu_k


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    warnings.warn(
        "output_attentions asks for attention weights, which lmfuse never stores: this forward "
        "uses the model's own eager attention",
        stacklevel=2,
    )
    if seen is not None and seen.dtype is torch.bool:
        hidden = torch.finfo(query.dtype).min
        seen = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, hidden)
    key, value = (x.gathered() if isinstance(x, Cached) else x for x in (key, value))
    if position_bias is not None:
        options["position_bias"] = position_bias
    out: tuple[Tensor, Tensor | None] = next(_eagers(module))(
        module, query, key, value, seen, **options
    )
    return out


def _eagers(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The `eager_attention_forward` beside the class of `module` or of one it derives from."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            yield found
    raise ValueError(
        f"output_attentions is set, but {type(module).__name__} has no eager attention to give it"
    )
