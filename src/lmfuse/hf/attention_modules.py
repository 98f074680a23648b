"""Attention of families that do not ask transformers' AttentionInterface for it.

Each class holds the forward of one family: transformers' own, with lmfuse's RoPE and attention in
the place of its formulas. Dropouts are left out, as they do nothing in eval mode.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmfuse import functional
from lmfuse.hf import attention, config, swap
from lmfuse.modules.linear_fusion import fused_linear

Result = tuple[Tensor, Tensor | None]


class FusedAttention(swap.Fused):
    """The attention of a family, with keys and values read where the cache keeps them."""

    layer_idx: int
    takes_our_mask = True  # the model hands on whatever `attention.mask` gives

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Any,
        mask: Tensor | None,
        scale: float,
        output_attentions: bool = False,
        **bias: Any,
    ) -> Result:
        """[batch, tokens, heads, dim] each -> [batch, tokens, heads * dim], and the weights."""
        if self.training:
            raise ValueError(
                "the model is in training mode, but lmfuse is for inference: call model.eval()"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, weights = attention.attention(
            self, q, k, v, mask, scaling=scale, output_attentions=output_attentions, **bias
        )
        return out.flatten(2), weights


class _RotatesPairs(FusedAttention):
    """GPT-J and CodeGen: interleaved RoPE out of a table, as many rows as positions."""

    embed_positions: Tensor

    def _rotated(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = self.embed_positions.chunk(2, dim=-1)
        return functional.rotate_qk(query, key, sin, cos, 2 * sin.shape[-1], False, positions)


class GPTJ(_RotatesPairs):
    """transformers' GPTJAttention."""

    num_attention_heads: int
    head_dim: int
    scale_attn: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Result:
        """See transformers."""
        heads = (self.num_attention_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        assert position_ids is not None  # the model makes them
        query, key = self._rotated(query, key, position_ids)
        out, weights = self._attend(
            query,
            key,
            value,
            layer_past,
            attention_mask,
            1 / self.scale_attn,
            bool(output_attentions),
        )
        return self.out_proj(out), weights


class CodeGen(_RotatesPairs):
    """transformers' CodeGenAttention, whose weight is that of four accelerators."""

    head_dim: int
    scale_attn: float
    qkv_proj: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
    ) -> Result:
        """See transformers."""
        parts = self.qkv_proj(hidden_states).unflatten(-1, (4, 3, -1, self.head_dim))
        query, value, key = (parts[:, :, :, i].flatten(2, 3) for i in range(3))
        assert position_ids is not None  # the model makes them
        query, key = self._rotated(query, key, position_ids)
        out, weights = self._attend(
            query,
            key,
            value,
            layer_past,
            attention_mask,
            1 / self.scale_attn,
            bool(output_attentions),
        )
        return self.out_proj(out), weights


class Falcon(FusedAttention):
    """transformers' FalconAttention, but the cache keeps each key once, not once for each query."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_norm_factor: float
    query_key_value: nn.Module
    dense: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Result:
        """See transformers."""
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads + 2, self.head_dim)
        qkv = self.query_key_value(hidden_states).unflatten(-1, groups)
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        bias: dict[str, Any] = {}
        if alibi is None:
            assert position_embeddings is not None  # the model makes them
            cos, sin = position_embeddings
            query, key = functional.rotate_qk(query, key, sin, cos, self.head_dim, True)
        elif attention_mask is None or attention_mask.dim() == 2:  # others have it in them
            bias["position_bias"] = _rows(alibi, query) * self.inv_norm_factor
        out, weights = self._attend(
            query,
            key,
            value,
            layer_past,
            attention_mask,
            self.inv_norm_factor,
            output_attentions,
            **bias,
        )
        return self.dense(out), weights


class Bloom(FusedAttention):
    """transformers' BloomAttention."""

    num_heads: int
    head_dim: int
    inv_norm_factor: float
    query_key_value: nn.Module
    dense: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Result:
        """See transformers."""
        qkv = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim))
        query, key, value = qkv.unbind(-2)
        bias: dict[str, Any]
        if _in_one_piece(attention_mask):
            bias = {"alibi": slopes(self.num_heads)}
        else:  # BLOOM does not count positions that are hidden between others
            bias = {"position_bias": _rows(alibi, query)}
        out, weights = self._attend(
            query,
            key,
            value,
            layer_past,
            attention_mask,
            self.inv_norm_factor,
            output_attentions,
            **bias,
        )
        return fused_linear(self.dense, out, "add", residual), weights


