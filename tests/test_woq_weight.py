"""What holds a quantized weight: its bytes, the module around them, and what neither takes."""

from __future__ import annotations

import copy
import io
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lmfuse
from helpers import BF16, DTYPES, F16, F32, assert_close, assert_same_bits
from lmfuse import modules
from lmfuse.functional import (
    copy_quantized,
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
from quantizing import COMPUTE, EXTRAS, check, kinds, product, quantized, values

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


def test_a_copy_lies_in_large_pages(isa: str) -> None:
    """Also of bytes in the middle of a file, as a checkpoint gives them."""
    for n, k in ((1, 1), (33, 70), (520, 65536)):
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = pack_quantized("int8", codes, torch.rand(n))
        file = torch.zeros(8 + len(packed), dtype=torch.uint8)
        file[8:] = packed
        own = copy_quantized(file[8:])
        assert torch.equal(own, packed)
        assert own.data_ptr() % (2 << 20 if len(own) > 32 << 20 else 64) == 0
        file[8:] = 0
        assert torch.equal(own, packed)
    for wrong in (packed.float(), packed[None], packed[::2], packed[:-1], packed[:0], None):
        with pytest.raises((TypeError, ValueError), match="packed"):
            copy_quantized(wrong)  # type: ignore[arg-type]


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
