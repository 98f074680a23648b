"""Quantized linear layers against float64 over the same codes, on every instruction set."""

from __future__ import annotations

import copy
import io
import random
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lmfuse
from helpers import BF16, DTYPES, F16, F32, LAYOUTS, assert_close, assert_same_bits
from lmfuse import functional, modules
from lmfuse.functional import (
    dequantize,
    pack_quantized,
    quantized_format,
    quantized_rows,
    unpack_quantized,
    woq_linear,
    woq_linear_concat,
    woq_linear_gate_up,
)
from lmfuse.functional.linear import UNFUSED
from lmfuse.functional.quantized import packed_bytes
from lmfuse.modules import QuantizedLinear
from lmfuse.reference import woq as reference

KINDS = ("int8", "int4", "nf4", "fp8")
COMPUTE = ("fp32", "bf16", "int8")
# What a weight may have besides codes and scales.
EXTRAS = {
    "int8": ("", "zeros", "offsets", "fractions", "g_idx", "zeros g_idx"),
    "int4": ("", "zeros", "offsets", "fractions", "g_idx", "zeros g_idx"),
    "nf4": ("", "g_idx"),
    "fp8": ("", "g_idx"),
}
OPERANDS = {"mul": 1, "add": 1, "add_add": 2, "silu_mul": 1}

kinds = pytest.mark.parametrize("kind", KINDS)


