"""The config of an optimized model: the caller's own, from which other models are made."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lmfuse
from lmfuse.hf import attention, config
from test_models import FAMILIES, close, generate, logits, make


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_models_that_share_a_config_or_are_made_from_it_stay_stock(name: str) -> None:
    stock = make(name)
    kind, state = type(stock), stock.state_dict()
    expected, ids = logits(stock), generate(stock, 3)
    model = kind(stock.config).eval()
    model.load_state_dict(state)
    lmfuse.optimize(model, inplace=True)
    assert model.config is stock.config
    auto: Any = transformers.AutoModelForCausalLM
    later = [stock, kind(model.config), auto.from_config(model.config), kind(copied(model.config))]
    for other in later:
        other.load_state_dict(state)
        assert torch.equal(logits(other.eval()), expected)
    assert torch.equal(generate(stock, 3), ids)
    assert torch.equal(generate(model, 3), ids)
    bare = lmfuse.optimize(stock.base_model)
    type(stock.base_model)(bare.config)


def copied(config: Any) -> Any:
    again = pickle.loads(pickle.dumps(copy.deepcopy(copy.copy(config))))
    assert type(again) is type(config)
    return again


def test_what_is_changed_in_the_config_counts_for_all_parts(tmp_path: Path) -> None:
    model = lmfuse.optimize(make())
    parts = [model.model, model.model.layers[0].self_attn]
    assert [m.config._attn_implementation for m in parts] == [attention.NAME] * 2
    assert parts[0].config is parts[1].config
    model.config.use_cache = False
    assert model(torch.tensor([[3, 4]])).past_key_values is None
    model.model.config.use_cache = True
    assert model.config.use_cache
    for part in (model, *parts):
        assert isinstance(part.config, type(make().config))
        assert part.config.to_dict() == model.config.to_dict()
        part.config.save_pretrained(tmp_path)
        assert attention.NAME not in (tmp_path / "config.json").read_text()
        assert str(part.config) == str(model.config)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        view = clone.model.config
        assert view.lmfuse_stock is clone.config
        assert view._attn_implementation == attention.NAME
        clone.config.use_cache = False
        assert not view.use_cache
        assert lmfuse.restore(clone).model.config is clone.config
    assert model.config.use_cache


def test_the_attention_can_be_chosen_and_ours_again() -> None:
    stock = make()
    model = lmfuse.optimize(stock)
    before = model.config._attn_implementation
    for name in ("eager", attention.NAME, "sdpa"):
        model.set_attn_implementation(name)
        assert config.name(model) == model.model.config._attn_implementation == name
        close(logits(model), logits(stock))
        assert torch.equal(generate(model, 3), generate(stock, 3))
        assert model.config._attn_implementation != attention.NAME
    assert stock.config._attn_implementation == before


def test_configs_within_a_config_have_views_of_their_own() -> None:
    text = {**FAMILIES["gemma3"][1], "hidden_size": 32, "intermediate_size": 48, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    eye = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 56}
    stock = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**text, **heads, "pad_token_id": 0},
            vision_config={**eye, "num_hidden_layers": 1, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    ).eval()
    model: Any = lmfuse.optimize(stock)
    inner = model.model.language_model.config
    assert inner is model.model.config.text_config
    assert inner is model.model.config.get_text_config()
    assert inner._attn_implementation == attention.NAME
    assert model.config.text_config is inner.lmfuse_stock
    ids = torch.arange(3, 20)[None]
    close(logits(model, input_ids=ids), logits(stock, input_ids=ids))
    other = copy.copy(inner.lmfuse_stock)
    model.model.config.text_config = other
    assert model.config.text_config is model.model.config.text_config is other


def composite(family: str) -> Any:
    """Text and vision, each with a config of its own."""
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    part["num_attention_heads"] = 4
    text = {**part, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
    made = transformers.AutoConfig.for_model(
        family,
        text_config={**text, "max_position_embeddings": 64},
        vision_config={**part, "image_size": 16, "patch_size": 4},
        image_token_index=95,
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    return auto.from_config(made).eval()


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_attention_by_part_of_the_config(family: str) -> None:
    """What a part is told, it alone does; our names are not written into the caller's config."""
    stock = composite(family)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(ids, **options)
    model = lmfuse.optimize(stock)

    def told() -> tuple[Any, ...]:
        assert torch.equal(model.generate(ids, **options), expected)
        parts = (model.model.language_model, model.model.vision_tower)
        names = [m.config._attn_implementation for m in (model.model, *parts)]
        seen = model.config, model.config.text_config, model.config.vision_config
        return (*names, *(c._attn_implementation for c in seen))

    ours = attention.NAME
    assert told() == (ours, ours, ours, "sdpa", "sdpa", "sdpa")
    for asked, then in (
        ({"text_config": ours}, (ours, ours, ours, "sdpa", "sdpa", "sdpa")),
        ({"text_config": "eager"}, (ours, "eager", ours, "sdpa", "eager", "sdpa")),
        (
            {"text_config": ours, "vision_config": "eager"},
            (ours, ours, "eager", "sdpa", "eager", "eager"),
        ),
        ({"": "sdpa"}, ("sdpa", ours, "eager", "sdpa", "eager", "eager")),
        (ours, (ours, ours, ours, "sdpa", "eager", "eager")),
    ):
        model.set_attn_implementation(asked)
        assert told()[: len(then)] == then, asked
    with pytest.raises(ValueError, match="nothing"):
        model.set_attn_implementation({"text_config": "nothing"})
    assert told()[:2] == (ours, ours)
