"""Packed weights as parameters, and whole models: saved, loaded, copied, moved, unpacked."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lmfuse
from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import modules
from lmfuse.functional import PackedWeight, linear, pack_linear, weight_rows
from lmfuse.modules.pack import pack_model, unpack_model


def layer(dtype: torch.dtype = F32, n: int = 45, k: int = 70) -> tuple[nn.Linear, modules.Linear]:
    stock = nn.Linear(k, n).to(dtype)
    return stock, modules.Linear.from_linear(stock)


# --- one weight ----------------------------------------------------------------------------------


def test_unpacking_is_exact(isa: str, dtype: torch.dtype) -> None:
    """Every size around a panel and a line, NaN and all, from odd addresses."""
    for n, k in ((1, 1), (31, 15), (32, 16), (33, 17), (64, 33), (70, 300), (5, 1000)):
        w = torch.randint(-32768, 32767, (n, k), dtype=torch.int16).view(BF16)
        w = w.to(dtype) if dtype is not F16 else w.view(F16)
        assert_same_bits(pack_linear(w).unpack(), w)
        raw = torch.empty(w.nbytes + 1, dtype=torch.uint8)
        unaligned = torch.frombuffer(raw.numpy()[1:], dtype=dtype).view(n, k)
        unaligned.copy_(w)
        assert_same_bits(pack_linear(unaligned).unpack(), w)


def test_the_layout_depends_on_the_dtype_alone(dtype: torch.dtype) -> None:
    w = torch.randn(100, 70).to(dtype)
    first = pack_linear(w).packed
    for isa in lmfuse.available_isas():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with lmfuse.use_isa(isa):
                assert torch.equal(pack_linear(w).packed, first)


def test_a_packed_weight_is_a_tensor(dtype: torch.dtype) -> None:
    w = torch.randn(45, 70).to(dtype)
    packed = pack_linear(w)
    assert (packed.shape, packed.dtype, packed.device.type) == (w.shape, dtype, "cpu")
    assert (packed.numel(), packed.element_size(), packed.nbytes) == (
        45 * 70,
        dtype.itemsize,
        w.nbytes,
    )
    x = torch.randn(3, 70).to(dtype)
    assert_same_bits(x @ packed.T, x @ w.T)
    assert_same_bits(packed[3], w[3])
    assert_same_bits(packed + w, w + w)
    assert packed.tolist() == w.tolist()
    assert torch.equal(packed.sum(), w.sum())
    assert_same_bits(F.linear(x, packed), linear(x, packed))
    ids = torch.tensor([[0, 44], [31, 32]])
    assert_same_bits(F.embedding(ids, packed), w[ids])
    assert_same_bits(weight_rows(packed, ids.int()), w[ids])
    if dtype is not BF16:
        assert (packed.numpy() == w.numpy()).all()


def test_writing_into_a_packed_weight(dtype: torch.dtype) -> None:
    w = torch.randn(45, 70).to(dtype)
    packed, alias = pack_linear(w), w.clone()
    for change in (
        lambda t: t.mul_(2),
        lambda t: t.copy_(torch.ones(70)),
        lambda t: t.zero_(),
        lambda t: nn.init.constant_(t, 3.0),
        lambda t: torch.add(t, t, out=t),
        lambda t: t.uniform_(generator=torch.Generator().manual_seed(0)),
    ):
        assert change(packed) is packed
        change(alias)
        assert_same_bits(packed.unpack(), alias)
    other = pack_linear(w)
    for t, more in ((packed, other), (alias, w)):
        t[3:5, 1:4] = 0.5
        t[7:20] *= 2
        t[t > 1.5] = -1
        t[44] = more[1]
        plain = torch.zeros(2, 45, 70).to(dtype)
        plain[1] = t
        assert_same_bits(plain[1], alias if t is alias else packed.unpack())
    assert_same_bits(packed.unpack(), alias)
    packed.data = w
    assert_same_bits(packed.unpack(), w)
    packed.data = w.to(F16)
    assert packed.dtype is F16
    packed.data = torch.ones(2, 3)  # as transformers resizes embeddings
    assert packed.shape == (2, 3)
    assert_same_bits(packed.unpack(), torch.ones(2, 3))


def test_an_unpacked_copy_is_shared_until_it_changes() -> None:
    packed = pack_linear(torch.randn(4, 5))
    first = packed.unpack()
    assert packed.unpack() is first
    first.zero_()
    second = packed.unpack()
    assert second is not first
    assert second.any()
    packed.mul_(2)
    assert_same_bits(packed.unpack(), second * 2)
    with torch.inference_mode():
        inner = pack_linear(torch.randn(4, 5))
        assert inner.unpack().shape == (4, 5)


# --- one layer -----------------------------------------------------------------------------------


def test_state_dict(dtype: torch.dtype) -> None:
    stock, packed = layer(dtype)
    state = packed.state_dict()
    assert list(state) == ["weight", "bias"]
    for name, value in stock.state_dict().items():
        assert type(state[name]) is Tensor
        assert_same_bits(state[name], value)
    for options in ({}, {"assign": True}, {"strict": False}):
        other = modules.Linear(70, 45, dtype=dtype)
        other.load_state_dict(state, **options)
        assert type(other.weight) is PackedWeight
        assert_same_bits(other.weight.unpack(), stock.weight.detach())
    stock.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        modules.Linear(70, 46, dtype=dtype).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({"bias": state["bias"]})
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert_same_bits(again["weight"], stock.weight.detach())


def test_copies_and_pickles(dtype: torch.dtype) -> None:
    _, packed = layer(dtype)
    x = torch.randn(3, 70).to(dtype)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert type(other) is modules.Linear
        assert isinstance(other.weight, nn.Parameter)
        with torch.no_grad():
            assert_same_bits(other(x), packed(x))
            before = packed.weight.unpack().clone()
            other.weight.zero_()
            assert_same_bits(packed.weight.unpack(), before)


def test_dtypes_and_devices() -> None:
    stock, packed = layer()
    for move in (lambda m: m.to(BF16), lambda m: m.half(), lambda m: m.float()):
        stock, packed = move(stock), move(packed)
        assert type(packed.weight) is PackedWeight
        assert packed.weight.dtype is stock.weight.dtype
        assert_same_bits(packed.weight.unpack(), stock.weight.detach())
        x = torch.randn(3, 70).to(stock.weight.dtype)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), stock(x), rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        packed.double()
    packed.share_memory()
    meta = packed.to("meta")
    assert meta.weight.is_meta
    assert meta(torch.empty(3, 70, device="meta")).shape == (3, 45)


def test_assigned_weights_are_packed() -> None:
    stock, packed = layer()
    packed.weight = nn.Parameter(torch.ones(45, 70))
    assert type(packed.weight) is PackedWeight
    meta = modules.Linear(70, 45, device="meta")
    assert type(meta.weight) is nn.Parameter
    meta.load_state_dict(stock.state_dict(), assign=True)
    assert type(meta.weight) is PackedWeight
    double = modules.Linear(70, 45, dtype=torch.float64)
    x = torch.randn(3, 70, dtype=torch.float64)
    with torch.no_grad():
        assert_same_bits(double(x).to(F32), F.linear(x, double.weight, double.bias).to(F32))


def test_repr() -> None:
    _, packed = layer()
    assert repr(packed) == "Linear(in_features=70, out_features=45, bias=True, packed)"
    assert "PackedWeight(45, 70, dtype=torch.float32)" in repr(packed.weight)


# --- whole models --------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Fast(nn.Linear):
    """A subclass, of which we do not know what it does."""


class Toy(nn.Module):
    def __init__(self, embedding: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.embed = embedding(45, 64)
        self.a, self.b, self.fast = nn.Linear(64, 64), nn.Linear(64, 64), Fast(64, 64)
        self.again = self.a
        self.head = nn.Linear(64, 45, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fast(self.b(self.again(self.a(self.embed(ids))))))


IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled])
def test_a_model_packed_and_unpacked(dtype: torch.dtype, embedding: type[nn.Embedding]) -> None:
    model = Toy(embedding).to(dtype).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    count, names = (
        sum(p.numel() for p in model.parameters()),
        [n for n, _ in model.named_parameters()],
    )
    with torch.no_grad():
        expected = model(IDS)
        done = pack_model(model)
        assert done.packed == {
            "a": "packed",
            "b": "packed",
            "embed": "packed, tied",
            "head": "packed, tied",
        }
        assert "Fast" in done.stock["fast"]
        assert model.embed.weight is model.head.weight
        assert isinstance(model.embed, embedding)
        torch.testing.assert_close(model(IDS), expected, rtol=0.05, atol=0.05)
    assert sum(p.numel() for p in model.parameters()) == count
    assert [n for n, _ in model.named_parameters()] == names
    state = model.state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    for name, value in before.items():
        assert_same_bits(state[name], value)
    for other in (copy.deepcopy(model), _pickled(model)):
        assert other.embed.weight is other.head.weight
        other.to(BF16)
        assert other.embed.weight is other.head.weight
        assert other.embed.weight.dtype is BF16
    assert pack_model(model).packed == {}
    unpack_model(model)
    assert [type(m) for m in model.modules()] == kinds
    assert model.embed.weight is model.head.weight
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_stays_stock_says_why() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(8, 8) for name in ("hooked", "replaced", "shared", "normed")}
    )
    model["hooked"].weight.register_hook(lambda grad: None)
    model["replaced"].forward = lambda x: x
    model["tied"] = nn.Conv1d(8, 8, 1)
    model["tied"].weight = model["shared"].weight
    model["empty"] = nn.Linear(8, 8, device="meta")
    model["wide"] = nn.Linear(8, 8).double()
    nn.utils.parametrizations.weight_norm(model["normed"])
    done = pack_model(model)
    assert done.packed == {}
    for name, text in (
        ("hooked", "hooks"),
        ("replaced", "replaced on the instance"),
        ("shared", "shared with tied, a Conv1d"),
        ("empty", "on meta"),
        ("wide", "float64"),
    ):
        assert text in done.stock[name]


def test_a_failure_half_way_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy().eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calls = 0

    def fail(weight: Tensor) -> bool:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return False

    with pytest.raises(MemoryError):
        pack_model(model, keep=fail)
    assert not any(isinstance(m, modules.Linear | modules.Embedding) for m in model.modules())
    assert model.embed.weight is model.head.weight
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


def test_each_plain_weight_is_freed_at_once() -> None:
    """When a layer is packed, those before it have no plain weight left."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5)))
    most = 0

    def plain(_: Tensor) -> bool:
        nonlocal most
        shapes = [o for o in gc.get_objects() if type(o) is nn.Parameter and o.shape == (64, 64)]
        most = max(most, len(shapes) + sum(isinstance(m, modules.Linear) for m in model))
        return False

    alive = sum(type(o) is nn.Parameter and o.shape == (64, 64) for o in gc.get_objects())
    pack_model(model, keep=plain)
    assert most == alive


