"""Llama, written with lmfuse's modules inside of transformers' classes; takes ordinary checkpoints.

    model = LlamaForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf", dtype=torch.bfloat16)
    model = lmfuse.optimize(model.eval(), inplace=True)  # packs the linear layers
    model.generate(...)

Modules and parameters have the names of transformers' Llama; lines that apply lmfuse end in
`# lmfuse`, with what they fuse. A layer's past is the 4-tuple of IndirectAccessKVCacheAttention.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmfuse.functional import DecoderLayer, DecoderNorm
from lmfuse.modules import (
    ConcatLinear,
    DecoderLayers,
    IndirectAccessKVCacheAttention,
    Linear2SiluMul,
    LinearAdd,
    RMSNorm,
    RotaryEmbedding,
    described_linear,
)

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]


class LlamaAttention(nn.Module):
    """residual + o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x)))"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, bias = config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias)
        self.rope = RotaryEmbedding(  # lmfuse: one sweep, from a table that all layers share
            config.max_position_embeddings,
            self.head_dim,
            extra_rope_config=config.rope_parameters,
        )
        self.attention = IndirectAccessKVCacheAttention(  # lmfuse: beams are indices, no key moves
            getattr(config, "text_max_length", 2048)
        )
        # No modules of this one: a state_dict shall know each layer by its own name only.
        self.fused = SimpleNamespace(
            qkv=ConcatLinear(self.q_proj, self.k_proj, self.v_proj),  # lmfuse: one call for three
            o_add=LinearAdd(self.o_proj),  # lmfuse: the residual is added before rounding
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        past: LayerPast | None,
    ) -> tuple[Tensor, LayerPast]:
        batch, seq, _ = x.shape
        length = seq + (past[0].size(-2) if past else 0)
        query, key, value = self.fused.qkv(x)
        d = self.head_dim
        query = self.rope(query, position_ids, self.heads, d, d // 2, d, length)
        key = self.rope(key, position_ids, self.kv_heads, d, d // 2, d, length)
        value = value.view(batch, seq, self.kv_heads, d)
        y, _, present = self.attention(query, key, value, math.sqrt(d), past, None, mask)
        y = y.transpose(1, 2).reshape(batch, seq, self.heads * d)
        return self.fused.o_add(y, residual), present


class LlamaMLP(nn.Module):
    """residual + down_proj(silu(gate_proj(x)) · up_proj(x))"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, but Llama's is 'silu'")
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias)
        self.up_proj = nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)
        self.fused = SimpleNamespace(
            gate_up=Linear2SiluMul(self.gate_proj, self.up_proj),  # lmfuse: one walk, one rounding
            down_add=LinearAdd(self.down_proj),  # lmfuse
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fused.down_add(self.fused.gate_up(x), residual)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # lmfuse
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # lmfuse

    def forward(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor, past: LayerPast | None
    ) -> tuple[Tensor, LayerPast]:
        x, present = self.self_attn(self.input_layernorm(x), x, mask, position_ids, past)
        return self.mlp(self.post_attention_layernorm(x), x), present

    def described(self) -> DecoderLayer:
        """The same in lmfuse's terms, for one op over all layers."""
        attn, mlp, norms = self.self_attn, self.mlp, []
        for norm in (self.input_layernorm, self.post_attention_layernorm):
            norms.append(DecoderNorm(norm.weight, eps=norm.eps))
        linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
        linears += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return DecoderLayer(
            attn.heads,
            attn.kv_heads,
            attn.head_dim,
            *map(described_linear, linears),
            scale=attn.head_dim**-0.5,
            attention_input=norms[0],
            mlp_input=norms[1],
            rotary_dim=attn.head_dim,
        )


class LlamaModel(LlamaPreTrainedModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = DecoderLayers(  # lmfuse: run whole, unless somebody looks inside
            (LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)),
            getattr(config, "text_max_length", 2048),
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # lmfuse
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[LayerPast, ...] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, tuple[LayerPast, ...]]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        past = past_key_values[0][0].size(-2) if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens).unsqueeze(0)
        # Which keys are padding; that a query sees none behind its own, the attention knows.
        mask = None if attention_mask is None else attention_mask.bool()
        angles = self.layers[0].self_attn.rope.angles(tokens, position_ids, past + tokens)
        done = self.layers.whole(x, past_key_values, mask, angles)  # lmfuse: all layers in one op
        x, presents = done or self.one_by_one(x, past_key_values, mask, position_ids)
        return self.norm(x), presents

    def one_by_one(
        self,
        x: Tensor,
        pasts: tuple[LayerPast, ...] | None,
        mask: Tensor | None,
        position_ids: Tensor,
    ) -> tuple[Tensor, tuple[LayerPast, ...]]:
        """The layers as the modules that they are."""
        mask, presents = None if mask is None else mask[:, None, None, :], []
        for i, layer in enumerate(self.layers):
            past = pasts[i] if pasts else None
            x, present = layer(x, mask, position_ids, past)
            presents.append(present)
        return x, tuple(presents)


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[LayerPast, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, tuple[LayerPast, ...]]:
        """A tuple instead of CausalLMOutputWithPast while torch.jit.trace looks on."""
        x, presents = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        )
        if getattr(self.config, "lm_head_generation", False):
            logits_to_keep = 1  # the head is computed for the last token only
        logits = self.lm_head(x[:, -logits_to_keep:])
        if return_dict is False or torch.jit.is_tracing():
            return logits, presents
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=None if use_cache is False else presents
        )

    # --- what `generate` asks of a model that keeps its cache itself --------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _reorder_cache(
        self, past: tuple[LayerPast, ...], beam_idx: Tensor
    ) -> tuple[LayerPast, ...]:
        last = past[0][0].size(-2) - 1
        for parents in {id(layer[3]): layer[3] for layer in past}.values():  # most often one
            parents[last] = beam_idx  # lmfuse: all that a step of beam search does
        return past