def quantized(
    kind: str, n: int, k: int, group: int = -1, extra: str = "", scale: torch.dtype = F32
) -> dict[str, Any]:
    """Arguments of pack_quantized: every code occurs."""
    if kind == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    elif kind == "fp8":
        codes = (torch.randn(n, k) * 0.01 * 10.0 ** torch.randint(0, 4, (n, k))).clamp(-448, 448)
        codes = codes.to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    if "g_idx" in extra and group == -1:
        group = 32
    groups = 1 if group == -1 else -(-k // group)
    low, high = (-128, 128) if kind == "int8" else (0, 16)
    q: dict[str, Any] = {"kind": kind, "codes": codes, "group_size": group}
    q["scales"] = (torch.rand(n, groups) + 0.1).div(k**0.5).to(scale)
    if "zeros" in extra:
        q["zeros"] = torch.randint(low, high, (n, groups))
    if "fractions" in extra:
        q["zeros"] = torch.rand(n, groups) * (high - low) + low
    if "offsets" in extra:
        q["offsets"] = torch.randn(n, groups).div(k**0.5).to(scale)
    if "g_idx" in extra:
        q["g_idx"] = (torch.arange(k) // group)[torch.randperm(k)]
    return q


def values(q: dict[str, Any], compute: str = "fp32") -> tuple[Tensor, Tensor]:
    """The weights in float64, and the magnitudes that their parts add up to."""
    wide = {**q, "scales": q["scales"].double()}
    table = torch.tensor(reference.NF4)
    if compute == "bf16" and lmfuse.isa() in ("avx512_bf16", "amx"):
        table = table.to(BF16)
    w = reference.dequantize(**wide, table=table.double())
    group = reference.groups_of(q["codes"].shape[1], q["group_size"], q.get("g_idx"))
    scale = wide["scales"].reshape(len(w), -1)[:, group]
    zeros, offsets = q.get("zeros"), q.get("offsets")
    size = q["codes"].double().abs() * scale if q["kind"] != "nf4" else scale
    if zeros is not None:
        size = size + zeros.double().abs().reshape(len(w), -1)[:, group] * scale
    if offsets is not None:
        size = size + offsets.double().abs().reshape(len(w), -1)[:, group]
    # int8 products work on codes raised by 128, int4 on codes without their middle.
    return w, size + (128 * scale if compute == "int8" else 8 * scale)


def seen(x: Tensor, q: dict[str, Any], compute: str, block_scales: bool = False) -> Tensor:
    """x as the arithmetic sees it, in float64."""
    if compute == "fp32":
        return x.double()
    if compute == "bf16":
        return x.to(BF16).double()
    if not block_scales:
        return reference.quantize_rows(x)
    group, g_idx = q["group_size"], q.get("g_idx")
    order = torch.arange(x.shape[-1]) if g_idx is None else g_idx.argsort(stable=True)
    blocks = min(256, x.shape[-1] if group == -1 else group)
    return reference.quantize_rows(x[..., order], blocks)[..., order.argsort()]


def check(
    y: Tensor,
    x: Tensor,
    q: dict[str, Any],
    bias: Tensor | None = None,
    compute: str = "fp32",
    block_scales: bool = False,
    post: str | None = None,
    *operands: Tensor,
) -> None:
    """As in test_linear.py: sums of K terms err by at most γ_K of their magnitudes."""
    (w, size), s = values(q, compute), seen(x, q, compute, block_scales)
    b = torch.zeros(len(w)).double() if bias is None else bias.double()
    z, scale = s @ w.T + b, s.abs() @ size.T + b.abs()
    u = [t.double() for t in operands]
    expected = UNFUSED[post](z, *u) if post else z
    if post in ("mul", "silu_mul"):
        scale = 1.1 * scale * u[0].abs()
    elif u:
        scale = scale + sum(t.abs() for t in u)
    assert_close(y, expected, ulps=(x.shape[-1] + 32) / 2, scale=1.2 * scale)


def product(x: Tensor, packed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return woq_linear(
        x, packed, *args, out_features=quantized_format(packed).out_features, **kwargs
    )


# --- what is stored ------------------------------------------------------------------------------


@kinds
def test_round_trip(isa: str, kind: str) -> None:
    """Codes, scales and zeros come back exactly; their bytes are the same on every level."""
    for n, k, group in ((1, 1, -1), (33, 70, 32), (40, 300, -1), (70, 513, 128), (32, 1024, 512)):
        for extra in EXTRAS[kind]:
            for scale in DTYPES:
                q = quantized(kind, n, k, group, extra, scale)
                packed = pack_quantized(**q)
                got = unpack_quantized(packed)
                assert torch.equal(got.codes.view(torch.uint8), q["codes"].view(torch.uint8))
                assert torch.equal(got.scales.double(), q["scales"].double())
                for name in ("zeros", "offsets", "g_idx"):
                    mine, theirs = getattr(got, name), q.get(name)
                    assert (mine is None) == (theirs is None)
                    if theirs is not None:
                        assert torch.equal(mine.double(), theirs.double())
                assert torch.equal(got.pack(), packed)
                f = quantized_format(packed)
                assert (f.out_features, f.in_features) == (n, k)
                assert (f.kind, f.group_size) == (kind, q["group_size"])
                assert packed_bytes(f) == packed.numel()
                with lmfuse.use_isa("generic"):
                    assert torch.equal(pack_quantized(**q), packed)


@kinds
def test_values(isa: str, kind: str) -> None:
    """(q - zero) scale, rounded once for integers; rows of it are what an embedding reads."""
    for extra in EXTRAS[kind]:
        q = quantized(kind, 45, 300, 64, extra)
        packed = pack_quantized(**q)
        w = dequantize(packed)
        once = "fractions" not in extra and "offsets" not in extra
        if once:
            assert_same_bits(w, reference.dequantize(**q))
        assert_close(w, values(q)[0], ulps=0.5 if once else 1.5, scale=0 if once else values(q)[1])
        rows = torch.tensor([[3, 44], [0, 3]], dtype=torch.int32)
        assert_same_bits(quantized_rows(packed, rows, 45, 300), w[rows])
    half = quantized("int4", 8, 40, 32, "offsets", F16)  # as GGUF's Q4_1: d q + m, in fp32
    d, m = (half[name].float().repeat_interleave(32, 1)[:, :40] for name in ("scales", "offsets"))
    assert_same_bits(dequantize(pack_quantized(**half)), half["codes"] * d + m)


def test_uneven_groups_of_columns(isa: str) -> None:
    """g_idx may leave groups short, even empty; the columns keep their scales."""
    q = quantized("int4", 40, 100, 64, "zeros")
    q["g_idx"] = torch.tensor([0] * 40 + [1] * 60)[torch.randperm(100)]
    for g_idx in (q["g_idx"], torch.ones(100).long().index_fill(0, torch.arange(50), 0)):
        q["g_idx"] = g_idx
        packed, x = pack_quantized(**q), torch.randn(5, 100)
        assert torch.equal(unpack_quantized(packed).g_idx.long(), g_idx)
        assert_same_bits(dequantize(packed), reference.dequantize(**q))
        for compute in COMPUTE:
            check(product(x, packed, compute=compute), x, q, None, compute)


# --- products ------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("compute", COMPUTE)
def test_products(isa: str, kind: str, compute: str) -> None:
    """Random N and K, groups, extras, dtypes, layouts of x, and what follows the product."""
    if compute == "int8" and kind in ("nf4", "fp8"):
        packed = pack_quantized(**quantized(kind, 4, 40))
        with pytest.raises(ValueError, match="int8 and int4 weights"):
            product(torch.randn(2, 40), packed, compute=compute)
        return
    pick = random.Random(f"{isa} {kind} {compute}")
    posts = [None, *UNFUSED]
    for round_ in range(24):
        n, k, m = pick.randint(1, 150), pick.randint(1, 700), pick.choice([1, 2, 5, 13, 40])
        dtype = DTYPES[round_ % 3]
        group = pick.choice([-1, 32, 64, 128, 256, 512])
        extra, scale = EXTRAS[kind][round_ % len(EXTRAS[kind])], pick.choice(DTYPES)
        q = quantized(kind, n, k, group, extra, scale)
        place = LAYOUTS[pick.choice(list(LAYOUTS))]
        x = place(torch.randn(m, k).to(dtype))
        bias = pick.choice([None, torch.randn(n).to(pick.choice(DTYPES))])
        post = posts[round_ % len(posts)]
        u = [place(torch.randn(m, n).to(dtype)) for _ in range(OPERANDS.get(post or "", 0))]
        how = {"compute": compute, "block_scales": pick.random() < 0.5}
        y = product(x, pack_quantized(**q), bias, post, *u, **how)
        assert y.dtype is dtype
        check(y, x, q, bias, how["compute"], how["block_scales"], post, *u)


@kinds
def test_fp32_is_the_plain_layer_over_the_values(isa: str, kind: str) -> None:
    for extra in EXTRAS[kind]:
        if "g_idx" in extra:  # sums in another order
            continue
        q = quantized(kind, 70, 600, 128, extra, F16)
        packed = pack_quantized(**q)
        plain = functional.pack_linear(dequantize(packed))
        for m in (1, 7, 64):
            x = torch.randn(m, 600)
            assert_same_bits(product(x, packed, compute="fp32"), functional.linear(x, plain))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bits_of_a_row_depend_on_nothing_else(isa: str, kind: str, compute: str) -> None:
    for group, extra in ((-1, ""), (32, "zeros"), (128, "")):
        q = quantized(kind, 101, 700, group, extra)
        packed, x, u = pack_quantized(**q), torch.randn(600, 700), torch.randn(600, 101)
        how: dict[str, Any] = {"compute": compute, "block_scales": group == 128}
        torch.set_num_threads(1)
        alone = [product(x[i : i + 1], packed, None, "add", u[i : i + 1], **how) for i in range(40)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for m in (2, 13, 40, 600):
                y = product(x[:m], packed, None, "add", u[:m], **how)
                assert_same_bits(y[:40], torch.cat(alone)[:m])
        for m in (513, 530):  # beyond what shares a pass over the weight
            rest = product(x[512:m], packed, None, "add", u[512:m], **how)
            assert_same_bits(product(x[:m], packed, None, "add", u[:m], **how)[512:], rest)


@pytest.mark.parametrize("compute", COMPUTE)
def test_gate_up_and_concat(isa: str, compute: str) -> None:
    for kind, group, extra in (("int8", -1, ""), ("int4", 32, "zeros"), ("int4", 128, "")):
        a, b = (quantized(kind, 70, 200, group, extra) for _ in range(2))
        c = quantized(kind, 7, 200, group, "")
        pa, pb, pc = (pack_quantized(**q) for q in (a, b, c))
        bias = torch.randn(70)
        how: dict[str, Any] = {"compute": compute, "block_scales": group == 32}
        for m in (1, 30):
            x = torch.randn(m, 200)
            y = woq_linear_gate_up(x, pa, pb, bias, out_features=70, **how)
            gate, up = product(x, pa, bias, "silu", **how), product(x, pb, **how)
            torch.testing.assert_close(y, gate * up, rtol=1e-5, atol=1e-6)
            sizes = [70, 7, 70]
            parts = woq_linear_concat(
                x, [pa, pc, pb], [None, None, bias], out_features=sizes, **how
            )
            for part, packed, b_ in zip(parts, (pa, pc, pb), (None, None, bias), strict=True):
                assert_same_bits(part, product(x, packed, b_, **how))
            assert_same_bits(woq_linear_concat(x, [pc], out_features=[7], **how)[0], parts[1])
        x = torch.randn(0, 200)
        assert woq_linear_gate_up(x, pa, pb, out_features=70, **how).shape == (0, 70)


def test_leading_dimensions_and_broadcasting(isa: str) -> None:
    q = quantized("int8", 21, 40)
    packed = pack_quantized(**q)
    for lead in ((), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)):
        x = torch.randn(*lead, 40)
        y = product(x, packed, compute="fp32")
        assert y.shape == (*lead, 21)
        check(y.reshape(-1, 21), x.reshape(-1, 40), q)
    x = torch.randn(2, 3, 40)
    z = product(x, packed, compute="fp32")
    for shape in ((21,), (1, 1, 21), (2, 3, 1), (), (5, 2, 3, 21)):
        u = torch.randn(shape)
        torch.testing.assert_close(product(x, packed, None, "mul", u, compute="fp32"), z * u)
    assert product(x.to(BF16), packed, None, "mul", torch.randn(21)).dtype is F32  # as torch


@pytest.mark.parametrize("compute", COMPUTE)
def test_special_values(isa: str, compute: str) -> None:
    """NaN and infinity of a row stay in it; a row of zeros gives the bias."""
    q = quantized("int8", 40, 300, 64, "zeros")
    packed, x, bias = pack_quantized(**q), torch.randn(20, 300), torch.randn(40)
    x[5] = 0.0
    plain = product(x, packed, bias, compute=compute)
    assert_same_bits(plain[5], bias)
    for value in (torch.nan, torch.inf, -torch.inf):
        x2 = x.clone()
        x2[3, 299] = value
        y = product(x2, packed, bias, compute=compute)
        assert not y[3].isfinite().any()
        others = torch.arange(20) != 3
        assert_same_bits(y[others], plain[others])
        if compute == "int8":
            y = product(x2, packed, bias, compute=compute, block_scales=True)
            assert y[3].isnan().all()


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_of_integers(isa: str, code: int) -> None:
    """One scale for 70000 columns: more than int32 holds at once, where all are largest."""
    k = 70000
    packed = pack_quantized("int8", torch.full((2, k), code, dtype=torch.int8), torch.ones(2, 1))
    x = torch.ones(14, k)
    x[:, ::2] = torch.where(torch.arange(14) % 2 == 1, -1.0, 1.0)[:, None]
    expected = torch.where(torch.arange(14) % 2 == 1, 0.0, float(k * code)).expand(2, 14).T
    for m in (1, 14):
        y = product(x[:m], packed, compute="int8")
        torch.testing.assert_close(y, expected[:m], rtol=1e-6, atol=0.02 * abs(code))


@pytest.mark.parametrize(("kind", "group"), [("int8", -1), ("int8", 64), ("int4", 32)])
def test_eight_outliers_leave_the_rest_its_scale(isa: str, kind: str, group: int) -> None:
    """int8 compute is as exact with them as without, and takes them as they are."""
    q = quantized(kind, 70, 300, group, "zeros")
    packed, x = pack_quantized(**q), torch.randn(14, 300)
    w = dequantize(packed).double()
    large = torch.zeros_like(x)
    for row in range(14):
        large[row, torch.randperm(300)[: row % 9]] = 1000 * torch.randn(row % 9)
    y = product(x + large, packed, compute="int8").double()
    plain = product(x, packed, compute="int8").double()
    rounding = 1e-6 * (large.double().abs() @ w.abs().T)
    usual = (plain - x.double() @ w.T).square().mean().sqrt()
    assert ((y - (x + large).double() @ w.T).abs() < 7 * usual + rounding).all()
    assert_same_bits(y[5:7].float(), product((x + large)[5:7], packed, compute="int8"))


def test_autocast() -> None:
    packed, x = pack_quantized(**quantized("int8", 20, 30)), torch.randn(4, 30)
    with torch.autocast("cpu", BF16):
        y = product(x, packed)
    assert_same_bits(y, product(x.to(BF16), packed))


# --- modules -------------------------------------------------------------------------------------


def layer(kind: str = "int4", n: int = 21, k: int = 64, bias: bool = True, **kw: Any) -> Any:
    packed = pack_quantized(**quantized(kind, n, k, 32))
    return QuantizedLinear(packed, torch.randn(n) if bias else None, **kw)


def test_module_keeps_what_it_holds() -> None:
    """state_dict, deepcopy, torch.save, half(), safetensors' plain tensors."""
    m = layer(compute="int8", block_scales=True)
    x = torch.randn(2, 3, 64)
    y = m(x)
    assert m.format.kind == "int4"
    state = {name: t.clone() for name, t in m.state_dict().items()}
    assert {name: t.dtype for name, t in state.items()} == {"weight": torch.uint8, "bias": F32}
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    other = layer(compute="int8", block_scales=True)
    other.load_state_dict(state)
    empty = QuantizedLinear.placeholder(m.format, F32, "int8", True)
    assert empty.weight.is_meta
    empty.load_state_dict(state, assign=True)
    for same in (copy.deepcopy(m), torch.load(file, weights_only=False), other, empty):
        assert_same_bits(same(x), y)
        assert same.format == m.format
        assert same.dequantize().equal(m.dequantize())
    half = copy.deepcopy(m).to(BF16)
    assert (half.weight.dtype, half.bias.dtype) == (torch.uint8, BF16)
    assert half(x.to(BF16)).dtype is BF16
    assert "int4, group_size=32, compute=int8" in repr(m)


def test_fusions_over_quantized_layers() -> None:
    m, x, u = layer(), torch.randn(5, 64), torch.randn(5, 21)
    z = m(x)
    with torch.no_grad():
        for name, post, count in (
            ("LinearSilu", "silu", 0),
            ("LinearRelu", "relu", 0),
            ("LinearGelu", "gelu", 0),
            ("LinearNewGelu", "gelu_tanh", 0),
            ("LinearMul", "mul", 1),
            ("LinearAdd", "add", 1),
            ("LinearSiluMul", "silu_mul", 1),
            ("LinearAddAdd", "add_add", 2),
        ):
            y = getattr(modules, name)(m)(x, *[u] * count)
            torch.testing.assert_close(y, UNFUSED[post](z, *[u] * count), rtol=1e-5, atol=1e-6)
        other, third = layer(bias=False), layer("int8", n=8)
        both = modules.Linear2SiluMul(m, other)
        torch.testing.assert_close(both(x), F.silu(z) * other(x), rtol=1e-5, atol=1e-6)
        for rest in ((other,), (other, third), (nn.Linear(64, 7),)):
            for part, one in zip(modules.ConcatLinear(m, *rest)(x), (m, *rest), strict=True):
                assert_same_bits(part, one(x))


def test_a_quantized_layer_refuses_a_backward() -> None:
    y = layer()(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"lmfuse\.woq has no backward"):
        y.sum().backward()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = modules.Linear2SiluMul(layer(n=96), layer(n=96))
        self.down = modules.LinearAdd(layer("int8", 64, 96, compute="int8"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x), x)


def test_compile_export_trace() -> None:
    net, x = Net().eval(), torch.randn(2, 7, 64)
    with torch.no_grad():
        y = net(x)
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
        assert_same_bits(compiled(x), y)
        assert_same_bits(compiled(x[:, :3]), net(x[:, :3]))
        length = torch.export.Dim("length", min=2, max=64)
        program = torch.export.export(net, (x,), dynamic_shapes=({1: length},))
        assert_same_bits(program.module()(x[:, :4]), net(x[:, :4]))
        assert_same_bits(torch.jit.freeze(torch.jit.trace(net, x))(x), y)


# --- bad input -----------------------------------------------------------------------------------


def test_weights_that_cannot_be_packed() -> None:
    q = quantized("int4", 6, 70, 32)
    nan = q["scales"].clone()
    nan[5, 2] = torch.nan
    nan8 = torch.full((6, 70), torch.nan).to(torch.float8_e4m3fn)
    g_idx = torch.arange(70) // 32
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"kind": "int5"}, ValueError, "kind is 'int5'"),
        ({"codes": q["codes"].tolist()}, TypeError, "codes is list"),
        ({"codes": q["codes"].char()}, TypeError, "codes is torch.int8"),
        ({"codes": q["codes"][0]}, ValueError, "two dimensions"),
        ({"codes": q["codes"][:0]}, ValueError, "neither empty"),
        ({"codes": q["codes"] + 16}, ValueError, "a code of int4 is 0 … 15"),
        ({"codes": q["codes"].to("meta")}, ValueError, "codes is on meta"),
        ({"kind": "fp8", "codes": nan8}, ValueError, "codes has NaN"),
        ({"scales": q["scales"][:, :2]}, ValueError, r"scales has shape \(6, 2\)"),
        ({"scales": q["scales"][:, 0]}, ValueError, r"must have \(6, 3\)"),
        ({"scales": q["scales"].double()}, TypeError, "scales is torch.float64"),
        ({"scales": nan}, ValueError, "scales has NaN or infinity"),
        ({"scales": q["scales"] / 0}, ValueError, "scales has NaN or infinity"),
        ({"zeros": q["scales"][:5]}, ValueError, r"zeros has shape \(5, 3\)"),
        ({"zeros": nan}, ValueError, "zeros has NaN"),
        ({"offsets": nan}, ValueError, "offsets has NaN"),
        ({"zeros": q["scales"], "offsets": q["scales"]}, ValueError, "one or the other"),
        ({"kind": "nf4", "zeros": q["scales"]}, ValueError, "nf4 has neither"),
        ({"group_size": 48}, ValueError, "group_size is 48"),
        ({"group_size": 16}, ValueError, "group_size is 16"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"group_size": 64}, ValueError, r"scales has shape \(6, 3\), but must have \(6, 2\)"),
        ({"g_idx": g_idx.float()}, TypeError, "g_idx must be"),
        ({"g_idx": g_idx[:69]}, ValueError, r"g_idx has shape \(69,\)"),
        ({"g_idx": g_idx + 1}, ValueError, "there are 3 groups"),
        ({"g_idx": g_idx - 1}, ValueError, "there are 3 groups"),
        ({"g_idx": g_idx * 0}, ValueError, "gives group 0 70 columns"),
        ({"g_idx": g_idx, "group_size": -1}, ValueError, "there is one group"),
    ]
    for changes, error, text in cases:
        with pytest.raises(error, match=text):
            pack_quantized(**{**q, **changes})


