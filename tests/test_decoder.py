"""The decoder op against plain torch in float64, and whole transformers models that run in it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lmfuse
from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import functional, hf
from lmfuse.functional import DecoderLayer, DecoderLinear, DecoderNorm, decoder_stack, pack_linear
from lmfuse.generation import Cache
from lmfuse.hf import decoder as joint
from lmfuse.reference.decoder import decoder as reference
from test_hf_attention import TINY

HIDDEN, INNER, DIM = 40, 72, 20


def linear(n: int, k: int, dtype: torch.dtype, bias: bool = False) -> DecoderLinear:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return DecoderLinear(pack_linear(weight), torch.randn(n).to(dtype) if bias else None)


def norm(n: int, dtype: torch.dtype, centered: bool = False) -> DecoderNorm:
    bias = torch.randn(n).to(dtype) if centered else None
    return DecoderNorm(1 + 0.3 * torch.randn(n).to(dtype), bias, 1e-5, centered)


# What layers of transformers differ in, a few at a time.
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"rotary_dim": DIM},
    "biases": {"rotary_dim": DIM, "bias": True},
    "window, softcap": {"rotary_dim": DIM, "window": 6, "softcap": 2.0},
    "interleaved partial rope": {"rotary_dim": 8, "rotary_half": False},
    "parallel": {"parallel": True, "centered": True, "gated": False, "activation": "gelu"},
    "neox": {"interleaved": True, "heads": 3, "kv_heads": 3, "parallel": True, "rotary_dim": 8},
    "one projection": {"fused": True, "rotary_dim": DIM},
    "norms everywhere": {"head_norms": True, "after": True, "rotary_dim": DIM},
    "norm of all heads": {"wide_norms": True, "rotary_dim": DIM},
    "no norms, scaled": {"before": False, "residual_scale": 0.25, "activation": "gelu_tanh"},
    "plain relu": {"gated": False, "activation": "relu"},
}


def make(
    dtype: torch.dtype,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    centered: bool = False,
    fused: bool = False,
    head_norms: bool = False,
    wide_norms: bool = False,
    before: bool = True,
    after: bool = False,
    **options: Any,
) -> DecoderLayer:
    q, kv = heads * DIM, kv_heads * DIM
    gated = options.get("gated", True)
    if fused or options.get("interleaved"):
        query, key, value = linear(q + 2 * kv, HIDDEN, dtype, bias), None, None
    else:
        query, key, value = (linear(n, HIDDEN, dtype, bias) for n in (q, kv, kv))
    halves = 2 if fused and gated else 1
    norms: dict[str, DecoderNorm] = {}
    if before:
        norms |= {n: norm(HIDDEN, dtype, centered) for n in ("attention_input", "mlp_input")}
    if after:
        norms |= {n: norm(HIDDEN, dtype) for n in ("attention_output", "mlp_output")}
    if head_norms or wide_norms:
        norms["query_norm"] = norm(q if wide_norms else DIM, dtype)
        norms["key_norm"] = norm(kv if wide_norms else DIM, dtype)
    return DecoderLayer(
        heads,
        kv_heads,
        DIM,
        query,
        key,
        value,
        linear(HIDDEN, q, dtype, bias),
        linear(halves * INNER, HIDDEN, dtype, bias),
        linear(INNER, HIDDEN, dtype, bias) if gated and not fused else None,
        linear(HIDDEN, INNER, dtype, bias),
        DIM**-0.5,
        **norms,
        **options,
    )


class Run:
    """Some layers over one batch, in pieces."""

    def __init__(self, layers: list[DecoderLayer], x: Tensor, int8: bool = False) -> None:
        self.layers, self.x = layers, x
        self.stack = decoder_stack(layers)
        batch, tokens, _ = x.shape
        angle = torch.randn(1, tokens, DIM)
        self.cos, self.sin = angle.cos(), angle.sin()
        # Rows in turn, so that no sequence lies in order.
        self.table = torch.arange(batch * tokens).view(tokens, batch).T.contiguous()
        kv_heads, slots = layers[0].kv_heads, batch * tokens
        self.caches: list[Tensor] = []
        for _ in layers:
            kind = torch.int8 if int8 else x.dtype
            self.caches += [torch.zeros(kv_heads, slots, DIM, dtype=kind) for _ in range(2)]
            if int8:
                self.caches += [torch.zeros(kv_heads, slots) for _ in range(2)]

    def piece(self, begin: int, end: int, rows: slice = slice(None)) -> Tensor:
        x, table = self.x[rows, begin:end], self.table[rows]
        lengths = torch.arange(len(x) + 1) * end
        slots = table[:, begin:end].flatten()
        angles = self.cos[:, begin:end], self.sin[:, begin:end]
        return functional.decoder(x, self.stack, self.caches, slots, table, lengths, *angles)

    def pieces(self, *sizes: int) -> Tensor:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return torch.cat([self.piece(e - n, e) for n, e in zip(sizes, ends, strict=True)], 1)

    def expected(self) -> Tensor:
        return reference(self.x.double(), self.layers, self.cos, self.sin)


TOLERANCE = {F32: 2e-6, BF16: 2e-2, F16: 3e-3}


@pytest.mark.parametrize("form", FORMS)
def test_reference(isa: str, dtype: torch.dtype, form: str) -> None:
    run = Run([make(dtype, **FORMS[form]) for _ in range(2)], torch.randn(2, 19, HIDDEN).to(dtype))
    y, expected = run.pieces(19), run.expected()
    assert y.dtype is dtype
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("form", ["llama", "norms everywhere", "neox"])
def test_bits_depend_on_the_row_alone(isa: str, dtype: torch.dtype, form: str) -> None:
    """Not on the batch, the piece of the prompt, or the number of threads."""
    layers = [make(dtype, **FORMS[form]) for _ in range(3)]
    run = Run(layers, torch.randn(3, 37, HIDDEN).to(dtype))
    whole = run.pieces(37)
    assert_same_bits(run.pieces(20, 1, 1, 15), whole)
    torch.set_num_threads(1)
    assert_same_bits(run.pieces(37), whole)
    alone = torch.cat([run.piece(i, i + 1, slice(1, 2)) for i in range(37)], 1)
    assert_same_bits(alone, whole[1:2])


def test_a_sequence_in_order_has_the_same_bits(dtype: torch.dtype) -> None:
    """Which is read in one piece, from the middle of the caches."""
    layers, x = [make(dtype, rotary_dim=DIM)], torch.randn(2, 300, HIDDEN).to(dtype)
    run = Run(layers, x)
    apart = run.pieces(290, 10)
    run.table = torch.arange(600).view(2, 300)
    for row in range(2):
        rows = slice(row, row + 1)
        y = torch.cat([run.piece(0, 290, rows), run.piece(290, 300, rows)], 1)
        assert_same_bits(y, apart[rows])


def test_stack_is_layer_after_layer(dtype: torch.dtype) -> None:
    layers, x = [make(dtype, rotary_dim=DIM) for _ in range(4)], torch.randn(2, 9, HIDDEN).to(dtype)
    run = Run(layers, x)
    y = run.pieces(9)
    for layer in layers:
        one = Run([layer], x)
        one.cos, one.sin = run.cos, run.sin
        x = one.pieces(9)
    assert_same_bits(y, x)


def test_padding_on_the_left(dtype: torch.dtype) -> None:
    layers = [make(dtype, rotary_dim=DIM) for _ in range(2)]
    x = torch.randn(2, 9, HIDDEN).to(dtype)
    run = Run(layers, x)
    run.cos, run.sin = run.cos.expand(2, -1, -1).clone(), run.sin.expand(2, -1, -1).clone()
    hidden = 4  # tokens of row 0
    table = run.table.clone()
    table[0, : 9 - hidden] = run.table[0, hidden:]
    args = (
        run.stack,
        run.caches,
        run.table.flatten(),
        table,
        torch.tensor([0, 9 - hidden, 18 - hidden]),
    )
    y = functional.decoder(x, *args, run.cos, run.sin)
    short = Run(layers, x[:1, hidden:])
    short.cos, short.sin = run.cos[:1, hidden:], run.sin[:1, hidden:]
    assert_same_bits(y[:1, hidden:], short.pieces(9 - hidden))
    assert torch.isfinite(y).all()


def test_int8_cache(isa: str) -> None:
    layers, x = [make(F32, rotary_dim=DIM) for _ in range(2)], torch.randn(2, 19, HIDDEN)
    run = Run(layers, x, int8=True)
    y, expected = run.pieces(10, 9), run.expected()
    assert run.caches[0].abs().max() == 127
    assert (y - expected).abs().max() / expected.abs().max() < 3e-2
    assert_same_bits(run.pieces(19), y)


def test_caches_kept_open() -> None:
    """They are the tensors that they were made of, also where those lie elsewhere by now."""
    x = torch.randn(2, 9, HIDDEN)
    run = Run([make(F32, rotary_dim=DIM) for _ in range(2)], x)
    expected = run.pieces(9)
    tensors = run.caches
    whole = [c.clone() for c in tensors]
    kept: Any = functional.DecoderCaches(tensors)
    run.caches = kept
    for cache in tensors:
        cache.zero_()
    first = run.piece(0, 5)
    copied = copy.deepcopy(kept)
    for cache in tensors:
        cache.data = cache.clone()
    assert_same_bits(torch.cat([first, run.piece(5, 9)], 1), expected)
    assert all(map(torch.equal, tensors, whole))
    assert not any(map(torch.equal, copied.tensors, whole))
    run.caches = copied
    assert_same_bits(run.piece(5, 9), expected[:, 5:])
    run.caches = functional.DecoderCaches(tensors[:2])
    with pytest.raises(ValueError, match="for 1 layers, but there are 2"):
        run.piece(5, 9)


def test_bad_layouts() -> None:
    x = torch.randn(2, 5, HIDDEN)
    run = Run([make(F32, rotary_dim=DIM)], x)
    before = [c.clone() for c in run.caches]

    def refused(kind: type[Exception], match: str, **changed: Any) -> None:
        given = {
            "hidden_states": x,
            "stack": run.stack,
            "caches": run.caches,
            "slots": run.table.flatten(),
            "block_tables": run.table,
            "cu_seqlens": torch.tensor([0, 5, 10]),
            "cos": run.cos,
            "sin": run.sin,
        }
        with pytest.raises(kind, match=match):
            functional.decoder(**{**given, **changed})

    refused(ValueError, "hidden_states has shape", hidden_states=x[0])
    refused(TypeError, "hidden_states is torch.int64", hidden_states=x.long())
    refused(ValueError, "must have 40 features", hidden_states=torch.randn(2, 5, HIDDEN + 1))
    refused(ValueError, "the dtype of the weights", hidden_states=x.bfloat16())
    refused(ValueError, "slots has 10", slots=run.table.flatten() + 1)
    refused(ValueError, "slots has -1", slots=run.table.flatten() - 1)
    refused(ValueError, "slots has 9 elements", slots=run.table.flatten()[1:])
    refused(ValueError, r"block_tables\[1, 4\] is 10", block_tables=run.table + 1)
    refused(ValueError, "for 2 sequences", block_tables=run.table[:1])
    refused(ValueError, "the length of sequence 1 is 6", cu_seqlens=torch.tensor([0, 5, 11]))
    refused(ValueError, "the length of sequence 0 is -1", cu_seqlens=torch.tensor([0, -1, 4]))
    refused(RuntimeError, "cos and sin", cos=None)
    refused(RuntimeError, "row for each token", cos=run.cos[:, :4], sin=run.sin[:, :4])
    refused(RuntimeError, "caches must be two", caches=run.caches[:1])
    refused(RuntimeError, "cache must be a CPU tensor", caches=[c[:1] for c in run.caches])
    refused(RuntimeError, "dtype of hidden_states", caches=[c.half() for c in run.caches])
    broken = run.stack.layout.clone()
    broken[0, 1] = 99
    with pytest.raises(ValueError, match="the norm before attention is 99"):
        functional.DecoderStack(run.stack.parameters, broken, run.stack.numbers)
    with pytest.raises(RuntimeError, match="layout must be"):
        functional.DecoderStack(run.stack.parameters, broken[:, 1:], run.stack.numbers)
    assert all(torch.equal(a, b) for a, b in zip(run.caches, before, strict=True))
    two = [make(F32), make(F32, window=3)]
    with pytest.raises(ValueError, match="same sizes, window"):
        Run(two, x).pieces(5)
    with pytest.raises(ValueError, match="layers is empty"):
        decoder_stack([])
    with pytest.raises(ValueError, match="activation is 'mish'"):
        decoder_stack([make(F32, activation="mish")])
    refused(RuntimeError, "decoder has no backward", hidden_states=x.clone().requires_grad_())


# --- models ------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 6},
    "gpt_neox": {},
    "cohere": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "smollm3": {"no_rope_layer_interval": 2},
}
MIXED = ("gemma2", "gemma3_text")  # layers of two types: one op for each layer


def model_of(family: str = "llama", **changed: Any) -> Any:
    settings = {k: v for k, v in TINY.items() if k != "eos_token_id"}
    config = transformers.AutoConfig.for_model(
        family, **{**settings, **FAMILIES[family], "eos_token_id": 2, **changed}
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(k in name for k in ("q_proj", "k_proj", "v_proj", "embed", "qkv", "query_key")):
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
    each = 1 if family in MIXED else 2
    assert runs == [each] * (30 * 2 // each)
    with torch.no_grad():
        given = inputs(True)
        cache = Cache(stock.config.get_text_config())
        a, b = stock(**given).logits, ours(**given, past_key_values=cache).logits
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(b[seen], a[seen], rtol=1e-4, atol=1e-4)


def test_bfloat16() -> None:
    stock = model_of().bfloat16()
    ours = lmfuse.optimize(stock)
    with torch.no_grad():
        cache = Cache(stock.config)
        exact = copy.deepcopy(stock).float()(**inputs(False)).logits
        a = stock(**inputs(False)).logits.float()
        b = ours(**inputs(False), past_key_values=cache).logits.float()
    assert (b - exact).norm() <= 1.05 * (a - exact).norm()


def test_prompt_in_pieces_has_the_same_bits(runs: list[int]) -> None:
    ours = lmfuse.optimize(model_of())
    runs.clear()
    ids = inputs(False)["input_ids"]
    results = []
    for sizes in ((9,), (4, 1, 4)):
        cache = Cache(ours.config)
        with torch.no_grad():
            parts = [ours(p, past_key_values=cache).logits for p in ids.split(sizes, 1)]
        results.append(torch.cat(parts, 1))
    assert runs == [2] * 4
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

    def test_hidden_states_and_afterwards(self, runs: list[int]) -> None:
        stock = model_of()
        ours = lmfuse.optimize(stock)
        runs.clear()
        options = {"output_hidden_states": True, "return_dict_in_generate": True}
        a, b = generated(stock, **options), generated(ours, **options)
        assert not runs
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
            assert len(x) == len(y) == 3
            for p, q in zip(x, y, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
        generated(ours)  # the recorders are still there, but idle
        assert runs == [2] * 10

    def test_attentions(self, runs: list[int]) -> None:
        stock = model_of()
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


def test_padding_in_the_middle() -> None:
    stock = model_of()
    ours = lmfuse.optimize(stock)
    ids, mask = inputs(True).values()
    mask[2, 4] = 0
    with torch.no_grad():
        a = stock(ids, mask).logits
        cache = Cache(stock.config)
        b = ours(ids, mask, past_key_values=cache).logits
        assert cache.get_seq_length() == 9
    torch.testing.assert_close(b[mask.bool()], a[mask.bool()], rtol=1e-4, atol=1e-4)


def failing(*_: object) -> Tensor:
    raise RuntimeError("half way")


def test_an_exception_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = lmfuse.optimize(model_of())
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
    assert torch.equal(generated(ours), generated(stock))


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


def test_angles_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = model_of().model.rotary_emb
    ours = lmfuse.optimize(model_of()).model.rotary_emb
    made = []
    make = type(ours)._made
    monkeypatch.setattr(type(ours), "_made", lambda *a: made.append(a) or make(*a))
    x = torch.empty(0)
    for positions in ([[3, 4, 5]], [[0, 1, 1023], [7, 0, 2]], [[1024]], [[3000, 2047]]):
        at = torch.tensor(positions)
        for a, b in zip(ours(x, at), stock(x, at), strict=True):
            assert_same_bits(a, b)
    assert [count for *_, count in made] == [1024, 2048, 6000]
    assert ours(x.bfloat16(), at)[0].dtype is BF16
    for far in ([[100_000]], [[-1, 0]]):
        at = torch.tensor(far)
        assert_same_bits(ours(x, at)[1], stock(x, at)[1])
    ours.inv_freq.mul_(2)
    stock.inv_freq.mul_(2)
    at = torch.tensor([[5]])
    assert_same_bits(ours(x, at)[0], stock(x, at)[0])
