"""Whole transformers models whose layers run in the decoder op; the op itself: test_decoder.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lmfuse
from helpers import BF16, assert_same_bits
from lmfuse import functional, hf
from lmfuse.generation import Cache
from lmfuse.hf import decoder as joint
from test_hf_attention import TINY

# Two types of layers: with a window, and without.
TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
MIXED: dict[str, Any] = {"sliding_window": 6, "num_hidden_layers": 4, "layer_types": TYPES}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **MIXED},
    "gemma3_text": {"head_dim": 16, **MIXED},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 6},
    "gpt_neox": {},
    "cohere": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": None},
    "falcon heads": {"num_kv_heads": None, "multi_query": False, "parallel_attn": False},
    "mpt": {"use_cache": True, "max_seq_len": 64},
    "gptj": {"rotary_dim": 8, "n_positions": 64},
    "codegen": {"rotary_dim": 8, "n_positions": 64},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {},
    "gpt_bigcode heads": {"multi_query": False},
    "olmo": {},
    "falcon groups": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon groups, one norm": {
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
    },
    "cohere2": MIXED,  # where those without a window do not rotate
    "olmo3": MIXED,
    "qwen3 windows": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, **MIXED},
}

# Parts of models whose parameters are made larger, so that attention and tokens vary.
QUERIES = ("q_proj", "k_proj", "v_proj", "embed", "qkv", "query_key", "c_attn", "wte")


def model_of(family: str = "llama", **changed: Any) -> Any:
    settings = {k: v for k, v in TINY.items() if k != "eos_token_id"}
    config = transformers.AutoConfig.for_model(
        family.split()[0], **{**settings, **FAMILIES[family], "eos_token_id": 2, **changed}
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(k in name for k in QUERIES):
                parameter.mul_(5)
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = mask[1, :5] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}
    return {"input_ids": ids[:1]}


def generated(model: Any, padded: bool = False, **options: Any) -> Any:
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(**inputs(padded), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, runs: list[int]) -> None:
    stock = model_of(family)
    ours = lmfuse.optimize(stock)
    runs.clear()
    for options in ({}, {"padded": True}, {"num_beams": 4}):
        assert torch.equal(generated(ours, **options), generated(stock, **options))
    once = 9 if family == "mpt" else 10  # whose masks for a prompt the op does not read
    assert runs == [stock.config.num_hidden_layers] * 3 * once
    with torch.no_grad():
        given = inputs(True)
        cache = Cache(stock.config.get_text_config(decoder=True))
        a, b = stock(**given).logits, ours(**given, past_key_values=cache).logits
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(b[seen], a[seen], rtol=1e-4, atol=1e-4)


def test_mpt_that_clips_or_is_copied(runs: list[int]) -> None:
    """Numbers that clip no random ones; a class of ours in the place of another one of ours."""
    ours = lmfuse.optimize(model_of("mpt"))
    kinds = {type(m).__name__ for m in ours.modules()}
    expected = generated(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        runs.clear()
        assert torch.equal(generated(other), expected)
        assert runs == [2] * 9
    assert "FusedFusedMptBlock" in kinds
    assert not any(type(m).__name__.startswith("Fused") for m in lmfuse.restore(ours).modules())
    stock = model_of("mpt", attn_config={"clip_qkv": 0.5})
    clipped = lmfuse.optimize(stock)
    assert "clips" in hf.report(clipped).stock["transformer.blocks.0"]
    assert torch.equal(generated(clipped), generated(stock))


@pytest.mark.parametrize("how", ["assign", "copy"])
def test_angles_of_one_layer(how: str, runs: list[int]) -> None:
    """GPT-J's attention has its tables in each layer, and they may come to differ."""
    stock = model_of("gptj")
    ours = lmfuse.optimize(stock)
    generated(ours)
    assert 2 in runs
    runs.clear()
    for model in (stock, ours):
        attention = model.transformer.h[1].attn
        turned = attention.embed_positions.flip(0)
        if how == "assign":
            attention.embed_positions = turned
        else:
            attention.embed_positions.copy_(turned)
    assert torch.equal(generated(ours), generated(stock))
    assert set(runs) == {1}


def test_bfloat16() -> None:
    stock = model_of().bfloat16()
    ours = lmfuse.optimize(stock)
    with torch.no_grad():
        cache = Cache(stock.config)
        exact = copy.deepcopy(stock).float()(**inputs(False)).logits
        a = stock(**inputs(False)).logits.float()
        b = ours(**inputs(False), past_key_values=cache).logits.float()
    assert (b - exact).norm() <= 1.05 * (a - exact).norm()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gptj", "codegen", "gpt2"])
def test_prompt_in_pieces_has_the_same_bits(family: str, runs: list[int]) -> None:
    ours = lmfuse.optimize(model_of(family))
    runs.clear()
    ids = inputs(False)["input_ids"]
    results = []
    for sizes in ((9,), (4, 1, 4)):
        cache = Cache(ours.config)
        with torch.no_grad():
            parts = [ours(p, past_key_values=cache).logits for p in ids.split(sizes, 1)]
        results.append(torch.cat(parts, 1))
    assert runs == [ours.config.num_hidden_layers] * 4
    assert_same_bits(*results)


