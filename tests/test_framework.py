"""Every op and function under what torch does to models: compile, export, trace, autograd …"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import functional
from samples import FUNCTIONS, PENDING, SAMPLES

functions = pytest.mark.parametrize("name", FUNCTIONS)


class Block(nn.Module):
    """A function with a weight that requires grad, as in a model."""

    def __init__(self, name: str, n: int = 36) -> None:
        super().__init__()
        self.function = FUNCTIONS[name]
        self.weight = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def op_of(name: str) -> str:
    """What a refused backward of this function must name."""
    return {"fast_layer_norm": "layer_norm"}.get(name, name.split()[0])


def test_every_op_has_samples() -> None:
    prefix = "lmfuse::"
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix)]
    with_tensors = {
        s.name.removeprefix(prefix)
        for s in schemas
        if any("Tensor" in str(a.type) for a in s.arguments)
    }
    # None of torch.compile's graphs holds these, but the modules in place of a stack of layers.
    internal = {"refuse_backward", "limit_read", "limit_copy", "limit_peak"}
    internal |= {"decoder_open", "decoder_open_caches", "decoder_open_ends"}
    internal |= {"decoder", "decoder_logits", "decoder_indirect_step"}
    assert with_tensors - internal - PENDING == set(SAMPLES)
    for op in PENDING:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"lmfuse::{op}", "Meta"), op


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The bytes lie in a block of large pages, at an offset that no fake knows.
    if op in ("linear_pack", "woq_pack", "woq_copy"):
        tests.remove("test_faketensor")
    else:
        tests.append("test_aot_dispatch_dynamic")
    for args in SAMPLES[op]():
        torch.library.opcheck(getattr(torch.ops.lmfuse, op).default, args, test_utils=tests)


@pytest.mark.parametrize("op", SAMPLES)
def test_meta(op: str) -> None:
    """Meta tensors give meta tensors of the same shape and strides; a mixture is refused."""
    for args in SAMPLES[op]():
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        overload = getattr(torch.ops.lmfuse, op).default
        real, fake = overload(*args), overload(*meta)
        reals = real if isinstance(real, tuple) else (real,)
        fakes = fake if isinstance(fake, tuple) else (fake,)
        for a, b in zip(reals, fakes, strict=True):
            if a is not None:
                assert b.is_meta
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        mixed = [*args]
        last = max(i for i, a in enumerate(args) if isinstance(a, Tensor))
        mixed[last] = mixed[last].to("meta")
        if last:
            with pytest.raises(ValueError, match=r"is on meta, but \w+ is on cpu"):
                overload(*mixed)


@functions
@pytest.mark.parametrize("grad", [False, True])
def test_compile(name: str, grad: bool) -> None:
    block = Block(name)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for rows in (3, 4, 7):
            x = torch.randn(rows, 5, 36)
            assert_same_bits(compiled(x).detach(), block(x).detach())


def test_inductor() -> None:
    def chain(x: Tensor, w: Tensor) -> Tensor:
        for function in FUNCTIONS.values():
            x = function(x, w)
        return x

    x, w = torch.randn(3, 36), torch.randn(36)
    with torch.no_grad():
        compiled = torch.compile(chain, fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x, w), chain(x, w), rtol=1e-4, atol=1e-4)


@functions
@pytest.mark.parametrize("grad", [False, True])
def test_export(name: str, grad: bool) -> None:
    block = Block(name)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, (torch.randn(3, 36),), dynamic_shapes=({0: rows},))
        assert any("lmfuse" in str(node.target) for node in program.graph.nodes)
        x = torch.randn(9, 36)
        assert_same_bits(program.module()(x).detach(), block(x).detach())


@functions
@pytest.mark.parametrize("grad", [False, True])
def test_trace_freeze_save_load(name: str, grad: bool) -> None:
    block = Block(name).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.freeze(torch.jit.trace(block, torch.randn(3, 36)))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        x = torch.randn(9, 36)
        assert_same_bits(loaded(x).detach(), block(x).detach())


@functions
def test_inference_mode(name: str) -> None:
    block, x = Block(name), torch.randn(3, 36)
    with torch.inference_mode():
        y = block(x)
        assert y.is_inference()
    assert_same_bits(y.clone(), block(x).detach())


@functions
def test_forward_does_not_depend_on_grad_mode(name: str) -> None:
    block = Block(name)
    x = torch.randn(3, 36, requires_grad=True)
    y = block(x)
    assert y.requires_grad
    with torch.no_grad():
        plain = block(x)
    assert not plain.requires_grad
    assert_same_bits(y.detach(), plain)


@functions
@pytest.mark.parametrize("wanted", ["weight", "input", "both"])
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_is_refused(name: str, wanted: str, compiled: bool) -> None:
    block = Block(name)
    block.weight.requires_grad_(wanted != "input")
    x = torch.randn(3, 36, requires_grad=wanted != "weight")
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    loss = run(x).sum()
    with pytest.raises(RuntimeError, match=rf"lmfuse.{op_of(name)}_? has no backward.*no_grad"):
        loss.backward()
    assert block.weight.grad is None
    assert x.grad is None


ADD = {"rms": functional.add_rms_norm, "layer": functional.add_layer_norm}


@pytest.mark.parametrize("add", ADD)
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_through_the_written_residual_is_refused(add: str, compiled: bool) -> None:
    """x + residual depends on x although the residual's own tensor asked for no gradient."""

    def function(residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return ADD[add](residual, x, None, None, add_back=True), residual

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    x = torch.randn(3, 36, requires_grad=True)
    residual = torch.randn(3, 36)
    expected = (residual + x).detach()
    _, written = run(residual, x)
    assert written is residual
    assert_same_bits(residual.detach(), expected)
    with pytest.raises(RuntimeError, match=rf"lmfuse.add_{add}_norm_ has no backward"):
        residual.sum().backward()
    assert x.grad is None


def test_a_leaf_residual_is_not_written() -> None:
    residual = torch.randn(3, 36, requires_grad=True)
    with pytest.raises(ValueError, match="residual is written in place, but a leaf"):
        functional.add_rms_norm(residual, torch.randn(3, 36), None, add_back=True)


@functions
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """A norm keeps the dtype of its input, whatever its weight has."""
    block, x = Block(name), torch.randn(3, 36).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = block(x)
    expected = F32 if name.endswith(("mul", "tanh")) else dtype
    assert y.dtype is expected
    assert y.isfinite().all()


def test_autocast_of_mixed_dtypes() -> None:
    x, residual = torch.randn(3, 36).to(BF16), torch.randn(3, 36)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        for add_back in (False, True):
            y = functional.add_rms_norm(residual.clone(), x, None, add_back=add_back)
            assert_same_bits(y, functional.add_rms_norm(residual.clone(), x.float(), None))
            z = functional.add_layer_norm(residual.clone(), x, None, None, add_back=add_back)
            assert_same_bits(z, functional.add_layer_norm(residual.clone(), x.float(), None, None))
        assert_same_bits(functional.silu_mul(x, residual), functional.silu_mul(x.float(), residual))
        assert_same_bits(functional.gelu_mul(residual, x), functional.gelu_mul(residual, x.float()))


# --- bad input ------------------------------------------------------------------------------------

X, W = (3, 36), (36,)
ALL: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "rms_norm": (functional.rms_norm, {"hidden_states": X, "weight": W}),
    "layer_norm": (functional.layer_norm, {"hidden_states": X, "weight": W, "bias": W}),
    "add_rms_norm": (functional.add_rms_norm, {"residual": X, "x": X, "weight": W}),
    "add_layer_norm": (functional.add_layer_norm, {"residual": X, "x": X, "weight": W, "bias": W}),
    "silu_mul": (functional.silu_mul, {"x": X, "y": X}),
    "gelu_mul": (functional.gelu_mul, {"x": X, "y": X}),
}
arguments = pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, shapes) in ALL.items() for argument in shapes],
)


