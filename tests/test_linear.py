"""Linear layers over packed weights against float64, on every instruction set."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import BF16, DTYPES, F16, F32, LAYOUTS, assert_close, assert_same_bits
from lmfuse import functional, modules
from lmfuse.functional import PackedWeight, linear, linear_concat, linear_gate_up, pack_linear

# post -> (how many operands, the formula, a bound of |d result / d z| for operands u)
POSTS: dict[str | None, tuple[int, Callable[..., Tensor], Callable[..., Tensor | float]]] = {
    None: (0, lambda z: z, lambda: 1.0),
    "relu": (0, F.relu, lambda: 1.0),
    "gelu": (0, F.gelu, lambda: 1.13),
    "gelu_tanh": (0, lambda z: F.gelu(z, approximate="tanh"), lambda: 1.13),
    "silu": (0, F.silu, lambda: 1.1),
    "mul": (1, lambda z, u: z * u, lambda u: u.abs()),
    "add": (1, lambda z, u: z + u, lambda u: 1.0),
    "add_add": (2, lambda z, u, v: z + u + v, lambda u, v: 1.0),
    "silu_mul": (1, lambda z, u: F.silu(z) * u, lambda u: 1.1 * u.abs()),
}
posts = pytest.mark.parametrize("post", POSTS)


def sums(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + b in float64, and the same sum of magnitudes."""
    x, w = x.double(), w.double()
    zero = torch.zeros(w.shape[0], dtype=torch.float64)
    b = zero if b is None else b.double()
    return x @ w.T + b, x.abs() @ w.abs().T + b.abs()


def check(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, post: str | None, *u: Tensor) -> None:
    """|error before rounding| <= γ_K · (|x| |W|^T + |b|) · |post'|, γ_K = (K + 16) 2^-24: each of
    the K sums and the steps after them err by half an ulp of what they add up to at most."""
    z, size = sums(x, w, b)
    _, formula, slope = POSTS[post]
    u = tuple(t.double() for t in u)
    scale = size * slope(*u) + (sum(t.abs() for t in u) if post in ("add", "add_add") else 0.0)
    assert_close(y, formula(z, *u), ulps=(x.shape[-1] + 16) / 2, scale=scale)


def weights(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k).div(k**0.5).to(dtype)


def test_odd_shapes(isa: str, dtype: torch.dtype) -> None:
    """Random N and K in 1…300, M in 1…70, epilogues, layouts and dtypes of the bias."""
    pick = random.Random(f"{isa} {dtype}")
    kinds = list(POSTS)
    for round_ in range(60):
        n, k, m = pick.randint(1, 300), pick.randint(1, 300), pick.randint(1, 70)
        post = kinds[round_ % len(kinds)]
        w = LAYOUTS[pick.choice(["contiguous", "shifted", "gaps", "every other"])](
            weights(n, k, dtype)
        )
        b = pick.choice([None, torch.randn(n).to(pick.choice(DTYPES))])
        place = LAYOUTS[pick.choice(list(LAYOUTS))]
        x = place(torch.randn(m, k).to(dtype))
        u = [place(torch.randn(m, n).to(dtype)) for _ in range(POSTS[post][0])]
        y = linear(x, pack_linear(w), b, post, *u)
        assert y.dtype is dtype
        assert y.is_contiguous()
        check(y, x, w, b, post, *u)


@pytest.mark.parametrize("k", [511, 512, 513, 1100])
def test_long_sums(isa: str, dtype: torch.dtype, k: int) -> None:
    """k around and beyond what one pass over the first-level cache takes."""
    w, x = weights(70, k, dtype), torch.randn(70, k).to(dtype)
    packed = pack_linear(w)
    check(linear(x, packed), x, w, None, None)
    check(linear(x[:3], packed), x[:3], w, None, None)