class MPT(FusedAttention):
    """transformers' MptAttention, whose model negates its mask."""

    takes_our_mask = False
    n_heads: int
    softmax_scale: float
    clip_qkv: float | None
    Wqkv: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Result:
        """See transformers; attention_mask is [batch, 1, queries, keys], True where hidden."""
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = qkv.unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        seen = None if attention_mask is None else ~attention_mask
        if seen is not None and seen.shape[1:3] == (1, 1):  # one query: causality hides nothing
            seen = seen[:, 0, 0]
        bias: dict[str, Any] = {} if position_bias is None else {"alibi": slopes(self.n_heads)}
        out, weights = self._attend(
            query, key, value, past_key_values, seen, self.softmax_scale, **bias
        )
        return self.out_proj(out), weights


class MPTBlock(swap.Fused):
    """transformers' MptBlock, which does not tell its attention that the weights are wanted."""

    def forward(self, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        """See transformers."""
        if not output_attentions:
            return super().forward(*args, **kwargs)
        with attention.wanting_weights():
            return super().forward(*args, output_attentions=True, **kwargs)


_FAMILIES: dict[str, type[FusedAttention]] = {
    "GPTJAttention": GPTJ,
    "CodeGenAttention": CodeGen,
    "FalconAttention": Falcon,
    "BloomAttention": Bloom,
    "MptAttention": MPT,
}


def plan(model: nn.Module, name: str, module: nn.Module) -> swap.Swap | str | None:
    """The swap for `module` if it is the attention of one of these families, or None."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return None
    if kind.__name__ == "MptBlock" and "forward" not in vars(module):
        return swap.Swap(swap.subclass(MPTBlock, kind), "attention weights on demand")
    if kind.__name__ not in _FAMILIES:
        return None
    ours = _FAMILIES[kind.__name__]
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    stock, mine = (list(inspect.signature(c.forward).parameters) for c in (kind, ours))
    if stock != mine:
        return f"its forward takes {', '.join(stock[1:])}, which is new to lmfuse"
    return swap.Swap(swap.subclass(ours, kind), "attention")


def covers(root: PreTrainedModel) -> bool:
    """Whether the attention of `root` is that of this file."""
    return any(isinstance(module, FusedAttention) for module in root.modules())


def choose(root: PreTrainedModel, implementation: str) -> None:
    """Gives the parts of `root` the attention of this name; those of this file, which do not ask
    for one, then get its masks.

    A model of these families without a head keeps its masks: its config would be seen, and no stock
    model could be made from it."""
    families = [m for m in root.modules() if isinstance(m, FusedAttention)]
    if not families:
        config.give(root, implementation)
    elif root.base_model is not root and all(m.takes_our_mask for m in families):
        config.give(root, implementation, everywhere=True)


def slopes(heads: int) -> Tensor:
    """ALiBi's, float32: 2^(-8 i / n) for n heads, a power of 2; others are drawn from those of 2n.

    Source: Press et al., Train Short, Test Long, 2022, and its published code.
    """
    whole = 1 << (heads.bit_length() - 1)
    powers = [i / whole for i in range(1, whole + 1)]
    powers += [(2 * i + 1) / (2 * whole) for i in range(heads - whole)]
    return torch.exp2(-8 * torch.tensor(powers))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    alibi: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The attention of all these families in plain torch, for who asks for the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.float().mT * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if alibi is not None:
        positions = torch.arange(key.shape[2])
        scores = scores + alibi[:, None, None] * positions
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


def _rows(alibi: Tensor, query: Tensor) -> Tensor:
    """[batch * heads, 1, keys] as a bias for all queries of a head, [batch, heads, 1, keys]."""
    return alibi.view(query.shape[0], query.shape[2], 1, -1)


def _in_one_piece(mask: Tensor | None) -> bool:
    """Whether a mask hides nothing, or keys on the left only."""
    if mask is None:
        return True
    return mask.dim() == 2 and not bool((mask[:, 1:] < mask[:, :-1]).any())
