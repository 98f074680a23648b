"""GPT-J, written with lmfuse's modules inside of transformers' classes; takes ordinary checkpoints.

    model = GPTJForCausalLM.from_pretrained("EleutherAI/gpt-j-6b", dtype=torch.bfloat16)
    model = lmfuse.optimize(model.eval(), inplace=True)  # packs the linear layers
    model.generate(...)

Modules and parameters have the names of transformers' GPT-J; lines that apply lmfuse end in
`# lmfuse`, with what they fuse. A layer's past is the 4-tuple of IndirectAccessKVCacheAttention.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, GPTJConfig, GPTJPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmfuse.functional import DecoderLayer, DecoderNorm, fast_layer_norm
from lmfuse.modules import (
    ConcatLinear,
    DecoderLayers,
    IndirectAccessKVCacheAttention,
    LinearAddAdd,
    LinearNewGelu,
    RotaryEmbedding,
    described_linear,
)

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return fast_layer_norm(  # lmfuse: float32 within, rounded once
        x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )


class GPTJAttention(nn.Module):
    """out_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x)))"""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        n = config.n_embd
        self.heads, self.head_dim = config.n_head, n // config.n_head
        self.rotary_dim = config.rotary_dim or self.head_dim
        self.q_proj = nn.Linear(n, n, bias=False)
        self.k_proj = nn.Linear(n, n, bias=False)
        self.v_proj = nn.Linear(n, n, bias=False)
        self.out_proj = nn.Linear(n, n, bias=False)
        self.rope = RotaryEmbedding(  # lmfuse: one sweep, from a table that all layers share
            config.n_positions, self.rotary_dim
        )
        self.attention = IndirectAccessKVCacheAttention(  # lmfuse: beams are indices, no key moves
            getattr(config, "text_max_length", 2048)
        )
        # No module of this one: a state_dict shall know each layer by its own name only.
        self.fused = SimpleNamespace(
            qkv=ConcatLinear(self.q_proj, self.k_proj, self.v_proj)  # lmfuse: one call for three
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor, past: LayerPast | None
    ) -> tuple[Tensor, LayerPast]:
        batch, seq, n = x.shape
        length = seq + (past[0].size(-2) if past else 0)
        query, key, value = self.fused.qkv(x)
        h, d, r = self.heads, self.head_dim, self.rotary_dim
        query = self.rope(query, position_ids, h, d, 1, r, length)
        key = self.rope(key, position_ids, h, d, 1, r, length)
        value = value.view(batch, seq, h, d)
        y, _, present = self.attention(query, key, value, math.sqrt(d), past, None, mask)
        return self.out_proj(y.transpose(1, 2).reshape(batch, seq, n)), present


class GPTJMLP(nn.Module):
    """fc_out(gelu(fc_in(x))) + attended + residual"""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        if config.activation_function != "gelu_new":
            raise ValueError(
                f"activation_function is {config.activation_function!r}, but GPT-J's is 'gelu_new'"
            )
        inner = config.n_inner or 4 * config.n_embd
        self.fc_in = nn.Linear(config.n_embd, inner)
        self.fc_out = nn.Linear(inner, config.n_embd)
        self.fused = SimpleNamespace(
            in_gelu=LinearNewGelu(self.fc_in),  # lmfuse: the activation before rounding
            out_add_add=LinearAddAdd(self.fc_out),  # lmfuse: both branches join here
        )

    def forward(self, x: Tensor, attended: Tensor, residual: Tensor) -> Tensor:
        return self.fused.out_add_add(self.fused.in_gelu(x), attended, residual)


class GPTJBlock(nn.Module):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor, past: LayerPast | None
    ) -> tuple[Tensor, LayerPast]:
        normed = layer_norm(x, self.ln_1)
        attended, present = self.attn(normed, mask, position_ids, past)
        return self.mlp(normed, attended, x), present

    def described(self) -> DecoderLayer:
        """The same in lmfuse's terms, for one op over all layers."""
        attn, mlp, ln = self.attn, self.mlp, self.ln_1
        norm = DecoderNorm(ln.weight, ln.bias, ln.eps, centered=True)
        linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, mlp.fc_in, mlp.fc_out]
        q, k, v, out, fc_in, fc_out = map(described_linear, linears)
        return DecoderLayer(
            attn.heads,
            attn.heads,
            attn.head_dim,
            *(q, k, v, out, fc_in, None, fc_out),
            scale=attn.head_dim**-0.5,
            gated=False,
            activation="gelu_tanh",
            attention_input=norm,
            mlp_input=norm,
            rotary_dim=attn.rotary_dim,
            rotary_half=False,
            parallel=True,
        )


class GPTJModel(GPTJPreTrainedModel):
    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = DecoderLayers(  # lmfuse: run whole, unless somebody looks inside
            (GPTJBlock(config) for _ in range(config.n_layer)),
            getattr(config, "text_max_length", 2048),
        )
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = new_embeddings

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
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        past = past_key_values[0][0].size(-2) if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens).unsqueeze(0)
        # Which keys are padding; that a query sees none behind its own, the attention knows.
        mask = None if attention_mask is None else attention_mask.bool()
        angles = self.h[0].attn.rope.angles(tokens, position_ids, past + tokens)
        done = self.h.whole(x, past_key_values, mask, angles)  # lmfuse: all layers in one op
        x, presents = done or self.one_by_one(x, past_key_values, mask, position_ids)
        return layer_norm(x, self.ln_f), presents

    def one_by_one(
        self,
        x: Tensor,
        pasts: tuple[LayerPast, ...] | None,
        mask: Tensor | None,
        position_ids: Tensor,
    ) -> tuple[Tensor, tuple[LayerPast, ...]]:
        """The layers as the modules that they are."""
        mask, presents = None if mask is None else mask[:, None, None, :], []
        for i, block in enumerate(self.h):
            past = pasts[i] if pasts else None
            x, present = block(x, mask, position_ids, past)
            presents.append(present)
        return x, tuple(presents)


class GPTJForCausalLM(GPTJPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
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
        x, presents = self.transformer(
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
