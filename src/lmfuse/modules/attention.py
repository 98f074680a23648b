"""The three families of attention as modules; see `lmfuse.functional` for what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional._indirect import LayerPast


class VarlenAttention(nn.Module):
    """Attention over packed sequences: `lmfuse.functional.varlen_attention`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The arguments of `lmfuse.functional.varlen_attention`; returns out."""
        return functional.varlen_attention(*args, **kwargs)

    @staticmethod
    def apply_function(*args: Any, **kwargs: Any) -> Tensor:
        """`lmfuse.functional.varlen_attention`."""
        return functional.varlen_attention(*args, **kwargs)


class PagedAttention:
    """A paged cache and attention over it: the functions of `lmfuse.functional`."""

    reshape_and_cache = staticmethod(functional.reshape_and_cache)
    reshape_and_cache_flash = staticmethod(functional.reshape_and_cache)
    single_query_cached_kv_attention = staticmethod(functional.single_query_cached_kv_attention)
    flash_attn_varlen_func = staticmethod(functional.flash_attn_varlen_func)


class IndirectAccessKVCacheAttention(nn.Module):
    """Attention over a cache that beam search reorders by indices alone.

    Args:
        text_max_length: rows of a new cache; see
            `lmfuse.functional.indirect_access_kv_cache_attention`.
    """

    def __init__(self, text_max_length: int = 2048) -> None:
        super().__init__()
        self.text_max_length = text_max_length

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale_attn: float | Tensor,
        layer_past: LayerPast | None = None,
        head_mask: None = None,
        attention_mask: Tensor | None = None,
        alibi: None = None,
        add_casual_mask: bool = True,
        seq_info: int | torch.Tensor | None = None,
    ) -> tuple[Tensor, None, LayerPast | None]:
        """See `lmfuse.functional.indirect_access_kv_cache_attention`."""
        return functional.indirect_access_kv_cache_attention(
            query,
            key,
            value,
            scale_attn,
            layer_past,
            head_mask,
            attention_mask,
            alibi,
            add_casual_mask,
            seq_info,
            self.text_max_length,
        )

    @staticmethod
    def apply_function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale_attn: float | Tensor,
        layer_past: LayerPast | None = None,
        head_mask: None = None,
        attention_mask: Tensor | None = None,
        alibi: None = None,
        add_casual_mask: bool = True,
        seq_info: int | torch.Tensor | None = None,
        text_max_length: int = 0,
    ) -> tuple[Tensor, None, LayerPast | None]:
        """`lmfuse.functional.indirect_access_kv_cache_attention`."""
        return functional.indirect_access_kv_cache_attention(
            query,
            key,
            value,
            scale_attn,
            layer_past,
            head_mask,
            attention_mask,
            alibi,
            add_casual_mask,
            seq_info,
            text_max_length,
        )

    def extra_repr(self) -> str:
        return f"text_max_length={self.text_max_length}"