def test_gate_up(isa: str, dtype: torch.dtype) -> None:
    for n, k, m in ((1, 1, 1), (33, 65, 7), (96, 64, 40), (130, 600, 33), (64, 31, 1)):
        g, u = weights(n, k, dtype), weights(n, k, dtype)
        gb, ub = torch.randn(n), torch.randn(n).to(BF16)
        x = torch.randn(m, k).to(dtype)
        for biases in ((None, None), (gb, None), (None, ub), (gb, ub)):
            y = linear_gate_up(x, pack_linear(g), pack_linear(u), *biases)
            (zg, sg), (zu, su) = sums(x, g, biases[0]), sums(x, u, biases[1])
            gate = F.silu(zg)
            scale = 1.1 * sg * zu.abs() + gate.abs() * su
            assert_close(y, gate * zu, ulps=(k + 16) / 2, scale=scale)


def test_concat_gives_the_bits_of_each(isa: str, dtype: torch.dtype) -> None:
    """Uneven sizes and biases, as in grouped-query attention."""
    for sizes in ((64, 16, 16), (576, 192, 192), (1, 33, 7), (5,)):
        for m in (1, 5, 600):
            ws = [pack_linear(weights(n, 70, dtype)) for n in sizes]
            bs = [None if i == 1 else torch.randn(n) for i, n in enumerate(sizes)]
            x = torch.randn(m, 70).to(dtype)
            for y, w, b in zip(linear_concat(x, ws, bs), ws, bs, strict=True):
                assert_same_bits(y, linear(x, w, b))
    assert [tuple(y.shape) for y in linear_concat(x[:0], ws)] == [(0, 5)]


