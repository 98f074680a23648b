"""Rotary embedding under torch: opcheck, compile, export, trace, autocast and autograd."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from lmfuse.functional import rotary_embedding, rotate, rotate_qk, rotate_qkv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def table(rows: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, width) * 6.28
    return angles.sin(), angles.cos()


def op_calls():
    ops, (sin, cos) = torch.ops.lmfuse, table(9, 8)
    q, k = heads(2, 5, 4, 16, dtype=torch.bfloat16), heads(2, 5, 2, 16, dtype=torch.bfloat16)
    rows = torch.rand(1, 5, 16)
    each, start = torch.randint(9, (2, 5)), torch.tensor([[4]])
    first = q.transpose(1, 2), k.transpose(1, 2)
    for positions in (None, each, start):
        yield ops.rope.default, (q, sin, cos, positions, 16, True, False)
        yield ops.rope_qk.default, (q, k, sin, cos, positions, 12, False, False)
        yield ops.rope_qk_.default, (q.clone(), k.clone(), sin, cos, positions, 16, True)
        yield ops.rope_qkv.default, (q.flatten(2), sin, cos, positions, 2, 16, 16, True)
    yield ops.rope.default, (first[0], rows, rows, None, 16, True, True)
    yield ops.rope_qk.default, (*first, rows, rows, None, 16, False, True)
    yield ops.rope_qk.default, (first[0].contiguous(), first[1], rows, rows, None, 16, True, True)
    yield ops.rope.default, (q[:, :0], sin, cos, None, 16, True, False)
    yield ops.rope_qk_.default, (q[:, ::2].clone(), k[:, ::2], sin, cos, None, 16, True)
    yield ops.rope_qkv.default, (q.flatten(2)[:1, :1], sin, cos, start, 2, 16, 6, False)


def test_opcheck():
    for op, arguments in op_calls():
        torch.library.opcheck(op, arguments)


class Rotations(torch.nn.Module):
    """Every form, from one projection, so that nothing is written that the caller holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 8 * 16)
        self.sin, self.cos = table(64, 16)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(x)
        sin, cos = self.sin, self.cos
        q, k, v = rotate_qkv(qkv, sin, cos, 4, 16, 16, True, position_ids)
        q2, k2 = rotate_qk(q, k, sin, cos, 10, False, position_ids)
        q3 = rotate(q.transpose(1, 2), sin, cos, 16, True, position_ids, heads_first=True)
        q4, k4 = rotary_embedding(q + 1, k + 1, sin, cos, 16, False, position_ids)
        return q, k, v, q2, k2, q3, q4, k4


@pytest.fixture
def module():
    return Rotations().eval()


def inputs(batch: int, seq: int) -> tuple[Tensor, Tensor]:
    return heads(batch, seq, 8), torch.randint(64, (batch, seq))


def assert_same(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.stride() == e.stride()
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


SIZES = ((2, 5), (3, 7), (2, 16), (5, 2))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(module, backend):
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in SIZES:
            arguments = inputs(*size)
            assert_same(compiled(*arguments), module(*arguments))


def test_compile_rotates_the_callers_tensors():
    sin, cos = table(9, 8)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def rotated(q, k):
        return rotary_embedding(q, k, sin, cos, 16, True)

    for grad in (False, True):
        q, k = heads(2, 5, 4, 16), heads(2, 5, 2, 16)
        expected = rotate_qk(q, k, sin, cos, 16, True)
        with torch.set_grad_enabled(grad):
            result = rotated(q, k)
        assert result[0] is q
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])


def test_export(module):
    batch, seq = torch.export.Dim("batch", min=2), torch.export.Dim("seq", min=2)
    shapes = ({0: batch, 1: seq}, {0: batch, 1: seq})
    with torch.no_grad():
        exported = torch.export.export(module, inputs(2, 5), dynamic_shapes=shapes).module()
        for size in SIZES:
            arguments = inputs(*size)
            assert_same(exported(*arguments), module(*arguments))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of each check of a shape
def test_jit_trace(module):
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, inputs(2, 5), check_trace=False))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for size in (*SIZES, (1, 1)):
            arguments = inputs(*size)
            assert_same(loaded(*arguments), module(*arguments))
        with pytest.raises(RuntimeError, match=r"position_ids.* 64 rows"):
            loaded(heads(1, 2, 8), torch.tensor([[63, 64]]))


def test_autocast(module):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = module(*inputs(2, 5))
    assert {r.dtype for r in results} == {torch.bfloat16}


def test_inference_mode(module):
    arguments = inputs(2, 5)
    with torch.no_grad():
        expected = module(*arguments)
    with torch.inference_mode():
        assert_same(module(*arguments), expected)


@pytest.mark.parametrize("form", range(8))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_backward_is_refused(module, compiled, form):
    arguments = inputs(2, 5)
    with torch.no_grad():
        expected = module(*arguments)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    results = run(*arguments)
    assert_same(results, expected)
    with pytest.raises(RuntimeError, match="has no backward"):
        results[form].sum().backward()
