"""OPT, written with lmfuse's modules inside of transformers' classes; takes ordinary checkpoints.

    model = OPTForCausalLM.from_pretrained("facebook/opt-1.3b", dtype=torch.bfloat16)
    model = lmfuse.optimize(model.eval(), inplace=True)  # packs the linear layers
    model.generate(...)

Modules and parameters have the names of transformers' OPT; lines that apply lmfuse end in
`# lmfuse`, with what they fuse. A layer's past is the 4-tuple of IndirectAccessKVCacheAttention.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, OPTConfig, OPTPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmfuse.functional import DecoderLayer, DecoderNorm, fast_layer_norm
from lmfuse.modules import (
    ConcatLinear,
    DecoderLayers,
    IndirectAccessKVCacheAttention,
    LinearAdd,
    LinearGelu,
    LinearRelu,
    described_linear,
)

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]

FUSED_FC1 = {"relu": LinearRelu, "gelu": LinearGelu}  # lmfuse: the activation before rounding
OFFSET = 2  # OPT's learned positions begin at this row


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return fast_layer_norm(  # lmfuse: float32 within, rounded once
        x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )


class OPTAttention(nn.Module):
    """residual + out_proj(attention(q_proj(x), k_proj(x), v_proj(x)))"""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        n, bias = config.hidden_size, config.enable_bias
        self.heads, self.head_dim = config.num_attention_heads, n // config.num_attention_heads
        self.k_proj = nn.Linear(n, n, bias)
        self.v_proj = nn.Linear(n, n, bias)
        self.q_proj = nn.Linear(n, n, bias)
        self.out_proj = nn.Linear(n, n, bias)
        self.attention = IndirectAccessKVCacheAttention(  # lmfuse: beams are indices, no key moves
            getattr(config, "text_max_length", 2048)
        )
        # No modules of this one: a state_dict shall know each layer by its own name only.
        self.fused = SimpleNamespace(
            qkv=ConcatLinear(self.q_proj, self.k_proj, self.v_proj),  # lmfuse: one call for three
            out_add=LinearAdd(self.out_proj),  # lmfuse: the residual is added before rounding
        )

    def forward(
        self, x: Tensor, residual: Tensor, mask: Tensor | None, past: LayerPast | None
    ) -> tuple[Tensor, LayerPast]:
        batch, seq, n = x.shape
        query, key, value = (
            y.view(batch, seq, self.heads, self.head_dim) for y in self.fused.qkv(x)
        )
        scale = math.sqrt(self.head_dim)
        y, _, present = self.attention(query, key, value, scale, past, None, mask)
        y = y.transpose(1, 2).reshape(batch, seq, n)
        return self.fused.out_add(y, residual), present


class OPTDecoderLayer(nn.Module):
    """Attention, then fc2(act(fc1(x))), each with its norm before or (opt-350m) after it."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        if config.activation_function not in FUSED_FC1:
            raise ValueError(
                f"activation_function is {config.activation_function!r}, but must be one of "
                f"{', '.join(FUSED_FC1)}"
            )
        n, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.norm_first, self.activation = config.do_layer_norm_before, config.activation_function
        self.self_attn = OPTAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(n, elementwise_affine=affine)
        self.fc1 = nn.Linear(n, config.ffn_dim, config.enable_bias)
        self.fc2 = nn.Linear(config.ffn_dim, n, config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(n, elementwise_affine=affine)
        self.fused = SimpleNamespace(
            fc1_act=FUSED_FC1[config.activation_function](self.fc1),  # lmfuse
            fc2_add=LinearAdd(self.fc2),  # lmfuse
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, past: LayerPast | None
    ) -> tuple[Tensor, LayerPast]:
        normed = layer_norm(x, self.self_attn_layer_norm) if self.norm_first else x
        x, present = self.self_attn(normed, x, mask, past)
        if not self.norm_first:
            x = layer_norm(x, self.self_attn_layer_norm)
        normed = layer_norm(x, self.final_layer_norm) if self.norm_first else x
        x = self.fused.fc2_add(self.fused.fc1_act(normed), x)
        if not self.norm_first:
            x = layer_norm(x, self.final_layer_norm)
        return x, present

    def described(self) -> DecoderLayer | None:
        """The same in lmfuse's terms, for one op over all layers, which has norms first."""
        attn, norms = self.self_attn, []
        if not self.norm_first or self.final_layer_norm.weight is None:
            return None
        for norm in (self.self_attn_layer_norm, self.final_layer_norm):
            norms.append(DecoderNorm(norm.weight, norm.bias, norm.eps, centered=True))
        linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, self.fc1, self.fc2]
        q, k, v, out, fc1, fc2 = map(described_linear, linears)
        return DecoderLayer(
            attn.heads,
            attn.heads,
            attn.head_dim,
            *(q, k, v, out, fc1, None, fc2),
            scale=attn.head_dim**-0.5,
            gated=False,
            activation=self.activation,
            attention_input=norms[0],
            mlp_input=norms[1],
        )


class OPTDecoder(OPTPreTrainedModel):
    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        n, narrow = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, narrow, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + OFFSET, n)
        self.project_in = nn.Linear(narrow, n, bias=False) if narrow != n else None
        self.project_out = nn.Linear(n, narrow, bias=False) if narrow != n else None
        self.final_layer_norm = None
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(
                n, elementwise_affine=config.layer_norm_elementwise_affine
            )
        self.layers = DecoderLayers(  # lmfuse: run whole, unless somebody looks inside
            (OPTDecoderLayer(config) for _ in range(config.num_hidden_layers)),
            getattr(config, "text_max_length", 2048),
        )
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
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(position_ids + OFFSET)
        # Which keys are padding; that a query sees none behind its own, the attention knows.
        mask = None if attention_mask is None else attention_mask.bool()
        done = self.layers.whole(x, past_key_values, mask)  # lmfuse: all layers in one op
        x, presents = done or self.one_by_one(x, past_key_values, mask)
        if self.final_layer_norm is not None:
            x = layer_norm(x, self.final_layer_norm)
        if self.project_out is not None:
            x = self.project_out(x)
        return x, presents

    def one_by_one(
        self, x: Tensor, pasts: tuple[LayerPast, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[LayerPast, ...]]:
        """The layers as the modules that they are."""
        mask, presents = None if mask is None else mask[:, None, None, :], []
        for i, layer in enumerate(self.layers):
            past = pasts[i] if pasts else None
            x, present = layer(x, mask, past)
            presents.append(present)
        return x, tuple(presents)


class OPTModel(OPTPreTrainedModel):
    """The checkpoints' names: everything lies in `model.decoder`."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        self.decoder = OPTDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value


class OPTForCausalLM(OPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        self.model = OPTModel(config)
        self.lm_head = nn.Linear(config.word_embed_proj_dim, config.vocab_size, bias=False)
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
        x, presents = self.model.decoder(
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