@pytest.mark.parametrize("k", [300, 1100])
def test_bits_of_a_row_depend_on_nothing_else(isa: str, dtype: torch.dtype, k: int) -> None:
    w, b, x = weights(101, k, dtype), torch.randn(101), torch.randn(512, k).to(dtype)
    u = torch.randn(512, 101).to(dtype)
    packed, gate = pack_linear(w), pack_linear(w.flip(0))
    torch.set_num_threads(1)
    assert torch.equal(packed.packed, pack_linear(w).packed)
    alone = torch.cat(
        [linear(x[i : i + 1], packed, b, "silu_mul", u[i : i + 1]) for i in range(512)]
    )
    both = torch.cat([linear_gate_up(x[i : i + 1], gate, packed) for i in range(0, 512, 7)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same_bits(linear(x, packed, b, "silu_mul", u), alone)
        assert_same_bits(linear_gate_up(x, gate, packed)[::7], both)
        for m in (2, 8, 13, 33, 511):
            assert_same_bits(linear(x[:m], packed, b, "silu_mul", u[:m]), alone[:m])
    assert_same_bits(linear(x.repeat(3, 1), packed, b, "silu_mul", u.repeat(3, 1))[1024:], alone)


@posts
def test_leading_dimensions(isa: str, post: str | None) -> None:
    w, b = weights(21, 40, F32), torch.randn(21)
    packed = pack_linear(w)
    for lead in ((), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)):
        x = torch.randn(*lead, 40)
        u = [torch.randn(*lead, 21) for _ in range(POSTS[post][0])]
        y = linear(x, packed, b, post, *u)
        assert y.shape == (*lead, 21)
        rows = [t.reshape(-1, 21) for t in u]
        check(y.reshape(-1, 21), x.reshape(-1, 40), w, b, post, *rows)


@pytest.mark.parametrize("post", ["mul", "add", "add_add", "silu_mul"])
def test_operands_broadcast_as_in_torch(isa: str, post: str) -> None:
    w = weights(21, 40, F32)
    packed, x = pack_linear(w), torch.randn(2, 3, 40)
    z = F.linear(x, w)
    for shape in (
        (21,),
        (1, 21),
        (1, 1, 21),
        (2, 3, 1),
        (1,),
        (),
        (3, 21),
        (5, 2, 3, 21),
        (4, 1, 3, 1),
    ):
        u = [torch.randn(shape) for _ in range(POSTS[post][0])]
        y, expected = linear(x, packed, None, post, *u), POSTS[post][1](z, *u)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    wide = torch.randn(2, 3, 21, dtype=F32)
    half = linear(x.to(BF16), pack_linear(w.to(BF16)), None, post, *[wide] * POSTS[post][0])
    assert half.dtype is F32  # as torch: the wider of the two


def test_rounded_fp32(isa: str) -> None:
    """fp32 rows over a bf16 weight are rounded to bf16; the result is not."""
    w, x = weights(50, 130, F32), torch.randn(9, 130)
    for packed in (pack_linear(w, rounded=True), pack_linear(w.to(BF16))):
        y = linear(x, packed, None, "silu")
        assert y.dtype is F32
        check(y, x.to(BF16), w.to(BF16), None, "silu")
    assert pack_linear(w, rounded=True).dtype is F32
    assert_same_bits(pack_linear(w, rounded=True).unpack(), w.to(BF16).float())


def test_special_values(isa: str, dtype: torch.dtype) -> None:
    """Infinities and NaN spread over their own row or channel only."""
    w, x = weights(40, 35, dtype), torch.randn(20, 35).to(dtype)
    plain = linear(x, pack_linear(w))
    x2, w2 = x.clone(), w.clone()
    x2[3, 34], w2[39, 0] = torch.nan, torch.inf
    y = linear(x2, pack_linear(w2))
    assert y[3].isnan().all()
    assert not y[:, 39].isfinite().any()
    others = torch.ones(20, 40, dtype=torch.bool)
    others[3], others[:, 39] = False, False
    assert_same_bits(y[others], plain[others])


def test_autocast_casts_to_the_weight() -> None:
    w = weights(20, 30, BF16)
    packed, x = pack_linear(w), torch.randn(4, 30)
    with torch.autocast("cpu", BF16):
        y = linear(x, packed, None, "silu")
    assert y.dtype is BF16
    check(y, x.to(BF16), w, None, "silu")
    exact = pack_linear(torch.randn(20, 30))
    u = torch.randn(4, 20)
    with torch.autocast("cpu", BF16):
        assert linear(x, exact).dtype is F.linear(x, exact.unpack()).dtype is BF16
        assert linear_gate_up(x, exact, exact).dtype is BF16
        assert {y.dtype for y in linear_concat(x, [exact, exact])} == {BF16}
        assert linear(x, exact, None, "add", u).dtype is (F.linear(x, exact.unpack()) + u).dtype


# --- modules -------------------------------------------------------------------------------------

UNARY = {
    "LinearSilu": "silu",
    "LinearRelu": "relu",
    "LinearGelu": "gelu",
    "LinearNewGelu": "gelu_tanh",
}
BINARY = {"LinearMul": "mul", "LinearAdd": "add", "LinearSiluMul": "silu_mul"}
FUSIONS = {**UNARY, **BINARY, "LinearAddAdd": "add_add"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_modules(dtype: torch.dtype, name: str, packed: bool) -> None:
    linear_ = nn.Linear(40, 21).to(dtype)
    inner = modules.Linear.from_linear(linear_) if packed else linear_
    fused = getattr(modules, name)(inner)
    keys = list(fused.state_dict())
    x = torch.randn(2, 3, 40).to(dtype)
    post = FUSIONS[name]
    u = [torch.randn(2, 3, 21).to(dtype) for _ in range(POSTS[post][0])]
    with torch.no_grad():
        y = fused(x, *u)
        if packed:
            rows = [t.reshape(-1, 21) for t in u]
            x2 = x.reshape(-1, 40)
            check(y.reshape(-1, 21), x2, linear_.weight, linear_.bias, post, *rows)
        else:
            assert_same_bits(y, POSTS[post][1](linear_(x), *u))
        inner.weight.mul_(2)
        expected = POSTS[post][1](
            F.linear(x, linear_.weight * (2 if packed else 1), linear_.bias), *u
        )
        torch.testing.assert_close(fused(x, *u), expected, rtol=0.02, atol=0.02)
        large = torch.randn(4, 1, 3, 21).to(dtype)
        if u:
            assert fused(x, *[large] * len(u)).shape == (4, 2, 3, 21)
    assert list(fused.state_dict()) == keys == ["linear.weight", "linear.bias"]
    lower = name[0].lower() + name[1:]
    assert getattr(modules, lower) is getattr(modules, name)


@pytest.mark.parametrize("packed", [False, True])
def test_linear_2_silu_mul(packed: bool) -> None:
    s, m = nn.Linear(40, 21), nn.Linear(40, 21, bias=False)
    both = (s, m) if not packed else tuple(modules.Linear.from_linear(t) for t in (s, m))
    fused = modules.Linear2SiluMul(*both)
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), F.silu(s(x)) * m(x), rtol=1e-5, atol=1e-6)
    assert list(fused.state_dict()) == ["linear_1.weight", "linear_1.bias", "linear_2.weight"]
    mixed = modules.Linear2SiluMul(both[0], m)
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), F.silu(s(x)) * m(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_concat_linear(packed: bool) -> None:
    stock = [nn.Linear(40, n, bias=n != 8) for n in (32, 8, 8)]
    ours = [modules.Linear.from_linear(t) for t in stock] if packed else stock
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        for y, t in zip(modules.ConcatLinear(*ours)(x), stock, strict=True):
            torch.testing.assert_close(y, t(x), rtol=1e-5, atol=1e-6)


def test_hooks_on_the_layer_are_called() -> None:
    layer = modules.Linear.from_linear(nn.Linear(40, 21))
    seen = []
    layer.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        y = modules.LinearSilu(layer)(torch.randn(3, 40))
    assert_same_bits(y, F.silu(seen[0]))


def test_a_plain_layer_trains() -> None:
    fused = modules.LinearSilu(nn.Linear(4, 3))
    fused(torch.randn(2, 4)).sum().backward()
    assert fused.linear.weight.grad is not None


def test_a_packed_layer_refuses_a_backward() -> None:
    layer = modules.Linear.from_linear(nn.Linear(4, 3))
    y = layer(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"lmfuse\.linear has no backward"):
        y.sum().backward()


# --- tracing -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A head tied to its embedding, an MLP, siblings and an operand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = modules.Embedding(45, 64)
        self.qkv = modules.ConcatLinear(*(modules.Linear(64, n) for n in (64, 16, 16)))
        self.mlp = modules.Linear2SiluMul(modules.Linear(64, 96), modules.Linear(64, 96))
        self.down = modules.LinearAdd(modules.Linear(96, 64))
        self.head = modules.Linear(64, 45, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x)
        return self.head(self.down(self.mlp(q + k.sum(-1, True) * v.mean(-1, True)), x))


IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for length in (7, 3, 5):
            assert_same_bits(compiled(IDS[:, :length]).detach(), net(IDS[:, :length]).detach())


def test_export() -> None:
    net = Net().eval()
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (IDS,), dynamic_shapes=({1: length},))
        assert_same_bits(program.module()(IDS[:, :4]), net(IDS[:, :4]))