def test_int8_kv_cache(runs: list[int]) -> None:
    ours = lmfuse.optimize(model_of())
    cache = Cache(ours.config, dtype=torch.int8)
    ids = generated(ours, past_key_values=cache)
    assert runs
    assert cache.layers[0].key_arena.dtype is torch.int8
    assert ids.shape == (1, 19)


class TestWatched:
    """Whoever looks inside sees what the modules do."""

    @pytest.mark.parametrize("family", ["llama", "bloom"])
    def test_hidden_states_and_afterwards(self, family: str, runs: list[int]) -> None:
        stock = model_of(family)
        ours = lmfuse.optimize(stock)
        runs.clear()
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        a, b = generated(stock, **options), generated(ours, **options)
        assert 2 not in runs  # bloom's forward takes what its layers return
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
            assert len(x) == len(y) == 3
            for p, q in zip(x, y, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
        runs.clear()
        generated(ours)  # the recorders are still there, but idle
        assert runs == [2] * 10

    @pytest.mark.parametrize("family", ["llama", "bloom"])
    def test_attentions(self, family: str, runs: list[int]) -> None:
        stock = model_of(family)
        ours = lmfuse.optimize(stock)
        with torch.no_grad():
            a = stock(**inputs(True), output_attentions=True).attentions
            given: dict[str, Any] = {**inputs(True), "past_key_values": Cache(ours.config)}
            with pytest.warns(UserWarning, match="output_attentions"):
                b = ours(**given, output_attentions=True).attentions
        assert len(a) == len(b) == 2
        torch.testing.assert_close(a[1][2], b[1][2], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("part", ["", ".self_attn", ".self_attn.q_proj", ".mlp.act_fn"])
    @pytest.mark.parametrize("pre", [True, False])
    def test_hooks(self, part: str, pre: bool, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of())
        seen: list[nn.Module] = []
        module = ours.get_submodule(f"model.layers.1{part}")
        generated(ours)
        runs.clear()
        if pre:
            handle = module.register_forward_pre_hook(lambda m, *_: seen.append(m))
        else:
            handle = module.register_forward_hook(lambda m, *_: seen.append(m))
        generated(ours)
        # A hook on the layer itself leaves it whole; beside one that looks inside, layer 0 is.
        assert runs == [1] * (20 if part == "" else 10)
        assert seen == [module] * 10
        handle.remove()
        runs.clear()
        generated(ours)
        assert runs == [2] * 10

    def test_replaced_forward(self, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of())
        generated(ours)
        mlp = ours.model.layers[0].mlp
        mlp.forward = lambda x: torch.zeros_like(x)
        with torch.no_grad():
            changed = ours(**inputs(False), past_key_values=Cache(ours.config)).logits
            del mlp.forward
            whole = ours(**inputs(False), past_key_values=Cache(ours.config)).logits
        assert not torch.allclose(changed, whole, atol=1e-3)

    def test_replaced_part(self) -> None:
        stock = model_of()
        ours = lmfuse.optimize(stock)
        generated(ours)
        for model in (stock, ours):
            torch.manual_seed(1)
            model.model.layers[1].mlp.down_proj = nn.Linear(96, 64, bias=False)
        assert torch.equal(generated(ours), generated(stock))

    @pytest.mark.parametrize("family", ["llama", "gemma3_text"])
    def test_replaced_layer(self, family: str) -> None:
        class Slow(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, **kwargs: Any) -> Any:
                return 2 * self.layer(x, **kwargs)

        stock = model_of(family)
        ours = lmfuse.optimize(stock)
        generated(ours)
        for model in (stock, ours):
            model.model.layers[1] = Slow(model.model.layers[1])
        assert torch.equal(generated(ours), generated(stock))

    @pytest.mark.parametrize("how", ["data", "copy", "assign"])
    def test_new_weights(self, how: str, runs: list[int]) -> None:
        stock = model_of()
        ours = lmfuse.optimize(stock)
        generated(ours)
        runs.clear()
        for model in (stock, ours):
            layer = model.model.layers[1]
            for module in (layer.mlp.up_proj, layer.input_layernorm):
                torch.manual_seed(1)
                new = torch.randn(module.weight.shape) * 0.3
                if how == "data":
                    module.weight.data = new
                elif how == "copy":
                    with torch.no_grad():
                        module.weight.copy_(new)
                else:
                    module.weight = nn.Parameter(new)
        assert torch.equal(generated(ours), generated(stock))
        assert runs == [2] * 10

    def test_gradients_and_other_caches(self, runs: list[int]) -> None:
        ours = lmfuse.optimize(model_of())
        runs.clear()
        ours(**inputs(False), past_key_values=Cache(ours.config))  # grad mode
        with torch.no_grad():
            ours(**inputs(False))  # DynamicCache
            ours(**inputs(False), use_cache=False)
            whole = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
            ours(inputs(False)["input_ids"], whole, past_key_values=Cache(ours.config))
            with torch.autocast("cpu", torch.bfloat16):
                ours(**inputs(False), past_key_values=Cache(ours.config))
        assert not runs


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2"])
def test_padding_in_the_middle(family: str) -> None:
    stock = model_of(family)
    ours = lmfuse.optimize(stock)
    ids, mask = inputs(True).values()
    mask[2, 4] = 0
    with torch.no_grad():
        a = stock(ids, attention_mask=mask).logits
        cache = Cache(stock.config)
        b = ours(ids, attention_mask=mask, past_key_values=cache).logits
        assert cache.get_seq_length() == 9
    torch.testing.assert_close(b[mask.bool()], a[mask.bool()], rtol=1e-4, atol=1e-4)


def failing(*_: object) -> Tensor:
    raise RuntimeError("half way")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_exception_leaves_the_cache_as_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lmfuse.optimize(model_of(family))
    ids = inputs(False)["input_ids"]
    cache, other = Cache(ours.config), Cache(ours.config)
    with torch.no_grad():
        for each in (cache, other):
            ours(ids[:, :5], past_key_values=each)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "decoder", failing)
            with pytest.raises(RuntimeError, match="half way"):
                ours(ids[:, 5:], past_key_values=cache)
        assert cache.get_seq_length() == 5
        a = ours(ids[:, 5:], past_key_values=cache).logits
        b = ours(ids[:, 5:], past_key_values=other).logits
    assert_same_bits(a, b)


def test_the_list_stays_a_list() -> None:
    ours = lmfuse.optimize(model_of())
    generated(ours)
    layers = ours.model.layers
    assert isinstance(layers, nn.ModuleList)
    assert [type(m).__name__ for m in layers] == ["FusedLlamaDecoderLayer"] * 2
    assert len(layers) == len(list(layers)) == 2
    assert layers[0] is next(iter(layers))
    assert len(layers[:1]) == 1
    assert hf.report(ours).replaced["model.layers"] == "stack of decoder layers"


def test_copies_pickles_and_restore(runs: list[int]) -> None:
    stock = model_of()
    ours = lmfuse.optimize(stock)
    expected = generated(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert joint._RUN not in vars(other.model.layers)
        runs.clear()
        assert torch.equal(generated(other), expected)
        assert runs == [2] * 10
    assert list(ours.state_dict()) == list(stock.state_dict())
    lmfuse.restore(ours)
    left = {name for module in ours.modules() for name in vars(module)}
    assert left == {name for module in stock.modules() for name in vars(module)}
    runs.clear()
    assert type(ours.model.layers) is nn.ModuleList
    assert torch.equal(generated(ours), expected)
    assert not runs


def test_fewer_layers() -> None:
    """num_hidden_layers of the config counts, as in transformers."""
    stock = model_of()
    ours = lmfuse.optimize(stock)
    for model in (stock, ours):
        model.config.num_hidden_layers = 1
    expected = generated(stock)
    assert torch.equal(generated(ours), expected)
    assert torch.equal(generated(ours, past_key_values=Cache()), expected)


def test_compile_and_export(runs: list[int]) -> None:
    ours = lmfuse.optimize(model_of())
    runs.clear()
    ids = inputs(False)["input_ids"]
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
        exported = torch.export.export(ours, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, expected)
    assert not runs


def test_other_attention(runs: list[int]) -> None:
    """What the user sets afterwards is what runs."""
    ours = lmfuse.optimize(model_of())
    ours.set_attn_implementation("eager")
    runs.clear()
    generated(ours)
    assert not runs


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", ()), ("gemma3_text", ("full_attention",)), ("gemma3_text", ("sliding_attention",))],
)
def test_angles_are_looked_up(
    family: str, kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = model_of(family).model.rotary_emb
    ours = lmfuse.optimize(model_of(family)).model.rotary_emb
    made = []
    make = type(ours)._made
    monkeypatch.setattr(type(ours), "_made", lambda *a: made.append(a) or make(*a))
    x = torch.empty(0)
    for positions in ([[3, 4, 5]], [[0, 1, 1023], [7, 0, 2]], [[1024]], [[3000, 2047]]):
        at = torch.tensor(positions)
        for a, b in zip(ours(x, at, *kind), stock(x, at, *kind), strict=True):
            assert_same_bits(a, b)
    assert [call[2] for call in made] == [1024, 2048, 6000]
    assert ours(x.bfloat16(), at, *kind)[0].dtype is BF16
    for far in ([[100_000]], [[-1, 0]]):
        at = torch.tensor(far)
        assert_same_bits(ours(x, at, *kind)[1], stock(x, at, *kind)[1])
    for rotary in (ours, stock):
        getattr(rotary, "_".join((*kind, "inv_freq"))).mul_(2)
    at = torch.tensor([[5]])
    assert_same_bits(ours(x, at, *kind)[0], stock(x, at, *kind)[0])