def test_arguments_that_cannot_be() -> None:
    packed, x, u = pack_quantized(**quantized("int4", 4, 6)), torch.randn(2, 6), torch.randn(2, 4)
    act = pack_quantized(**quantized("int4", 4, 64, 32, "g_idx"))
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: product(torch.randn(2, 5), packed), ValueError, r"\[\.\.\., 6\]"),
        (lambda: product(x.double(), packed), TypeError, "x is torch.float64"),
        (lambda: product(torch.tensor(1.0), packed), ValueError, "x has no dimension"),
        (lambda: product(x, packed, torch.randn(5)), ValueError, r"bias has shape \(5,\)"),
        (lambda: product(x, packed, compute="int4"), ValueError, "compute is 'int4'"),
        (lambda: product(x, packed, None, "tanh"), ValueError, "post is 'tanh'"),
        (lambda: product(x, packed, None, "mul"), ValueError, "takes 1"),
        (lambda: product(x, packed, None, "relu", u), ValueError, "takes 0"),
        (lambda: product(x, packed, None, "mul", u[:, :3]), ValueError, "does not broadcast"),
        (lambda: woq_linear(x, packed, out_features=5), ValueError, "4 output channels, not 5"),
        (lambda: woq_linear(x, u, out_features=4), TypeError, "weight is torch.float32"),
        (lambda: quantized_format(torch.randn(3)), TypeError, "pack_quantized"),
        (lambda: quantized_format([1]), TypeError, "packed is list"),
        (lambda: woq_linear_concat(x, [], out_features=[]), ValueError, "weights is empty"),
        (lambda: woq_linear_concat(x, [packed], out_features=[4, 4]), ValueError, "1 weights"),
        (
            lambda: woq_linear_gate_up(torch.randn(2, 64), act, act, out_features=4),
            ValueError,
            "no order of columns",
        ),
        (
            lambda: quantized_rows(packed, torch.tensor([4]), 4, 6),
            ValueError,
            "rows has 4, but packed has 4",
        ),
        (lambda: quantized_rows(packed, torch.tensor([0.5]), 4, 6), TypeError, "rows is"),
        (lambda: QuantizedLinear(packed, torch.randn(5)), ValueError, r"bias has shape \(5,\)"),
    ]
    for run, error, text in cases:
        with pytest.raises(error, match=text):
            run()