def test_trace_freeze_save_load() -> None:
    net = Net().eval()
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(net, IDS))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_same_bits(loaded(IDS), net(IDS))
        assert_same_bits(traced(IDS[:, :3]), net(IDS[:, :3]))


# --- bad input -----------------------------------------------------------------------------------


def test_weights_that_cannot_be_packed() -> None:
    for weight, error, text in (
        (torch.randn(0, 3), ValueError, "neither empty"),
        (torch.randn(3, 0), ValueError, "neither empty"),
        (torch.randn(3), ValueError, r"weight has shape \(3,\)"),
        (torch.randn(2, 3, 4), ValueError, "two dimensions"),
        (torch.randn(2, 3).double(), TypeError, "weight is torch.float64"),
        (torch.ones(2, 3, dtype=torch.int8), TypeError, "weight is torch.int8"),
        (torch.randn(2, 3, device="meta"), ValueError, "weight is on meta"),
        ([[1.0]], TypeError, "weight is list"),
    ):
        with pytest.raises(error, match=text):
            pack_linear(weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rounded is for a float32 weight"):
        pack_linear(torch.randn(2, 3).to(F16), rounded=True)


def test_arguments_that_cannot_be() -> None:
    w, x = pack_linear(torch.randn(4, 6)), torch.randn(2, 6)
    u = torch.randn(2, 4)
    for args, error, text in (
        ((torch.randn(2, 5), w), ValueError, r"last dimension must be 6, the in_features"),
        ((torch.tensor(1.0), w), ValueError, "x has no dimension"),
        ((x.double(), w), TypeError, "x is torch.float64"),
        ((x.to(BF16), w), TypeError, "x is torch.bfloat16, but must be torch.float32"),
        ((x.tolist(), w), TypeError, "x is list"),
        ((x, torch.randn(4, 6)), TypeError, "must come from pack_linear"),
        ((x, w.packed), TypeError, "must come from pack_linear"),
        ((x, w, torch.randn(5)), ValueError, r"bias has shape \(5,\)"),
        ((x, w, torch.randn(4).double()), TypeError, "bias is torch.float64"),
        ((x, w, None, "tanh"), ValueError, "post is 'tanh'"),
        ((x, w, None, "mul"), ValueError, "takes 1 of other and other2, not 0"),
        ((x, w, None, "mul", u, u), ValueError, "not 2"),
        ((x, w, None, "mul", None, u), ValueError, "takes 1"),
        ((x, w, None, "add_add", u), ValueError, "takes 2"),
        ((x, w, None, "silu", u), ValueError, "takes 0"),
        ((x, w, None, None, u), ValueError, "takes 0"),
        ((x, w, None, "mul", torch.randn(2, 5)), ValueError, "does not broadcast"),
        ((x, w, None, "mul", 3.0), TypeError, "other is float"),
    ):
        with pytest.raises(error, match=text):
            linear(*args)
    with pytest.raises(ValueError, match="up is PackedWeight"):
        linear_gate_up(x, w, pack_linear(torch.randn(5, 6)))
    with pytest.raises(ValueError, match=r"weights\[1\] is PackedWeight"):
        linear_concat(x, [w, pack_linear(torch.randn(4, 7))])
    with pytest.raises(ValueError, match="weights is empty"):
        linear_concat(x, [])
    with pytest.raises(ValueError, match="biases has 2 entries"):
        linear_concat(x, [w], [None, None])
    with pytest.raises(ValueError, match="rows has 4, but weight has 4 rows"):
        functional.weight_rows(w, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="rows has -1"):
        functional.weight_rows(w, torch.tensor([-1]))


@pytest.mark.parametrize("name", [*FUSIONS, "Linear2SiluMul"])
def test_what_is_no_linear(name: str) -> None:
    wrong = [nn.Identity()] * (2 if name == "Linear2SiluMul" else 1)
    with pytest.raises(TypeError, match=r"is Identity, but must be a torch.nn.Linear"):
        getattr(modules, name)(*wrong)
    with pytest.raises(TypeError, match="linear is Identity"):
        modules.Linear.from_linear(nn.Identity())  # type: ignore[arg-type]


def test_bytes_are_not_trusted() -> None:
    """Every length and every bit of the header: refused in words, or the same weight."""
    good = pack_linear(torch.randn(4, 6))
    x = torch.randn(2, 6)

    def over(packed: Tensor) -> Tensor:
        return linear(x, PackedWeight(packed, 4, 6, F32, F32))

    expected = over(good.packed)
    for length in (0, 1, 63, 64, 65, good.packed.numel() - 1):
        with pytest.raises(ValueError, match="weight"):
            over(good.packed[:length].clone())
    for bit in range(8 * 28):  # magic, n, k, dtype
        bad = good.packed.clone()
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="weight"):
            over(bad)
    assert_same_bits(over(good.packed.clone()), expected)
