"""Loads the compiled library, which registers `torch.ops.lmfuse.*`, and calls its ops.

`functional/` is the only caller. What every op shares is here: value errors that only the data can
tell come back as `ValueError`, and a backward that reaches an op is refused in words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_spec = find_spec("lmfuse._lmfuse")
if _spec is None or _spec.origin is None:
    raise ImportError(
        "lmfuse was installed without its compiled library; install it again with pip"
    )
torch.ops.load_library(_spec.origin)  # type: ignore[no-untyped-call]

ops: Any = torch.ops.lmfuse
Op = Callable[..., Any]

_VALUE = "lmfuse: [value]"


def register_fake(name: str) -> Callable[[Op], Op]:
    """Registers what shapes and strides `torch.ops.lmfuse.<name>` returns, for tracing.

    A call that mixes real and meta tensors arrives here too, and would come back unwritten.
    """

    def register(fake: Op) -> Op:
        @wraps(fake)
        def checked(*args: Any) -> Any:
            _one_device(getattr(ops, name).default, args)
            return fake(*args)

        torch.library.register_fake(f"lmfuse::{name}", checked)
        return fake

    return register


def _one_device(op: Any, args: tuple[Any, ...]) -> None:
    tensors = _tensors(op, args)
    for name, value in tensors[1:]:
        first, like = tensors[0]
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, but {first} is on {like.device}")


def call(op: Op, *args: Any, written: tuple[int, ...] = (), check: Op | None = None) -> Any:
    """`op(*args)`

    Args:
        op: checks what it needs before it touches memory, but can only throw RuntimeError.
        written: which arguments, by position, the op changes in place.
        check: called with `args` after op refused them: raises what names the argument. So a call
            that is right pays nothing for it (0.5 us); op's fake calls it for those who trace.

    Raises:
        ValueError: the data of an argument are out of range.
        RuntimeError: later, from a backward that reaches the result.
    """
    if not torch.is_grad_enabled():  # 40 ns; the rest costs only those who did not say no_grad
        try:
            result = op(*args)
        except Exception as error:
            raise _translated(error, op, args, check) from None
        for place in written:  # what is written below the dispatcher does not count by itself
            _count_write(args[place])
        return result
    return _call_in_grad_mode(op, args, written, check)


def _count_write(x: Tensor) -> None:
    if not torch.compiler.is_compiling() and not x.is_inference():
        increment_version(x)


def _translated(error: Exception, op: Any, args: tuple[Any, ...], check: Op | None) -> Exception:
    text = str(error)
    if check is not None:
        check(*args)
    if _VALUE in text:
        return ValueError(text.split(_VALUE, 1)[1].split("\n", 1)[0].strip())
    if "Expected a value of type" in text:  # the dispatcher's words, which name the argument
        return TypeError(text.split("\n", 1)[0])
    for name, value in _tensors(op, args):
        dense(name, value)
    for argument, value in zip(op._schema.arguments, args, strict=False):
        # Which torch resolves, but cannot write for an op without results.
        if argument.is_write and isinstance(value, Tensor) and value.is_neg():
            return ValueError(f"{argument.name} is written in place, but is a view that negates")
    return error


def dense(name: str, x: Tensor) -> None:
    """Raises unless the elements of `x` lie in memory, at strides."""
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor, but must be dense")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}, but must be dense")


def _tensors(op: Any, args: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    pairs = zip(op._schema.arguments, args, strict=False)
    return [(argument.name, value) for argument, value in pairs if isinstance(value, Tensor)]


def _call_in_grad_mode(
    op: Any, args: tuple[Any, ...], written: tuple[int, ...], check: Op | None
) -> Any:
    needs_grad = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    try:
        if not needs_grad:
            return op(*args)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return _hooked(op, op(*args))
        # The function works on copies of what the op writes, so that autograd sees the writing.
        # Dynamo wants each input once: of a tensor that comes again, a view.
        apart = (
            a.view_as(a) if isinstance(a, Tensor) and any(a is b for b in args[:i]) else a
            for i, a in enumerate(args)
        )
        returned = _NoBackward.apply(op, written, *apart)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise _translated(error, op, args, check) from None
    count = len(returned) - len(written)
    for place, value in zip(written, returned[count:], strict=True):
        try:
            args[place].copy_(value)
        except RuntimeError as error:
            raise _unwritable(op._schema.arguments[place].name, error) from None
    results = returned[:count]
    return results[0] if count == 1 else results or None


def write(name: str, to: Tensor, value: Tensor) -> None:
    """Copies `value` to the argument `name`, if autograd lets it be written in place."""
    try:
        to.copy_(value)
    except RuntimeError as error:
        raise _unwritable(name, error) from None


def _unwritable(name: str, error: RuntimeError) -> ValueError:
    return ValueError(f"{name} is written in place, but {error}")


def _name(op: Op) -> str:
    return str(op).removesuffix(".default")


def _refusal(name: str) -> str:
    return (
        f"{name} has no backward: lmfuse is for inference. Run the forward under torch.no_grad() "
        "or torch.inference_mode(), or train with the stock modules (lmfuse.restore(model))."
    )


def _hooked(op: Op, result: Any) -> Any:
    """For torch.jit.trace, whose graph can hold an op but no autograd.Function."""

    def refuse(_: Tensor) -> None:
        raise RuntimeError(_refusal(_name(op)))

    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(refuse)  # type: ignore[no-untyped-call]
    return result


# torch.compile traces the backward together with the forward, so refusing must wait until the
# backward runs: an op that raises then.
torch.library.define("lmfuse::refuse_backward", "(Tensor grad, str name) -> Tensor")


@torch.library.impl("lmfuse::refuse_backward", "CompositeExplicitAutograd")
def _refuse_backward(grad: Tensor, name: str) -> Tensor:
    raise RuntimeError(_refusal(name))


@register_fake("refuse_backward")
def _(grad: Tensor, name: str) -> Tensor:
    return torch.empty_like(grad)


class _NoBackward(torch.autograd.Function):
    """`op` on `args`, copies of the `written` ones; returns the results, then the copies."""

    @staticmethod
    def forward(ctx: Any, op: Op, written: tuple[int, ...], *args: Any) -> tuple[Tensor, ...]:
        ctx.name = _name(op)
        ctx.shapes = [
            (a.shape, a.dtype, a.device) if isinstance(a, Tensor) and a.requires_grad else None
            for a in args
        ]
        copies = {i: args[i].clone() for i in written}
        result = op(*(copies.get(i, a) for i, a in enumerate(args)))
        if result is None:
            result = ()
        elif isinstance(result, Tensor):
            result = (result,)
        return (*result, *copies.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refused = ops.refuse_backward(grads[0], ctx.name)
        zero = refused.sum() * 0
        return (
            None,
            None,
            *(s and zero.to(s[1]).expand(s[0]) for s in ctx.shapes),
        )
