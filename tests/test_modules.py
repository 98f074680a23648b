"""The modules: their arguments, their parameters, and the tables of RotaryEmbedding."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmfuse import functional
from lmfuse.modules import FastLayerNorm, RMSNorm, RotaryEmbedding
from lmfuse.modules.rope_scaling import SCALINGS, Rope

# --- norms


def test_rms_norm():
    x, weight = torch.randn(2, 3, 40), torch.randn(40)
    norm = RMSNorm(40, 1e-5, weight)
    expected = functional.rms_norm(x, weight, 1e-5)
    assert torch.equal(norm(x), expected)
    assert torch.equal(RMSNorm.apply_function(x, weight, 1e-5), expected)
    assert torch.equal(norm.apply_function(x, weight, 1e-5), expected)
    assert list(norm.state_dict()) == ["weight"]
    assert norm.weight.data_ptr() == weight.data_ptr()
    assert not norm.weight.requires_grad
    gemma = RMSNorm(40, eps=1e-5, weight=weight - 1, weight_offset=1.0)
    torch.testing.assert_close(gemma(x), expected)


def test_rms_norm_defaults():
    x = torch.randn(5, 16)
    norm = RMSNorm(16)
    assert norm.eps == 1e-6
    assert torch.equal(norm.weight, torch.ones(16))
    with torch.no_grad():
        assert torch.equal(norm(x), functional.rms_norm(x, None, 1e-6))
        before = norm(x.bfloat16())
        assert torch.equal(norm.bfloat16()(x.bfloat16()), before)
        assert torch.equal(copy.deepcopy(norm)(x), norm(x))
    assert norm(x).shape == x.shape  # its parameter requires grad: the forward works all the same


def test_layer_norm():
    x, weight, bias = torch.randn(2, 3, 8, 5), torch.randn(8, 5), torch.randn(8, 5)
    for shape, w, b in (((8, 5), weight, bias), ((8, 5), weight, None), (5, weight[0], bias[0])):
        norm = FastLayerNorm(shape, 1e-5, w, b)
        expected = nn.functional.layer_norm(x, w.shape, w, b, 1e-5)
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(norm.apply_function(x, shape, w, b, 1e-5), expected)
        assert list(norm.state_dict()) == (["weight"] if b is None else ["weight", "bias"])
    tied = nn.Parameter(weight[0])
    assert FastLayerNorm(5, 1e-5, tied).weight is tied


def test_norms_refuse_other_sizes():
    with pytest.raises(ValueError, match=r"weight has shape \(4,\).*hidden_size"):
        RMSNorm(5, weight=torch.ones(4))
    with pytest.raises(ValueError, match="bias has shape"):
        FastLayerNorm(5, 1e-5, torch.ones(5), torch.ones(4))
    with pytest.raises(ValueError, match=r"weight has shape \(16,\)"):
        RMSNorm(16)(torch.ones(2, 15))


# --- scalings: our formulas against those of transformers

HALF = 16  # pairs of the widths below
FACTORS = {
    "short_factor": [1.0 + 0.05 * i for i in range(HALF)],
    "long_factor": [1.5 + 0.5 * i for i in range(HALF)],
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 256}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 128, **FACTORS}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
CONFIGS = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6},
    YARN,
    {**YARN, "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "rope_theta": 1e6},
    {**YARN, "attention_factor": 1.25},
    {**YARN, "factor": None},
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 4},  # both borders at pair 0
    LONGROPE,
    {**LONGROPE, "factor": 8.0},
    {**LONGROPE, "attention_factor": 1.5, "rope_theta": 1e6},
    {**LONGROPE, "original_max_position_embeddings": 2048},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 512},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 8.0, "rope_theta": 1e6},
    {"rope_type": "proportional"},
)
MAX = 1024


def stock(config: dict, dim: int = 2 * HALF, length: int | None = None) -> tuple[Tensor, float]:
    parameters = {"rope_theta": 10000.0, **config}
    model = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=MAX,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[config["rope_type"]](model, "cpu", seq_len=length)


def test_every_scaling_of_transformers_is_known():
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == set(SCALINGS)
    tested = {config["rope_type"] for config in CONFIGS}
    assert tested == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["rope_type"])
def test_scaling(config):
    for length in (None, 100, 128, 129, MAX, MAX + 1, 5000):
        inv_freq, attention = stock(config, length=length)
        rope = Rope.of(2 * HALF, 10000.0, MAX, config)
        assert torch.equal(rope.inv_freq(length or 0), inv_freq)
        torch.testing.assert_close(
            rope.inv_freq(torch.tensor(length or 0)), inv_freq, rtol=1e-6, atol=0
        )
        assert rope.attention_factor == attention


@pytest.mark.parametrize("dim", [2, 8, 80, 128])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "proportional"])
def test_scaling_of_other_widths(kind, dim):
    for config in (c for c in CONFIGS if c["rope_type"] == kind):
        assert torch.equal(Rope.of(dim, 10000.0, MAX, config).inv_freq(), stock(config, dim)[0])


def test_without_scaling():
    expected = 1.0 / (5e5 ** (torch.arange(0, 64, 2).float() / 64))
    for config in (None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 5e5}):
        assert torch.equal(Rope.of(64, 5e5, MAX, config).inv_freq(), expected)
    assert torch.equal(Rope.of(64, 10000, MAX, {"rope_theta": 5e5}).inv_freq(), expected)


def test_forms_of_one_config():
    def rope(config):
        return Rope.of(2 * HALF, 10000, MAX, config)

    old = {("type" if k == "rope_type" else k): v for k, v in LONGROPE.items()}
    untyped = {k: v for k, v in LONGROPE.items() if k != "rope_type"}
    for config in (old, {**old, "type": "su"}, untyped):
        assert rope(config) == rope(LONGROPE)
    assert rope({**YARN, "type": "yarn"}) == rope(YARN)
    model = Phi3Config(
        hidden_size=8 * HALF,
        num_attention_heads=4,
        max_position_embeddings=MAX,
        rope_parameters={**LONGROPE, "rope_theta": 9e3},
    )
    assert rope(model.rope_parameters).base == 9e3


BAD_CONFIGS = {
    "unknown": ({"rope_type": "spiral"}, "rope_type 'spiral'.*default, linear.*llama3"),
    "no factor": ({"rope_type": "linear"}, "factor None.*positive"),
    "factor of text": ({"rope_type": "dynamic", "factor": "2"}, "factor '2'"),
    "factor zero": ({**YARN, "factor": 0}, "factor 0"),
    "no original": ({"type": "yarn", "factor": 4.0}, "original_max_position_embeddings None"),
    "short_factor short": ({**LONGROPE, "short_factor": [1.0]}, "1 numbers in short_factor.*16"),
    "borders": ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor 1.0.*more than"),
    "theta": ({"rope_theta": 0.5}, "base is 0.5"),
    "proportion": ({"rope_type": "proportional", "partial_rotary_factor": 2.0}, "at most 1"),
    "by layer": ({"full_attention": YARN, "sliding_attention": YARN}, "one of these entries"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case):
    config, text = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=text):
        RotaryEmbedding(MAX, 2 * HALF, extra_rope_config=config)


def test_bad_sizes():
    with pytest.raises(ValueError, match="pos_embd_dim is 31"):
        RotaryEmbedding(MAX, 31)
    with pytest.raises(ValueError, match="max_position_embeddings is 0"):
        RotaryEmbedding(0, 32)
    with pytest.raises(ValueError, match=r"base is 5.*rope_theta 7"):
        RotaryEmbedding(MAX, 32, 5, extra_rope_config={"rope_theta": 7})


# --- RotaryEmbedding


def expected_of(x: Tensor, positions: Tensor, config: dict | None, length: int) -> Tensor:
    """Stock formula, half style, over the frequencies of transformers for that length."""
    if config is None:
        inv_freq, attention = 1.0 / 1e4 ** (torch.arange(0, 32, 2).float() / 32), 1.0
    else:
        inv_freq, attention = stock(config, length=length)
    angles = positions[..., None].float() * inv_freq
    sin, cos = (f.repeat(1, 1, 2)[:, :, None] * attention for f in (angles.sin(), angles.cos()))
    turned = torch.cat((-x[..., HALF:], x[..., :HALF]), -1)
    return x * cos + turned * sin


LENGTHS = (5, 128, 129, MAX, MAX + 1, 40, 3 * MAX, 129)
CASES = {"default": None, **{c["rope_type"]: c for c in reversed(CONFIGS)}}


@pytest.mark.parametrize("given", [True, False], ids=["seq_len", "positions"])
@pytest.mark.parametrize("kind", CASES)
def test_scaling_stays_right_as_sequences_grow_and_shrink(kind, given):
    config = CASES[kind]
    rope = RotaryEmbedding(MAX, 32, 10000, extra_rope_config=config)
    rope(torch.ones(1, 1, 4, 32), torch.tensor([[0]]), 4, 32, HALF, 32, seq_len=4 * MAX)
    for length in LENGTHS:
        x = torch.randn(2, 5, 4, 32)
        positions = torch.arange(length - 5, length)[None]
        start = positions[:, :1].int()
        seq_len = length if given else None
        expected = expected_of(x, positions, config, length)
        for form in (positions, start):
            y = rope(x, form, 4, 32, HALF, 32, seq_len)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_forms_of_x():
    rope = RotaryEmbedding(64, 32)
    qkv = torch.randn(2, 5, (4 + 2 + 2) * 32)
    positions = torch.randint(64, (2, 5))
    q, k, v = rope(qkv, positions, 4, 32, HALF, 32, None, 3)
    heads = qkv.view(2, 5, 8, 32)
    assert torch.equal(q, rope(heads[:, :, :4], positions, 4, 32, HALF, 32))
    assert torch.equal(k, rope(heads[:, :, 4:6], positions, 2, 32, HALF, 32))
    assert torch.equal(v, heads[:, :, 6:])
    assert torch.equal(q, rope(qkv[..., : 4 * 32], positions, 4, 32, HALF, 32))
    assert torch.equal(q, rope(qkv, positions, 4, 32, HALF, 32))  # as IPEX: the query alone
    assert torch.equal(
        rope(heads, None, 8, 32, HALF, 32), rope(heads, torch.arange(5)[None], 8, 32, HALF, 32)
    )


def test_gptj_and_partial_width():
    x, positions = torch.randn(1, 6, 4, 256), torch.arange(6)[None]
    rope = RotaryEmbedding(2048, 64, 10000, "GPTJForCausalLM")
    y = rope(x, positions, 4, 256, 1, 64)
    angles = positions[0, :, None] / 1e4 ** (torch.arange(0, 64, 2) / 64)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x[..., :64].unflatten(-1, (32, 2)))
    torch.testing.assert_close(y[..., :64], torch.view_as_real(pairs * turns).flatten(-2))
    assert torch.equal(y[..., 64:], x[..., 64:])
    half = rope(x, positions, 4, 256, 16, 32)  # narrower than the table
    assert torch.equal(half[..., 32:], x[..., 32:])


def test_apply_function_is_the_function():
    q, k, sin, cos = (torch.randn(s) for s in ((2, 3, 4, 32), (2, 3, 1, 32), (3, 32), (3, 32)))
    expected = functional.rotary_embedding(q.clone(), k.clone(), sin, cos, 32, True)
    result = RotaryEmbedding.apply_function(q, k, sin, cos, 32, True, None)
    assert result[0] is q
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def test_bad_input():
    rope, x, p = RotaryEmbedding(64, 32), torch.ones(2, 5, 4, 32), torch.arange(5)[None]
    with pytest.raises(ValueError, match=r"offset is 8.*half of rotary_ndims, 32"):
        rope(x, p, 4, 32, 8, 32)
    with pytest.raises(ValueError, match=r"rotary_ndims is 34.*pos_embd_dim, 32"):
        rope(torch.ones(2, 5, 4, 64), p, 4, 64, 17, 34)
    with pytest.raises(ValueError, match="rotary_dim is 7"):
        rope(x, p, 4, 32, 1, 7)
    with pytest.raises(ValueError, match=r"x has shape .*\[batch, seq, 4, 31\]"):
        rope(x, p, 4, 31, HALF, 32)
    with pytest.raises(ValueError, match="x has shape"):
        rope(torch.ones(2, 5, 100), p, 4, 32, HALF, 32)
    with pytest.raises(TypeError, match="x is list"):
        rope([1], p, 4, 32, HALF, 32)
    for positions in ([[0, 1, 2, 3, 64]], [[-1, 0, 1, 2, 3]], [[60]]):
        with pytest.raises(ValueError, match="position_ids"):
            rope(x, torch.tensor(positions), 4, 32, HALF, 32)
    rope(x, p + 59, 4, 32, HALF, 32)
    rope(x, p + 60, 4, 32, HALF, 32, seq_len=65)
    assert rope._table.rows == 128
    rope(x, p + 123, 4, 32, HALF, 32)


def test_no_state_and_one_table():
    rope = RotaryEmbedding(64, 32)
    assert not rope.state_dict()
    assert not list(rope.buffers())
    table = rope._table
    rope(torch.ones(1, 5, 4, 32), None, 4, 32, HALF, 32, 64)
    assert rope._table is table
    assert RotaryEmbedding(64, 32)._table is table
    assert copy.deepcopy(rope)._table is table
    assert RotaryEmbedding(65, 32)._table is not table
    file = io.BytesIO()
    torch.save(rope, file)
    assert len(file.getvalue()) < 64 * 32 * 4
    file.seek(0)
    assert torch.load(file, weights_only=False)._table is table
    assert rope.to(torch.bfloat16)._table.sin.dtype is torch.float32
    with torch.device("meta"):
        assert RotaryEmbedding(63, 32)._table.sin.device.type == "cpu"


def test_growing_leaves_others_alone():
    a, b = RotaryEmbedding(64, 32), RotaryEmbedding(64, 32)
    x, far = torch.ones(1, 1, 4, 32), torch.tensor([[64]])
    a(x, far, 4, 32, HALF, 32, seq_len=65)
    with pytest.raises(ValueError, match="64 rows"):
        b(x, far, 4, 32, HALF, 32)


@pytest.mark.parametrize("kind", ["default", "yarn", "longrope", "dynamic"])
@pytest.mark.parametrize("begin", [0, 3, MAX - 2])
def test_angles_are_those_that_forward_turns_by(kind: str, begin: int) -> None:
    rope = RotaryEmbedding(MAX, 32, extra_rope_config=CASES[kind])
    x, length = torch.randn(2, 5, 1, 32), begin + 5
    rows = torch.arange(begin, length)
    for positions in (rows[None], rows[:1], torch.stack([rows, rows.flip(0)])):
        sin, cos = rope.angles(5, positions, length)
        assert sin.shape == cos.shape == (positions.shape[0], 5, HALF)
        expected = functional.rotate(x, sin, cos, 32, True)
        assert torch.equal(rope(x, positions, 1, 32, 16, 32, length), expected)


@pytest.mark.parametrize("kind", ["default", "yarn", "longrope", "dynamic"])
def test_threads_that_grow_at_once(kind):
    rope = RotaryEmbedding(MAX, 32, extra_rope_config=CASES[kind])
    lengths = [64 * n for n in range(1, 65)]
    fresh = RotaryEmbedding(MAX, 32, extra_rope_config=CASES[kind])
    x = torch.randn(1, 1, 4, 32)

    def turned(module, length):
        return module(x, torch.tensor([[length - 1]]), 4, 32, HALF, 32, seq_len=length)

    expected = {length: turned(fresh, length) for length in lengths}
    wrong: list[object] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        for length in sorted(lengths, key=lambda n: (n * 7919 * seed) % 1009):
            try:
                if not torch.equal(turned(rope, length), expected[length]):
                    wrong.append(length)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Layer(nn.Module):
    """One projection and one rotation, called as IPEX's modelling files do."""

    def __init__(self, config: dict | None) -> None:
        super().__init__()
        self.norm = RMSNorm(32)
        self.linear = nn.Linear(32, 8 * 32)
        self.rope = RotaryEmbedding(MAX, 32, 10000, "LlamaForCausalLM", config)

    def forward(self, x: Tensor, position_ids: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(self.norm(x))
        seq_len = past.shape[0] + x.shape[1]
        q, k, v = self.rope(x, position_ids, 4, 32, HALF, 32, seq_len, 3)
        return q, k, v, self.rope(x[..., :128], position_ids, 4, 32, 1, 32)


def step(batch: int, seq: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.arange(past, past + seq).expand(batch, seq)
    return torch.randn(batch, seq, 32), positions, torch.empty(past, 1)


STEPS = ((2, 5, 2), (3, 7, 40), (2, 128, 3), (2, 2, 127), (4, 5, MAX - 5))


def assert_same(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["default", "yarn", "longrope", "dynamic"])
def test_compile(kind):
    layer = Layer(CASES[kind]).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in STEPS:
            arguments = step(*size)
            assert_same(compiled(*arguments), layer(*arguments))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of each check of a shape
@pytest.mark.parametrize("kind", ["default", "yarn", "longrope", "dynamic"])
def test_jit_trace(kind):
    layer = Layer(CASES[kind]).eval()
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(layer, step(2, 5, 2), check_trace=False))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for size in (*STEPS, (1, 1, 200), (1, 1, 7)):
            arguments = step(*size)
            assert_same(loaded(*arguments), layer(*arguments))
        beyond = step(1, 2, MAX - 1)
        if kind in ("longrope", "dynamic"):
            assert_same(loaded(*beyond), layer(*beyond))
        else:
            with pytest.raises(RuntimeError, match=f"position_ids.* {MAX} rows"):
                loaded(*beyond)


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_export(kind):
    layer = Layer(CASES[kind]).eval()
    batch, seq, past = (torch.export.Dim(n, min=2, max=MAX) for n in ("batch", "seq", "past"))
    shapes = ({0: batch, 1: seq}, {0: batch, 1: seq}, {0: past})
    with torch.no_grad():
        exported = torch.export.export(layer, step(2, 5, 4), dynamic_shapes=shapes).module()
        for size in STEPS:
            arguments = step(*size)
            assert_same(exported(*arguments), layer(*arguments))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_export_of_scalings_by_length(kind):
    """Without a seq_len the length is data, and one graph serves both sides of the border."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope = RotaryEmbedding(MAX, 32, extra_rope_config=CASES[kind])

        def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
            return self.rope(x, position_ids, 4, 32, HALF, 32)

    turned = Turned()
    seq = torch.export.Dim("seq", min=2, max=MAX)
    arguments = torch.randn(1, 5, 128), torch.arange(5)[None]
    exported = torch.export.export(turned, arguments, dynamic_shapes=({1: seq}, {1: seq})).module()
    for start in (0, 100, 124, 500, MAX - 2, 2 * MAX):
        x, positions = torch.randn(1, 5, 128), torch.arange(start, start + 5)[None]
        assert_same([exported(x, positions)], [turned(x, positions)])


def test_autocast_and_grad_mode():
    layer, arguments = Layer(None).eval(), step(2, 5, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in layer(*arguments)} == {torch.bfloat16}
    results = layer(*arguments)
    with torch.no_grad():
        assert_same(results, layer(*arguments))
    with pytest.raises(RuntimeError, match="has no backward"):
        results[0].sum().backward()