# Peak memory of packing: in a process of its own, because a peak is for life.
PEAK = """
import sys, torch
from torch import nn
from lmfuse.modules.pack import pack_model

def memory(field):  # ru_maxrss would begin with the peak of the process that started this one
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

largest, layers, hidden, inner = map(int, sys.argv[1:])
shapes = [(hidden, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
shapes = shapes * layers + [(largest, hidden)]
model = nn.ModuleList(
    nn.utils.skip_init(nn.Linear, k, n, bias=False, dtype=torch.bfloat16) for n, k in shapes
)
for module in model:
    module.weight.data.fill_(1.0)
pack_model(nn.Linear(8, 8))  # what the first call loads
start, size = memory("VmRSS"), max(m.weight.nbytes for m in model)
pack_model(model)
print((memory("VmHWM") - start) / size, sum(m.weight.nbytes for m in model))
"""


def _peak(*sizes: int) -> tuple[float, int]:
    output = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, sizes)], check=True, capture_output=True, text=True
    ).stdout.split()
    return float(output[0]), int(output[1])


def test_peak_memory_of_packing() -> None:
    """Beyond the model: at most the largest layer, twice."""
    beyond, total = _peak(40_000, 4, 1024, 4096)
    assert total > 150e6
    assert beyond < 2


@pytest.mark.slow
def test_peak_memory_of_packing_a_llama_of_a_billion() -> None:
    beyond, total = _peak(128_256, 16, 2048, 8192)
    assert total > 2.2e9
    assert beyond < 2