def test_hostile_bytes() -> None:
    """Whatever a header says, it is refused, or its length bears it out; no byte leads astray."""
    packed = pack_quantized(**quantized("int4", 40, 100, 32, "zeros g_idx"))
    x = torch.randn(2, 100)
    for bad, text in (
        (packed[:40], "it has 40 bytes"),
        (packed[:-1], "but its header"),
        (torch.cat((packed, packed[:1])), "but its header"),
        (packed.flip(0), "header is unknown"),
    ):
        with pytest.raises(ValueError, match=text):
            product(x, bad.contiguous())
    names = {8: "q", 16: "q", 24: "q", 32: "q", 40: "i", 44: "i", 48: "i", 52: "i"}
    for place, code in names.items():
        (now,) = struct.unpack_from(code, bytes(packed[:64].tolist()), place)
        most = 2 ** (63 if code == "q" else 31) - 1
        for value in {-1, 0, 1, 3, 31, 33, 2**24 + 1, 2**31 - 1, most, -most} - {now}:
            bad = packed.clone()
            raw = struct.pack(code, value)
            bad[place : place + len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
            try:
                woq_linear(x, bad, out_features=40)  # another format of the same length
            except ValueError as error:
                text = str(error)
                assert any(t in text for t in ("damaged", "asks for", "x must be", "not 40"))
    wild = packed.clone()
    wild[-400:] = 0x7F  # the order of the columns
    for bad in (wild, packed.clone().index_fill_(0, torch.arange(len(wild) - 400, len(wild)), 255)):
        dequantize(bad)
        unpack_quantized(bad)
        product(x, bad)