def call_with(name: str, argument: str, value: Any) -> Tensor:
    """The function with good arguments but for one."""
    function, shapes = ALL[name]
    return function(**{k: torch.randn(s) for k, s in shapes.items()} | {argument: value})


@arguments
def test_not_a_tensor(name: str, argument: str) -> None:
    bad: tuple[Any, ...] = ([1.0] * 36, 3, "x")
    if argument not in ("weight", "bias", "residual"):
        bad = (*bad, None)
    for value in bad:
        with pytest.raises(TypeError, match=rf"^{argument} is \w+, but must be a torch.Tensor"):
            call_with(name, argument, value)


@arguments
@pytest.mark.parametrize(
    "bad",
    [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_wrong_dtype(name: str, argument: str, bad: torch.dtype) -> None:
    shape = ALL[name][1][argument]
    with pytest.raises(TypeError, match=rf"^{argument} is {bad}, but must be float32, bfloat16"):
        call_with(name, argument, torch.zeros(shape, dtype=bad))


@arguments
def test_sparse(name: str, argument: str) -> None:
    shape = ALL[name][1][argument]
    with pytest.raises(
        TypeError, match=rf"^{argument} has layout torch.sparse_coo, but must be dense"
    ):
        call_with(name, argument, torch.ones(shape).to_sparse())


@arguments
def test_another_device(name: str, argument: str) -> None:
    """No GPU is needed to hold a tensor that says it is on one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensor = torch.empty(ALL[name][1][argument], device="cuda")
    with pytest.raises(
        ValueError, match=rf"^{argument} is on cuda:0, but lmfuse computes on the CPU"
    ):
        call_with(name, argument, tensor)


@arguments
def test_meta_beside_real(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=r"is on (meta|cpu), but \w+ is on (meta|cpu)"):
        call_with(name, argument, torch.empty(ALL[name][1][argument], device="meta"))


@arguments
def test_wrong_shape(name: str, argument: str) -> None:
    for wrong in ((3, 35), (3, 37), (35,), (37,), (1, 36), (36, 3), (3, 1, 36), ()):
        if wrong == ALL[name][1][argument]:
            continue
        if argument == "hidden_states" and wrong[-1:] == W:
            continue  # any number of rows
        others = "|".join(ALL[name][1])
        with pytest.raises(
            ValueError, match=rf"^({others}) has (shape|no dimension).*but must have"
        ):
            call_with(name, argument, torch.zeros(wrong))


@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm", "silu_mul", "gelu_mul"])
def test_two_dtypes(name: str) -> None:
    argument = "residual" if name.startswith("add") else "y"
    with pytest.raises(
        TypeError, match=rf"^{argument} is torch.bfloat16, but must be torch.float32"
    ):
        call_with(name, argument, torch.zeros(X, dtype=BF16))


@pytest.mark.parametrize("add", ADD.values())
def test_residual_that_cannot_be_written(add: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 36)
    for residual, reason in (
        (torch.zeros(36).expand(3, 36), "several of its elements share memory"),
        (torch.zeros(99).as_strided((3, 36), (7, 1)), "several of its elements share memory"),
        (torch.zeros(36, 3).t(), "last dimension must be contiguous"),
    ):
        with pytest.raises(ValueError, match=rf"^residual is written in place, .*{reason}"):
            add(residual, x, None, None, add_back=True)
        assert not residual.any()


def test_bias_of_rms_norm() -> None:
    with pytest.raises(ValueError, match=r"^bias must be None"):
        functional.add_rms_norm(torch.zeros(X), torch.zeros(X), None, torch.zeros(W))


def test_approximate() -> None:
    with pytest.raises(ValueError, match=r'^approximate is \'erf\', but must be "none" or "tanh"'):
        functional.gelu_mul(torch.zeros(X), torch.zeros(X), approximate="erf")


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_out_of_another_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"^out has shape"):
        call_with(name, "out", torch.zeros(3, 35))
    with pytest.raises(TypeError, match=r"^out is torch.bfloat16"):
        call_with(name, "out", torch.zeros(X, dtype=BF16))
    with pytest.raises(TypeError, match=r"^out is list"):
        call_with(name, "out", [0.0])


def test_fast_layer_norm_shapes() -> None:
    x, w = torch.randn(2, 3, 4), torch.randn(3, 4)
    y = functional.fast_layer_norm(x, (3, 4), w, w)
    torch.testing.assert_close(y, nn.functional.layer_norm(x, (3, 4), w, w))
    for shape in ((), (4, 3), (5,), (1, 2, 3, 4)):
        with pytest.raises(
            ValueError, match=r"hidden_states has shape \(2, 3, 4\), which does not end"
        ):
            functional.fast_layer_norm(x, shape, None, None)
    with pytest.raises(ValueError, match=r"^weight has shape \(12,\)"):
        functional.fast_layer_norm(x, (3, 4), w.flatten(), None)
    with pytest.raises(ValueError, match=r"^bias has shape \(4,\)"):
        functional.fast_layer_norm(x, (3, 4), w, w[0])
    for value in ([1.0], None):
        with pytest.raises(TypeError, match=r"^hidden_states is"):
            functional.fast_layer_norm(value, 4, None, None)  # type: ignore[arg-type]


def test_too_many_dimensions() -> None:
    x = torch.randn(36).reshape([1] * 64 + [36])
    with pytest.raises(ValueError, match="65 dimensions, but may have at most 64"):
        functional.rms_norm(x, None)
    assert functional.rms_norm(x[0], None).dim() == 64


def test_residual_with_too_many_strides() -> None:
    shape = (*[2] * 7, 4)
    strides = (*(4 * 3**i for i in reversed(range(1, 8))), 1)
    residual = torch.zeros(4 * 3**8).as_strided(shape, strides)
    with pytest.raises(ValueError, match=r"^residual is written in place, .* at most 6 strides"):
        functional.add_rms_norm(residual, torch.ones(shape), None, add_back=True)
    assert not residual.any()
