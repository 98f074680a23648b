"""Whole models whose layers are of several kinds, in one op; others: test_decoder_models.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import lmfuse
from helpers import BF16, assert_same_bits
from lmfuse import hf
from lmfuse.generation import Cache
from test_decoder_models import TYPES, generated, inputs, model_of


class Own(transformers.Gemma3TextModel):
    """With a forward that may do something between two layers."""

    more: bool

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        x = self.embed_tokens(input_ids)
        at = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        angles = {kind: self.rotary_emb(x, at, kind) for kind in set(TYPES)}
        given: dict[str, Any] = {"attention_mask": None, "past_key_values": past_key_values}
        for i, layer in enumerate(self.layers):
            x = 1.5 * x if self.more else x
            x = layer(x, position_embeddings=angles[TYPES[i]], **given)
        return BaseModelOutputWithPast(self.norm(x), past_key_values)


class TestMixed:
    """Layers of two types in one op, and where they cannot be."""

    @pytest.mark.parametrize("family", ["gemma3_text", "bloom"])
    def test_rows_have_the_same_bits_alone(self, family: str, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of(family), dtype=BF16)
        runs.clear()
        ids, mask = inputs(True).values()
        rows, batched = [], []
        with torch.no_grad():
            cache = Cache(ours.config)
            at = (mask.cumsum(1) - 1).clamp(min=0)
            for piece, seen in ((slice(0, 8), 8), (slice(8, 9), 9)):
                given = {"attention_mask": mask[:, :seen]}
                if family != "bloom":
                    given["position_ids"] = at[:, piece]
                out = ours(ids[:, piece], **given, past_key_values=cache)
                batched.append(out.logits)
            for row, hidden in enumerate((3, 5, 0)):
                out = ours(ids[row : row + 1, hidden:], past_key_values=Cache(ours.config))
                rows.append(out.logits)
        found = torch.cat(batched, 1)
        for row, hidden in enumerate((3, 5, 0)):
            assert_same_bits(found[row : row + 1, hidden:], rows[row])
        assert runs == [ours.config.num_hidden_layers] * 5

    @pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
    def test_a_cache_that_keeps_all(self, family: str, runs: list[int]) -> None:
        """Also what has left the window."""
        stock = model_of(family)
        ours = lmfuse.optimize(stock)
        runs.clear()
        ids = inputs(False)["input_ids"]
        with torch.no_grad():
            expected = stock(ids).logits
            cache = Cache()
            found = [ours(p, past_key_values=cache).logits for p in ids.split((4, 4, 1), 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
        assert runs == [4] * 3

    def test_heads_as_wide_as_those_of_gemma(self) -> None:
        """Of which sums are so long that rounding shows."""
        for dtype in (None, BF16):
            ours = lmfuse.optimize(model_of("gemma2", head_dim=256), dtype=dtype)
            assert hf.report(ours).replaced["model.layers"] == "stack of decoder layers"

    @pytest.mark.parametrize("more", [False, True])
    def test_a_model_that_does_more_between_its_layers(self, more: bool, runs: list[int]) -> None:
        stock = model_of("gemma3_text")
        stock.model.__class__ = Own
        stock.model.more = more
        stock.set_attn_implementation("sdpa")  # without a mask: causal, and without a window
        ours = lmfuse.optimize(stock)
        ids = inputs(False)["input_ids"][:, :5]
        runs.clear()
        with torch.no_grad():
            expected = stock.model(ids, past_key_values=transformers.DynamicCache())[0]
            found = ours.model(ids, past_key_values=Cache(ours.config))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert runs == ([1] * 4 if more else [4])

    def test_a_hook_leaves_the_others_whole(self, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of("gemma3_text"))
        expected = generated(ours, padded=True)
        seen: list[nn.Module] = []
        hook = ours.model.layers[1].mlp.register_forward_hook(lambda m, *_: seen.append(m))
        runs.clear()
        assert torch.equal(generated(ours, padded=True), expected)
        assert runs == [1] * 30
        assert len(seen) == 10
        hook.remove()

    def test_fewer_layers(self) -> None:
        stock = model_of("gemma3_text")
        ours = lmfuse.optimize(stock)
        for model in (stock, ours):
            model.config.num_hidden_layers = 2  # of one type
        assert torch.equal(generated(ours, padded=True), generated(stock, padded=True))

    def test_copies_and_restore(self, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of("gemma3_text"))
        expected = generated(ours)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            runs.clear()
            assert torch.equal(generated(other), expected)
            assert runs == [4] * 10
        lmfuse.restore(ours)
        runs.clear()
        assert torch.equal(generated(ours), expected)
        assert not runs

    def test_masks_and_angles_of_the_caller(self, runs: list[int]) -> None:
        """Who hands over a mask for each type gets what the modules say."""
        stock = model_of("gemma3_text")
        ours = lmfuse.optimize(stock)
        runs.clear()
        ids = inputs(False)["input_ids"]
        behind = torch.arange(9)[:, None] - torch.arange(9)
        masks = {"full_attention": behind >= 0, "sliding_attention": (behind >= 0) & (behind < 3)}
        masks = {k: torch.where(m, 0.0, -torch.inf)[None, None] for k, m in masks.items()}
        with torch.no_grad():
            expected = stock(ids, masks).logits
            found = ours(ids, masks, past_key_values=Cache(ours.config)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not runs
