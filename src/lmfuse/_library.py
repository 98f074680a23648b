"""Loads the compiled library, which registers `torch.ops.lmfuse.*`, and calls its ops.

`functional/` is the only caller. What every op shares is here: value errors that only the data can
tell come back as `ValueError`, and a backward that reaches an op is refused in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

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
    """Registers what shapes and strides `torch.ops.lmfuse.<name>` returns, for tracing."""
    return cast(Callable[[Op], Op], torch.library.register_fake(f"lmfuse::{name}"))


def call(op: Op, *args: Any, written: Iterable[Tensor] = ()) -> Any:
    """`op(*args)`; `written` are the arguments that the op changes in place.

    Raises:
        ValueError: the data of an argument are out of range.
        RuntimeError: later, from a backward that reaches the result.
    """
    if not torch.is_grad_enabled():  # 40 ns; the rest costs only those who did not say no_grad
        try:
            return op(*args)
        except RuntimeError as error:
            raise _translated(error) from None
    return _call_in_grad_mode(op, args, written)


def _translated(error: RuntimeError) -> Exception:
    text = str(error)
    if _VALUE not in text:
        return error
    return ValueError(text.split(_VALUE, 1)[1].split("\n", 1)[0].strip())


def _call_in_grad_mode(op: Op, args: tuple[Any, ...], written: Iterable[Tensor]) -> Any:
    needs_grad = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if needs_grad and torch.compiler.is_compiling() and not written:
        return _NoBackward.apply(op, *args)  # type: ignore[no-untyped-call]
    try:
        result = op(*args)
    except RuntimeError as error:
        raise _translated(error) from None
    if needs_grad and not torch.compiler.is_compiling():
        results = result if isinstance(result, (tuple, list)) else (result,)
        for tensor in (*results, *written):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(_refuser(_name(op)))  # type: ignore[no-untyped-call]
    return result


def _name(op: Op) -> str:
    return str(op).removesuffix(".default")


def _refusal(name: str) -> str:
    return (
        f"{name} has no backward: lmfuse is for inference. Run the forward under torch.no_grad() "
        "or torch.inference_mode(), or train with the stock modules (lmfuse.restore(model))."
    )


def _refuser(name: str) -> Callable[[Tensor], None]:
    def refuse(_: Tensor) -> None:
        raise RuntimeError(_refusal(name))

    return refuse


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
    @staticmethod
    def forward(ctx: Any, op: Op, *args: Any) -> Any:
        ctx.name = _name(op)
        ctx.shapes = [
            (a.shape, a.dtype, a.device) if isinstance(a, Tensor) and a.requires_grad else None
            for a in args
        ]
        return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refused = ops.refuse_backward(grads[0], ctx.name)
        zero = refused.sum() * 0
        return (
            None,
            *(s and zero.to(s[1]).expand(s[0]) for s in ctx.shapes),
        )
